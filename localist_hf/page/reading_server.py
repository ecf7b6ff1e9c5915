"""What the live page's server keeps: models by name, and what was read with them."""

import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.check_model import core_model, num_positions
from .page_data import packed_blocks, page_data
from .passage import Passage, num_tokens
from .reading import Reading, read, read_beside


#: Longer texts are refused, whatever the model takes and however fast it is.
MAX_TOKENS = 2048
#: Tokens take time, so characters are counted first: so many for each token that may be read. English has 4 to 5.
CHARACTERS_PER_TOKEN = 16
#: What a reading may take: everybody else waits so long.
MAX_SECONDS = 2.0
#: What is kept takes no more memory, unless it is two models, which may be compared, or one reading.
_MODEL_BYTES, _READING_BYTES = 2**31, 2**30


def max_characters(max_tokens: int | None) -> int:
    """Characters of the longest text that any model may read."""
    return CHARACTERS_PER_TOKEN * (max_tokens or MAX_TOKENS)


Load = Callable[[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class _Model(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    #: How many tokens it reads in `MAX_SECONDS`.
    tokens_in_time: float


class Readings:
    """
    The models that a page's readers have asked for, and what was read with them. What was not asked for longest makes
    room, and is read again when it is asked for: every request names all that it is about, and equal ones share one
    reading. Models do one thing at a time: each serves one thread, and two at once would take twice as long. Attention
    weights of what has been read need no model any more, and wait for none.

    Args:
        load (`Callable[[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]`):
            Loads a localised model and its tokenizer by name. Where that cannot be done, it raises a `ValueError` with
            a sentence for the reader, in which the model is called by the second argument: `"model"` or `"compare"`.
        max_tokens (`int`, *optional*):
            Tokens of the longest text that is read; by default 2048, or as many as take two seconds.
        models (`Collection[str]`, *optional*):
            The names that may be asked for; by default any.
    """

    def __init__(self, load: Load, max_tokens: int | None = None, models: Collection[str] | None = None) -> None:
        self._load, self._max_tokens, self._names = load, max_tokens, models
        self._models_lock, self._kept_lock = threading.Lock(), threading.Lock()
        self._models: OrderedDict[str, tuple[_Model, int]] = OrderedDict()
        self._readings: OrderedDict[tuple[str, str, str], tuple[list[Reading], int]] = OrderedDict()

    def read(self, text: str, model: str, compare: str | None) -> dict[str, Any]:
        """
        Reads a text.

        Args:
            text (`str`), model (`str`):
                The text, and the name of the model.
            compare (`str`, *optional*):
                The name of a second one.

        Returns:
            `dict[str, Any]`: what the page draws.

        Raises:
            ValueError: for what cannot be read.
        """
        return page_data(self._read((text, model, compare or "")), has_rows=False)

    def weights(
        self, text: str, model: str, compare: str | None, reading: int, layer: int, head: int | None, position: int,
        dial: float, target: int | None,
    ) -> list[float]:  # fmt: skip
        """
        The attention weights of one query under the dial, told to look at a block or not; of the mean over heads where
        `head` is `None`.
        """
        key = text, model, compare or ""
        ask = self._ask if self._has_weights(key, reading, dial, position, target) else self._ask_model
        return _of_head(ask(key, reading, lambda one: one.weights(layer, position, dial, target)), head).tolist()

    def looked_at(
        self, text: str, model: str, compare: str | None, reading: int, layer: int, head: int | None, position: int,
        dial: float,
    ) -> list[float]:  # fmt: skip
        """The weights that a token has for itself and for those after it: [`Reading.looked_at`]."""
        key = text, model, compare or ""
        ask = self._ask if self._has_weights(key, reading, dial, position, None) else self._ask_model
        return _of_head(ask(key, reading, lambda one: one.looked_at(layer, position, dial)), head).tolist()

    def reach(self, text: str, model: str, compare: str | None, reading: int, dial: float) -> dict[str, Any]:
        """What each prediction can depend on, on the blocks that are shown, and the sentence that says so."""
        found = self._ask_model((text, model, compare or ""), reading, lambda one: one.dependence.reach(dial))
        return {"first": found.first[0].tolist() if found.is_bounded else None, "statement": found.statement}

    def influence(
        self, text: str, model: str, compare: str | None, reading: int, position: int, dial: float, target: int | None,
        unit: str, end: int,
    ) -> dict[str, Any]:  # fmt: skip
        """A portion of what a prediction rests on, in bits, and how much is left: [`Dependence.influence`]."""
        key = text, model, compare or ""
        left, values = self._ask_model(
            key, reading, lambda one: one.dependence.influence(position, dial, unit, end, target)
        )
        return {"left": left, "bits": values}

    def blocks(self, text: str, model: str, compare: str | None, reading: int, layer: int, head: int | None) -> str:
        """Which blocks the words of each block look at: [`Reading.block_attention`], packed."""
        shares = self._ask_model((text, model, compare or ""), reading, lambda one: one.block_attention(layer))
        return packed_blocks(_of_head(shares, head))

    def predict(
        self, text: str, model: str, compare: str | None, reading: int, position: int, dial: float, target: int | None
    ) -> dict[str, Any]:
        """What comes after a position under the dial, told to look at a block or not: a [`Prediction`] for the page."""
        key = text, model, compare or ""
        found = self._ask_model(key, reading, lambda one: one.predict(position, dial, target=target))
        return {
            "tokens": found.tokens,
            "probabilities": found.probabilities,
            "actual": found.actual_probability,
            "divergence": found.divergence,
        }

    def go_on(
        self, text: str, model: str, compare: str | None, reading: int, position: int, dial: float, target: int | None
    ) -> str:
        """The text that follows a position under the dial, told to look at a block or not."""
        key = text, model, compare or ""
        return self._ask_model(key, reading, lambda one: one.go_on(position, dial, target=target))

    def _has_weights(
        self, key: tuple[str, str, str], reading: int, dial: float, position: int, target: int | None
    ) -> bool:
        return self._ask(key, reading, lambda one: one.has_weights(dial, position, target))

    def _ask(self, key: tuple[str, str, str], reading: int, ask: Callable[[Reading], Any]) -> Any:
        return ask(_one_of(self._read(key), reading))

    def _ask_model(self, key: tuple[str, str, str], reading: int, ask: Callable[[Reading], Any]) -> Any:
        with self._models_lock:
            readings = self._kept(key) or self._read_anew(key)
            answer = ask(_one_of(readings, reading))
            self._keep(key, readings)  # with the caches that they have now
        return answer

    def _read(self, key: tuple[str, str, str]) -> list[Reading]:
        if (readings := self._kept(key)) is not None:
            return readings
        with self._models_lock:
            return self._kept(key) or self._read_anew(key)  # while this one waited, another may have asked for the same

    def _read_anew(self, key: tuple[str, str, str]) -> list[Reading]:
        text, model, compare = key
        if not model:
            raise ValueError("`model` is empty; give a model's folder or Hub id.")
        wanted = [(field, name) for field, name in (("model", model), ("compare", compare)) if name]
        for field, name in wanted:
            if self._names is not None and name not in self._names:
                raise ValueError(f"`{field}` is {name!r}; this page has {', '.join(self._names)}.")
        models = [self._model(name, field) for field, name in wanted]
        limit, sentence = self._limit(models)
        if len(text) > limit * CHARACTERS_PER_TOKEN:
            raise ValueError(f"`text` has more than {limit * CHARACTERS_PER_TOKEN} characters; {sentence}.")
        readings: list[Reading] = []
        for each in models:
            if (length := num_tokens(each.tokenizer, text)) > limit:
                raise ValueError(f"`text` has {length} tokens; {sentence}.")
            passage = Passage.of(each.tokenizer, text)
            readings.append(read_beside(readings[0], each.model, passage) if readings else read(each.model, passage))
        self._keep(key, readings)
        return readings

    def _limit(self, models: list[_Model]) -> tuple[int, str]:
        """How many tokens a text may have, by the lowest of several limits, and a sentence that says which it is."""
        positions = [num_positions(core_model(each.model).config) or sys.maxsize for each in models]
        limits = [(min(positions), "the model has positions for"), (self._max_tokens or MAX_TOKENS, "this page takes")]
        if self._max_tokens is None:
            in_time = max(1, int(1 / sum(1 / each.tokens_in_time for each in models)))
            limits.append((in_time, f"in {MAX_SECONDS:.0f} seconds, which is all it may take, this machine reads"))
        limit, whose = min(limits)
        return limit, f"{whose} {limit} tokens"

    def _model(self, name: str, field: str) -> _Model:
        with self._kept_lock:
            if name in self._models:
                self._models.move_to_end(name)  # so that it does not make room for one to be compared with it
                return self._models[name][0]
        model, tokenizer = self._load(name, field)
        in_time = _tokens_in_time(model, tokenizer) if self._max_tokens is None else math.inf
        loaded, num_bytes = _Model(model, tokenizer, in_time), model.get_memory_footprint()
        with self._kept_lock:
            _keep(self._models, name, loaded, num_bytes, _MODEL_BYTES, at_least=2)
            for key in list(self._readings):  # a reading holds its models in memory
                if not all(of in self._models for of in key[1:] if of):
                    del self._readings[key]
        return loaded

    def _kept(self, key: tuple[str, str, str]) -> list[Reading] | None:
        with self._kept_lock:
            if key not in self._readings:
                return None
            for name in filter(None, key[1:]):
                self._models.move_to_end(name)
            self._readings.move_to_end(key)
            return self._readings[key][0]

    def _keep(self, key: tuple[str, str, str], readings: list[Reading]) -> None:
        num_bytes = sum(reading.num_bytes for reading in readings)
        with self._kept_lock:
            _keep(self._readings, key, readings, num_bytes, _READING_BYTES, at_least=1)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, num_bytes: int, most: int, at_least: int) -> None:
    kept[key] = value, num_bytes
    kept.move_to_end(key)
    while len(kept) > at_least and sum(each for _, each in kept.values()) > most:
        kept.popitem(last=False)


def _one_of(readings: list[Reading], reading: int) -> Reading:
    if not 0 <= reading < len(readings):
        raise ValueError(f"`reading` is {reading}; it must be in 0 to {len(readings) - 1}.")
    return readings[reading]


def _of_head(values: torch.Tensor, head: int | None) -> torch.Tensor:
    if head is not None and not 0 <= head < len(values):
        raise ValueError(f"`head` is {head}; it must be in 0 to {len(values) - 1}.")
    return values.mean(0) if head is None else values[head]


def _tokens_in_time(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """
    How many tokens a model reads in `MAX_SECONDS` on this machine, by readings of more and more until one takes a
    quarter of that. Time grows with the square of the length at most, so that none takes longer than this says.
    """
    core, found = core_model(model), math.inf
    limit = min(num_positions(core.config) or MAX_TOKENS, MAX_TOKENS)
    ids = torch.arange(limit) % core.get_input_embeddings().weight.shape[0]
    for length in (1, 32, 64, 128, 256, 512, 1024, 2048):
        if length > limit:
            break
        start = time.perf_counter()
        read(model, Passage(ids[:length], [""] * length, tokenizer))
        ratio = MAX_SECONDS / (time.perf_counter() - start)
        if length > 1:  # the first time takes longer, and says nothing
            found = length * min(ratio, ratio**0.5)
            if ratio < 4:
                break
    return found
