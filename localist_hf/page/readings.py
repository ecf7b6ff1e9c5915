"""What the live page's server keeps: models by name, and what was read with them."""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .page_data import page_data
from .reading import Passage, Reading, read, read_beside


#: Longer texts are refused, whatever the model takes: the queries and keys of every layer are held in memory.
MAX_TOKENS = 2048
_KEPT_MODELS, _KEPT_READINGS = 2, 4

Load = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class Readings:
    """
    The models that a page's readers have asked for, and what was read with them; what was not asked for longest makes
    room. Models do one thing at a time: each serves one thread, and two at once would take twice as long. Attention
    weights need no model any more, and wait for none.

    Args:
        load (`Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]`):
            Loads a localised model and its tokenizer by name. It raises a `ValueError` with a sentence for the reader
            where that cannot be done.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._models_lock, self._readings_lock = threading.Lock(), threading.Lock()
        self._models: OrderedDict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = OrderedDict()
        self._readings: OrderedDict[str, list[Reading]] = OrderedDict()

    def read(self, text: str, model: str, compare: str | None) -> dict[str, Any]:
        """
        Reads a text.

        Args:
            text (`str`), model (`str`):
                The text, and the name of the model.
            compare (`str`, *optional*):
                The name of a second one.

        Returns:
            `dict[str, Any]`: `"page"`, what the page draws, and `"key"`, by which the other methods know it.

        Raises:
            ValueError: for what cannot be read.
        """
        if not model:
            raise ValueError("`model` is empty; give a model's folder or Hub id.")
        with self._models_lock:
            first, tokenizer = self._model(model)
            passage = _passage(tokenizer, text)
            readings = [read(first, passage)]
            if compare:
                second, tokenizer = self._model(compare)
                readings.append(read_beside(readings[0], second, _passage(tokenizer, text)))
            key = uuid.uuid4().hex
            with self._readings_lock:
                _keep(self._readings, key, readings, _KEPT_READINGS)
            return {"key": key, "page": page_data(readings, has_rows=False)}

    def weights(self, key: str, reading: int, layer: int, head: int | None, position: int) -> list[float]:
        """The attention weights of one query, of the mean over heads where `head` is `None`."""
        row = self._reading(key, reading).weights(layer, position)
        if head is not None and not 0 <= head < len(row):
            raise ValueError(f"`head` is {head}; it must be in 0 to {len(row) - 1}.")
        return (row.mean(0) if head is None else row[head]).tolist()

    def predict(self, key: str, reading: int, position: int, dial: float) -> dict[str, Any]:
        """What comes after a position under the dial: a [`Prediction`] for the page."""
        with self._models_lock:
            found = self._reading(key, reading).predict(position, dial)
        return {
            "tokens": found.tokens,
            "probabilities": found.probabilities,
            "actual": found.actual_probability,
            "divergence": found.divergence,
            "continuation": found.continuation,
        }

    def _model(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        loaded = self._models.get(name) or self._load(name)
        _keep(self._models, name, loaded, _KEPT_MODELS)
        kept = [model for model, _ in self._models.values()]
        with self._readings_lock:  # a reading holds its model in memory
            gone = [key for key, found in self._readings.items() if not all(one.model in kept for one in found)]
            for key in gone:
                del self._readings[key]
        return loaded

    def _reading(self, key: str, reading: int) -> Reading:
        with self._readings_lock:
            if key not in self._readings:
                raise ValueError("This text was read too long ago, and others have taken its place: read it again.")
            self._readings.move_to_end(key)
            readings = self._readings[key]
        if not 0 <= reading < len(readings):
            raise ValueError(f"`reading` is {reading}; it must be in 0 to {len(readings) - 1}.")
        return readings[reading]


def _keep(kept: OrderedDict[str, Any], key: str, value: Any, number: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > number:
        kept.popitem(last=False)


def _passage(tokenizer: PreTrainedTokenizerBase, text: str) -> Passage:
    passage = Passage.of(tokenizer, text)
    if len(passage) > MAX_TOKENS:
        raise ValueError(f"`text` has {len(passage)} tokens; this page takes {MAX_TOKENS}.")
    return passage
