"""What the server answers are the readings' numbers, or a sentence."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.page import Passage, read, read_beside
from localist_hf.page.page_data import page_data
from localist_hf.page.readings import MAX_TOKENS, Readings


TEXT = "Sentence number 12 says something. some more of the words here\nnumber 3 says more."


class Shelf:
    """Models by name, and what was taken from it."""

    def __init__(self, make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.models = {
            name: make_model(seed, vocab_size=len(tokenizer), locality_schedule="localist")
            for seed, name in enumerate(("first", "second", "third"))
        }
        self.loaded: list[str] = []

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if name not in self.models:
            raise ValueError(f"`model` is {name!r}, which cannot be loaded: there is none.")
        self.loaded.append(name)
        return self.models[name], self.tokenizer


@pytest.fixture
def shelf(make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> Shelf:
    return Shelf(make_model, tokenizer)


def test_answers_are_the_readings_numbers(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    answer = readings.read(TEXT, "first", "second")
    passage = Passage.of(shelf.tokenizer, TEXT)
    first = read(shelf.models["first"], passage)
    second = read_beside(first, shelf.models["second"], passage)
    assert answer["page"] == page_data([first, second], has_rows=False)
    key = answer["key"]
    for number, reading in enumerate((first, second)):
        row = reading.weights(2, 9)
        assert_close(torch.tensor(readings.weights(key, number, 2, None, 9)), row.mean(0))
        assert_close(torch.tensor(readings.weights(key, number, 2, 3, 9)), row[3])
        predicted, expected = readings.predict(key, number, 9, 0.5), reading.predict(9, 0.5)
        assert predicted == {
            "tokens": expected.tokens,
            "probabilities": expected.probabilities,
            "actual": expected.actual_probability,
            "divergence": expected.divergence,
            "continuation": expected.continuation,
        }


def test_models_and_readings_that_are_no_longer_asked_for_make_room(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    keys = [readings.read(TEXT, name, "")["key"] for name in ("first", "second", "first", "first", "first")]
    assert shelf.loaded == ["first", "second"]
    assert len(set(keys)) == 5
    with pytest.raises(ValueError, match="read too long ago"):
        readings.weights(keys[0], 0, 0, None, 0)
    readings.weights(keys[1], 0, 0, None, 0)
    readings.read(TEXT, "third", None)  # there is room for two models: the second goes, and what it has read
    with pytest.raises(ValueError, match="read too long ago"):
        readings.weights(keys[1], 0, 0, None, 0)
    readings.weights(keys[4], 0, 0, None, 0)
    readings.read(TEXT, "second", None)
    assert shelf.loaded == ["first", "second", "third", "second"]


def test_weights_wait_for_no_prediction(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    key = readings.read(TEXT, "first", None)["key"]
    with readings._models_lock:  # a prediction is being made
        assert len(readings.weights(key, 0, 0, None, 9)) == 10


def test_what_cannot_be_answered_is_said(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    for text, model, compare, message in (
        ("", "first", None, "`text` is empty"),
        (TEXT, "", None, "`model` is empty"),
        (TEXT, "fourth", None, "`model` is 'fourth', which cannot be loaded"),
        (TEXT, "first", "fourth", "`model` is 'fourth', which cannot be loaded"),
        ("a " * 200, "first", None, "tokens; the model has positions for 300"),
        ("a " * 2000, "first", None, f"tokens; this page takes {MAX_TOKENS}"),
    ):
        with pytest.raises(ValueError, match=message):
            readings.read(text, model, compare)
    key = readings.read(TEXT, "first", None)["key"]
    for head in (-1, 4):
        with pytest.raises(ValueError, match=f"`head` is {head}; it must be in 0 to 3"):
            readings.weights(key, 0, 0, head, 0)
    for reading in (-1, 1):
        with pytest.raises(ValueError, match=f"`reading` is {reading}; it must be in 0 to 0"):
            readings.weights(key, reading, 0, None, 0)
    with pytest.raises(ValueError, match="`position` is 999"):
        readings.predict(key, 0, 999, 1.0)
    with pytest.raises(ValueError, match="read too long ago"):
        readings.predict("unknown", 0, 0, 1.0)
