"""The part of a card that is people's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localist_hf.hub.own_text import keep_own_text, own_text, with_own_text


characters = st.characters(codec="utf-8", exclude_characters="\r<")
words = st.text(characters, max_size=40)


@given(card=words, own=words)
def test_what_people_wrote_is_read_back_and_kept(card: str, own: str) -> None:
    whole = with_own_text(card, own)
    assert own_text(whole, "it").removesuffix("\n") == (own.removesuffix("\n") if own.strip() else "")
    assert with_own_text(whole, own) == whole
    assert keep_own_text(with_own_text("new"), whole, "it") == with_own_text("new", own)
    # An editor may end lines in its own way.
    assert own_text(whole.replace("\n", "\r\n"), "it") == own_text(whole, "it")


CARD = with_own_text("---\nlicense: mit\n---\n\n# A card\n\nWords.")


@pytest.mark.parametrize(
    "edited",
    [
        CARD.replace("mit", "apache-2.0"),
        CARD.replace("Words.", "Words. And mine."),
        CARD + "\nMine, behind the end.\n",
        CARD.replace("<!-- Your own text goes below", "<!-- Your text goes below"),
        "# Somebody's card\n",
        "",
    ],
)
def test_what_was_edited_elsewhere_is_refused(edited: str) -> None:
    with pytest.raises(ValueError, match=r"^it is not as this version of localist-hf writes it"):
        own_text(edited, "it")


def test_of_two_texts_none_is_lost() -> None:
    mine, theirs = with_own_text("a", "mine"), with_own_text("b", "theirs")
    with pytest.raises(ValueError, match="it holds another text"):
        keep_own_text(mine, theirs, "it")
    assert keep_own_text(mine, with_own_text("b", "mine"), "it") == mine
    assert keep_own_text(mine, with_own_text("b"), "it") == mine
