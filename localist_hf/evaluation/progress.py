"""How far a measurement is: bars for people at a terminal, by transformers' own switch (`disable_progress_bar`)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.utils import logging

from .check_model import core_model


_Item = TypeVar("_Item")


def progress(items: Iterable[_Item], desc: str) -> Iterable[_Item]:
    """The same items, with a bar of how many there were; none where standard error is no terminal."""
    return logging.tqdm(items, desc=desc, unit="batch", disable=None, leave=False)


@contextmanager
def progress_of_passes(model: PreTrainedModel, number: int, desc: str) -> Iterator[None]:
    """A bar, as of [`progress`], of what a model's transformer runs inside, which is that often at most."""
    with logging.tqdm(total=number, desc=desc, unit="pass", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return

        def count(*_: Any) -> None:
            bar.update()

        hook = core_model(model).base_model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
