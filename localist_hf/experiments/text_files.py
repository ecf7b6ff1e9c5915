"""Files that are read: what must be one, and what must be text in it."""

import codecs
import os
from pathlib import Path


#: A byte order mark at the beginning is no part of the text.
ENCODING = "utf-8-sig"


def is_unicode(text: str) -> bool:
    """Whether a string holds no half of a surrogate pair: those that do are no text to tokenizers and files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_fault(path: Path) -> str | None:
    """Tells what is wrong with a file that must hold UTF-8 text; `None` for nothing."""
    decoder, has_text, line = codecs.getincrementaldecoder(ENCODING)(), False, 1
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                if b"\0" in chunk:  # valid UTF-8, but no text has it: other encodings and binary files do
                    return "it must be UTF-8 text (it holds zero bytes)"
                has_text = bool(decoder.decode(chunk).strip()) or has_text
                line += chunk.count(b"\n")
        decoder.decode(b"", final=True)  # a letter cut off at the end
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        return f"it must be UTF-8 text (line {line}: {error.reason})"
    return None if has_text else "the file is empty"


def file_fault(file: str | Path) -> str | None:
    """Tells why something is no file to read; `None` where it is one. What comes through a pipe is there once."""
    if os.path.isfile(file):  # which takes names that no file can have
        return None
    if os.path.isdir(file):
        return "it is a folder and must be a file"
    return "it is no file that can be read twice" if os.path.exists(file) else "there is no such file"
