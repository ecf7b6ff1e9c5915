"""What a Space's app.py serves: some models, at their commits, and no others."""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from localist_hf.cli import space_page, view


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page was made of, and launched with; Gradio need not be there."""
    made: dict[str, Any] = {}

    def live_page(load: Callable, models: list[str], text: str, compare: str | None, is_open: bool) -> SimpleNamespace:
        made.update(load=load, models=models, text=text, compare=compare, is_open=is_open)
        return SimpleNamespace(launch=lambda **settings: made.update(settings=settings))

    for name, function in (("live_page", live_page), ("serving", lambda: {"share": False})):
        module = ModuleType(f"localist_hf.page.{name}")
        setattr(module, "launch_settings" if name == "serving" else name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_strangers_have_the_published_models_only(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str, settings: dict, revisions: Mapping[str, str], flag: str) -> tuple[torch.nn.Module, str]:
        loaded.append((name, settings, revisions))
        if name == "org/b":
            raise ValueError("`model` is 'org/b', which cannot be loaded: the Hub is away.")
        return torch.nn.Linear(2, 2, dtype=torch.bfloat16), "its tokenizer"

    monkeypatch.setattr(view, "load", load)
    revisions = {"org/a": "1" * 40, "org/b": "2" * 40, "org/base": "3" * 40}
    space_page.serve_page(["org/a", "org/b"], revisions)
    assert (served["models"], served["text"]) == (["org/a", "org/b"], view.default_text())
    assert (served["compare"], served["is_open"]) == ("org/b", False)
    assert served["settings"] == {"share": False}
    model, tokenizer = served["load"]("org/a", "model")
    assert (model.weight.dtype, tokenizer) == (torch.float32, "its tokenizer")
    with pytest.raises(ValueError, match="the Hub is away"):  # what the page says, in place of a stack trace
        served["load"]("org/b", "model")
    assert loaded == [("org/a", {}, revisions), ("org/b", {}, revisions)]
