"""The folder of a run: held by one process at a time, and its checkpoints."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .errors import INPUT_ERRORS, CommandError, ending_with


_LOCK_FILE = ".localist-hf.lock"
_STAGING = ".saving"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Holds a run's folder, which is made where it is missing, for this process alone; the operating system lets it go
    when the process ends, however that happens. A folder that was made and is still empty at the end is removed.

    Raises:
        CommandError: where another process holds it, or it cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / _LOCK_FILE)
    with ending_with(2, *INPUT_ERRORS, what=f"`output_dir` is {str(folder)!r}, which cannot be used: "):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CommandError(
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


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; `None` where it is complete and can be read."""
    try:
        # The last file that is written.
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        for index in checkpoint.glob("*.safetensors.index.json"):
            for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                if not (checkpoint / name).is_file():
                    return f"{name} is missing"
        weights = list(checkpoint.glob("*.safetensors"))
        # FSDP and DeepSpeed keep theirs in a folder.
        if not weights and not any(path.is_dir() for path in checkpoint.iterdir()):
            return "its weights are missing"
        for path in weights:
            with safe_open(path, "pt"):  # which compares the file's length with what its header says
                pass
    except FileNotFoundError:
        return "trainer_state.json is missing, which is written last"
    except (ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
        return f"it cannot be read: {error}"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:  # of the optimizer, schedule and random numbers
        if not zipfile.is_zipfile(path):
            return f"{path.name} is damaged"
    return None


def find_checkpoint(wanted: str, folder: Path) -> tuple[Path, dict[Path, str]]:
    """
    The checkpoint to go on from, and the damaged ones that were passed over, with what is wrong with them.

    Args:
        wanted (`str`):
            `"true"` for the last one in `folder`, or a checkpoint's own folder; the one before it where it is damaged.
        folder (`Path`):
            The run's folder.

    Raises:
        CommandError: where there is none, or all are damaged.
    """
    if wanted.lower() == "true":
        candidates = checkpoints(folder)
        if not candidates:
            raise CommandError(f"`resume_from_checkpoint` is true, but `output_dir` {str(folder)!r} has no checkpoint.")
    else:
        first = Path(wanted)
        if not first.is_dir():
            raise CommandError(
                f"`resume_from_checkpoint` is {wanted!r}; there is no such folder. It must be a checkpoint's folder, "
                "or 'true' for the last one in `output_dir`."
            )
        candidates = [first, *(path for path in checkpoints(first.parent) if _step(path) < _step(first))]
    damaged: dict[Path, str] = {}
    for checkpoint in candidates:
        if (what := damage(checkpoint)) is None:
            return checkpoint, damaged
        damaged[checkpoint] = what
    what = "; ".join(f"{path}: {what}" for path, what in damaged.items())
    raise CommandError(f"`resume_from_checkpoint` is {wanted!r}; there is no checkpoint that can be read ({what}).")


def _step(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name; -1 for another name."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


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
