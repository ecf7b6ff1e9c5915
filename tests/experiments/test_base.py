"""The script that trains the base, and the base that comes with the package."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from localist_hf.evaluation import measure
from localist_hf.experiments import base
from localist_hf.hub import RunRecord


def test_the_shipped_base_uses_its_attention_and_is_what_its_record_says() -> None:
    folder = Path(str(base.BASE))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    record = RunRecord.load(folder)
    record.check_weights(folder)
    controls = record.controls
    assert controls["all_local_perplexity"] > 2 * controls["perplexity"]
    assert controls["all_local_self_only_perplexity"] > 8 * controls["perplexity"]
    assert (record.name, record.variant, record.license) == ("base", "distributed", "apache-2.0")
    assert f"{record.metrics['perplexity']:.2f}" in (folder / "README.md").read_text()


def test_the_shipped_base_knows_python() -> None:
    """Its own text about itself has a perplexity like that of its record; a base of random weights has 2,048."""
    model = AutoModelForCausalLM.from_pretrained(str(base.BASE), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(base.BASE))
    sequences = base.tokenize_and_pack(
        base.Dataset.from_dict({"text": [Path(base.__file__).read_text()]}), tokenizer, base.SEQUENCE_LENGTH
    )
    assert measure(model, sequences).metrics["perplexity"] < 60


def test_training_writes_what_can_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    texts = {f"module {number}": f"def sentence_{number}(): return 'something'\n" * 60 for number in range(60)}
    monkeypatch.setattr(base, "python_text", lambda: texts)
    monkeypatch.setattr(base, "NUM_HELD_OUT", 2)
    folder = tmp_path / "base"
    base.main(["--output-dir", str(folder), "--steps", "2", "--batch-size", "2", "--seed", "3"])
    record = RunRecord.load(folder)
    record.check_weights(folder)
    assert (record.name, record.seed, record.training["steps"]) == ("base", 3, 2)
    assert record.controls is not None
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert f"The base: {folder}" in capsys.readouterr().out

    # Among the runs that start from it, it has its code, and its weights are the same.
    monkeypatch.setattr(base, "BASE", folder)
    base.copy_base(tmp_path / "runs" / "base")
    RunRecord.load(tmp_path / "runs" / "base").check_weights(tmp_path / "runs" / "base")
    assert (tmp_path / "runs" / "base" / "modeling_localist_gpt2.py").is_file()
    written = (tmp_path / "runs" / "base" / "model.safetensors").stat().st_mtime_ns
    base.copy_base(tmp_path / "runs" / "base")
    assert (tmp_path / "runs" / "base" / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds another base than this package has"):
        base.copy_base(tmp_path / "runs" / "base")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 0", "`steps` is 0; it must be at least 1."),
        ("--batch-size 0", "`batch_size` is 0; it must be at least 1."),
        ("--batch-size 100000000000000", "`batch_size` is 100000000000000; it must be below 2**32."),
        ("--seed -1", "`seed` is -1; it must be between 0 and 2**32 - 1."),
    ],
)
def test_numbers_that_mean_nothing_are_refused(flags: str, words: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        base.main(flags.split())
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f" error: {words}\n")
