"""The text that every CPython ships, whole files dealt out to parts: no download, and the same parts everywhere."""

import hashlib
import importlib
import platform
import sysconfig
from pathlib import Path
from typing import Any


#: Shares of the text in hundredths: the base trains on the first part, the variants on the second, and all are measured
#: on the third.
SHARES = {"base": 85, "variants": 10, "held-out": 5}

# Tests and data tables are no prose of a programmer.
_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "pydoc_data",
    "unicode", "topics.py",
}  # fmt: skip
_MAX_BYTES = 400_000


def python_reference() -> dict[str, str]:
    """
    The topics of the Python language reference, which every CPython ships as `pydoc_data.topics` (about 460 KB of
    English technical prose; the text differs a little between Python versions).
    """
    topics: dict[str, Any] = importlib.import_module("pydoc_data.topics").topics
    return {name: text.strip() + "\n\n" for name, text in sorted(topics.items())}


def python_text() -> dict[str, str]:
    """
    The sources of the standard library and the topics of the language reference, by their names: about 9 MB of Python
    and English. The text differs a little between versions of Python.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {
        path.relative_to(library).as_posix(): path
        for path in sorted(library.rglob("*.py"))
        if not _LEFT_OUT & set(path.relative_to(library).parts)
        and not path.name.startswith("_sysconfigdata")  # what the machine that built this Python was like
        and 0 < path.stat().st_size < _MAX_BYTES
    }
    sources = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
    return sources | {f"reference/{name}": text for name, text in python_reference().items()}


def part_of(name: str) -> str:
    """
    The part that a file belongs to. It depends on nothing but the file's name, so that no version of Python holds out
    what a model of another has seen.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % sum(SHARES.values())
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    raise AssertionError


def split_text(texts: dict[str, str]) -> dict[str, list[str]]:
    """Deals texts out to the parts."""
    parts: dict[str, list[str]] = {part: [] for part in SHARES}
    for name, text in texts.items():
        parts[part_of(name)].append(text)
    return parts


def python_card(num_sequences: dict[str, int], tokens: str) -> dict[str, Any]:
    """
    Returns what model cards say about this text.

    Args:
        num_sequences (`dict[str, int]`):
            How many sequences of each part are used.
        tokens (`str`):
            What it is tokenised by.
    """
    shares = ", ".join(f"{share} % for {name}" for name, share in SHARES.items())
    used = ", ".join(f"{number} for {name}" for name, number in num_sequences.items())
    return {
        "dataset": "Python standard library and language reference",
        "dataset_details": f"It is what CPython {platform.python_version()} ships of both, whole files dealt out by "
        f"their names to three parts ({shares}); sequences used: {used}, tokenised by {tokens}.",
        "evaluation_split": "held-out",
        "language": "en",
    }
