"""Which checkpoints of a run can be gone on from."""

import json
import os
import pickletools
import shutil
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .run_history import RunHistory


# What is written first to a checkpoint of ours.
_MARK = ".localist-hf"
# What the names of checkpoints begin with that are being removed.
_REMOVED = ".localist-hf.removed-"


def find_checkpoint(wanted: str | os.PathLike | bool, output_dir: str | os.PathLike) -> tuple[Path, dict[Path, str]]:
    """
    The checkpoint that training is to go on from: the one that is wanted, or, where a crash has left that one
    half-written, the last before it that is whole.

    Args:
        wanted (`str`, `os.PathLike` or `True`):
            A checkpoint's folder, or `True` for the last one in `output_dir`.
        output_dir (`str` or `os.PathLike`):
            Folder of the run.

    Returns:
        `tuple(Path, dict[Path, str])`: the checkpoint, and those that were passed over with what is wrong with them.

    Raises:
        ValueError: where there is none, or none is whole.
    """
    if wanted is True:
        candidates = list_checkpoints(output_dir)
        if not candidates:
            raise ValueError(
                f"`resume_from_checkpoint` is True, but `output_dir` {str(output_dir)!r} has no checkpoint."
            )
    else:
        first = Path(wanted)
        if not first.is_dir():
            raise ValueError(
                f"`resume_from_checkpoint` is {str(wanted)!r}; there is no such folder. It must be a checkpoint's, "
                "or True (on the command line 'true') for the last one in `output_dir`."
            )
        others = list_checkpoints(first.parent)
        candidates = [first, *(others[others.index(first) + 1 :] if first in others else ())]
    damages: dict[Path, str] = {}
    for checkpoint in candidates:
        if (damage := checkpoint_damage(checkpoint)) is None:
            return checkpoint, damages
        damages[checkpoint] = damage
    found = "; ".join(f"{path}: {damage}" for path, damage in damages.items())
    raise ValueError(
        f"`resume_from_checkpoint` is {str(wanted)!r}; there is no whole checkpoint ({found}). "
        "Start anew, on the command line with `--overwrite_output_dir`."
    )


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the last step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = {path: path.name.removeprefix("checkpoint-") for path in folders}
    return sorted((path for path in folders if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def mark_as_own(checkpoint: str | os.PathLike) -> None:
    """Makes a checkpoint's folder, or notes of it, before anything is written to it, that it is a trainer's of ours."""
    Path(checkpoint).mkdir(parents=True, exist_ok=True)
    (Path(checkpoint) / _MARK).touch()


def is_own_checkpoint(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint, perhaps half-written, is of a trainer of ours, which may remove and overwrite it."""
    checkpoint = Path(checkpoint)
    if checkpoint.is_symlink():
        return False
    if (checkpoint / _MARK).exists():
        return True
    try:  # of a former version, which has left no mark
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return RunHistory.__name__ in state["stateful_callbacks"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint's folder, or a link to one; what is left where that is cut short is no checkpoint."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    remove_leftovers(checkpoint.parent)
    checkpoint = checkpoint.rename(checkpoint.with_name(f"{_REMOVED}{checkpoint.name}"))
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Removes what is left of checkpoints where a process was killed while it removed them."""
    for path in Path(output_dir).glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_damage(checkpoint: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, `None` where nothing is: whether every file is there and as long as it says of
    itself. Reads the heads of files, not their contents, so that gigabytes take no time.
    """
    checkpoint = Path(checkpoint)
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{state.name}, which is written last, is missing"
    indices = sorted(checkpoint.glob("*.safetensors.index.json"))
    for path in (state, *indices):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            told = content["weight_map" if path in indices else "global_step"]
            shards = told.values() if path in indices else ()
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            return f"{path.name} cannot be read ({error})"
        if missing := sorted(shard for shard in set(shards) if not (checkpoint / shard).is_file()):
            return f"{missing[0]} is missing"
    weights = sorted(checkpoint.glob("*.safetensors"))
    # FSDP and DeepSpeed keep theirs in a folder.
    if not weights and not any(path.is_dir() for path in checkpoint.iterdir()):
        return "its weights are missing"
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    # transformers goes on without what is missing, as if that had been left out on purpose (`save_only_model`).
    kinds = {"optimizer.pt": "optimizer*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*.pth"}
    missing = [name for name, pattern in kinds.items() if not any(checkpoint.glob(pattern))]
    if 0 < len(missing) < len(kinds) and not any(path.is_dir() for path in checkpoint.iterdir()):
        return f"{missing[0]} is missing"
    for pattern in ("*.pt", "*.pth", "*.bin"):  # of the optimizer, the schedule and the random numbers
        for path in sorted(checkpoint.glob(pattern)):
            try:
                with zipfile.ZipFile(path) as archive:
                    (pickled,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                    for _ in pickletools.genops(archive.read(pickled)):  # looked at, and not run
                        pass
            except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
                return f"{path.name} cannot be read"
    return None
