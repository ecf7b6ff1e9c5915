"""Every sentence of a card is true of the run that it is about, whatever its configuration."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from scipy import stats

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.configuration import variant_name
from localist_hf.evaluation import measure, measure_controls
from localist_hf.hub import RunRecord, card_files


IN_BLOCK = "goes to the token's own block; of all"
CONTEXT = "Training asked for at least 90% of the attention that a token pays to other words to go to the block of the "
CONTEXT += "text that the token stands in, in each layer to the degree of its lambda (lambda = 0, 0.0041, 0.13, 1)."
# By case: what is set in the configuration and for the training, what the card must say, and what it must not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = {
    "context": (
        {},
        {},
        [
            CONTEXT,
            IN_BLOCK,
            "of the attention that goes to other words (not the token itself), the share that goes to the token's own ",
            "a token that looks at itself and nowhere else has phi 1.",
            "elsewhere than to their block, and `min_fidelity`",
            "Locality loss**: on context fidelity (psi), target 0.9, weight 5",
            "at dial 1 a layer with lambda = 1 attends to nothing else",
            "before a token's own are local too (in the tables above 0)",
        ],
        ["first token", "first 1", "(*sink*)", "or the one before it", "fidelity (phi), target"],
    ),
    "fidelity": (
        {},
        {"locality_objective": "fidelity", "target_fidelity": 0.575},
        [
            "asked for at least 57.5% of a token's attention to go to the block of the text that it stands in, itself "
            "included, in each layer",
            "Locality loss**: on fidelity (phi), target 0.575",
        ],
        ["asked for at least 57.5% of the attention that a token pays"],
    ),
    "sinks": (
        {"num_sink_tokens": 3},
        {},
        [
            "that a token pays to other words (neither the token itself nor the first 3 tokens) to go to",
            "to the token itself, to the first 3 tokens (*sink*), to other words in",
            "goes to other words (neither the token itself nor the first 3 tokens), the share",
            "a token that looks at itself, or at the first 3 tokens, and nowhere else has phi 1",
            "attention on the token itself or on the first 3 tokens counts as local",
            "tokens that see more than their block and the first 3 tokens",
            "elsewhere than to their block and the first 3 tokens, and",
            "nothing to see for a token but itself and the first 3 tokens",
            "; the first 3 tokens of a text count as local everywhere.",
            "*self*, *sink*: the share of all attention that goes to the token itself, and to the first 3 tokens",
        ],
        [],
    ),
    "one sink, fidelity": (
        {"num_sink_tokens": 1},
        {"locality_objective": "fidelity"},
        [
            "to go to the block of the text that it stands in or the first token, itself included",
            "; the first token of a text counts as local everywhere.",
        ],
        ["first 1 token"],
    ),
    "previous block": (
        {"num_previous_blocks": 1},
        {},
        [
            "to go to the block of the text that the token stands in or the one before it, in each",
            "goes to the token's own block or the one before it; of all",
            "tokens that see more than their block and the one before it.",
            "; the block before a token's own counts as local too.",
            "before a token's own are local too (in the tables above 1)",
        ],
        [],
    ),
    "previous blocks, sink": (
        {"num_previous_blocks": 2, "num_sink_tokens": 1, "max_block_length": 4},
        {},
        [
            "goes to the token's own block or the 2 before it; of all",
            "see more than their block, the 2 before it and the first token.",
            "; the 2 blocks before a token's own count as local too; the first token of a text counts",
        ],
        [],
    ),
    "a list that does not rise": (
        {"locality_schedule": [0.0, 1.0, 0.0002, 0.0]},
        {},
        [
            "under the custom configuration of",
            "(lambda = 0, 1, 0.0002, 0)",  # low, and not none
            "| 2     | 0.0002 |",
            "Of the attention that layer 1 pays to other words",
            "measured in layer 1:",
            "layer = 1  # layer 1\n",
            "in layer 1 on the same text: on the model's own blocks (those of its last\nlayer)",
        ],
        ["that the last layer pays", "late layers"],
    ),
    "low lambdas": (
        {"locality_schedule": [0.0, 0.0, 0.001, 0.002]},
        {},
        ["(lambda = 0, 0, 0.001, 0.002)", "multiplied by 1 - *d* lambda of the layer and all are renormalised;"],
        ["attends to nothing else"],
    ),
    "windows": (
        {"block_partition": "window"},
        {},
        [
            "blocks of 7 tokens each, whatever the text says",
            "The blocks do not depend on the text, so psi says how near a token looks",
        ],
        ["model finds", "Laid over this text"],
    ),
    "windows of one token": (
        {"block_partition": "window", "window_length": 1},
        {},
        ["0.0% goes to the token's own block", "blocks of 1 token each"],
        [],
    ),
    "delimiters": (
        {"block_partition": "delimiter"},
        {},
        ["blocks of 3 to 12 tokens that end at given tokens"],
        ["model finds"],
    ),
    "one layer": (
        {"n_layer": 1},
        {},
        [
            "the token stands in, in its only layer (lambda = 1).",
            "Of the attention that the only layer pays to other words",
            "of all the only layer's attention other words get",
            "GPT-2 (1 layer, width 32, 4 heads",
            "With its layer held wholly inside the blocks",
        ],
        ["the last layer", "lower", "all layers"],
    ),
    "no locality": (
        {"locality_schedule": [0.0] * 4},
        {},
        ["Its attention is free in every layer, to be compared with.", "so a dial has nothing to turn down"],
        ["locality_dial", "- **Locality loss**", "from dial 0 to dial 1", "Training asked"],
    ),
    "weight 0": (
        {},
        {"locality_weight": 0.0},
        ["Training left its attention free; the schedule (lambda = 0, 0.0041, 0.13, 1) is that of the dial."],
        ["Training asked"],
    ),
    "contrast": (
        {},
        {"locality_objective": "contrast"},
        [
            "to go to the block of the text that the token stands in, and for less of it where these blocks are moved "
            "along the text, in each layer to the degree of its lambda",
            "on context fidelity (psi) and its distance from that on moved blocks, target 0.9",
        ],
        [],
    ),
    "weight 0 at dial 1": (
        {"locality_dial": 1.0},
        {"locality_weight": 0.0},
        [
            "Training held its attention with `locality_dial` at 1 (lambda = 0, 0.0041, 0.13, 1), and asked for "
            "nothing beyond that."
        ],
        ["Training asked", "left its attention free"],
    ),
    "the loss at dial 0.5": (
        {"locality_dial": 0.5},
        {},
        ["(lambda = 0, 0.0041, 0.13, 1), with `locality_dial` at 0.5 all the while."],
        [],
    ),
    "not trained": (
        {},
        {"steps": 0},
        [
            "with the weights of base, measured on the book of sentences under the `quintic` configuration of",
            "It was not trained for it; the schedule (lambda = 0, 0.0041, 0.13, 1) is that of the dial.",
        ],
        ["fine-tuned", "Training asked"],
    ),
    "blocks longer than the text": (
        {"min_block_length": 50, "max_block_length": 64},
        {},
        [
            "Nothing can be said of where the last layer looks, since no token sees more than their block.",
            "A dash stands where there is nothing to measure",
            "On the blocks of another text psi is not defined here",
        ],
        ["% goes to"],
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has no others beside it."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def measured(make_config: Callable, texts: Dataset) -> Callable[[dict[str, Any]], tuple]:
    """The configuration with these settings, what a random model of it measures, and its controls; each once."""
    known = {}

    def found(settings: dict[str, Any]) -> tuple:
        key = repr(settings)
        if key not in known:
            torch.manual_seed(0)
            model = LocalistGPT2LMHeadModel(make_config(**settings))
            known[key] = model.config, measure(model, texts).metrics, measure_controls(model, texts, dials=(0, 0.5, 1))
        return known[key]

    return found


@pytest.fixture(scope="module")
def controlled(family: Path, texts: Dataset) -> RunRecord:
    """The record of the family's quintic run with its controls; not to be changed."""
    model = LocalistGPT2LMHeadModel.from_pretrained(family / "quintic")
    controls = measure_controls(model, texts, dials=(0, 0.5, 1))
    return RunRecord.load(family / "quintic").with_measurements(controls=controls)


@pytest.fixture(scope="module")
def texts() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(2, 97, (3, 40), generator=generator).tolist()})


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "code", text, flags=re.DOTALL)


def rows(text: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose head has this title first, by their own first cell and the second."""
    table = text[text.index(f"\n| {first}") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()]
    return {" ".join(row[:2]): row for row in cells}


@pytest.mark.parametrize("case", CASES)
def test_the_card_says_what_is_so(family: Path, measured: Callable, folder: Path, case: str) -> None:
    settings, training, said, unsaid = CASES[case]
    config, metrics, controls = measured(settings)
    record = RunRecord.load(family / "quintic")
    record = replace(
        record,
        variant=variant_name(config),
        name="mine",
        config=record.config | {name: getattr(config, name) for name in settings},
        training=record.training | training,
        metrics=metrics,
    ).with_measurements(controls=controls)
    record.save(folder)
    text = ModelCard(card_files(folder)["README.md"].decode()).text

    flat = re.sub(r"\s+", " ", text)
    for phrase in said:
        assert phrase in text or re.sub(r"\s+", " ", phrase) in flat, phrase
    for phrase in unsaid:
        assert phrase not in flat, phrase
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\}\}|\{%|\n\n\n\n", prose(text))
    if not config.num_sink_tokens:
        assert "sink" not in prose(text)

    # The numbers are the record's.
    lambdas = record.lambdas
    layer = max(range(len(lambdas)), key=lambda layer: (lambdas[layer], layer))
    psi, share, own, keys = (
        record.metrics[f"{name}_layer_{layer}"]
        for name in ("context_fidelity", "context_share", "self_share", "visible_keys")
    )
    if not math.isnan(psi):
        assert f"pays to other words, {psi:.1%} goes to" in flat
        assert f"attention other words get {share:.1%}, the token itself {own:.1%}" in flat
        row = next(row for name, row in rows(text, "configuration").items() if name.startswith("**mine**"))
        assert row[2:4] == [f"{psi:.2f}", f"{share:.2f}"]
        assert row[-2] == f"{keys:.1f}"
    # What is said of other blocks is what the table shows.
    controls = text[text.index("### Controls") :]
    row = rows(controls, "configuration")[f"**mine** {config.num_previous_blocks}"]
    if config.block_partition != "window" and row[4] != "-":
        apart = float(row[4]) - float(row[5])
        assert f"of another one get psi {row[5]} where its own get {row[4]}" in flat
        assert (f"at most the {apart:.2f} between them" in flat) == (apart > 0)
        assert ("nothing about where this text's blocks begin." in flat) == (apart <= 0)
    dials = rows(controls, "configuration").keys() | rows(text[text.index("What it costs") :], "configuration").keys()
    assert any(name.startswith(f"**mine** {record.controls['perplexity']:.2f}") for name in dials)


def test_attention_that_goes_to_no_other_word_has_no_psi(family: Path, folder: Path) -> None:
    record = RunRecord.load(family / "quintic")
    shares = {"context_fidelity": math.nan, "context_share": 0.0, "block_share": 0.0, "outside_share": 0.0}
    metrics = record.metrics | {f"{name}_layer_3": value for name, value in (shares | {"self_share": 1.0}).items()}
    replace(record, metrics=metrics).save(folder)
    text = ModelCard(card_files(folder)["README.md"].decode()).text
    assert "Of all the last layer's attention other words get 0.0%, the token itself 100.0%." in text
    assert re.search(r"\| - +\| 0\.00 +\| 1\.00 \|", text)
    assert "A dash stands where there is nothing to measure: no attention goes to other words" in text
    # Overall there is some.
    metrics = metrics | {"context_fidelity": math.nan, "context_share": 0.0}
    replace(record, metrics=metrics).save(folder)
    assert "context_fidelity" not in card_files(folder)["README.md"].decode()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (0.25, "the blocks of another one get psi 0.25 where its own get 0.75: at most the 0.50 between them is about"),
        (0.75, "get psi 0.75 where its own get 0.75: psi says here how near a token looks, and nothing about where"),
        (0.751, "get psi 0.75 where its own get 0.75: psi says here how near a token looks, and nothing about where"),
    ],
)
def test_other_blocks_are_judged_by_what_the_page_shows(
    controlled: RunRecord, folder: Path, wrong: float, said: str
) -> None:
    record = copy.deepcopy(controlled)
    blocks = record.controls["blocks"][0]
    blocks["own"]["context_fidelity"][-1], blocks["wrong"]["context_fidelity"][-1] = 0.75, wrong
    record.save(folder)
    assert said in card_files(folder)["README.md"].decode()


@pytest.mark.parametrize(
    ("wrongs", "said"),
    [
        (
            (0.70, 0.71, 0.69),
            "get psi 0.70 where its own get 0.75 (means over 3 seeds, 0.05 ± 0.02 apart): at most that",
        ),
        (
            (0.60, 0.73, 0.77),
            "get psi 0.70 where its own get 0.75 (means over 3 seeds, 0.05 ± 0.22 apart): not more than",
        ),
    ],
)
def test_controls_of_several_seeds_have_intervals(
    controlled: RunRecord, tmp_path: Path, wrongs: tuple[float, ...], said: str
) -> None:
    for seed, wrong in enumerate(wrongs):
        (tmp_path / f"seed{seed}").mkdir()
        controls = copy.deepcopy(controlled.controls)
        blocks = controls["blocks"][0]
        blocks["own"]["context_fidelity"][-1], blocks["wrong"]["context_fidelity"][-1] = 0.75, wrong
        controls |= {"perplexity": 20.0, "self_only_perplexity": 30.0 + seed, "all_local_perplexity": 24.0 + seed}
        controls["dials"][-1]["perplexity"] = 21.0 + seed
        replace(controlled, seed=seed, controls=controls).save(tmp_path / f"seed{seed}")
    text = card_files(tmp_path / "seed2")["README.md"].decode()
    assert said in text
    # 4.303 standard errors: of psi those of the wrong blocks above, of ratios a deviation of 1 / 20.
    half = stats.t.ppf(0.975, 2) * stats.sem(wrongs)
    assert re.search(rf"\| 0\.75 ± 0\.00 +\| 0\.70 ± {half:.2f} ", text)
    half = f"{stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3):.3f}"
    assert re.search(rf"\| 20\.00 ± 0\.00 +\| 1\.100 ± {half} +\| 1\.550 ± {half} +\| 1\.250 ± {half} ", text)
    assert "held wholly inside the blocks, none before them, the perplexity is 1.250 times that at dial 0" in text
    assert text.count("means over the seeds ± half of the 95 % interval") == 2


def test_without_controls_nothing_is_said_of_them(family: Path) -> None:
    text = card_files(family / "quintic")["README.md"].decode()
    assert "### Controls" not in text
    assert "psi was not measured on the blocks of another text" in text


def test_a_run_of_several_parts_was_asked_in_the_last(family: Path, folder: Path) -> None:
    record = RunRecord.load(family / "quintic")
    part = {"steps": 5, "planned_steps": 9, "seed": 3, "variant": None, "locality": None, "training": None}
    replace(record, earlier_parts=[part], training=record.training | {"steps": 6}).save(folder)
    assert "The last part of the training asked for at least 90%" in card_files(folder)["README.md"].decode()
