"""The text that every CPython ships, whole files dealt out to parts: no download, and the same parts everywhere."""

import hashlib
import sysconfig
from pathlib import Path

from .data import python_reference


#: Shares of the text in hundredths: the base trains on the first part, the variants on the second, and all are measured
#: on the third.
SHARES = {"base": 85, "variants": 10, "held-out": 5}

# Tests and data tables are no prose of a programmer.
_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "pydoc_data",
    "unicode", "topics.py",
}  # fmt: skip
_MAX_BYTES = 400_000


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
    """The texts of each part."""
    parts: dict[str, list[str]] = {part: [] for part in SHARES}
    for name, text in texts.items():
        parts[part_of(name)].append(text)
    return parts
