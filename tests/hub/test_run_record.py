"""A record says what was trained on what, and refuses to exist without its numbers."""

import json
import math
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from localist_hf.hub import RunRecord
from localist_hf.hub.run_record import load_siblings


def test_a_record_says_what_was_trained_on_what(family: Path) -> None:
    record = RunRecord.load(family / "cubic")
    assert (record.name, record.variant, record.seed) == ("cubic", "cubic", 42)
    assert (record.base_model, record.base_run, record.adapter) == (None, "base", None)
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


def test_a_variant_is_told_from_the_configuration(make_trainer: Callable, tmp_path: Path) -> None:
    for variant in ("window", "distributed"):
        trainer = make_trainer(tmp_path / variant, variant)
        trainer.train()
        trainer.save_model()
        trainer.evaluate()
        assert RunRecord.from_trainer(trainer).variant == variant
    trainer.model.config.locality_schedule = [0.0, 0.5, 0.5, 1.0]
    record = RunRecord.from_trainer(trainer)
    assert (record.variant, record.name) == (None, "distributed")  # the name is the folder's


@pytest.mark.parametrize("metric", ["perplexity", "fidelity", "fidelity_layer_3", "entropy", "entropy_layer_0"])
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


def test_the_present_weights_must_have_been_evaluated_and_saved(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "quintic")
    trainer.train()
    trainer.evaluate()
    with pytest.raises(ValueError, match=r"holds no weights; call `save_model\(\)` first"):
        trainer.create_model_card()
    trainer.save_model()
    trainer.create_model_card()
    trainer.state.global_step += 1  # as further training would
    with pytest.raises(ValueError, match="The weights of step 2 have not been evaluated"):
        trainer.create_model_card()


def test_siblings_differ_in_locality_and_seed_only(family: Path, tmp_path: Path, train_run: Callable) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    train_run(folder / "longer", "linear", folder / "base", max_steps=2)
    train_run(folder / "weight", "linear", folder / "base", locality_weight=1.0, name="weight")
    names = [record.name for record in load_siblings(folder / "quintic")]
    assert names[0] == "quintic"
    # The other seed is a sibling too; the locality loss may differ; another number of steps or an adapter may not.
    assert sorted(names) == sorted(
        ["base", "cubic", "distributed", "linear", "localist", "quadratic", "quartic", "quintic", "quintic", "weight"]
    )
    assert {record.name for record in load_siblings(folder / "base")} >= {"base", "quintic", "quintic-lora", "linear"}
    assert [record.name for record in load_siblings(folder / "quintic-lora")] == ["quintic-lora", "base"]
