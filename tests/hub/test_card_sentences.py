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

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.configuration import variant_name
from localist_hf.evaluation import measure, measure_controls
from localist_hf.hub import RunRecord, card_files


# By case: what is set in the configuration and for the training, what the card must say, and what it must not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = {
    "context": (
        {},
        {},
        [
            "% goes to the token's own block.",
            "the attention to *other words* (not the token itself) that goes to the token's own block, as the model",
            "to all but their block; 0",
            "lambda = 0, 0.0041, 0.13, 1; semantic blocks of 3 to 12 tokens.",
            "Locality loss**: on context fidelity (psi), target 0.9, weight 5, exponent 1.",
            "on the token itself, on other words in its block, elsewhere]",
        ],
        ["first token", "first 1", "(sink)", "or the one before it", "fidelity (phi), target", "warm-up over 0"],
    ),
    "fidelity": (
        {},
        {"locality_objective": "fidelity", "target_fidelity": 0.575},
        ["Locality loss**: on fidelity (phi), target 0.575"],
        ["on context fidelity"],
    ),
    "held and taught": (
        {},
        {"training_dials": [1], "distillation_weight": 0.9, "locality_weight": 0},
        [
            "Trained at dial 1, taught by its own earlier predictions at dial 0: use it there (perplexity ",
            " at dial 0, ",
            ", KL from its own earlier predictions at dial 0 weighing 0.9 beside the loss.",
            "Locality loss**: none.",
        ],
        ["dials 1", "budget"],
    ),
    "another teacher": (
        {},
        {"training_dials": [1], "distillation_weight": 0.9, "has_other_teacher": True},
        ["Trained at dial 1, taught by another model: use it there", ", KL from another model weighing 0.9"],
        ["its own earlier"],
    ),
    "both ends": (
        {},
        {"training_dials": [0, 1], "max_loss_increase": 0.01},
        [
            "Trained at dials 0 and 1: use it there (perplexity ",
            "target 0.9, within a budget of 0.01 nats of KL from its own earlier predictions at dial 0, exponent 1.",
        ],
        ["taught by", "weighing", "weight 5"],
    ),
    "sinks": (
        {"num_sink_tokens": 3},
        {},
        [
            "*other words* (neither the token itself nor the first 3 tokens) that goes to",
            "on the token itself, on the first 3 tokens (sink), on other words in",
            "tokens that see more than their block and the first 3 tokens: *psi*",
            "to all but their block and the first 3 tokens; 0",
            "nothing to see for a token but itself and the first 3 tokens",
            "; the first 3 tokens of a text count as local everywhere.",
        ],
        [],
    ),
    "one sink": (
        {"num_sink_tokens": 1},
        {},
        ["; the first token of a text counts as local everywhere."],
        ["first 1 token"],
    ),
    "previous block": (
        {"num_previous_blocks": 1},
        {},
        [
            "goes to the token's own block or the one before it.",
            "tokens that see more than their block and the one before it: *psi*",
            "; the block before a token's own counts as local too.",
        ],
        [],
    ),
    "previous blocks, sink": (
        {"num_previous_blocks": 2, "num_sink_tokens": 1, "max_block_length": 4},
        {},
        [
            "goes to the token's own block or the 2 before it.",
            "see more than their block, the 2 before it and the first token: *psi*",
            "; the 2 blocks before a token's own count as local too; the first token of a text counts",
        ],
        [],
    ),
    "a list that does not rise": (
        {"locality_schedule": [0.0, 1.0, 0.0002, 0.0]},
        {},
        [
            "under the custom configuration of",
            "lambda = 0, 1, 0.0002, 0;",  # low, and not none
            "Of the attention that layer 1 pays to other words",
            "Of layer 1, over tokens",
            "layer = 1  # layer 1\n",
        ],
        ["that the last layer pays", "late layers"],
    ),
    "low lambdas": ({"locality_schedule": [0.0, 0.0, 0.001, 0.002]}, {}, ["lambda = 0, 0, 0.001, 0.002;"], []),
    "windows": (
        {"block_partition": "window"},
        {},
        [
            "blocks of 7 tokens each, whatever the text says",
            "The blocks do not depend on the text, so psi says how near a token looks",
        ],
        ["model finds", "On another text's blocks"],
    ),
    "windows of one token": (
        {"block_partition": "window", "window_length": 1},
        {},
        ["0% goes to the token's own block", "blocks of 1 token each"],
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
            "Of the attention that the only layer pays to other words",
            "GPT-2 (1 layer, width 32, 4 heads",
            "with its layer held inside the blocks",
        ],
        ["the last layer", "lower", "all layers"],
    ),
    "no locality": (
        {"locality_schedule": [0.0] * 4},
        {},
        ["so a dial has nothing to turn down"],
        ["locality_dial", "- **Locality loss**", "at dial 1"],
    ),
    "weight 0": ({}, {"locality_weight": 0.0}, ["- **Locality loss**: none."], []),
    "contrast": (
        {},
        {"locality_objective": "contrast"},
        ["on context fidelity (psi) and its distance from that on moved blocks, target 0.9"],
        [],
    ),
    "choice": (
        {},
        {"locality_objective": "choice", "target_blocks": 1.5},
        ["on attention to other words in no more than 1.5 blocks, weight 5, exponent 1"],
        ["target 0.9", "psi), target"],
    ),
    "weight 0 at dial 1": (
        {"locality_dial": 1.0},
        {"locality_weight": 0.0},
        ["- **Locality loss**: none.", "`locality_dial` of this model is 1.0; so it was in evaluation."],
        [],
    ),
    "warm-up": ({}, {"locality_warmup_steps": 7}, ["weight 5, exponent 1, warm-up over 7 steps."], []),
    "not trained": (
        {},
        {"steps": 0},
        ["with the weights of base, measured on the book of sentences under the `quintic` configuration of"],
        ["fine-tuned"],
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
    psi, share, keys = (
        record.metrics[f"{name}_layer_{layer}"] for name in ("context_fidelity", "context_share", "visible_keys")
    )
    is_held = record.training.get("training_dials") == [1]
    if is_held:
        at_1 = next(each["perplexity"] for each in record.controls["dials"] if each["dial"] == 1)
        assert f"by the schedule, perplexity is {at_1:.2f}." in flat
        row = next(row for name, row in rows(text, "configuration").items() if name.startswith("**mine**"))
        assert row[2:] == [f"{at_1:.2f}", f"{keys:.1f}"]
        assert "*psi*" not in prose(text)
    elif not math.isnan(psi):
        assert f"pays to other words, {psi:.0%} goes to" in flat
        row = next(row for name, row in rows(text, "configuration").items() if name.startswith("**mine**"))
        blocks, top = (record.metrics[f"{name}_layer_{layer}"] for name in ("blocks_looked_at", "top_block_share"))
        assert row[2:] == [f"{psi:.2f}", f"{share:.2f}", f"{keys:.1f}", f"{blocks:.1f}", f"{top:.2f}"]
    of_blocks = next(
        each for each in record.controls["blocks"] if each["num_previous_blocks"] == config.num_previous_blocks
    )
    own, wrong = (
        of_blocks[kind]["context_fidelity"][record.controls["layers"].index(layer)] for kind in ("own", "wrong")
    )
    if config.block_partition != "window" and own is not None and not is_held:
        apart = float(f"{own:.2f}") - float(f"{wrong:.2f}")
        assert f"On another text's blocks psi is {wrong:.2f}, on its own {own:.2f}" in flat
        assert (f"at most the {apart:.2f} between them" in flat) == (apart > 0)
        assert ("nothing about where this text's blocks begin." in flat) == (apart <= 0)
    ratios = {
        title: record.controls[f"{name}_perplexity"] / record.controls["perplexity"]
        for title, name in {"with all layers held": "all_local", "with nothing to see": "all_local_self_only"}.items()
        if record.num_layers > 1
    }
    for title, ratio in ratios.items():
        assert f"{ratio:.3f} {title}" in flat


def test_attention_that_goes_to_no_other_word_has_no_psi(family: Path, folder: Path) -> None:
    record = RunRecord.load(family / "quintic")
    shares = {"context_fidelity": math.nan, "context_share": 0.0, "block_share": 0.0, "outside_share": 0.0}
    metrics = record.metrics | {f"{name}_layer_3": value for name, value in (shares | {"self_share": 1.0}).items()}
    replace(record, metrics=metrics).save(folder)
    text = ModelCard(card_files(folder)["README.md"].decode()).text
    assert "The last layer pays no attention to other words." in text
    assert re.search(r"\| - \| 0\.00 \|", text)
    assert "A dash stands where there is nothing to measure." in text
    # Overall there is some.
    metrics = metrics | {"context_fidelity": math.nan, "context_share": 0.0}
    replace(record, metrics=metrics).save(folder)
    assert "context_fidelity" not in card_files(folder)["README.md"].decode()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (0.25, "psi is 0.25, on its own 0.75: at most the 0.50 between them is about"),
        (0.75, "psi is 0.75, on its own 0.75: psi says here how near a token looks, and nothing about where"),
        (0.751, "psi is 0.75, on its own 0.75: psi says here how near a token looks, and nothing about where"),
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
            "psi is 0.70, on its own 0.75 (means over 3 seeds, 0.05 ± 0.02 apart): at most that",
        ),
        (
            (0.60, 0.73, 0.77),
            "psi is 0.70, on its own 0.75 (means over 3 seeds, 0.05 ± 0.22 apart): not more than",
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
    assert "times that at dial 0: 1.100 at dial 1, 1.550 there with blocks of one token; 1.250 with all layers" in text


def test_without_controls_nothing_is_said_of_them(family: Path) -> None:
    text = card_files(family / "quintic")["README.md"].decode()
    assert "times that at dial 0" not in text
    assert "psi was not measured on the blocks of another text" in text


def test_a_bound_on_what_a_prediction_can_depend_on_is_stated(controlled: RunRecord, tmp_path: Path) -> None:
    for share, said in ((None, False), (0.234, True)):
        folder = tmp_path / str(share)
        folder.mkdir()
        replace(controlled, controls=controlled.controls | {"share_out_of_reach": share}).save(folder)
        text = card_files(folder)["README.md"].decode()
        flat = re.sub(r"\s+", " ", text)
        assert ("23 % of the tokens before a prediction, on average, cannot change it by a bit" in flat) == said
