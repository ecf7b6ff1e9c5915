"""The bounded cache: the same keys and values as transformers' sliding window, step by step."""

import copy

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from localist_hf.modeling.local_cache import LocalCacheLayer


WINDOW = 8


@torch.no_grad()
def test_steps_keep_what_a_sliding_window_keeps_whatever_happens_to_the_rows_between() -> None:
    torch.manual_seed(0)
    ours, plain = LocalCacheLayer(WINDOW, 0), DynamicSlidingWindowLayer(WINDOW)
    changes = {
        5: lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        6: lambda layer: layer.batch_repeat_interleave(2),
        21: lambda layer: layer.batch_select_indices(torch.tensor([2])),
        30: lambda layer: layer.reset(),
    }
    rows = 2
    for at, length in enumerate([11] + [1] * 28 + [3] + [1] * 20):
        for layer in (ours, plain):
            changes.get(at, lambda layer: None)(layer)
        rows = rows if plain.keys is None else len(plain.keys)
        new = torch.randn(2, rows, 3, length, 4)
        for kept, expected in zip(ours.update(*new), plain.update(*new), strict=True):
            assert torch.equal(kept, expected)
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
        assert ours.get_seq_length() == plain.get_seq_length()
    assert ours.keys.untyped_storage().nbytes() <= 4 * 2 * WINDOW * 3 * rows * 4


@torch.no_grad()
def test_a_copy_goes_its_own_way() -> None:
    layer = LocalCacheLayer(WINDOW, 0)
    layer.update(*torch.randn(2, 1, 3, 5, 4))
    layer.update(*torch.randn(2, 1, 3, 1, 4))
    other = copy.deepcopy(layer)
    key = layer.update(*torch.zeros(2, 1, 3, 1, 4))[0]
    other.update(*torch.ones(2, 1, 3, 1, 4))
    assert not key[:, :, -1].any()
    assert other.keys[:, :, -1].all()
