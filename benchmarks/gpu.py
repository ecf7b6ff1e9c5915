# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
r"""
All that a machine with a GPU can tell, in one call of six minutes, most important first: tests that need CUDA, training
steps, a model of GPT-2's size held at dial 1 and taught by itself (the limits before it leave it time), and other rows.

    python benchmarks/gpu.py $OUT                         # its folder has log.txt, the rows' figures, both run.json
    python benchmarks/gpu.py runs/stand-in --stand-in     # tiny and on the CPU: to see that every part runs

A machine without network is brought what it lacks as wheels, 16 MB. Here, in the repository (`runs/` is ignored):

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 -c constraints.txt -d runs/wheels \
        transformers huggingface-hub click httpx2 httpcore2 truststore datasets dill multiprocess evaluate peft

There, with `runs/wheels` carried along and ten minutes for the call:

    python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site runs/wheels/*.whl &&
        PYTHONPATH=/tmp/site python3 benchmarks/gpu.py $OUT
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from packaging.requirements import Requirement


_HERE = Path(__file__).resolve().parent
_TOTAL, _LEAST = 360.0, 20.0  # seconds in all, and those that a part needs to be begun


def missing(stand_in: bool) -> list[str]:
    """What the parts need and this machine lacks; prints the versions that it has."""
    needed = tomllib.loads((_HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lacks, there = [], [f"Python {sys.version.split()[0]}"]
    for requirement in map(Requirement, [*needed, "psutil", "pytest", "hypothesis"]):
        with suppress(PackageNotFoundError):
            there.append(f"{requirement.name} {version(requirement.name)}")
            if requirement.specifier.contains(version(requirement.name), prereleases=True):
                continue
        lacks.append(str(requirement))
    print(", ".join(there), flush=True)
    for name in () if lacks else ("torch", "datasets", "evaluate", "localist_hf.cli.train"):
        try:
            importlib.import_module(name)
        except Exception as error:  # transformers, for one, raises more than ImportError
            lacks.append(f"{name}: {type(error).__name__}: {error}")
    if not (lacks or stand_in or importlib.import_module("torch").cuda.is_available()):
        lacks.append("a CUDA device that torch sees (--stand-in rehearses on the CPU)")
    return lacks


def parts(work: Path, stand_in: bool) -> list[tuple[str, list[str], float]]:
    """Each part's name, its command, and the most seconds that it may take."""
    python, tests = sys.executable, str(_HERE.parent / "tests/modeling/test_gpu.py")
    rows = [python, str(_HERE / "run.py"), *(["--quick"] if stand_in else ["--write"]), "--rows"]
    train = [python, "-m", "localist_hf.cli.main", "train", "--text-file", str(work / "python.txt"),
             "--report-to", "none", "--disable-tqdm", "true", "--save-strategy", "no"]  # fmt: skip
    size = ["--use-cpu", "64", "2"] if stand_in else ["--bf16", "1024", "8"]
    train += [size[0], "--sequence-length", size[1], "--per-device-train-batch-size", size[2], "--max-steps"]
    start, free, held = (str(work / "models" / name) for name in ("start", "free", "held"))
    begin = f"import sys; sys.path.insert(0, {str(_HERE)!r}); import gpu; gpu.make_start({str(work)!r}, {stand_in})"
    taught = ["--model", free, "--variant", "quintic", "--recipe", "hold", "--learning-rate", "3e-4"]
    plain = ["--model", start, "--variant", "distributed", "--learning-rate", "6e-4"]
    return [
        ("tests", [python, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", tests], 50),
        ("steps", [*rows, "^gpu-step"], 60),
        ("start", [python, "-c", begin], 50),
        ("free", [*train, "2" if stand_in else "400", *plain, "--output-dir", free], 80),
        ("held", [*train, "2" if stand_in else "150", *taught, "--output-dir", held], 90),
        ("prefill", [*rows, "^gpu-prefill"], 80),
        ("dial", [*rows, "^gpu-dial"], 30),
        ("decoding", [*rows, "^gpu-decode"], 50),
    ]


def make_start(work: str, stand_in: bool) -> None:
    """A random model of GPT-2's size, the base's tokenizer, and Python to read."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from localist_hf.experiments import base, python_text

    start = Path(work, "models", "start")
    text = "\n".join(python_text.split_text(python_text.python_text())["variants"])
    Path(work, "python.txt").write_text(text[: 50_000 if stand_in else None], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base.BASE)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 64} if stand_in else {}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **tokens)).save_pretrained(start)
    tokenizer.save_pretrained(start)


def run_part(command: list[str], limit: float, log: IO[str]) -> str:
    """How the command ended; none of the processes that it began outlives it."""
    path = os.pathsep.join(filter(None, (str(_HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return f"ended with {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # at which pytest still prints what failed
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return f"stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; 1 where one of them failed or had no time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put what was found")
    parser.add_argument("--stand-in", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args(arguments)
    began, outcomes = time.monotonic(), {}
    if lacks := missing(args.stand_in):
        print("Nothing was run, since this machine lacks", *lacks, sep="\n  ")
        return 1
    args.folder.mkdir(parents=True, exist_ok=True)
    log, slack = args.folder / "log.txt", 3 if args.stand_in else 1  # a rehearsal's times mean nothing
    with TemporaryDirectory() as work, log.open("w", encoding="utf-8") as file:
        for name, command, most in parts(Path(work), args.stand_in):
            limit, size = min(most, _TOTAL - (time.monotonic() - began) / slack), log.stat().st_size
            outcome = "skipped, too little time left" if limit < _LEAST else run_part(command, limit * slack, file)
            outcomes[name] = f"{outcome}, {time.monotonic() - began:.0f} s since the beginning"
            print(f"== {name}: {outcomes[name]}", file=file, flush=True)
            print(log.read_bytes()[size:].decode(errors="replace")[-3_000:], end="", flush=True)
            for record in Path(work, "models", name).glob("run.json"):
                shutil.copy(record, args.folder / f"{name}-run.json")
            for figures in () if args.stand_in else ("results.json", "README.md"):  # of all rows so far
                shutil.copy(_HERE / figures, args.folder / f"benchmarks-{figures}")
    print(*(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")
    return int(not all(outcome.startswith("ended with 0") for outcome in outcomes.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run_part` ends what it began
    sys.exit(main())
