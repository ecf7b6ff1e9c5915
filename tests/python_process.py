"""
Processes that know nothing of this package, in a fraction of the time: they are forked from one that has imported
torch, and neither transformers nor huggingface_hub, which read the environment when they are imported.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch


_CONTEXT = multiprocessing.get_context("forkserver")
# Torch and what transformers imports of it: two thirds of what a process that loads a model waits for.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"]
)


def run_python(
    code: str, *arguments: str, env: Mapping[str, str], cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, "-c", code, *arguments])` gives, with nothing to read from."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run, args=(code, arguments, dict(env), cwd, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, timeout, *(path.read_bytes() for path in outputs))
        return subprocess.CompletedProcess(code, process.exitcode, *(path.read_text() for path in outputs))


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], cwd: Path, outputs: list[Path]) -> None:
    for target, path in enumerate([Path(os.devnull), *outputs]):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, target)
        os.close(descriptor)
    assert not {"transformers", "huggingface_hub", "localist_hf"} & sys.modules.keys()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
