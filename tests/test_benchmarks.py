"""Every row of the benchmarks runs, and its peers agree, at tiny shapes; so does the table of block lift."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_every_row_runs() -> None:
    script = BENCHMARKS / "run.py"
    done = subprocess.run([sys.executable, str(script), "--quick"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-2048" in done.stdout


@pytest.mark.slow
def test_every_part_for_a_gpu_runs_on_its_stand_in(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), str(tmp_path / "out"), "--stand-in"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    for name in ("tests", "steps", "prefill", "dial", "decoding", "free", "held"):
        assert f"== {name}: ended with 0" in log
    assert log.count("gpu-") >= 8
    assert "skipped" in log or "passed" in log


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, or for a space and the letter after it, as those of real models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in alphabet if letter.isascii() and letter.isalpha()]
    vocabulary = {piece: number for number, piece in enumerate(alphabet + ["".join(merge) for merge in merges])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        LocalistGPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=4, n_head=2),
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ],
    ids=["localist-gpt2", "llama"],
)
def test_the_table_of_block_lift(config, byte_tokenizer, tmp_path, capsys) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    paragraph = "It was a long day . Nobody came to see us . " * 8
    text.write_text("".join(f" = Title {number} = \n {paragraph}\n" for number in range(3)))
    main = runpy.run_path(str(BENCHMARKS / "block_lift.py"))["main"]
    main(f"--model {tmp_path} --text {text} --boundaries joins sentences --thresholds 0.5 1 --length 64".split())
    output = capsys.readouterr().out
    assert "joins: 2 boundaries" in output and "sentences: 4" in output
    rows = [line.count("|") for line in output.splitlines() if line.startswith("| 3/8")]
    assert rows == [4] * 6  # three bands from 3/8 on, for each of the two kinds


def test_boundaries_are_the_tokens_that_begin_a_part(byte_tokenizer) -> None:
    functions = runpy.run_path(str(BENCHMARKS / "block_lift.py"))
    text = "One. Two!\nif x:\n\n    y\n"
    places = {kind: [match.end() for match in pattern.finditer(text)] for kind, pattern in functions["_ENDS"].items()}
    input_ids, boundaries = functions["tokenize"](byte_tokenizer, text, places, length=4)
    tokens = byte_tokenizer.convert_ids_to_tokens(input_ids.flatten().tolist())
    marked = {
        kind: ["".join(tokens[index : index + 2]) for index in marks.flatten().nonzero().flatten().tolist()]
        for kind, marks in boundaries.items()
    }
    assert marked == {"sentences": ["ĠTw"], "lines": ["if", "ĠĠ"]}


def test_every_row_begins_as_the_tokenizer_begins_a_text(bos_tokenizer) -> None:
    functions = runpy.run_path(str(BENCHMARKS / "block_lift.py"))
    text = "Sentence number 1 says something.\n" * 9
    own = bos_tokenizer(text, add_special_tokens=False)["input_ids"]
    input_ids, boundaries = functions["tokenize"](bos_tokenizer, text, {"lines": [len(text) // 9]}, length=8)
    assert input_ids[:, 0].tolist() == [bos_tokenizer.bos_token_id] * len(input_ids)
    assert input_ids[:, 1:].flatten().tolist() == own[: 7 * len(input_ids)]
    ((row, column),) = boundaries["lines"].nonzero().tolist()
    before = bos_tokenizer.decode([*input_ids[:row, 1:].flatten(), *input_ids[row, 1:column]])
    assert before == "Sentence number 1 says something.\n"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The benchmarks' rows by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return {row.name: row for experiment in importlib.import_module("rows").EXPERIMENTS for row in experiment.rows}


def test_the_row_of_block_finding_counts_what_a_model_finds(rows: dict) -> None:
    config = LocalistGPT2Config(
        vocab_size=50, n_positions=32, n_embd=24, n_layer=12, n_head=2, bos_token_id=1, eos_token_id=1,
        locality_schedule="localist",
    )  # fmt: skip
    outputs = LocalistGPT2LMHeadModel(config)(torch.arange(32)[None], output_fidelity=True)
    found = {starts.data_ptr() for starts in outputs.block_starts}  # layers that share blocks share the tensor
    row = rows["block-finding"]
    assert row.over == {"block finding": len(found)} == {"block finding": 10}
    assert f"({len(found)} findings)" in row.title
    readme = (BENCHMARKS / "README.md").read_text()
    assert row.title in readme and f"{len(found)} of its 12 layers find blocks" in readme


def test_the_figures_of_the_benchmarks_are_what_their_rounds_give(rows: dict) -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    for result in json.loads((BENCHMARKS / "results.json").read_text()):
        row, raw = rows[result["name"]], result["raw"]
        ratios = row.ratios(raw)
        spread = f"{row.format(min(ratios))} to {row.format(max(ratios))}"
        assert (result["figure"], result["spread"]) == (row.format(median(ratios)), spread), row.name
        assert f"| {result['title']} | {result['figure']} | {result['spread']} |" in readme
