"""JSON in which a key that stands twice is refused, of which Python would keep the last without a word."""

import json
from typing import Any, NoReturn


#: Of 4300 digits and more Python makes no number, and says so in words of its own.
_MOST_DIGITS = 1000


def load_json(text: str, is_strict: bool = False) -> Any:
    """
    Loads a JSON text.

    Args:
        text (`str`):
            The text.
        is_strict (`bool`, *optional*, defaults to `False`):
            Refuse NaN and infinities, which Python reads and JSON does not have.

    Raises:
        ValueError: for what is none, has a key twice, a whole number of more than 1000 digits or half of a character,
            and for what is nested too deeply.
    """
    constants = {"parse_constant": _refuse_constant} if is_strict else {}
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, **constants)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in text.lower():  # nothing else makes half of a pair
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half of a character, one of two surrogates") from error
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON does not have.")


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
