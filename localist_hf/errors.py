"""Errors that say in one line what is wrong, and what those of libraries mean."""

import errno
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .command_line import shortened


#: What our code and the libraries raise for input that they cannot use.
INPUT_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: How torch and what lies below it say that there is no memory, which only Python has a type of error for.
_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed", "new thread", "failed to map"
)  # fmt: skip


class InputError(ValueError):
    """Input that cannot be used; the message says in one line what is wrong, with names and values."""


class RunError(RuntimeError):
    """A run that failed for a reason its user can do something about; the message says in one line which."""


@contextmanager
def reraised_as(kind: type[InputError | RunError], *expected: type[Exception], what: str = "") -> Iterator[None]:
    """
    Makes an [`InputError`] or a [`RunError`] of the exceptions that are expected inside; those that are one already
    pass, and so do those that say that memory or the disk is full.

    Args:
        kind (`type[InputError | RunError]`):
            What is raised.
        expected (`type[Exception]`):
            The expected exceptions, such as `INPUT_ERRORS`.
        what (`str`, *optional*, defaults to `""`):
            What the message begins with: the argument and its value, where the exception does not name them.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except expected as error:
        if is_disk_full(error) or is_out_of_memory(error):  # no matter of the input
            raise
        raise kind(what + one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, and without the end of those that explain at length."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # the message around it names the validator
    # A message that is nothing but a key or a word says what it means only with its type.
    message = str(error) if " " in str(error) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(shortened(message), 400, placeholder=" ...")


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
