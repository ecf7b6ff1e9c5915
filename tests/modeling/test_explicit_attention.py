import pytest
import torch

from localist_hf.modeling.explicit_attention import explicit_attention
from localist_hf.modeling.fidelity import LayerDial
from localist_hf.modeling.fused_attention import Scoring
from localist_hf.modeling.local_set import LocalSet


LENGTH, SOFTCAP, SCALE = 150, 2.0, 0.5  # more queries than one step takes
SCORING = Scoring(SCALE, softcap=SOFTCAP)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(2, 3, LENGTH, 8, dtype=dtype) for _ in range(3))
    documents = torch.tensor([[0], [7]])
    position = torch.arange(LENGTH)
    starts = torch.where(position < documents, -1, torch.maximum(documents, position - position % 16))
    return query, key, value, starts, documents, position


@pytest.mark.parametrize(("weight", "floor"), [(1.0, 0.0), (0.4, 0.0), (0.0, 0.0), (1.0, 0.9), (0.7, 0.5)])
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_it_equals_the_whole_matrix(weight: float, floor: float, num_sinks: int):
    query, key, value, starts, documents, position = inputs()
    is_token = starts >= 0
    visible = (position <= position[:, None]) & (position >= documents[..., None]) & is_token[..., None]
    starts = torch.where(is_token, torch.maximum(starts, torch.minimum(starts, documents + num_sinks)), -1)
    local = visible & (position >= starts[..., None])
    sink = visible & (position < documents[..., None] + num_sinks) & ~local
    scores = SOFTCAP * torch.tanh(SCALE * query @ key.transpose(-1, -2) / SOFTCAP)
    weights = (scores.exp() * visible[:, None]).nan_to_num()
    inside = (local | sink)[:, None]
    share = (weights * inside).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    factor = torch.full_like(share, weight)
    if floor:
        factor = torch.minimum(factor, share * (1 - floor) / (floor * (1 - share)).clamp(min=1e-300))
    weights = torch.where(inside, weights, weights * factor)
    weights = (weights / weights.sum(-1, keepdim=True)).nan_to_num()

    mask = visible[:, None] if weight else None  # where only the local set counts, none is needed
    local_set = LocalSet(starts, documents, LENGTH, LENGTH, num_sinks)
    result = explicit_attention(query, key, value, mask, SCORING, local_set, LayerDial(weight, floor))
    tokens = is_token[:, None, :, None]
    torch.testing.assert_close(result.output * tokens, (weights @ value) * tokens)
    own = torch.eye(LENGTH, dtype=torch.bool) & visible
    for part, mask in ((result.own, own), (result.sink, sink), (result.block, local & ~own)):
        torch.testing.assert_close(part, (weights * mask[:, None]).sum(-1))
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(result.entropy, entropy)
    if floor:
        counted = is_token & (documents + num_sinks < starts)
        inside_share = (result.own + result.sink + result.block).transpose(1, 2)[counted]
        assert counted.any() and (inside_share >= floor - 1e-9).all()


@pytest.mark.parametrize(("weight", "floor"), [(1.0, 0.0), (0.4, 0.0), (0.0, 0.0), (0.7, 0.5)])
def test_gradients_are_those_of_numbers(weight: float, floor: float):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    local_set = LocalSet(torch.tensor([[0, 0, 0, 3, 3, 3]]), torch.tensor([[0]]), 6, 6, num_sinks=1)

    def outputs(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(explicit_attention(*rows, None, SCORING, local_set, LayerDial(weight, floor)))

    assert torch.autograd.gradcheck(outputs, (query, key, value))


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_sliding_window_without_a_mask_is_that_of_the_mask(weight: float):
    query, key, value, starts, documents, position = inputs(torch.float32)
    starts, documents = starts[:1], documents[:1]
    query, key, value = query[:1], key[:1], value[:1]
    window = 20
    seen = (position <= position[:, None]) & (position > position[:, None] - window)
    starts = torch.maximum(starts, position - window + 1)
    args = (SCORING, LocalSet(starts, documents, LENGTH, LENGTH, num_sinks=1), LayerDial(weight))
    masked = explicit_attention(query, key, value, seen[None, None], *args)
    args = (SCORING, args[1]._replace(window=window), args[2])
    given = explicit_attention(query, key, value, None, *args)
    for one, other in zip(masked, given, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_gets_nothing_and_gives_no_nan():
    query, key, value, starts, documents, _ = inputs(torch.float32)
    query.requires_grad_()
    local_set = LocalSet(starts, documents, LENGTH, LENGTH)
    result = explicit_attention(query, key, value, None, SCORING, local_set, LayerDial(weight=0.5, floor=0.3))
    assert not result.own[1, :, :7].any() and not result.entropy[1, :, :7].any()
    sum(part.sum() for part in result).backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(("weight", "floor"), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.7, 0.5)])
@pytest.mark.parametrize("upstream", [1.0, 1e3])
def test_gradients_of_the_entropy_are_finite_however_large_the_upstream_one(weight: float, floor: float, upstream):
    query, key, value, starts, documents, _ = inputs(torch.float32)
    query.requires_grad_()
    local_set = LocalSet(starts, documents, LENGTH, LENGTH, num_sinks=1)
    result = explicit_attention(query, key, value, None, SCORING, local_set, LayerDial(weight, floor))
    (gradient,) = torch.autograd.grad(upstream * result.entropy.sum(), query, retain_graph=True)
    assert gradient.isfinite().all() and gradient.any()
    (unit,) = torch.autograd.grad(result.entropy.sum(), query)
    torch.testing.assert_close(gradient, upstream * unit, rtol=1e-4, atol=1e-6 * upstream)


def test_a_local_set_of_which_nothing_is_seen_has_a_finite_gradient_under_a_guarantee():
    # exp(-100) is no number in float32: the share inside is 0, and its logarithm is none.
    query = torch.tensor([[[[0.0], [1.0]]]], requires_grad=True)
    key, value = torch.tensor([[[[60.0], [-60.0]]]]), torch.ones(1, 1, 2, 1)
    starts, documents = torch.tensor([[0, 1]]), torch.tensor([[0]])
    scoring = Scoring(1.0, softcap=60.0)
    result = explicit_attention(
        query, key, value, None, scoring, LocalSet(starts, documents, 2, 2), LayerDial(weight=1.0, floor=0.9)
    )
    sum(part.sum() for part in result).backward()
    assert query.grad.isfinite().all()
