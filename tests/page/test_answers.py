"""Whatever the page's server is asked, what is wrong with it is said in one sentence."""

import inspect
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.page.answers import AT_WORK, answer
from localist_hf.page.reading_server import Readings


ASKED = {
    "text": "some more", "model": "one", "compare": None, "reading": 0, "layer": 0, "head": None, "position": 1,
    "dial": 0.5, "target": None, "unit": "block", "end": 1,
}  # fmt: skip
ENDPOINTS = ("read", "weights", "looked_at", "blocks", "reach", "influence", "predict", "go_on")
#: Each type that JSON has, and numbers that no place or share can be.
VALUES = (
    None, True, False, -1, 10**30, 0.5, 1.0, 1.5, math.nan, math.inf, -math.inf, "", "0 1", "\ud83d", [], [0], {},
    {"a": 1}, "x" * 1000, [0] * 1000,
)  # fmt: skip
#: Those of them that can be answered.
RIGHT = {"text": ["0 1"], "compare": [None, ""], "head": [None], "target": [None], "dial": [0.5, 1.0], "end": [1]}
CALLED = {
    "text": "a text", "model": "a text", "compare": "a text or null", "head": "a whole number or null",
    "target": "a whole number or null", "dial": "a number", "unit": "a text",
}  # fmt: skip


@pytest.fixture
def readings(make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> Readings:
    model = make_model(0, vocab_size=len(tokenizer))
    return Readings(lambda *_: (model, tokenizer), 2000, ["one"])


def fields(ask: Callable[..., Any]) -> dict[str, Any]:
    return {name: ASKED[name] for name in inspect.signature(ask).parameters}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_each_wrong_value_of_each_field_is_named_with_what_is_allowed(readings: Readings, endpoint: str) -> None:
    ask = getattr(readings, endpoint)
    assert "answer" in answer(ask, fields(ask))
    for field in fields(ask):
        kinds = inspect.signature(ask).parameters[field].annotation
        kinds = int | float if kinds is float else kinds
        for value in VALUES:
            told = answer(ask, fields(ask) | {field: value})
            if any(value == right and type(value) is type(right) for right in RIGHT.get(field, [])):
                assert "answer" in told, (field, value, told)
                continue
            problem = told["problem"]
            assert re.fullmatch(rf"`{field}` (is|has) .*[;,] .*\.", problem), (field, value, problem)
            if isinstance(value, bool) or not isinstance(value, kinds):
                shown = json.dumps(value)
                shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
                assert problem == f"`{field}` is {shown}; it must be {CALLED.get(field, 'a whole number')}."
    assert not AT_WORK


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_other_fields_and_what_is_no_object_are_refused(readings: Readings, endpoint: str) -> None:
    ask = getattr(readings, endpoint)
    names = ", ".join(fields(ask))
    for value in (None, [], "text", 1, True, math.nan):
        expected = f"The request is {json.dumps(value)}; it must be an object with the fields {names}."
        assert answer(ask, value) == {"problem": expected}
    for asked in ({}, fields(ask) | {"sinks": 1}, {name: ASKED[name] for name in list(fields(ask))[1:]}):
        problem = answer(ask, asked)["problem"]
        assert problem.startswith('The request has the fields ["' if asked else "The request has the fields []; ")
        assert problem.endswith(f"; it must have {names}.")
