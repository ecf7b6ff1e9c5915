"""Faithfulness of guesses, against all orders and predictions that are made one by one."""

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import strategies
from peft import PromptTuningConfig, get_peft_model

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure_agreement, measure_faithfulness
from localist_hf.evaluation.faithfulness import _changes, faithfulness
from localist_hf.evaluation.influence import replaced


@hypothesis.given(changes=strategies.lists(strategies.floats(0, 9), min_size=16, max_size=16))
@hypothesis.settings(max_examples=100, deadline=None)
def test_an_order_lies_between_the_best_and_the_worst_of_all(changes: list[float]) -> None:
    def area(order: tuple[int, ...]) -> float:
        return sum(changes[sum(1 << stretch for stretch in order[:taken])] for taken in range(1, 4))

    orders = list(itertools.permutations(range(4)))
    areas = {order: area(order) for order in orders}
    low, high = min(areas.values()), max(areas.values())
    for order in orders:
        found = faithfulness(np.array(changes), list(order))
        if high - low < 1e-9:
            assert high > low or np.isnan(found).all()
            continue
        expected = (areas[order] - low) / (high - low), (high - areas[order[::-1]]) / (high - low)
        assert found == pytest.approx(expected, abs=1e-9 + 1e-12 / (high - low))


@torch.no_grad()
def test_changes_are_those_of_predictions_made_one_by_one(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    model, ids = make_model(), torch.randint(2, 97, (30,), generator=torch.manual_seed(1))
    parts = np.array_split(np.arange(29), 3)
    found = _changes(model, ids, parts, 2, 3, torch.Generator().manual_seed(0), 0.5)
    generator = torch.Generator().manual_seed(0)
    others = [replaced(ids, [(0, 29)], generator)[0] for _ in range(2)]
    starts = model(ids[None], output_fidelity=[3], locality_dial=0.5, use_cache=False).block_starts[0]

    def predicted(text: torch.Tensor) -> torch.Tensor:
        logits = model(text[None], block_starts=starts, locality_dial=0.5, use_cache=False).logits[0, -1]
        return logits.double().log_softmax(-1)

    before, expected = predicted(ids), np.zeros(8)
    for taken, other in itertools.product(range(8), others):
        text = ids.clone()
        for at, part in enumerate(parts):
            if taken >> at & 1:
                text[part] = other[part]
        after = predicted(text)
        expected[taken] += ((before.exp() * (before - after)).sum() / np.log(2) / 2).item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert (found[1:] > 0.001).all()


def test_what_erasure_puts_first_is_more_faithful_than_chance(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
) -> None:
    ids = torch.randint(2, 97, (4, 60), generator=torch.manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    found = measure_faithfulness(make_model(), dataset, num_stretches=4, num_draws=1, with_gradients=True)
    for figures in (found.comprehensiveness, found.sufficiency):
        assert {"layer 3", "rollout", "gradient x input", "integrated gradients", "erasure", "random"} <= figures.keys()
        assert all(len(values) == 4 and min(values) >= 0 and max(values) <= 1 for values in figures.values())
    means = found.means()
    for figure in ("comprehensiveness", "sufficiency"):
        assert means["erasure"][figure] > means["random"][figure] + 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_stretches": 1}, "`num_stretches` is 1; it must be a whole number from 2 to 12"),
        ({"num_stretches": 13}, "`num_stretches` is 13; it must be"),
        ({"num_draws": 0}, "`num_draws` is 0; it must be a whole number above 0"),
        ({"num_positions": 0}, "`num_positions` is 0; it must be a whole number above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    make_model: Callable[..., LocalistGPT2LMHeadModel], arguments: dict[str, Any], sentence: str
) -> None:
    dataset = Dataset.from_dict({"input_ids": [list(range(2, 40))]})
    with pytest.raises(ValueError, match=sentence):
        measure_faithfulness(make_model(), dataset, **arguments)


def test_a_beginning_of_one_token_does_not_count(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5] * 17, [5] * 17 + [6], [*range(2, 40)]]})
    with pytest.raises(ValueError, match="`dataset` has one token only in row 0"):
        measure_faithfulness(make_model(), dataset)
    found = measure_faithfulness(make_model(), dataset.select([1]), 1, num_stretches=2, num_draws=1)
    assert np.isnan(found.comprehensiveness["layer 3"]).all()
    found = measure_faithfulness(make_model(), dataset.select([1, 2]), 2, num_stretches=2, num_draws=1)
    assert not np.isnan(found.sufficiency["layer 3"]).any()


def test_adapters_that_bring_tokens_are_refused(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    model = get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    dataset = Dataset.from_dict({"input_ids": [[*range(2, 40)]]})
    for measure in (measure_agreement, measure_faithfulness):
        with pytest.raises(ValueError, match="`model` has an adapter that puts tokens of its own before a text"):
            measure(model, dataset)
