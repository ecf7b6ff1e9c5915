# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
All that a machine with a GPU can tell, in one call of at most six minutes, most important first: the tests that need
CUDA, the rows of run.py that need it, and a model of GPT-2's size that is held at dial 1 and taught by itself. What a
part prints is in the folder's log.txt when it ends, whatever becomes of the others.

    python benchmarks/gpu.py $OUT
    python benchmarks/gpu.py runs/stand-in --stand-in     # tiny and on the CPU: to see that every part runs
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from localist_hf.experiments.base import BASE
from localist_hf.experiments.python_text import python_text, split_text


_HERE = Path(__file__).resolve().parent
#: Seconds in all; and of each part the command, and the most that it may take.
_TOTAL = 360.0


def parts(folder: Path, stand_in: bool) -> list[tuple[str, list[str], float]]:
    """Each part's name, its command, and the most seconds that it may take."""
    python, tests = sys.executable, _HERE.parent / "tests"
    rows = [python, str(_HERE / "run.py"), *(["--quick"] if stand_in else ["--write"]), "--rows"]
    train = [python, "-m", "localist_hf.cli.main", "train", "--text-file", str(folder / "text" / "python.txt"),
             "--report-to", "none", "--disable-tqdm", "true", "--save-strategy", "no"]  # fmt: skip
    if stand_in:
        train += ["--use-cpu", "--sequence-length", "64", "--per-device-train-batch-size", "2"]
        steps = ("2", "2")
    else:
        train += ["--bf16", "--sequence-length", "1024", "--per-device-train-batch-size", "8"]
        steps = ("400", "150")
    free, held = folder / "models" / "free", folder / "models" / "held"
    schedule = ["--variant", "distributed", "--learning-rate", "6e-4"]
    recipe = ["--variant", "quintic", "--recipe", "hold", "--learning-rate", "3e-4"]
    model = ["--model", str(folder / "models" / "start")]
    return [
        ("tests", [python, "-m", "pytest", "-q", "-m", "gpu", str(tests)], 90),
        ("steps", [*rows, "^gpu-step"], 80),
        ("prefill", [*rows, "^gpu-prefill"], 80),
        ("dial", [*rows, "^gpu-dial"], 30),
        ("decoding", [*rows, "^gpu-decode"], 50),
        ("free", [*train, *model, *schedule, "--max-steps", steps[0], "--output-dir", str(free)], 90),
        ("held", [*train, "--model", str(free), *recipe, "--max-steps", steps[1], "--output-dir", str(held)], 90),
    ]


def make_start(folder: Path, stand_in: bool) -> None:
    """A random model of GPT-2's size, the base's tokenizer, and Python to read."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    texts = split_text(python_text())["variants"]
    text = "\n".join(texts)[: 50_000 if stand_in else None]
    (folder / "text" / "python.txt").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 64} if stand_in else {}
    start = folder / "models" / "start"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **tokens)).save_pretrained(start)
    tokenizer.save_pretrained(start)


def main() -> int:
    """Runs the parts; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put what was found: log.txt, and the figures of all rows")
    parser.add_argument("--stand-in", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(_HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log, began, failed = args.folder / "log.txt", time.monotonic(), []
    with TemporaryDirectory() as work, log.open("w", encoding="utf-8") as file:
        make_start(Path(work), args.stand_in)
        for name, command, most in parts(Path(work), args.stand_in):
            limit = max(min(most, _TOTAL - (time.monotonic() - began)), 1.0)
            print(f"== {name}", file=file, flush=True)
            try:
                done = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment, check=False
                )
                outcome = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
            if outcome != "ended with 0":
                failed.append(name)
            print(f"== {name}: {outcome}, {time.monotonic() - began:.0f} s", file=file, flush=True)
            if not args.stand_in:  # figures of all rows so far
                for figures in ("results.json", "README.md"):
                    (args.folder / f"benchmarks-{figures}").write_bytes((_HERE / figures).read_bytes())
    print(log.read_text(encoding="utf-8")[-12_000:])
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
