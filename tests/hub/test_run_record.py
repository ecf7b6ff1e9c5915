"""A record says what was trained on what, and refuses to exist without its numbers."""

import functools
import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

import localist_hf
from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure_controls
from localist_hf.hub import RunRecord, write_card
from localist_hf.hub.adapters import brings_embeddings
from localist_hf.hub.weights import weight_hashes


def test_a_record_says_what_was_trained_on_what(family: Path) -> None:
    record = RunRecord.load(family / "cubic")
    assert (record.name, record.variant, record.seed) == ("cubic", "cubic", 42)
    assert (record.base_model, record.base_run, record.adapter) == (None, "base", None)
    assert record.base_weights == weight_hashes(family / "base")
    assert record.earlier_parts == []
    assert record.lambdas == [0.0, (1 / 3) ** 3, (2 / 3) ** 3, 1.0]
    assert record.data["training_sequences"] == 4
    assert record.data["evaluation_sequences"] == 2
    assert record.data["evaluation_lengths"] == [40, 40]
    assert record.training["steps"] == 1
    assert record.training["batch_size"] == 8
    assert record.training["target_fidelity"] == 0.9
    weights = load_file(family / "cubic" / "model.safetensors")
    assert record.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert record.metrics["perplexity"] == pytest.approx(math.exp(record.metrics["loss"]))


def test_an_adapter_and_a_base_say_what_they_are(family: Path) -> None:
    adapter = RunRecord.load(family / "quintic-lora")
    assert (adapter.name, adapter.variant, adapter.base_run) == ("quintic-lora", "quintic", "base")
    assert adapter.adapter["rank"] == 2
    assert adapter.adapter["target_modules"] == ["c_attn"]
    weights = load_file(family / "quintic-lora" / "adapter_model.safetensors")
    assert adapter.adapter["parameters"] == sum(tensor.numel() for tensor in weights.values())
    base = RunRecord.load(family / "base")
    assert base.from_scratch
    assert base.num_parameters == adapter.num_parameters
    assert not adapter.from_scratch


def test_a_record_gives_nothing_of_this_machine_away(family: Path) -> None:
    for path in family.glob("*/run.json"):
        text = path.read_text()
        assert str(family.parent) not in text
        assert str(Path.home()) not in text
        assert socket.gethostname() not in text


def test_a_saved_record_is_read_again(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic")
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "metric",
    [
        "perplexity",
        "context_fidelity",
        "context_fidelity_layer_1",
        "context_share",
        "self_share_layer_3",
        "sink_share",
        "block_share_layer_0",
        "outside_share_layer_2",
        "visible_keys_layer_3",
        "fidelity",
        "fidelity_layer_3",
        "entropy",
        "entropy_layer_0",
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_record_without_a_number_cannot_be_made(family: Path, metric: str, value: float | None) -> None:
    record = RunRecord.load(family / "quintic")
    metrics = {name: number for name, number in record.metrics.items() if name != metric}
    if value is not None:
        metrics[metric] = value
    with pytest.raises(ValueError, match=f"`metrics` must hold a finite number '{metric}'"):
        replace(record, metrics=metrics)
    with pytest.raises(ValueError, match=f"`metrics_on_base_blocks` must hold a finite number '{metric}'"):
        replace(record, metrics_on_base_blocks=metrics)


NOWHERE = {"context_share": 0.0, "block_share": 0.0, "outside_share": 0.0, "context_fidelity": math.nan}


NOT_COUNTED = dict.fromkeys(
    ["context_fidelity", "context_share", "self_share", "sink_share", "block_share", "outside_share", "visible_keys"],
    math.nan,
)


@pytest.mark.parametrize("values", [NOWHERE, NOT_COUNTED], ids=["nowhere", "not counted"])
@pytest.mark.parametrize("part", ["", "_layer_2"])
def test_what_is_undefined_is_null_in_the_file(family: Path, tmp_path: Path, values: dict, part: str) -> None:
    record = RunRecord.load(family / "quintic")
    metrics = record.metrics | {f"{name}{part}": value for name, value in values.items()}
    replace(record, metrics=metrics, metrics_on_base_blocks=metrics).save(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert "NaN" not in text
    saved = json.loads(text)
    expected = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    assert saved["metrics"] == saved["metrics_on_base_blocks"] == expected
    loaded = RunRecord.load(tmp_path)
    assert loaded.metrics == loaded.metrics_on_base_blocks == pytest.approx(metrics, nan_ok=True)
    # One number that is missing among others is an error, and so is no psi of what goes to other words.
    for wrong in ({f"self_share{part}": math.nan}, {f"context_fidelity{part}": math.nan}):
        with pytest.raises(ValueError, match=f"`metrics` must hold a finite number '{next(iter(wrong))}'"):
            replace(record, metrics=record.metrics | wrong)


def test_controls_are_kept_as_they_were_measured(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic")
    assert record.controls is None
    model = LocalistGPT2LMHeadModel.from_pretrained(family / "quintic")
    texts = Dataset.from_dict({"input_ids": torch.randint(2, 90, (2, 40)).tolist()})
    controls = measure_controls(model, texts)
    measured = record.with_measurements(controls=controls)
    measured.save(tmp_path)
    assert RunRecord.load(tmp_path) == measured
    assert RunRecord.load(tmp_path).controls == json.loads(json.dumps(controls.to_dict()))
    # By the names of 0.2 too.
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    former = text.replace("all_local_cost_at_dial_1", "all_local_retention").replace("cost_at_dial_1", "retention")
    assert former != text
    (tmp_path / "run.json").write_text(former, encoding="utf-8")
    assert RunRecord.load(tmp_path) == measured
    assert replace(measured, controls=None) == record
    # What is measured later leaves them alone.
    assert measured.with_measurements(record.metrics).controls == measured.controls
    assert measured.is_repetition(replace(record, seed=7))
    for change, message in (
        ({"cost_at_dial_1": ...}, "`controls` has no 'cost_at_dial_1'."),
        ({"layers": [1, 2]}, "`controls` are of the layers [1, 2]; the last, 3, must be among them."),
        ({"layers": [3]}, "`controls` must hold 'visible_keys' of each of the layers [3]."),
        ({"blocks": []}, "`controls` must hold the blocks with 0 before them, as the configuration has it."),
    ):
        values = {name: value for name, value in (measured.controls | change).items() if value is not ...}
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(record, controls=values)


def of_base() -> dict[str, Any]:
    """The record of the base that the package ships, which has controls."""
    return json.loads((Path(localist_hf.__file__).parent / "base" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("blocks", 0, "wrong", "fidelity"), ..., "`controls.blocks[0].wrong` has no 'fidelity'."),
        (("blocks", 0, "windows"), 7, "`controls.blocks[0].windows` is 7; it must be of type LocalityFigures or None."),
        (("blocks", 0, "own", "fidelity"), 2.0, "`controls.blocks[0].own.fidelity` is 2.0; it must be of type list[f"),
        (("blocks", 0, "own", "fidelity", 0), "x", "`controls.blocks[0].own.fidelity[0]` is 'x'; it must be of type"),
        (("dials", 0, "locality"), ..., "`controls.dials[0]` has no 'locality'."),
        (("dials", 0, "dial"), True, "`controls.dials[0].dial` is True; it must be of type"),
        (("perplexity",), 10**30, "`controls.perplexity` is 1000000000000000000000000000000, which is too large."),
        (("divergence",), float("nan"), "it holds NaN, which JSON does not have."),
    ],
)
def test_what_is_wrong_in_controls_is_named(keys: tuple, value: object, message: str, tmp_path: Path) -> None:
    values = of_base()
    *before, last = keys
    inside = functools.reduce(lambda entry, key: entry[key], before, values["controls"])
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        RunRecord.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parts", [7, [7]])
def test_earlier_parts_that_are_none_are_refused_by_name(parts: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(of_base() | {"earlier_parts": parts}))
    with pytest.raises(ValueError, match=r"no record of a run: `earlier_parts.* is 7; it must be of type"):
        RunRecord.load(tmp_path)


def test_a_record_of_0_1_is_refused_in_one_sentence(family: Path, tmp_path: Path) -> None:
    values = asdict(RunRecord.load(family / "quintic"))
    del values["controls"], values["training"]["locality_objective"]
    values["metrics"] = {
        name: value
        for name, value in values["metrics"].items()
        if name.split("_")[0] in ("loss", "perplexity", "fidelity", "entropy")
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    message = (
        "run.json' is no record of a run: it is of localist-hf 0.1, which measured no attention shares; train the run "
        "again."
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        RunRecord.load(tmp_path)


def test_the_objective_tells_runs_apart(family: Path) -> None:
    record = RunRecord.load(family / "quintic")
    assert record.objective["locality_objective"] == "context"
    other = replace(record, training=record.training | {"locality_objective": "fidelity"})
    assert record.is_comparable(other)
    assert not record.is_repetition(other)


def test_a_folder_without_a_whole_record_is_refused(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished run: there is no run\.json"):
        RunRecord.load(tmp_path)
    values = asdict(RunRecord.load(family / "quintic"))
    del values["hardware"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no record of a run: `hardware` is missing or unknown"):
        RunRecord.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no record of a run"):
        RunRecord.load(tmp_path)


def test_weights_that_were_not_measured_are_told(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    record = RunRecord.load(folder)
    record.check_weights(folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those that its run\.json was measured on"):
        record.check_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="are not those"):
        record.check_weights(folder)


def test_a_record_of_others_beside_a_run_or_under_its_base_is_no_obstacle(
    train_run: Callable, family: Path, tmp_path: Path, transformers_warnings: pytest.LogCaptureFixture
) -> None:
    record = asdict(RunRecord.load(family / "cubic"))
    for number, text in enumerate(
        ("{", "[]", '{"name": "x"}', json.dumps(record | {"config": None}), json.dumps(record | {"variant": "sextic"}))
    ):
        (tmp_path / f"other{number}").mkdir()
        (tmp_path / f"other{number}" / "run.json").write_text(text)
    base = shutil.copytree(family / "base", tmp_path / "start")
    (base / "run.json").write_text('["of another program"]')
    train_run(tmp_path / "run", "cubic", base)
    assert (tmp_path / "run" / "README.md").exists()
    assert RunRecord.load(tmp_path / "run").base_run == "start"
    for name in ("other0", "other1", "other2", "other3", "other4", "start"):
        assert f"{name}/run.json' is no record of a run" in transformers_warnings.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "`seed` is '1'; it must be of type"),
        ({"metrics": []}, "`metrics` is"),
        ({"training": {}}, "`training` has no 'steps'"),
        ({"controls": {}}, "`controls` has no 'layers'"),
        ({"data": {"name": "x"}}, "`data` has no 'details'"),
        ({"variant": "sextic"}, "`variant` is 'sextic'; allowed are 'distributed'"),
        ({"earlier_parts": [{}]}, "`earlier_parts[0]` has no 'steps'."),
        ({"weights": {"model.safetensors": 1}}, "`weights.model.safetensors` is 1; it must be of type"),
        ({"example": {"prompt": "x", "printed": "```\n# x"}}, "`example.printed` has the line '```'; it must be five"),
        (
            {"config": {"model_type": "llama", "locality": [1]}},
            "`config.locality` is [1]; it must map names to values.",
        ),
    ],
)
def test_a_record_of_another_form_is_refused(family: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(RunRecord.load(family / "quintic"), **change)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 42,', '"seed": 42, "seed": 1,', "the key 'seed' stands there twice"),
        ('"name": "quintic"', '"name": "\\ud800"', "it holds half of a character"),
        ('"seed": 42,', f'"seed": {"[" * 100000}', "it is nested too deeply"),
        ('"model_type": "localist-gpt2"', '"model_type": "new"', "`config.model_type` is 'new', which transformers "),
        ('"fidelity": 0.', '"fidelity": 7.', "`metrics` holds 'fidelity' of 7."),
        ('"perplexity": ', '"perplexity": -', "`metrics` holds 'perplexity' of -"),
        ('"perplexity": ', f'"perplexity": {"9" * 400}, "x": ', "is no record of a run: "),
        ('"seed": 42,', '"seed": 42', "is no record of a run: "),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused_in_one_line(
    family: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (family / "quintic" / "run.json").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "run.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        RunRecord.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_a_card_says_how_an_adapter_that_brings_embeddings_is_loaded(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic-lora")
    assert not brings_embeddings(family / "quintic-lora", record.config["vocab_size"])
    assert "embeddings" not in record.adapter
    record.save(tmp_path)
    assert "ignore_mismatched_sizes" not in write_card(tmp_path).read_text()
    replace(record, adapter=record.adapter | {"embeddings": True}).save(tmp_path)
    assert "trust_remote_code=True, ignore_mismatched_sizes=True\n)" in write_card(tmp_path).read_text()
