# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""Key-value caches of layers that find blocks, and of layers that attend to their blocks only."""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .block_partition import BlockState


class _SearchLayer:
    """Where the search for blocks in a layer's values stands, for a cache layer to keep with them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.block_state: BlockState | None = None
        #: Number of tokens that have been searched.
        self.searched = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows only."""
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.forget_search()

    def forget_search(self) -> None:
        """Forgets where the search stands, but no keys and values."""
        self.block_state, self.searched = None, 0

    def _map_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.block_state is not None:
            self.block_state = BlockState(*map(select, self.block_state))


class BlockCacheLayer(_SearchLayer, DynamicLayer):
    """All keys and values, and where the search for blocks in them stands, so that a step looks at its tokens only."""

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; the search starts anew."""
        super().crop(tokens_to_remove)
        self.forget_search()


class LocalCacheLayer(_SearchLayer, DynamicSlidingWindowLayer):
    """
    Keys and values that a fully localised layer can still need at dial 1: those of the longest block, and of the sinks.
    Where the layer's own values define blocks, the few numbers with which the search for them goes on travel along.

    Args:
        max_block_length (`int`):
            No block is longer.
        semantic_window (`int`):
            Number of preceding tokens whose values the search for blocks needs.
        num_sink_tokens (`int`):
            Tokens at the start of the text that are kept.
    """

    def __init__(self, max_block_length: int, semantic_window: int, num_sink_tokens: int) -> None:
        # A sliding window of n keeps n - 1 tokens; the next token makes the n-th.
        super().__init__(sliding_window=max(max_block_length, semantic_window + 1))
        self.num_sink_tokens = num_sink_tokens
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep_sinks(self, first: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Keeps the keys and values of the first tokens as they come.

        Args:
            first (`torch.LongTensor` of shape `(batch_size,)`):
                Position of each row's first token.
            key (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`), value (`torch.Tensor`):
                Of the last `length` tokens, the new ones among them.
        """
        if self.sinks is None:
            shape = (*key.shape[:2], self.num_sink_tokens, key.shape[-1])
            self.sinks = key.new_zeros(shape), value.new_zeros(shape)
        dropped = self.cumulative_length - key.shape[2]
        position = first[:, None] + torch.arange(self.num_sink_tokens, device=first.device) - dropped
        is_here = ((position >= 0) & (position < key.shape[2]))[:, None, :, None]
        index = position.clamp(0, key.shape[2] - 1)[:, None, :, None].expand_as(self.sinks[0])
        self.sinks = tuple(
            torch.where(is_here, tensor.gather(2, index), kept)
            for tensor, kept in zip((key, value), self.sinks, strict=True)
        )

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.sinks = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the dropped tokens would need is gone."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"`tokens_to_remove` is {tokens_to_remove}; the cache of a layer that attends to its blocks cannot "
                "be cropped. Set the dial below 1, or start with a new cache."
            )

    def _map_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(select)
        if self.sinks is not None:
            self.sinks = tuple(map(select, self.sinks))
