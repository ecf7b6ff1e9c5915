"""How a command ends where no traceback helps: with one line, and status 2 for bad input or 1 for a failure."""

import argparse
import errno
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


#: What our code and the libraries raise for input that they cannot use.
INPUT_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: How torch and what lies below it say that there is no memory, which only Python has a type of error for.
_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed", "new thread", "failed to map"
)  # fmt: skip
#: No number that a command takes has a use beyond that of a seed; with such ones nothing that is computed of them, be
#: it a product, leaves what torch can hold.
LARGEST = 2**32 - 1


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


def check_numbers(values: Mapping[str, Any]) -> None:
    """
    Raises:
        CommandError: for a number that is not finite, or beyond `LARGEST`.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CommandError(f"`{name}` is {value}; it must be a finite number.")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            bound = "below 2**32" if value > 0 else "above -2**32"
            raise CommandError(f"`{name}` is {value}; it must be {bound}.")


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
    except CommandError:
        raise
    except kinds as error:
        if is_disk_full(error) or is_out_of_memory(error):  # no matter of the input
            raise
        raise CommandError(what + one_line(error), 2 if is_bad_path(error) else status) from error


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, and without the end of those that explain at length."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # the message around it names the validator
    # A message that is nothing but a key or a word says what it means only with its type.
    message = str(error) if " " in str(error) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(message, 400, placeholder=" ...")


def is_bad_path(error: BaseException) -> bool:
    """Whether an exception says that a path can be none: too long, or in a loop of links."""
    # Python 3.11 and 3.12 have words of their own for a loop.
    is_loop = isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")
    return is_loop or (isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that a file could not be written for want of space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        # Rust and C++ say it in words; torch's writer of zip files knows only that a write failed.
        if isinstance(error, SafetensorError) and "os error 28" in str(error):
            return True
        if isinstance(error, RuntimeError) and "inline_container.cc" in str(error) and "unexpected pos" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that there is not enough memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError | SafetensorError | ImportError) and any(
            each in str(error).lower() for each in _NO_MEMORY
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
