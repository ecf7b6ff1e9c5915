"""What the live page is told when it asks its server, of which anybody may ask anything."""

import inspect
import json
import threading
from collections.abc import Callable
from typing import Any


#: The types that what is asked may have, and what they are called: the words are JSON's.
_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    str | None: (str | None, "a text or null"),
    int: (int, "a whole number"),
    int | None: (int | None, "a whole number or null"),
    float: (int | float, "a number"),
}
_MOST_CHARACTERS = 60
#: The threads that are answering something.
AT_WORK: set[int] = set()


def answer(ask: Callable[..., Any], asked: Any) -> dict[str, Any]:
    """
    Asks something that a page has asked.

    Args:
        ask (`Callable`):
            A function such as a method of [`Readings`], whose annotations say which arguments it takes.
        asked (`Any`):
            What has come as its arguments, of which nothing is known but that it was JSON.

    Returns:
        `dict[str, Any]`: under `"answer"` what it returns, or under `"problem"` a sentence that says why it does not.
    """
    AT_WORK.add(threading.get_ident())
    try:
        _check(ask, asked)
        return {"answer": ask(**asked)}
    except (ValueError, TypeError, LookupError, OSError) as error:
        return {"problem": str(error)}
    finally:
        AT_WORK.discard(threading.get_ident())


def _check(ask: Callable[..., Any], asked: Any) -> None:
    parameters = inspect.signature(ask).parameters
    fields = ", ".join(parameters)
    if not isinstance(asked, dict):
        raise ValueError(f"The request is {_shown(asked)}; it must be an object with the fields {fields}.")
    if asked.keys() != parameters.keys():
        raise ValueError(f"The request has the fields {_shown(list(asked))}; it must have {fields}.")
    for name, value in asked.items():
        kind, called = _KINDS[parameters[name].annotation]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"`{name}` is {_shown(value)}; it must be {called}.")


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]}..."
