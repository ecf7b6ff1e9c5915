"""Errors of libraries as errors of ours, in one line."""

import errno

import pytest

from localist_hf.errors import InputError, RunError, reraised_as


def test_what_is_expected_is_named_in_one_line() -> None:
    with (
        pytest.raises(InputError, match=r"^`model` is 'a': no such model$"),
        reraised_as(InputError, OSError, what="`model` is 'a': "),
    ):
        raise OSError("no such\n  model")
    with pytest.raises(KeyError), reraised_as(InputError, OSError):  # nobody expects it: it keeps its traceback
        raise KeyError("a")
    assert issubclass(InputError, ValueError) and issubclass(RunError, RuntimeError)


@pytest.mark.parametrize("error", [InputError("`a` is 1."), RunError("the training diverged.")])
def test_what_is_said_already_is_said_once(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reraised_as(InputError, Exception, what="`b` is 2: "):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("CUDA out of memory.")]
)
def test_a_full_disk_and_want_of_memory_are_no_matter_of_the_input(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reraised_as(InputError, Exception, what="`model` is 'a': "):
        raise error
    assert raised.value is error
