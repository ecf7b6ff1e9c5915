"""JSON in which a key that stands twice is refused, of which Python would keep the last without a word."""

import json
from typing import Any


#: Of 4300 digits and more Python makes no number, and says so in words of its own.
_MOST_DIGITS = 1000


def load_json(text: str) -> Any:
    """
    Loads a JSON text.

    Raises:
        ValueError: for what is none, has a key twice, or a whole number of more than 1000 digits.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_int=_whole)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands there twice")
        values[key] = value
    return values


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"the number {digits} has more than {_MOST_DIGITS} digits")
    return int(digits)
