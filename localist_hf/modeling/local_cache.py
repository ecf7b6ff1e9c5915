# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""Key-value caches of layers that find blocks, and of layers that attend to their local set only."""

from collections.abc import Callable, Collection

import torch
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .block_partition import BlockState
from .block_step import StepState
from .locality_config import LocalityFields


_BOUNDED_CACHE = (
    "The key-value cache was filled at dial 1 (or `min_fidelity` 1), and keeps of the layers that attend to their "
    "blocks no more than those; it cannot go on at another dial. Start with a new cache."
)


class SearchLayer:
    """Where the search for the blocks that a layer defines stands, for a cache layer to keep with its keys."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.block_state: BlockState | StepState | None = None
        #: Number of tokens that have been searched.
        self.searched = 0
        #: Their ids, where blocks are found by them: no key tells.
        self.token_ids: torch.LongTensor | None = None
        #: The starts of their blocks, where all are known.
        self.block_starts: torch.LongTensor | None = None

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
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.block_state, self.searched, self.token_ids, self.block_starts = None, 0, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; the search starts anew."""
        super().crop(tokens_to_remove)
        self.block_state, self.searched, self.block_starts = None, 0, None
        if self.token_ids is not None:
            self.token_ids = self.token_ids[:, : self.get_seq_length()]

    def state_after(self, num_tokens: int, needs_all: bool = False) -> BlockState | StepState | None:
        """
        Where the search stands if it has been through so many tokens, and, where they are needed, the starts of all of
        their blocks are here; `None` where it has not.
        """
        is_here = self.searched == num_tokens and (not needs_all or self.block_starts is not None)
        return self.block_state if is_here else None

    def keep_search(self, state: BlockState | StepState, starts: torch.LongTensor, num_tokens: int) -> None:
        """
        Keeps where the search stands after so many tokens, and the starts of their blocks, where these are of all.
        """
        self.block_state, self.searched = state, num_tokens
        self.block_starts = starts if starts.shape[1] == num_tokens else None

    def _map_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.block_state is not None:
            self.block_state = self.block_state.select(select)
        if self.token_ids is not None:
            self.token_ids = select(self.token_ids)
        if self.block_starts is not None:
            self.block_starts = select(self.block_starts)


class BlockCacheLayer(SearchLayer, DynamicLayer):
    """All keys and values, and where the search for blocks in them stands, so that a step looks at its tokens only."""


class SlidingBlockCacheLayer(SearchLayer, DynamicSlidingWindowLayer):
    """Keys and values of a layer's sliding window, and where the search for blocks stands."""


class LocalCacheLayer(SearchLayer, DynamicSlidingWindowLayer):
    """
    Keys and values that a fully localised layer can still need at dial 1: those of the longest local set, and of the
    sinks. Where the layer defines blocks, the few numbers with which the search for them goes on travel along.

    Args:
        max_local_length (`int`):
            No block is longer, together with the previous blocks that are local with it.
        num_sink_tokens (`int`):
            Tokens at the start of the text that are kept.
        native_window (`int`, *optional*):
            The layer's sliding window, where it has one.
    """

    def __init__(self, max_local_length: int, num_sink_tokens: int, native_window: int | None = None) -> None:
        super().__init__(sliding_window=min(max_local_length, native_window or max_local_length))
        self.num_sink_tokens = num_sink_tokens
        self.native_window = native_window
        self.is_sliding = native_window is not None
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        # Keys and values with room for those to come, how many there are, and what `keys` was when they were filled.
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._filled = 0
        self._kept: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        As in [`~transformers.DynamicSlidingWindowLayer`]; a step of a generation writes its token behind the others
        instead of copying them all.
        """
        is_step = key_states.shape[2] == 1 and self.is_initialized and not self.record_past
        if not is_step or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += 1
        # Others may have chosen rows, or the room is full: room is made anew, and what was read stays as it was.
        if self.keys is not self._kept or self._filled == self._room[0].shape[2]:
            self._filled = self.keys.shape[2]
            self._room = tuple(F.pad(kept, (0, 0, 0, self.sliding_window)) for kept in (self.keys, self.values))
        keys, values = self._room
        keys.narrow(2, self._filled, 1).copy_(key_states)
        values.narrow(2, self._filled, 1).copy_(value_states)
        self._filled += 1
        seen = min(self._filled, self.sliding_window)
        first = self._filled - seen
        keys, values = keys.narrow(2, first, seen), values.narrow(2, first, seen)
        self.keys, self.values = keys, values
        if seen == self.sliding_window:  # the first of them is seen for the last time
            self.keys, self.values = keys.narrow(2, 1, seen - 1), values.narrow(2, 1, seen - 1)
        self._kept = self.keys
        return keys, values

    def keep_sinks(self, first: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Keeps the keys and values of the first tokens as they come, as many as have come.

        Args:
            first (`torch.LongTensor` of shape `(batch_size,)`):
                Position of each row's first token.
            key (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`), value (`torch.Tensor`):
                Of the last `length` tokens, the new ones among them.
        """
        kept = self.sinks or (key[:, :, :0], value[:, :, :0])
        num_sinks = min(self.num_sink_tokens, self.cumulative_length)
        dropped = self.cumulative_length - key.shape[2]
        position = first[:, None] + torch.arange(num_sinks, device=first.device) - dropped
        is_here = ((position >= 0) & (position < key.shape[2]))[:, None, :, None]
        index = position.clamp(0, key.shape[2] - 1)[:, None, :, None]
        self.sinks = tuple(
            torch.where(
                is_here,
                tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3])),
                F.pad(before, (0, 0, 0, num_sinks - before.shape[2])),
            )
            for tensor, before in zip((key, value), kept, strict=True)
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of the native layer: masks are made once for all layers of its kind, and this one needs none."""
        dropped = 0 if self.native_window is None else max(0, self.cumulative_length - self.native_window + 1)
        return self.cumulative_length - dropped + query_length, dropped

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.sinks = None

    def native_layer(self) -> DynamicLayer:
        """The layer in whose place this one stands, with nothing in it."""
        return DynamicLayer() if self.native_window is None else DynamicSlidingWindowLayer(self.native_window)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the dropped tokens would need is gone."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"`tokens_to_remove` is {tokens_to_remove}; the cache of a layer that attends to its blocks cannot "
                "be cropped. Start with a new cache; one that is filled below dial 1 can be."
            )

    def _map_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(select)
        if self.sinks is not None:
            self.sinks = tuple(map(select, self.sinks))


def whole_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache from which tokens can be removed again at any dial: no layer keeps its blocks or its window only."""
    cache = DynamicCache(config=config)
    cache.layers = [BlockCacheLayer() for _ in cache.layers]
    return cache


def check_cache(cache: Cache | None, only_local: Collection[int]) -> None:
    """
    Refuses a cache that was filled at dial 1 where a layer that kept only its blocks would see more. One that is empty
    again is as a new one.

    Args:
        cache ([`~transformers.Cache`], *optional*):
            The key-value cache.
        only_local (`Collection[int]`):
            The layers that attend to their local sets only.

    Raises:
        ValueError: for such a cache.
    """
    for layer, cached in enumerate(cache.layers if isinstance(cache, Cache) else ()):
        if isinstance(cached, LocalCacheLayer) and layer not in only_local:
            if cached.get_seq_length():
                raise ValueError(_BOUNDED_CACHE)
            cache.layers[layer] = cached.native_layer()


def prepare_cache(
    cache: DynamicCache, config: LocalityFields, only_local: Collection[int], searching: Collection[int]
) -> None:
    """
    Prepares an empty cache.

    Args:
        cache ([`~transformers.DynamicCache`]):
            The key-value cache.
        config ([`LocalityFields`]):
            The model's.
        only_local (`Collection[int]`):
            The layers that attend to their local sets, which are to hold no more than those.
        searching (`Collection[int]`):
            The layers that are to remember where the search for blocks stands.
    """
    num_layers = config.num_hidden_layers
    cache.layers += [DynamicLayer() for _ in range(len(cache.layers), num_layers)]
    for layer in range(num_layers):
        cached = cache.layers[layer]
        window = config.sliding_windows[layer] if isinstance(cached, DynamicSlidingWindowLayer) else None
        if isinstance(cached, BlockCacheLayer):
            pass  # made so by a caller who wants to remove tokens again
        elif layer in only_local:
            cache.layers[layer] = LocalCacheLayer(config.max_local_length, config.num_sink_tokens, window)
        elif layer in searching:
            cache.layers[layer] = BlockCacheLayer() if window is None else SlidingBlockCacheLayer(window)
