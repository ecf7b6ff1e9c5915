"""The example scripts run as they stand."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.family import train_tokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fine_tune(tmp_path: Path) -> None:
    text = "".join(f"Sentence number {number} says something. " for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    tokenizer = train_tokenizer([text])
    tokenizer.save_pretrained(tmp_path / "base")
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "fine_tune.py"), "book.txt", "run", "base"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layer 1: lambda 1.00; 0." in done.stdout
    assert LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "run").config.locality_schedule == "quintic"


def test_fine_tune_says_how_to_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", "book.txt"])
    with pytest.raises(SystemExit, match=r"python examples/fine_tune\.py book\.txt runs/quintic"):
        runpy.run_path(str(EXAMPLES / "fine_tune.py"))
