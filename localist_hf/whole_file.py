"""Files that are written whole or not at all."""

from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """
    Writes a file that holds the whole content or, where that fails, what it held before. In place of a link there is a
    file then; what that led to stays as it was.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_can_be_written(path: str | Path) -> None:
    """
    Tries whether a file can be written, before the work that goes into it.

    Raises:
        OSError, ValueError: as [`write_whole`] would.
    """
    unfinished = _unfinished(Path(path))
    try:
        unfinished.open("xb").close()
    except FileExistsError:  # somebody is writing it
        return
    unfinished.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".localist-hf.{path.name}.unfinished")  # a name that nobody else's file has
