"""Processes that know nothing of this package, as those of strangers."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_python(
    code: str, *arguments: str, env: Mapping[str, str], cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess:
    """A new interpreter's output; a fork of one that has imported something would have its caches, of modules too."""
    env = {name: value for name, value in env.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
