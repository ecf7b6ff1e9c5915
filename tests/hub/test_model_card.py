"""The card holds the numbers of the records, valid metadata, and code that works as it stands."""

import ast
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from scipy import stats

import localist_hf
from localist_hf.hub import RunRecord, card_files, write_card
from localist_hf.hub.siblings import load_siblings


SECTIONS = ["Load it, read its attention", "Results"]
FOLDED = ["What it costs, and what this does not show", "Training, family, citation"]
METRICS = ("perplexity", "context_fidelity", "fidelity", "entropy")  # fmt: skip


def card(folder: Path, **arguments: str) -> ModelCard:
    return ModelCard(card_files(folder, **arguments)["README.md"].decode())


def copy_run(folder: Path, destination: Path, **changes: object) -> Path:
    """A run alone, without its siblings, its record changed."""
    copied = shutil.copytree(folder, destination / folder.name)
    replace(RunRecord.load(copied), **changes).save(copied)
    return copied


def code(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.mark.parametrize("name", ["base", "distributed", "quintic", "quintic-lora"])
def test_every_card_has_its_sections_code_and_repository(family: Path, name: str) -> None:
    found = card(family / name, repo_id="me/mine")
    assert re.findall(r"^## (.*)$", found.text, re.MULTILINE) == SECTIONS
    assert re.findall(r"^<details markdown><summary>(.*)</summary>\n\n", found.text, re.MULTILINE) == FOLDED
    assert found.text.count("\n\n</details>\n") == len(FOLDED)
    visible = re.sub(r"<details.*?</details>", "", found.text, flags=re.DOTALL)
    assert (
        len(re.findall(r"^\| ---", found.text, re.MULTILINE)) == len(re.findall(r"^\| ---", visible, re.MULTILINE)) == 1
    )
    assert visible.index("```python") < visible.index("| ---")  # how to load it, then what it does
    assert found.text.lstrip().startswith("# mine\n")
    for block in code(found):
        ast.parse(block)
    assert 'repo_id = "me/mine"' in code(found)[0] or 'repo_id, base_id = "me/mine"' in code(found)[0]
    assert "revision=revision" in code(found)[0]
    # Nothing that a template leaves where it has nothing to say.
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\}\}|\{%|\n\n\n\n", found.text)


def test_metadata_is_what_the_hub_understands(family: Path) -> None:
    data = card(family / "quintic").data
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "org/localist-gpt2-base"
    assert {"localist", "quintic"} <= set(data.tags)
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    metrics = RunRecord.load(family / "quintic").metrics
    assert name == "org/localist-gpt2-quintic"
    assert {result.metric_type: result.metric_value for result in results} == {
        metric: round(metrics[metric], 4) for metric in METRICS
    }
    assert {(result.dataset_name, result.dataset_split) for result in results} == {("book of sentences", "held-out")}
    assert data.datasets is None  # the text has no Hub id
    adapter = card(family / "quintic-lora").data
    assert (adapter.library_name, adapter.base_model) == ("peft", "org/localist-gpt2-base")
    assert "lora" in adapter.tags
    assert card(family / "base").data.base_model is None


def test_the_results_are_those_of_the_records(family: Path) -> None:
    text = card(family / "quintic").text
    runs = {name: RunRecord.load(family / name).metrics for name in ("distributed", "quintic", "quintic-seed1")}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = {row[0]: row for row in rows}
    assert list(table)[2:] == ["distributed", "linear", "quadratic", "cubic", "quartic", "**quintic**", "localist"]
    both = [runs[name]["perplexity"] for name in ("quintic", "quintic-seed1")]
    mean, half = table["**quintic**"][1].split(" ± ")
    assert float(mean) == pytest.approx(fmean(both), abs=0.006)
    # Of two values: t of one degree of freedom, and a standard error of half of their difference.
    assert float(half) == pytest.approx(stats.t.ppf(0.975, 1) * abs(both[0] - both[1]) / 2, abs=0.006)
    # Of the one seed that both have.
    assert table["**quintic**"][2] == f"{runs['quintic']['perplexity'] / runs['distributed']['perplexity']:.3f}"
    assert table["distributed"][1] == f"{runs['distributed']['perplexity']:.2f}"
    shown = ("context_fidelity", "context_share")
    for name, row in (("distributed", "distributed"), ("quintic", "**quintic**")):
        group = [runs[name]] if name == "distributed" else [runs[name], runs["quintic-seed1"]]
        cells = [f"{fmean(metrics[f'{metric}_layer_3'] for metrics in group):.2f}" for metric in shown]
        assert [f"{float(cell.split(' ')[0]):.2f}" for cell in table[row][3:5]] == cells
        assert table[row][5] == f"{fmean(metrics['visible_keys_layer_3'] for metrics in group):.1f}"
    assert "means over seeds 1, 42 ± half of the 95 % interval, weights of seed 42." in text
    assert "one run (seed 42), others means over seeds ± half" in card(family / "cubic").text
    # One seed of the baseline: there is nothing to pair.
    assert "In brackets" not in text


def test_several_seeds_are_compared_pair_by_pair(family: Path, tmp_path: Path) -> None:
    losses = {
        "distributed": {0: 3.0, 1: 3.5, 42: 4.0, 7: 1.0},
        "linear": {0: 3.2, 1: 3.5, 42: 4.4},
        "quintic": {0: 3.04, 1: 3.55, 42: 4.06},
        "localist": {42: 5.0},
    }
    for name, of_seeds in losses.items():
        record = RunRecord.load(family / name)
        for seed, loss in of_seeds.items():
            folder = tmp_path / (name if seed == 42 else f"{name}-seed{seed}")
            folder.mkdir()
            metrics = record.metrics | {"loss": loss, "perplexity": math.exp(loss)}
            replace(record, seed=seed, metrics=metrics).save(folder)
    text = card(tmp_path / "quintic").text
    perplexities = [math.exp(loss) for loss in losses["quintic"].values()]
    half = stats.t.ppf(0.975, 2) * stats.sem(perplexities)
    shown = f"{fmean(perplexities):.2f} ± {half:.2f}"
    # The ratio is of the seeds that both have, as in the table of differences.
    assert re.search(rf"\n\| \*\*quintic\*\* \| {re.escape(shown)} \| 1\.051 ", text)
    assert "means over seeds 0, 1, 42 ± half of the 95 % interval, weights of seed 42." in text
    assert "In brackets that for other seeds on this text." in text
    # By hand: differences 0.04, 0.05, 0.06 are 0.05 ± 4.303 * 0.01 / sqrt(3).
    assert "| 1.051 [1.025, 1.078] |" in text
    assert re.search(r"\n\| linear \|.*\| 1\.\d+ \[", text)
    assert not re.search(r"\n\| localist \|.*\[", text)  # of one seed


def test_siblings_are_linked_in_the_namespace(family: Path) -> None:
    text = card(family / "cubic", repo_id="me/x").text
    links = re.findall(r"\[([a-z]*)\]\(https://hf\.co/(.*?)\)", text)
    assert ("quintic", "me/localist-gpt2-quintic") in links
    assert len(links) == 6
    assert "fine-tuned from [me/localist-gpt2-base](https://huggingface.co/me/localist-gpt2-base)" in text


def test_a_run_without_a_baseline_says_so(family: Path, tmp_path: Path) -> None:
    folder = copy_run(family / "quintic", tmp_path)
    text = card(folder).text
    assert "no comparable run of the `distributed` baseline" in text
    assert f"\n| **quintic** | {RunRecord.load(folder).metrics['perplexity']:.2f} " in text
    assert "The family" not in text
    assert card(folder).data.base_model is None  # a folder of this machine, with no repository beside it
    assert "fine-tuned from base" in text


def test_a_text_with_a_hub_id_gets_evaluation_results(family: Path, tmp_path: Path) -> None:
    data = RunRecord.load(family / "quintic").data
    data |= {"name": "Salesforce/wikitext", "dataset_id": "Salesforce/wikitext", "dataset_config": "wikitext-2-raw-v1"}
    folder = copy_run(family / "quintic", tmp_path, data=data, base_model="openai-community/gpt2", base_run=None)
    files = card_files(folder)
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/localist-hf.yaml"]))
    metrics = RunRecord.load(folder).metrics
    assert {entry.task_id: entry.value for entry in entries} == {
        metric: round(metrics[metric], 4) for metric in METRICS
    }
    assert {entry.dataset_id for entry in entries} == {"Salesforce/wikitext"}
    found = ModelCard(files["README.md"].decode())
    assert found.data.datasets == ["Salesforce/wikitext"]
    assert found.data.base_model == "openai-community/gpt2"
    assert (
        "[Salesforce/wikitext](https://huggingface.co/datasets/Salesforce/wikitext) (wikitext-2-raw-v1)" in found.text
    )
    assert ".eval_results/localist-hf.yaml" not in card_files(family / "quintic")


def test_the_same_records_give_the_same_bytes(family: Path) -> None:
    assert card_files(family / "quintic") == card_files(family / "quintic")


def test_the_card_is_written_with_its_picture(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "family") / "quintic"
    (folder / "README.md").unlink()
    path = write_card(folder)
    assert path == folder / "README.md"
    assert path.read_bytes() == card_files(family / "quintic")["README.md"]
    with Image.open(folder / "shares_over_depth.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert {(0, 114, 178), (230, 159, 0)} <= {colour for _, colour in colours}  # the bands of block and self
    assert (folder / "shares_over_depth.png").stat().st_size < 200_000
    assert "](shares_over_depth.png)" in path.read_text()


def change(folder: Path, **changes: object) -> None:
    """Changes a record; `config`, `training` are added to what it has."""
    record = RunRecord.load(folder)
    merged = {
        name: getattr(record, name) | value if isinstance(value, dict) and name != "example" else value
        for name, value in changes.items()
    }
    replace(record, **merged).save(folder)


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    change(folder / "quintic-seed1", config={"num_sink_tokens": 2})
    text = card(folder / "quintic").text
    assert "one run (seed 42)" in text
    assert f"| **quintic** | {RunRecord.load(folder / 'quintic').metrics['perplexity']:.2f} |" in text
    # Another weight of the loss is another row, under a name that tells them apart.
    change(folder / "quintic-seed1", config={"num_sink_tokens": 0}, training={"locality_weight": 1.0})
    text = card(folder / "quintic").text
    assert "one run (seed 42)" in text
    assert "\n| quintic (locality_weight 1.0) |" in text
    assert "\n| **quintic** " in text
    assert "\n| quintic (locality_weight 5.0) |" in card(folder / "quintic-seed1").text
    # Where nothing is local, the loss says nothing, and the baseline stays one.
    change(folder / "distributed", training={"locality_weight": 0.0})
    assert "\n| distributed " in card(folder / "quintic").text
    # The same run twice is no second seed.
    shutil.copytree(folder / "quintic", folder / "copy")
    assert "one run (seed 42)" in card(folder / "quintic").text


def test_rows_with_several_seeds_are_told_on_the_card_of_one_run(family: Path) -> None:
    assert "one run (seed 42), others means over seeds ± half of the 95 % interval." in card(family / "cubic").text
    assert "elsewhere; beside distributed; means over seeds](shares_over_depth.png)" in card(family / "quintic").text


def test_blocks_that_no_model_finds_are_not_said_to_be_found(family: Path, tmp_path: Path) -> None:
    for name in ("quintic", "distributed", "linear"):
        shutil.copytree(family / name, tmp_path / name)
        change(tmp_path / name, config={"block_partition": "window", "window_length": 7})
    change(tmp_path / "quintic", variant="window", name="window")
    text = card(tmp_path / "quintic").text
    assert "blocks of 7 tokens each, whatever the text says" in text
    assert "the model finds" not in text
    change(tmp_path / "linear", config={"block_partition": "semantic"})
    assert "Each row has the blocks of its own partition" in card(tmp_path / "quintic").text


def test_a_dial_in_the_configuration_is_told(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    assert "; 0 (the default) changes nothing" in card(folder).text
    change(folder, config={"locality_dial": 0.5})
    text = card(folder).text
    assert "; 0 changes nothing" in text
    assert "`locality_dial` of this model is 0.5; so it was in evaluation." in text


def test_a_run_from_random_weights_that_nothing_started_from_is_no_base(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    change(folder, base_run=None, base_weights=None)
    text = card(folder).text
    assert "trained from random weights on the book of sentences under the `quintic` configuration of" in text
    assert "the base of models" not in text


def test_the_baseline_alone_does_not_miss_itself(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "distributed", tmp_path / "distributed")
    assert "There is no comparable run of another configuration" in card(folder).text


def test_what_was_trained_before_the_last_part_is_told(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    record = RunRecord.load(folder)
    training = {name: value for name, value in record.training.items() if name != "steps"}
    locality = {"locality_schedule": "linear", "num_sink_tokens": 2}
    known = {
        "steps": 7, "planned_steps": 9, "seed": 3, "variant": "linear", "locality": locality,
        "training": training | {"learning_rate": 0.25},
    }  # fmt: skip
    unknown = dict.fromkeys(known) | {"steps": 5}
    change(folder, earlier_parts=[unknown, known], training={"steps": 13})
    text = card(folder).text
    assert (
        "under a configuration that is not recorded, then the `linear` configuration, then the `quintic` configuration "
        "of" in text
    )
    assert "- **First**: 5 steps whose settings are not recorded.\n- **Then**: `linear` configuration (" in text
    assert "`locality_schedule` linear, `num_sink_tokens` 2), seed 3; 7 steps of 8 sequences" in text
    assert "learning rate 0.25" in text
    assert "with 9 steps planned" in text
    assert "- **Last**: 1 step of 8 sequences" in text
    assert "one run (seed unknown, then 3, then 42)" in text


def test_a_record_without_an_example_gets_the_prompt_alone(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    assert "It prints, for each block" in card(folder).text
    change(folder, example=None)
    text = card(folder).text
    assert "It prints" not in text
    assert "The with statement wraps" in text


def test_a_model_is_not_its_own_base(family: Path, tmp_path: Path) -> None:
    folder = copy_run(family / "quintic", tmp_path, base_model="me/localist-gpt2-quintic", base_run=None)
    with pytest.raises(ValueError, match="started from me/localist-gpt2-quintic and cannot be published over it"):
        card(folder, repo_id="me/Localist-gpt2-quintic")
    assert card(folder, repo_id="me/other").data.base_model == "me/localist-gpt2-quintic"


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"


BASE = Path(localist_hf.__file__).parent / "base"


@pytest.mark.parametrize(
    "path", [*MODEL_CARDS.glob("*/README.md"), BASE / "README.md"], ids=lambda path: path.parent.name
)
def test_the_cards_of_this_repository_are_short(path: Path) -> None:
    assert len(ModelCard.load(path).text.encode()) <= 6 * 1024


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODEL_CARDS.glob("*/README.md")))
def test_the_cards_of_this_repository_are_those_of_their_records(name: str) -> None:
    folder = MODEL_CARDS / name
    files = card_files(folder)
    assert (folder / "README.md").read_bytes() == files["README.md"], "write it anew with `make family`"
    assert {path.name for path in folder.iterdir()} == {*files, "run.json"}
    assert (folder / "shares_over_depth.png").stat().st_size < 200_000
    others = {RunRecord.load(path).seed for path in MODEL_CARDS.glob(f"{name}-seed*")}
    assert {run.seed for run in load_siblings(folder) if run.name == name} == {RunRecord.load(folder).seed, *others}


def test_trainer_arguments_reach_the_card(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "quintic")
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "a text that was not named" in text
    trainer.create_model_card(
        model_name="mine", language="de", license="mit", finetuned_from="some/base", dataset="ein Buch",
        dataset_details="Es ist kurz.", evaluation_split="last chapter",
    )  # fmt: skip
    found = ModelCard((tmp_path / "run" / "README.md").read_text())
    assert (found.data.language, found.data.license, found.data.base_model) == ("de", "mit", "some/base")
    assert found.data.model_name == "org/localist-gpt2-mine"
    assert "- **Text**: 4 sequences. Es ist kurz." in found.text
