"""The card holds the numbers of the records, valid metadata, and code that works as it stands."""

import ast
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

from localist_hf.configuration import PAPER_VARIANTS
from localist_hf.hub import RunRecord, card_files, write_card
from localist_hf.hub.run_record import load_siblings


SECTIONS = [
    "Load it", "Read its attention, turn the dial", "Results", "Training", "What it is for, and what it is not",
    "The family", "Citation",
]  # fmt: skip


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
    sections = SECTIONS if name.startswith("quintic") else [section.split(", turn")[0] for section in SECTIONS]
    assert re.findall(r"^## (.*)$", found.text, re.MULTILINE) == sections
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
        metric: round(metrics[metric], 4) for metric in ("perplexity", "fidelity", "entropy")
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
    assert list(table)[2:9] == ["distributed", "linear", "quadratic", "cubic", "quartic", "**quintic**", "localist"]
    both = sorted(runs[name]["perplexity"] for name in ("quintic", "quintic-seed1"))
    assert table["**quintic**"][1] == f"{fmean(both):.2f} ({both[0]:.2f} to {both[1]:.2f})"
    assert table["**quintic**"][2] == f"{fmean(both) / runs['distributed']['perplexity']:.3f}"
    assert table["distributed"][1] == f"{runs['distributed']['perplexity']:.2f}"
    last = fmean(runs[name]["fidelity_layer_3"] for name in ("quintic", "quintic-seed1"))
    assert table["3"][2:4] == [f"{last:.2f}", f"{runs['distributed']['fidelity_layer_3']:.2f}"]
    assert "2 runs with the seeds 1, 42" in text
    assert "are those of seed 42" in text
    assert "One run (seed 42), so there is no spread to show" in card(family / "cubic").text


def test_the_blocks_of_the_base_get_a_table_once_all_runs_have_it(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    assert "those that the common base finds" not in card(folder / "quintic").text
    for record in load_siblings(folder / "quintic"):
        run = folder / ("quintic-seed1" if record.seed == 1 else record.name)
        metrics = record.metrics | {"fidelity": 0.4321}
        replace(record, metrics_on_base_blocks=metrics).save(run)
    text = card(folder / "quintic").text
    assert "those that the common base finds" in text
    assert "0.43 " in text


def test_siblings_are_linked_in_the_namespace(family: Path) -> None:
    links = re.findall(
        r"^- \[(.*?)\]\(https://huggingface.co/(.*?)\)", card(family / "cubic", repo_id="me/x").text, re.M
    )
    assert links[0] == ("me/localist-gpt2-base", "me/localist-gpt2-base")
    assert ("me/localist-gpt2-quintic", "me/localist-gpt2-quintic") in links
    assert len(links) == 7


def test_a_run_without_a_baseline_says_so(family: Path, tmp_path: Path) -> None:
    folder = copy_run(family / "quintic", tmp_path)
    text = card(folder).text
    assert "no comparable run of the `distributed` baseline" in text
    assert f"Perplexity {RunRecord.load(folder).metrics['perplexity']:.2f}" in text
    assert "## The family" not in text
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
        metric: round(metrics[metric], 4) for metric in ("perplexity", "fidelity", "entropy")
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
    with Image.open(folder / "fidelity_over_depth.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert {(214, 96, 77), (140, 140, 140)} <= {colour for _, colour in colours}  # quintic's and distributed's
    assert (folder / "fidelity_over_depth.png").stat().st_size < 200_000
    assert "](fidelity_over_depth.png)" in path.read_text()


@pytest.mark.parametrize("variant", PAPER_VARIANTS)
def test_the_cards_of_this_repository_are_those_of_their_records(variant: str) -> None:
    folder = Path(__file__).parents[2] / "model_cards" / variant
    assert (folder / "README.md").read_bytes() == card_files(folder)["README.md"], "write it anew with `make family`"
    assert (folder / "fidelity_over_depth.png").stat().st_size < 200_000
    assert {run.seed for run in load_siblings(folder) if run.name == variant} == {0, 1}


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
    assert (
        "ein Buch: 4 sequences to train on, 2 sequences of 40 tokens to measure on (last chapter). Es ist kurz."
        in found.text
    )
