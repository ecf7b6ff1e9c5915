"""Which checkpoints of a run can be gone on from."""

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging


logger = logging.get_logger(__name__)


def find_checkpoint(wanted: str | os.PathLike | bool, output_dir: str | os.PathLike) -> Path:
    """
    The checkpoint that training is to go on from.

    Args:
        wanted (`str`, `os.PathLike` or `True`):
            A checkpoint's folder, or `True` for the last one in `output_dir` that is whole: one that a crash has left
            half-written is passed over with a warning.
        output_dir (`str` or `os.PathLike`):
            Folder of the run.

    Raises:
        ValueError: where there is none, or it is damaged.
    """
    if wanted is not True:
        if (damage := checkpoint_damage(wanted)) is not None:
            raise ValueError(f"`resume_from_checkpoint` is {str(wanted)!r}, which is no whole checkpoint: {damage}.")
        return Path(wanted)
    damages = {}
    for checkpoint in list_checkpoints(output_dir):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"{checkpoint} is no whole checkpoint and is passed over: {damage}.")
        damages[checkpoint.name] = damage
    found = "; ".join(f"{name}: {damage}" for name, damage in damages.items()) or "it holds none"
    raise ValueError(
        f"`resume_from_checkpoint` is True, but `output_dir` {str(output_dir)!r} has no whole checkpoint ({found})."
    )


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the last step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = {path: path.name.removeprefix("checkpoint-") for path in folders}
    return sorted((path for path in folders if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def checkpoint_damage(checkpoint: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, `None` where nothing is: whether every file is there and as long as it says of
    itself. Reads the heads of files, not their contents, so that gigabytes take no time.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{state.name}, which is written last, is missing"
    indices = sorted(checkpoint.glob("*.safetensors.index.json"))
    for path in (state, *indices):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = content["weight_map"].values() if path in indices else ()
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            return f"{path.name} cannot be read ({error})"
        if missing := sorted(shard for shard in set(shards) if not (checkpoint / shard).is_file()):
            return f"{missing[0]} is missing"
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    for pattern in ("*.pt", "*.pth", "*.bin"):  # of the optimizer, the schedule and the random numbers
        for path in sorted(checkpoint.glob(pattern)):
            if not zipfile.is_zipfile(path):
                return f"{path.name} cannot be read"
    return None
