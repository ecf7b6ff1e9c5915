"""Whoever waits at a terminal sees how far a measurement is; nobody else is told."""

import io
import re
import sys
from collections.abc import Callable

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from localist_hf.evaluation import causal_lm_collator, locality_probe, measure, measure_controls, recruit_separators
from localist_hf.evaluation import progress as module


DIALS = (0, 0.5, 1)


def recruit(model: PreTrainedModel, data: Dataset) -> None:
    with pytest.raises(ValueError, match="Pass more or longer texts"):  # as it says when it has seen them
        recruit_separators(model, data, mean_length=5.0, batch_size=2)


MEASUREMENTS = {
    "measure": (measure, "Measuring", "2/2"),
    "report": (lambda model, data: measure(model, data, 2, with_controls=True), "Measuring", "4/4"),
    # At most: where windows or last tokens have one length, or none, there are fewer.
    "controls": (lambda model, data: measure_controls(model, data, 2, dials=DIALS), "Controls", r"\d+/28"),
    "probe": (
        lambda model, data: locality_probe(model, DataLoader(data, batch_size=2, collate_fn=causal_lm_collator)),
        "Measuring",
        "2/2",
    ),
    "separators": (recruit, "Recruiting", "8/8"),
}


class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def data(make_text: Callable) -> Dataset:
    return Dataset.from_dict({"input_ids": [make_text(1, 40, seed=seed)[0].tolist() for seed in range(3)]})


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_bar_at_a_terminal_alone(name: str, make_model: Callable, data: Dataset, monkeypatch) -> None:
    measurement, desc, last = MEASUREMENTS[name]
    if name == "measure":
        data = data.select([*range(3)] * 3)  # of eight sequences a batch
    model = make_model(locality_schedule="quintic")
    # Every pass is shown, however fast it was.
    monkeypatch.setattr(logging.tqdm_lib.tqdm, "__init__", shown_at_once(logging.tqdm_lib.tqdm.__init__))
    printed, streams = {}, {"file": io.StringIO(), "person": Terminal(), "off": Terminal()}
    for kind, stream in streams.items():
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logging, "_tqdm_active", kind != "off")
        measurement(model, data)
        printed[kind] = stream.getvalue()
    assert printed["file"] == printed["off"] == ""
    assert re.search(rf"{desc}: .*{last}", printed["person"].replace("\r", "\n"))
    assert not any(module.core_model(model).base_model._forward_hooks.values())


def shown_at_once(init: Callable) -> Callable:
    return lambda self, *args, **kwargs: init(self, *args, **(kwargs | {"mininterval": 0, "miniters": 1}))


def test_the_passes_are_those_that_were_foretold(make_model: Callable, data: Dataset, monkeypatch) -> None:
    foretold, counted = [], []
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = logging.tqdm_lib.tqdm

    class Bar(bar):
        def close(self) -> None:
            if not self.disable and self.unit == "pass":
                foretold.append(self.total)
                counted.append(self.n)
            super().close()

    monkeypatch.setattr(logging.tqdm_lib, "tqdm", Bar)
    for schedule in ("quintic", "distributed"):
        measure_controls(make_model(locality_schedule=schedule), data, 2, dials=DIALS)
    assert foretold == [28, 12]
    # Windows or last tokens may have one length rather than two, or none.
    assert 20 <= counted[0] <= 28 and counted[1] == 12
