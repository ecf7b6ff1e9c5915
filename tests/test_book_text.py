"""The study's book: every verse once, in its chapter and its book, and whole books held out."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


PRINTED = """\
Ge1:1 In the beginning.
Ge1:2 And the earth.
Ge2:1 Thus the heavens.
1Sm1:1 Now there was: a man.
1Sm2:1 And Hannah prayed.
2Sm1:1 Now it came to pass.
"""


@pytest.fixture
def book_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "study"))
    return importlib.import_module("book_text")


def test_verses_are_put_together_by_chapter_and_book(book_text: ModuleType) -> None:
    assert book_text.books(PRINTED) == [
        "In the beginning. And the earth.\n\nThus the heavens.",
        "Now there was: a man.\n\nAnd Hannah prayed.",
        "Now it came to pass.",
    ]


@pytest.mark.parametrize("line", ["Ge1 In the beginning.", "In the beginning.", "Ge1:1", "Ge1:x In"])
def test_what_is_no_verse_is_refused_with_the_line(book_text: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match=r"`verses` has the line '" + line):
        book_text.books(f"{PRINTED}{line}\n")


def test_every_book_is_in_one_part_whole(book_text: ModuleType) -> None:
    texts = [f"book {number}" for number in range(66)]
    parts = book_text.split(texts)
    assert len(parts["held_out"]) == 6
    assert sorted([*parts["training"], *parts["held_out"]]) == sorted(texts)
