"""Files that are written whole or not at all."""

from pathlib import Path
from uuid import uuid4


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file that holds the whole content or, where that fails, what it held before."""
    path = Path(path).resolve()
    # A name that nobody else's file has.
    unfinished = path.with_name(f".{uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
