"""The weights in a folder, and what a training starts from."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .record_file import RECORD_FILE


#: The files from which transformers and PEFT load a model's and an adapter's weights.
WEIGHT_FILES = r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors"


def find_base(started_from: str) -> dict[str, Any]:
    """The fields of [`RunRecord`] that say what a training started from."""
    folder = Path(started_from)
    if not started_from or not folder.is_dir():
        return {"base_model": started_from or None, "base_run": None, "base_weights": None}
    return {"base_model": None, "base_run": run_name(folder), "base_weights": weight_hashes(folder)}


def run_name(folder: Path) -> str:
    """The name of the run in a folder; the folder's own name where no record tells it."""
    try:
        return str(json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, LookupError, TypeError):
        return folder.resolve().name


def weight_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every weight file of the model or the adapter in a folder, by its name; others may lie beside them."""
    hashes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if re.fullmatch(WEIGHT_FILES, path.name) is None:
            continue
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
