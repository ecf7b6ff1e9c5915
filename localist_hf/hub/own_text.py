"""The part of a card that is people's own: it is kept where all around it is made anew."""

import hashlib
import re


_BEGIN = "<!-- Your own text goes below this line: it is kept, where the rest of the card is made anew. -->"
_END = re.compile(r"<!-- Your own text goes above this line\. \(localist-hf ([0-9a-f]{16})\) -->\s*\Z")


def with_own_text(card: str, own: str = "") -> str:
    """
    A card with a part at its end that is people's own, and a digest of the rest, by which [`own_text`] sees whether
    that was changed by hand.

    Args:
        card (`str`):
            The card, perhaps with such a part already, which is replaced.
        own (`str`, *optional*, defaults to `""`):
            What people wrote.
    """
    body = card.partition(_BEGIN)[0].rstrip()
    own = own.replace("\r\n", "\n") if own.strip() else ""
    end = "" if not own or own.endswith("\n") else "\n"
    return f"{body}\n\n{_BEGIN}\n{own}{end}<!-- Your own text goes above this line. (localist-hf {_digest(body)}) -->\n"


def own_text(card: str, where: str, how: str = "Move the file away") -> str:
    """
    What people wrote into their part of a card, to the letter; nothing where it is blank.

    Args:
        card (`str`):
            The card, as [`with_own_text`] has made it.
        where (`str`):
            Where it is from, for the message.
        how (`str`, *optional*, defaults to `"Move the file away"`):
            What is to be done where it cannot be made anew.

    Raises:
        ValueError: for a card that was changed elsewhere, or is from somebody else.
    """
    body, begin, rest = card.removeprefix("\ufeff").replace("\r\n", "\n").partition(_BEGIN)
    end = _END.search(rest)
    if not begin or end is None or end[1] != _digest(body):
        raise ValueError(
            f"{where} is not as this version of localist-hf writes it, and would be overwritten. {how}; text of your "
            "own is kept from then on between the two lines for it at the end of the new card."
        )
    own = rest[: end.start()].removeprefix("\n")
    return own if own.strip() else ""


def keep_own_text(card: str, found: str, where: str) -> str:
    """
    A card with what people wrote into another one, which it takes the place of.

    Raises:
        ValueError: where the other was changed elsewhere, or people wrote something else into each.
    """
    mine = own_text(card, "The card")
    theirs = own_text(found, where, "Remove the file there")
    if mine and theirs and mine.strip() != theirs.strip():
        raise ValueError(
            f"{where} holds another text of people's own than the card in the run's folder; make them the same, or "
            "leave it in one of them alone."
        )
    return with_own_text(card, theirs or mine)


def _digest(body: str) -> str:
    """Of a text, whatever an editor did to the ends of its lines."""
    lines = [line.rstrip() for line in body.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
