"""The folder of a run: held by one process at a time, and written as a whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import INPUT_ERRORS, CommandError, ending_with


_LOCK_FILE = ".localist-hf.lock"
_STAGING = ".saving"


class FolderHeld(CommandError):
    """Another process is at work in a folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Holds a run's folder, which is made where it is missing, for this process alone; the operating system lets it go
    when the process ends, however that happens. A folder that was made and is still empty at the end is removed.

    Raises:
        FolderHeld: where another process holds it.
        CommandError: where it cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / _LOCK_FILE)
    with ending_with(2, *INPUT_ERRORS, what=f"`output_dir` is {str(folder)!r}, which cannot be used: "):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FolderHeld(
                f"`output_dir` is {str(folder)!r}, where another `localist-hf` is at work; choose another folder, or "
                "wait for its end."
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _LOCK_FILE).unlink()
        lock.release()
        for path in missing:
            with suppress(OSError):  # not empty
                path.rmdir()


@contextmanager
def replacing(folder: Path, is_main_process: bool = True) -> Iterator[Path]:
    """
    A folder to save a model to, whose files take the place of those in `folder` when all of them are written. Weights
    of the model before are removed; where the saving fails, that model stays as it is.
    """
    staging = folder / _STAGING
    try:
        yield staging
        if is_main_process:
            saved = {path.name for path in staging.iterdir()}
            for name in saved:
                (staging / name).replace(folder / name)
            for pattern in ("*.safetensors", "*.safetensors.index.json", "adapter_config.json"):
                for path in folder.glob(pattern):
                    if path.name not in saved:
                        path.unlink()
    finally:
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that holds the whole text or, where that fails, what it held before."""
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
