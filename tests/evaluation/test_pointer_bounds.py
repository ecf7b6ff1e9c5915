"""The framework's bounds hold on every query, of any weights and of every architecture's own."""

import hypothesis
import pytest
import torch
from architectures import LENGTH, SLIDING, eager_attentions, every_architecture, localised, text
from hypothesis import strategies
from torch.testing import assert_close

from localist_hf import Rule
from localist_hf.evaluation import PointerBounds, pointer_bounds
from localist_hf.modeling.fidelity import context_fidelity


def check_bounds(bounds: PointerBounds) -> None:
    fidelity, margin, entropy, most_missed, most_entropy = bounds
    is_some = ~fidelity.isnan()
    assert_close(fidelity[is_some], margin[is_some].sigmoid(), atol=1e-9, rtol=0)
    assert (1 - fidelity <= most_missed + 1e-12)[is_some].all()
    assert (entropy <= most_entropy + 1e-9)[is_some].all()
    assert (entropy >= -1e-12)[is_some].all()


@hypothesis.given(
    scores=strategies.lists(strategies.floats(-40, 40), min_size=1, max_size=12),
    kinds=strategies.lists(strategies.integers(0, 2), min_size=12, max_size=12),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_bounds_hold_and_are_met_where_attention_is_even(scores: list[float], kinds: list[int]) -> None:
    kind = torch.tensor(kinds[: len(scores)])
    scores_of = torch.tensor(scores, dtype=torch.float64)
    is_target, is_rest = kind == 1, kind == 2
    bounds = pointer_bounds(scores_of.softmax(-1), is_target, is_rest)
    check_bounds(bounds)
    if is_target.any() and is_rest.any():
        of_parts = (scores_of[is_target].logsumexp(-1), scores_of[is_rest].logsumexp(-1))
        assert_close(bounds.margin, of_parts[0] - of_parts[1], atol=1e-6, rtol=1e-6)
        # Even within the targets and within the rest: the entropy is the most that there can be.
        even = torch.where(is_target, bounds.fidelity / is_target.sum(), (1 - bounds.fidelity) / is_rest.sum())
        again = pointer_bounds(torch.where(kind > 0, even, 0.0), is_target, is_rest)
        assert_close(again.entropy, again.most_entropy, atol=1e-9, rtol=0)


@every_architecture
@torch.no_grad()
def test_they_hold_of_every_query_of_a_model_s_own_attention(architecture: str) -> None:
    ids = text(batch_size=1)[0]
    layers = eager_attentions(architecture, ids)
    position = torch.arange(LENGTH)
    is_target = (position >= 6) & (position < 20)
    is_other = (position < position[:, None]) & (position > 0)  # neither the query nor a sink
    queries = slice(7, None)
    model = localised(architecture, num_sink_tokens=1)
    outputs = None
    if architecture not in SLIDING:
        outputs = model(ids, rules=[Rule((7, None), (6, 20))], output_fidelity=True)
    for layer, weights in enumerate(layers):
        bounds = pointer_bounds(weights[0, :, queries], is_target & is_other[queries], ~is_target & is_other[queries])
        check_bounds(bounds)
        if outputs is not None and layer == len(layers) - 1:  # what rules measure is the pointer fidelity
            block, outside = outputs.block_share[layer][0, :, queries], outputs.outside_share[layer][0, :, queries]
            is_some = block + outside > 1e-3
            found = context_fidelity(block, outside).double()
            assert_close(found[is_some], bounds.fidelity[is_some], atol=1e-3, rtol=0)


def test_what_has_no_weight_has_no_numbers() -> None:
    mask = torch.tensor([True, False])
    bounds = pointer_bounds(torch.zeros(3, 2), mask, ~mask)
    assert bounds.fidelity.isnan().all()
    certain = pointer_bounds(torch.tensor([[0.3, 0.0], [0.0, 0.2]]), mask, ~mask)
    assert certain.fidelity.tolist() == [1, 0]
    assert certain.margin.tolist() == [float("inf"), float("-inf")]
    assert certain.entropy.tolist() == certain.most_entropy.tolist() == [0, 0]


def test_wrong_input_is_refused() -> None:
    weights, mask = torch.ones(2), torch.tensor([True, False])
    for arguments, sentence in (
        ((weights, mask, torch.ones(2)), "`is_rest` is of torch.float32; it must be a mask of bools"),
        ((weights, mask, mask), "`is_target` and `is_rest` have keys in common"),
        ((-weights, mask, ~mask), "`weights` has -1.0; attention weights are 0 or more"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pointer_bounds(*arguments)
