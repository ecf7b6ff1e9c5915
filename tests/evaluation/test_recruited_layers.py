"""What layers cost and give, against a model that is measured layer by layer, and which are taken in."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import RecruitedLayers, measure, recruit_layers
from localist_hf.evaluation.recruited_layers import _rank


@pytest.fixture
def model(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> LocalistGPT2LMHeadModel:
    model = make_model(locality_schedule="quintic")
    with torch.no_grad():
        for block in model.transformer.h:  # far from even, so that locality costs something
            block.attn.c_attn.weight *= 3
    return model


@pytest.fixture
def dataset(model: LocalistGPT2LMHeadModel) -> Dataset:
    """Texts whose labels are what the model predicts at dial 0, so that any change of its attention costs something."""
    ids = torch.randint(2, 97, (6, 50), generator=torch.manual_seed(3))
    with torch.no_grad():
        labels = model(ids).logits.argmax(-1).roll(1, 1)
    rows, others = ids.tolist(), labels.tolist()
    rows[1], others[1] = rows[1][:37], others[1][:37]
    return Dataset.from_dict({"input_ids": rows, "labels": others})


def at_dial_1(model: LocalistGPT2LMHeadModel, dataset: Dataset, lambdas: list[float]) -> dict[str, float]:
    model.config.locality.locality_schedule = lambdas
    with model.set_locality_dial(1.0):
        return measure(model, dataset, batch_size=2).metrics


def test_costs_and_gains_are_those_of_each_layer_alone(model: LocalistGPT2LMHeadModel, dataset: Dataset) -> None:
    found = recruit_layers(model, dataset, total=4, batch_size=4)
    free = measure(model, dataset).metrics
    for layer in range(4):
        metrics = at_dial_1(model, dataset, [float(layer == other) for other in range(4)])
        name = f"entropy_layer_{layer}"
        assert found.costs[layer] == pytest.approx((metrics["loss"] - free["loss"]) / math.log(2), abs=1e-5)
        assert found.gains[layer] == pytest.approx(free[name] - metrics[name], abs=1e-5)
    assert max(map(abs, found.costs)) > 1e-3
    assert min(found.gains) > 0.1
    assert min(found.costs) > 0
    assert found.order == sorted(range(4), key=lambda layer: found.costs[layer] / found.gains[layer])
    # What helps comes first, the most helpful before all, and what gives nothing last.
    pairs = [(0.1, 0.0), (0.1, 1.0), (-0.001, 1e-5), (-0.1, 10.0), (0.1, 2.0)]
    assert sorted(pairs, key=lambda pair: _rank(*pair)) == [pairs[3], pairs[2], pairs[4], pairs[1], pairs[0]]
    assert found.lambdas == [1.0] * 4
    everywhere = at_dial_1(model, dataset, [1.0] * 4)
    assert found.cost == pytest.approx((everywhere["loss"] - free["loss"]) / math.log(2), abs=1e-5)
    assert set(found.to_dict()) == {"lambdas", "order", "costs", "gains", "cost"}


def test_layers_are_taken_in_until_the_budget_is_spent(model: LocalistGPT2LMHeadModel, dataset: Dataset) -> None:
    order = recruit_layers(model, dataset, total=1).order
    costs = [recruit_layers(model, dataset, total=number).cost for number in range(1, 5)]
    assert costs == sorted(costs)  # of this model, so that it is known what fits
    for number, cost in enumerate(costs, start=1):
        for budget, expected in ((cost + 1e-6, number), (cost - 1e-6, number - 1)):
            if budget <= 0:
                continue
            found = recruit_layers(model, dataset, budget=budget)
            assert found.lambdas == [float(layer in order[:expected]) for layer in range(4)]
            assert found.cost == pytest.approx(([0.0, *costs])[expected], abs=1e-6)
            assert model.config.locality.locality_schedule == found.lambdas


def test_the_last_layer_taken_in_makes_up_the_sum(model: LocalistGPT2LMHeadModel, dataset: Dataset) -> None:
    found: RecruitedLayers = recruit_layers(model, dataset, total=1.4)
    first, second, *others = found.order
    assert found.lambdas[first] == 1
    assert found.lambdas[second] == pytest.approx(0.4)
    assert [found.lambdas[layer] for layer in others] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "`budget` is None and `total` None; exactly one"),
        ({"budget": 0.1, "total": 2}, "`budget` is 0.1 and `total` 2; exactly one"),
        ({"budget": 0}, "`budget` is 0; it must be a number above 0"),
        ({"budget": math.nan}, "`budget` is nan; it must be a number above 0"),
        ({"budget": True}, "`budget` is True; it must be a number above 0"),
        ({"total": 5}, "`total` is 5; it must be a number above 0 and at most 4, the number of layers"),
        ({"total": "2"}, "`total` is '2'; it must be a number above 0"),
    ],
)
def test_wrong_limits_are_refused(
    model: LocalistGPT2LMHeadModel, dataset: Dataset, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        recruit_layers(model, dataset, **settings)
    assert model.config.locality.locality_schedule == "quintic"


def test_text_without_labels_is_refused(model: LocalistGPT2LMHeadModel, dataset: Dataset) -> None:
    for rows, sentence in (
        (dataset.select([]), "`dataset` holds no sequence"),
        (Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, -100]]}), "`dataset` has no label that counts"),
        (
            dataset.select([0]).add_column("block_starts", [[0] * 50]).add_column("pointer_blocks", [[-1] * 50]),
            "`pointer_blocks` are given",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            recruit_layers(model, rows, total=2)
        assert model.config.locality.locality_schedule == "quintic"
