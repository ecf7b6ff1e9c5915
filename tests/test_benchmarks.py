"""Every row of the benchmarks runs, and its peers agree, at tiny shapes; so does the table of block lift."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import median
from types import ModuleType

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    for name in ("tests", "steps", "start", "free", "held", "prefill", "dial", "decoding"):
        assert f"== {name}: ended with 0" in log
    assert log.count("gpu-") >= 8
    assert "skipped" in log or "passed" in log
    records = [json.loads((tmp_path / "out" / f"{name}-run.json").read_text()) for name in ("free", "held")]
    assert records[0] != records[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`gpu.py`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_without_cuda_nothing_is_run(gpu, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 1
    versions, *_, lack = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions and "a CUDA device" in lack
    assert not (tmp_path / "out").exists()


def test_what_the_machine_lacks_is_said_before_anything_is_run(gpu, tmp_path, monkeypatch, capsys) -> None:
    there = {"transformers": "5.17.0", "torch": "2.11.0+cu130"}

    def version(name: str) -> str:
        if name == "datasets":
            raise PackageNotFoundError(name)
        return there.get(name, "2026")

    monkeypatch.setattr(gpu, "version", version)
    assert gpu.main([str(tmp_path / "out"), "--stand-in"]) == 1
    versions, *_, first, second = capsys.readouterr().out.splitlines()
    assert "transformers 5.17.0" in versions
    assert [first.split(">")[0], second.split("<")[0].split(">")[0]] == ["  datasets", "  transformers"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "evaluate", None)  # as of a module that fails to be imported
    assert [line.split(":")[0] for line in gpu.missing(True)] == ["evaluate"]


def test_the_tests_for_a_gpu_are_in_the_file_that_is_run(gpu) -> None:
    name, command, _ = gpu.parts(Path("work"), False)[0]
    marked = [str(path) for path in BENCHMARKS.parent.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    assert name == "tests" and command[-1:] == [path for path in marked if path != __file__]
    assert {"-v", "--tb=short"} <= set(command) and "-q" not in command  # each test's line at once


@pytest.mark.parametrize("stand_in", [False, True])
def test_the_training_that_is_held_has_its_time(gpu, stand_in: bool) -> None:
    limits = {name: most for name, _, most in gpu.parts(Path("work"), stand_in)}
    names = list(limits)
    assert names[names.index("held") - 2 :][:3] == ["start", "free", "held"]
    assert names.index("start") > names.index("steps")
    imports = 30
    assert imports + sum(limits[name] for name in names[: names.index("held") + 1]) <= gpu._TOTAL


def test_a_part_that_is_stopped_leaves_no_process(gpu, tmp_path) -> None:
    child = "import os, signal, time; signal.signal(2, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "log.txt").open("w") as log:
        assert gpu.run_part([sys.executable, "-c", parent], 3, log) == "stopped after 3 s"
    pid = int((tmp_path / "log.txt").read_text().split()[0])
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_was_found_is_kept_and_what_has_no_time_is_skipped(gpu, tmp_path, monkeypatch, capsys) -> None:
    def parts(work: Path, stand_in: bool) -> list[tuple[str, list[str], float]]:
        record = work / "models" / "held" / "run.json"
        write = f"from pathlib import Path; path = Path({str(record)!r}); path.parent.mkdir(parents=True); path.touch()"
        held = [sys.executable, "-c", f"{write}; print('found'); raise SystemExit(3)"]
        return [("held", held, 60), ("dial", ["no such command"], gpu._LEAST - 1)]

    monkeypatch.setattr(gpu, "missing", lambda stand_in: [])
    monkeypatch.setattr(gpu, "parts", parts)
    assert gpu.main([str(tmp_path), "--stand-in"]) == 1
    assert (tmp_path / "held-run.json").exists()
    log, printed = (tmp_path / "log.txt").read_text(), capsys.readouterr().out
    for text in ("found", "== held: ended with 3", "== dial: skipped, too little time left"):
        assert text in log and text in printed


def test_the_wheels_to_carry_are_named_alike_and_pinned(gpu) -> None:
    command = re.compile(r"pip download .*?-d runs/wheels \\\n +(.+)")
    names, again = (command.search(text)[1].split() for text in (gpu.__doc__, (BENCHMARKS / "README.md").read_text()))
    pinned = {line.split("==")[0].replace("_", "-") for line in (BENCHMARKS.parent / "constraints.txt").open()}
    assert names == again and set(names) <= pinned


def test_each_experiment_is_written_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run, written = importlib.import_module("run"), []

    def answers(selections, quick):
        yield selections[0], {"failed": "on purpose"}, {"threads": 1, "gpu": None}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_answers", answers)
    monkeypatch.setattr(run.report, "write", lambda results, folder: written.append(len(results)))
    with pytest.raises(KeyboardInterrupt):
        run.main(["--rows", "^gpu-step", "--write"])
    assert written == [1]


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
