"""What the server answers are the readings' numbers, or a sentence."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.page import Passage, Reading, read, read_beside
from localist_hf.page import reading_server as module
from localist_hf.page.page_data import packed_blocks, page_data
from localist_hf.page.reading_server import MAX_TOKENS, Readings


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

    def load(self, name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if name not in self.models:
            raise ValueError(f"`{flag}` is {name!r}, which cannot be loaded: there is none.")
        self.loaded.append(name)
        return self.models[name], self.tokenizer


@pytest.fixture
def shelf(make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> Shelf:
    return Shelf(make_model, tokenizer)


def test_answers_are_the_readings_numbers(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    passage = Passage.of(shelf.tokenizer, TEXT)
    first = read(shelf.models["first"], passage)
    second = read_beside(first, shelf.models["second"], passage)
    about = (TEXT, "first", "second")
    assert readings.read(*about) == page_data([first, second], has_rows=False)
    for number, reading in enumerate((first, second)):
        row = reading.weights(2, 9)
        assert_close(torch.tensor(readings.weights(*about, number, 2, None, 9, 0.0, None)), row.mean(0))
        assert_close(torch.tensor(readings.weights(*about, number, 2, 3, 9, 0.0, None)), row[3])
        of_blocks = reading.block_attention(2)
        assert readings.blocks(*about, number, 2, None) == packed_blocks(of_blocks.mean(0))
        assert readings.blocks(*about, number, 2, 3) == packed_blocks(of_blocks[3])
        predicted, expected = readings.predict(*about, number, 9, 0.5, None), reading.predict(9, 0.5)
        assert predicted == {
            "tokens": expected.tokens,
            "probabilities": expected.probabilities,
            "actual": expected.actual_probability,
            "divergence": expected.divergence,
        }
        assert readings.go_on(*about, number, 9, 0.5, None) == reading.go_on(9, 0.5)
        told = readings.predict(*about, number, 9, 1.0, 0)
        assert told["probabilities"] == reading.predict(9, 1.0, target=0).probabilities
        assert readings.go_on(*about, number, 9, 1.0, 0) == reading.go_on(9, 1.0, target=0)
        dialled = torch.tensor(readings.weights(*about, number, 2, 3, 20, 0.5, None))
        assert_close(dialled, reading.weights(2, 20, 0.5)[3])
        assert not torch.allclose(dialled, reading.weights(2, 20)[3], atol=1e-3)
        assert_close(
            torch.tensor(readings.weights(*about, number, 2, None, 20, 1.0, 0)), reading.weights(2, 20, 1.0, 0).mean(0)
        )
        assert_close(torch.tensor(readings.looked_at(*about, number, 2, 3, 9, 0.5)), reading.looked_at(2, 9, 0.5)[3])
        reach = reading.dependence.reach(1.0)
        assert readings.reach(*about, number, 1.0) == {"first": reach.first[0].tolist(), "statement": reach.statement}
        assert readings.reach(*about, number, 0.5)["first"] is None
        left, bits = reading.dependence.influence(9, 0.5, "token", 10)
        assert readings.influence(*about, number, 9, 0.5, None, "token", 10) == {"left": left, "bits": bits}


@pytest.fixture
def read_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What models have read, of the texts in the tests."""
    texts: list[str] = []

    def read_and_say(model: PreTrainedModel, passage: Passage) -> Reading:
        if text := "".join(passage.pieces):
            texts.append(text)
        return read(model, passage)

    monkeypatch.setattr(module, "read", read_and_say)
    return texts


def test_models_that_are_no_longer_asked_for_make_room_and_come_back(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = Readings(shelf.load)
    for name in ("first", "second", "third", "first", "second"):
        readings.read(TEXT, name, None)
    assert shelf.loaded == ["first", "second", "third"]  # small ones have room together
    monkeypatch.setattr(module, "_MODEL_BYTES", 0)
    readings = Readings(shelf.load)
    shelf.loaded.clear()
    for name in ("first", "second", "first", "third"):
        readings.read(TEXT, name, "")
    assert {reading.model for of, _ in readings._readings.values() for reading in of} == {
        shelf.models["first"], shelf.models["third"],
    }  # fmt: skip
    assert shelf.loaded == ["first", "second", "third"]
    # Its model has gone, and is loaded again.
    assert len(readings.weights(TEXT, "second", None, 0, 0, None, 9, 0.0, None)) == 10
    readings.read("a", "third", "first")  # the older of two stays for the new one that is compared with it
    readings.read("a", "third", "first")
    assert shelf.loaded[3:] == ["second", "first"]


def test_what_made_room_is_read_again_by_itself(
    shelf: Shelf, read_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = Readings(shelf.load)
    texts = ["a " * number + "number" for number in range(12, 2, -1)]
    answers = [readings.read(text, "first", None) for text in texts]
    assert read_texts == texts
    assert [readings.read(text, "first", None) for text in texts] == answers
    assert read_texts == texts  # all are there
    sizes = [size for _, size in readings._readings.values()]
    assert sizes == sorted(sizes, reverse=True)
    readings.predict(texts[0], "first", None, 0, 3, 1.0, None)
    assert list(readings._readings.values())[-1][1] > sizes[0]  # one more cache

    monkeypatch.setattr(module, "_READING_BYTES", 4 * sizes[0])
    readings.predict(texts[0], "first", None, 0, 3, 0.5, None)
    assert list(readings._readings) == [(text, "first", "") for text in (*texts[7:], texts[0])]
    assert len(readings.weights(texts[5], "first", "", 0, 0, None, 3, 0.0, None)) == 4
    assert read_texts == [*texts, texts[5]]
    monkeypatch.setattr(module, "_READING_BYTES", 0)  # one is kept, whatever it takes
    for _ in range(2):
        readings.go_on(texts[6], "first", None, 0, 3, 1.0, None)
    assert read_texts == [*texts, texts[5], texts[6]]
    assert len(readings._readings) == 1


def test_what_many_ask_for_at_once_is_read_once(shelf: Shelf, read_texts: list[str]) -> None:
    readings = Readings(shelf.load)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: readings.read(TEXT, "first", None), range(20)))
    assert read_texts == [TEXT]
    assert all(answer == answers[0] for answer in answers)


def test_many_read_and_ask_at_once_in_bounded_memory(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**22  # not for all of them
    monkeypatch.setattr(module, "_READING_BYTES", most)
    readings, kept = Readings(shelf.load, MAX_TOKENS), []

    def visit(number: int) -> dict[str, Any]:
        text, compare = f"number {number} says something. {TEXT}", "second" if number % 4 == 1 else None
        assert "".join(readings.read(text, "first", compare)["tokens"]) == text
        assert sum(readings.weights(text, "first", compare, 0, 1, None, 3, 0.0, None)) == pytest.approx(1, abs=1e-5)
        answer = readings.predict(text, "first", compare, 0, 3, 1.0, None)
        with readings._kept_lock:
            kept.append([size for _, size in readings._readings.values()])
        return answer

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, range(20)))
    assert [visit(number) for number in range(4)] == answers[:4]
    assert all(sum(sizes) <= most and len(sizes) < 20 for sizes in kept)


def test_weights_wait_for_no_prediction(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    page = readings.read(TEXT, "first", None)
    readings.weights(TEXT, "first", None, 0, 0, None, 9, 0.5, None)
    with readings._models_lock:  # a prediction is being made
        assert len(readings.weights(TEXT, "first", None, 0, 0, None, 9, 0.0, None)) == 10
        # A pass under this dial was made.
        assert len(readings.weights(TEXT, "first", None, 0, 0, None, 8, 0.5, None)) == 9
        assert readings.read(TEXT, "first", "") == page


def test_what_cannot_be_answered_is_said(shelf: Shelf) -> None:
    readings = Readings(shelf.load)
    for text, model, compare, message in (
        ("", "first", None, "`text` is empty"),
        ("half \ud83d of one", "first", None, r"`text` has '\\ud83d', character 5; it must be Unicode text"),
        (TEXT, "", None, "`model` is empty"),
        (TEXT, "fourth", None, "`model` is 'fourth', which cannot be loaded"),
        (TEXT, "first", "fourth", "`compare` is 'fourth', which cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            readings.read(text, model, compare)
    for head in (-1, 4):
        with pytest.raises(ValueError, match=f"`head` is {head}; it must be in 0 to 3"):
            readings.weights(TEXT, "first", None, 0, 0, head, 0, 0.0, None)
    for reading in (-1, 1):
        with pytest.raises(ValueError, match=f"`reading` is {reading}; it must be in 0 to 0"):
            readings.weights(TEXT, "first", None, reading, 0, None, 0, 0.0, None)
    with pytest.raises(ValueError, match="`position` is 999"):
        readings.predict(TEXT, "first", None, 0, 999, 1.0, None)


def test_strangers_have_the_page_s_models_only(shelf: Shelf) -> None:
    readings = Readings(shelf.load, models=["first", "second"])
    assert readings.read(TEXT, "first", "second") == readings.read(TEXT, "first", "second")
    for model, compare, message in (
        ("third", None, "`model` is 'third'; this page has first, second."),
        ("first", "/etc", "`compare` is '/etc'; this page has first, second."),
    ):
        for ask in (
            lambda *about: readings.read(*about),
            lambda *about: readings.weights(*about, 0, 0, None, 0, 0.0, None),
            lambda *about: readings.looked_at(*about, 0, 0, None, 0, 0.0),
            lambda *about: readings.reach(*about, 0, 0.0),
            lambda *about: readings.influence(*about, 0, 3, 0.0, None, "block", 1),
            lambda *about: readings.predict(*about, 0, 0, 1.0, None),
            lambda *about: readings.go_on(*about, 0, 0, 1.0, None),
        ):
            with pytest.raises(ValueError, match=f"^{message}$"):
                ask(TEXT, model, compare)
    assert shelf.loaded == ["first", "second"]


# --- how long a text may be


@pytest.mark.parametrize(
    ("max_tokens", "limit"), [(None, "the model has positions for 300"), (20, "this page takes 20")]
)
def test_the_lowest_limit_is_the_only_one_that_a_reader_hears_of(
    shelf: Shelf, max_tokens: int | None, limit: str
) -> None:
    readings = Readings(shelf.load, max_tokens)
    for number in (155, 2300, 10_000):
        with pytest.raises(ValueError, match=rf"^`text` has (\d+ tokens|more than \d+ characters); {limit} tokens\.$"):
            readings.read("a " * number, "first", None)


def test_characters_are_counted_before_tokens_and_these_before_pieces(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = Readings(shelf.load)
    monkeypatch.setattr(Passage, "of", lambda tokenizer, text: pytest.fail("the text was cut into pieces"))
    with pytest.raises(ValueError, match="`text` has 301 tokens; the model has positions for 300"):
        readings.read("a" * 301, "first", None)
    monkeypatch.setattr(module, "num_tokens", lambda tokenizer, text: pytest.fail("the text was cut into tokens"))
    with pytest.raises(ValueError, match="more than 4800 characters; the model has positions for 300"):
        readings.read("a" * 4801, "first", None)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_no_reading_takes_long(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", clock := Clock())

    def read_slowly(model: PreTrainedModel, passage: Passage) -> Reading:
        clock.now += 0.01 + len(passage) ** 2 / 10_000 if len(passage) > 1 else 60  # 100 tokens a second
        return read(model, passage)

    monkeypatch.setattr(module, "read", read_slowly)
    readings = Readings(shelf.load)
    limits = []
    for compare in (None, "second"):
        with pytest.raises(ValueError, match=r"^`text` has \d+ tokens; .* this machine reads \d+ tokens\.$") as error:
            readings.read("a " * 140, "first", compare)
        limits.append(int(str(error.value).split()[-2]))
    assert 0.9 * 141 < limits[0] <= 141
    assert limits[1] == limits[0] // 2
    Readings(shelf.load, 300).read("a " * 140, "first", None)  # where somebody wants to wait
