"""
A book to train and measure on, as arXiv:2511.18375 does: the King James Bible, out of Debian's packages, with every
eleventh of its books held out whole.

    apt-get install bible-kjv bible-kjv-text
    python study/book_text.py runs/book

writes `training.jsonl` and `held_out.jsonl` there, a book in each row: chapters apart by an empty line, verses without
their numbers.
"""

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path


#: What Debian's `bible` prints all of, a verse in each line, after its place: `Ge1:1 In the beginning ...`.
COMMAND = ("bible", "-f", "gen1:1-rev22:21")
#: One of so many books is held out.
EVERY = 11


def books(verses: str) -> list[str]:
    """
    The text of each book.

    Args:
        verses (`str`):
            What `bible` prints.

    Raises:
        ValueError: for a line that is no verse.
    """
    chapters = []
    for line in verses.splitlines():
        place, _, text = line.partition(" ")
        chapter, colon, verse = place.partition(":")
        if not (colon and verse.isdecimal() and text):
            raise ValueError(f"`verses` has the line {line!r}; it must be a place such as 'Ge1:1', and the verse.")
        chapters.append((chapter, text))
    texts = [(place, " ".join(text for _, text in verses)) for place, verses in groupby(chapters, lambda each: each[0])]
    of_books = groupby(texts, lambda each: each[0].rstrip("0123456789"))
    return ["\n\n".join(text for _, text in chapters) for _, chapters in of_books]


def split(texts: list[str]) -> dict[str, list[str]]:
    """Whole books to train on and to measure on."""
    return {
        "training": [text for index, text in enumerate(texts) if index % EVERY],
        "held_out": texts[::EVERY],
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        printed = subprocess.run(COMMAND, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        sys.exit("There is no program `bible`: apt-get install bible-kjv bible-kjv-text")
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in split(books(printed)).items():
        lines = "".join(f"{json.dumps({'text': text})}\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(texts)} books, {len(lines) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
