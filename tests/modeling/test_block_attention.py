"""A step of a generation: attention of one query a row, against the explicit weights."""

import pytest
import reference
import torch
from torch.testing import assert_close

from localist_hf.modeling.block_partition import document_starts, window_block_starts
from localist_hf.modeling.dialled_attention import Wanted, attend
from localist_hf.modeling.fidelity import LayerDial
from localist_hf.modeling.fused_attention import Scoring
from localist_hf.modeling.local_set import LocalSet


LENGTH, WIDTH = 41, 8
SCALE = 0.3
# First token of each row: one row, rows that agree, rows whose blocks start at different keys.
LAYOUTS = {"one": [0], "alike": [0, 0], "padded": [0, 6, 17]}


def step(rows: list[int], block_length: int, num_kv_heads: int = 3, num_heads: int = 6) -> tuple[torch.Tensor, ...]:
    """The last query, keys and values, documents and block starts."""
    torch.manual_seed(0)
    query = torch.randn(len(rows), num_heads, 1, WIDTH)
    key, value = torch.randn(2, len(rows), num_kv_heads, LENGTH, WIDTH)
    documents = document_starts(len(rows), LENGTH, torch.arange(LENGTH).ge(torch.tensor(rows)[:, None]))
    return query, key, value, documents, window_block_starts(documents, block_length)


@torch.no_grad()
def attend_once(query, key, value, mask, local_set: LocalSet, weight: float) -> torch.Tensor:
    """A step as the package takes it: nothing is measured."""
    return attend(query, key, value, mask, Scoring(SCALE), local_set, LayerDial(weight), Wanted()).output


def expected(query, key, value, visible, local, weight: float) -> torch.Tensor:
    """The weights outside the local set times `weight`, renormalised."""
    key, value = (rows.repeat_interleave(query.shape[1] // rows.shape[1], dim=1) for rows in (key, value))
    _, weights, _ = reference.attention(query, key, value, visible, SCALE)
    weights = weights * torch.where(local, 1.0, weight)
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
def test_a_step_equals_the_explicit_weights(rows, weight: float, sinks: int, num_kv_heads: int) -> None:
    query, key, value, documents, starts = step(rows, 7, num_kv_heads)
    visible = reference.visible_keys(documents, 1)
    local = reference.local_set(starts, documents, sinks, 1)
    mask = visible if max(rows) else None
    output = attend_once(query, key, value, mask, LocalSet(starts[:, -1:], documents[:, -1:], LENGTH, 7, sinks), weight)
    assert_close(output, expected(query, key, value, visible, local, weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [None, 12])
def test_a_step_needs_no_dropped_keys(rows, sinks: int, window: int | None) -> None:
    query, key, value, documents, starts = step(rows, 7)
    local = reference.local_set(starts, documents, sinks, 1)
    if window is not None:
        local &= torch.arange(LENGTH) >= LENGTH - window
    dropped = LENGTH - 9
    sink_rows = [torch.stack([rows_of[i, :, first : first + sinks] for i, first in enumerate(rows)])
                 for rows_of in (key, value)]  # fmt: skip
    local_set = LocalSet(
        starts[:, -1:], documents[:, -1:], LENGTH, 7, sinks, window, *(sink_rows if sinks else (None, None))
    )
    output = attend_once(query, key[:, :, dropped:], value[:, :, dropped:], None, local_set, 0.0)
    visible = reference.visible_keys(documents, 1)
    assert_close(output, expected(query, key, value, visible, local, 0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_rows_that_end_in_padding_stay_finite(weight: float) -> None:
    query, key, value, _, _ = step([0, 0], 7)
    documents = document_starts(2, LENGTH, torch.arange(LENGTH).lt(torch.tensor([[LENGTH], [20]])))
    starts = window_block_starts(documents, 7)
    visible = reference.visible_keys(documents, 1)
    local_set = LocalSet(starts[:, -1:], documents.amax(1, keepdim=True), LENGTH, 7, 1)
    output = attend_once(query, key, value, visible, local_set, weight)
    assert output.isfinite().all()
    assert_close(
        output[:1], expected(query, key, value, visible, reference.local_set(starts, documents, 1, 1), weight)[:1]
    )
