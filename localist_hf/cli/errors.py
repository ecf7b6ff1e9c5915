"""How a command ends where no traceback helps: with one line, and status 2 for bad input or 1 for a failure."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError, RunError, is_bad_path, is_disk_full, is_out_of_memory, one_line


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
