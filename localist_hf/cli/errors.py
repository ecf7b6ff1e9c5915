"""How a command ends where no traceback helps: with one line, and status 2 for bad input or 1 for a failure."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import InputError, RunError, check_numbers, is_bad_path, is_disk_full, is_out_of_memory, one_line


class CommandError(Exception):
    """
    The end of a command that its user can do something about; `main` prints the message, without a traceback.

    Args:
        message (`str`):
            One line: what is wrong, with names and values, and what is allowed.
        status (`int`, *optional*, defaults to 2):
            Exit status: 2 for input that cannot be used, 1 for a failure.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors end the command as all others do, and which takes no empty argument for a value."""

    def error(self, message: str) -> NoReturn:
        """Raises a [`CommandError`]."""
        raise CommandError(message)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See `argparse`; a path would take an empty name, as of a shell's variable that is not set, for the folder."""
        before = None
        for argument in args or ():
            flag, is_assigned, value = argument.partition("=")
            if not argument or (flag.startswith("--") and is_assigned and not value):
                name = flag or before
                self.error(f"argument {name}: it is empty" if name else "an argument is empty")
            before = argument if argument.startswith("--") else None
        found = super().parse_known_args(args, namespace)
        check_numbers(vars(found[0]))
        return found


@contextmanager
def as_command_error(status: int, *kinds: type[Exception], what: str = "") -> Iterator[None]:
    """
    Makes a [`CommandError`] of the exceptions that are expected inside.

    Args:
        status (`int`):
            Exit status.
        kinds (`type[Exception]`):
            The expected exceptions, such as `INPUT_ERRORS`.
        what (`str`, *optional*, defaults to `""`):
            What the message begins with: the argument and its value, where the exception does not name them.
    """
    try:
        yield
    except (CommandError, InputError, RunError):
        raise
    except kinds as error:
        if is_disk_full(error) or is_out_of_memory(error):  # no matter of the input
            raise
        raise CommandError(what + one_line(error), 2 if is_bad_path(error) else status) from error
