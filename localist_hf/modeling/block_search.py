# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""The blocks of one forward pass: found in the values of its layers as they come, or in its tokens."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .block_partition import (
    Blocks,
    BlockState,
    delimiter_blocks,
    semantic_blocks,
    value_lengths,
    value_norms,
    window_block_starts,
    with_previous_blocks,
)
from .block_step import StepState, semantic_step
from .local_cache import LocalCacheLayer, SearchLayer
from .locality_config import LocalityFields


class BlockSearch:
    """
    The blocks of one pass, by layer. Semantic blocks are found in the values of a band of layers, and serve the layers
    above it; where a cache knows where the search stands after its tokens, it goes on from there.

    Args:
        config ([`LocalityFields`]):
            How blocks are found.
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            First position of each token's document, -1 on padding; those in the cache come first.
        layers (`Collection[int]`):
            The layers that need blocks.
        cache ([`~transformers.DynamicCache`], *optional*):
            The key-value cache; the queries follow its tokens.
        fixed ([`Blocks`], *optional*):
            The blocks of all positions, or of the queries, where they do not depend on the model's values.
        needs_all (`bool`, *optional*, defaults to `False`):
            Whether the blocks of cached tokens are needed too.
    """

    def __init__(
        self,
        config: LocalityFields,
        documents: torch.Tensor,
        layers: Collection[int],
        cache: DynamicCache | None,
        fixed: Blocks | None,
        needs_all: bool = False,
    ) -> None:
        self._config = config
        self._documents = documents
        self._fixed = fixed
        #: The cache, which may be made after the search.
        self.cache = cache
        self._seen = cache.get_seq_length() if cache is not None else 0
        self._needs_all = needs_all
        #: The layers whose values define the blocks of every layer above them.
        self._band = config.semantic_band
        #: Layers that define blocks, their own or also those of the layers above.
        self.defining = frozenset() if fixed is not None else frozenset(map(self.defined_by, layers))
        self._blocks: dict[int, Blocks] = {}
        #: Where the searches of the defining layers stand after the cached tokens; the others start anew.
        self._states = {
            layer: state
            for layer in (self.defining if self._seen else ())
            if (state := _state_after(self._seen, cache.layers[layer], needs_all)) is not None
        }
        #: By each layer whose values the search needs, the layers whose blocks are searched anew with them.
        self._anew: dict[int, list[int]] = {}
        for layer in sorted(self.defining):
            for other in self._band_below(layer):
                self._anew.setdefault(other, []).extend([] if layer in self._states else [layer])
        # One token's numbers are looked at where that is free; of more, or elsewhere, tensors are made.
        num_searched = documents.shape[1] - (0 if any(self._anew.values()) else self._seen)
        self._is_step = num_searched == 1 and documents.device.type == "cpu"
        self._new_documents = documents[:, self._seen :]
        self._settings = (config.semantic_threshold, config.min_block_length, config.max_block_length)
        self._value_lengths: dict[int, torch.Tensor] = {}

    def blocks_of(self, layer: int) -> Blocks:
        """The blocks of a layer, once its values are known: of all positions, or of the queries only."""
        return self._blocks[self.defined_by(layer)] if self._fixed is None else self._fixed

    def defined_by(self, layer: int) -> int:
        """The layer at which this layer's blocks are found; -1 where they do not depend on the model's values."""
        return min(layer, self._band[-1]) if self._fixed is None else -1

    def _band_below(self, layer: int) -> range:
        """The layers in whose values the blocks of a defining layer are found."""
        return range(min(layer, self._band[0]), layer + 1)

    def look_at(self, layer: int, value: torch.Tensor) -> None:
        """
        Finds blocks in the values of a layer, if it defines some, alone or with those of the band below it.

        Args:
            layer (`int`):
                The layer.
            value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
                Its values.

        Raises:
            ValueError: where a cache has dropped values that the search needs.
        """
        # Gradient checkpointing comes here again in the backward pass, with the blocks known.
        if layer not in self._anew or layer in self._value_lengths:
            return
        # Cached tokens are searched again for the layers of which it is not known where the search stands after them.
        num_searched = self._documents.shape[1] - (0 if self._anew[layer] else self._seen)
        if value.shape[2] < num_searched:
            kept = "blocks" if isinstance(self.cache.layers[layer], LocalCacheLayer) else "sliding window"
            raise ValueError(
                f"The key-value cache keeps of layer {layer} its {kept} only, and not where the search for the blocks "
                f"of layer {self._anew[layer][0]} stands: it was filled without one, or tokens were removed. Pass "
                "`block_starts`, or start with a new cache."
            )
        if self._is_step:
            self._value_lengths[layer] = value_norms(value[:, :, -1])
        else:
            self._value_lengths[layer] = value_lengths(value[:, :, -num_searched:])
        if layer not in self.defining:
            return
        band = self._band_below(layer)
        if missing := [other for other in band if other not in self._value_lengths]:
            raise ValueError(
                f"The attention of the layers {missing} was not told of blocks, which those of layer {layer} are found "
                "with: the model does not hand its keyword arguments on to it. Pass `block_starts`."
            )
        lengths = [self._value_lengths[other] for other in band]
        is_known = layer in self._states
        seen, documents = (self._seen, self._new_documents) if is_known else (0, self._documents)
        state = self._states[layer] if is_known else BlockState.at_first(documents, self._config.num_previous_blocks)
        if self._is_step:
            self._blocks[layer], state = semantic_step(lengths, documents, *self._settings, state, seen)
        else:
            documents = documents.to(value.device)
            lengths = [entry[:, -documents.shape[1] :].to(value.device) for entry in lengths]
            lengths = torch.stack(lengths).mean(dim=0)
            if isinstance(state, StepState):
                state = state.in_tensors(value.device)
            self._blocks[layer], state = semantic_blocks(lengths, documents, *self._settings, state, seen)
        cached = self.cache.layers[layer] if self.cache is not None else None
        if isinstance(cached, SearchLayer):
            if is_known and self._needs_all:
                self._blocks[layer] = _with_starts_before(self._blocks[layer], cached)
            cached.keep_search(state, self._blocks[layer].starts, self._documents.shape[1])


class TokenBlocks(NamedTuple):
    """
    Blocks that the tokens tell, or that are windows of them: of the new tokens, or of all.

    Args:
        blocks ([`Blocks`]):
            The blocks.
        state ([`BlockState`], *optional*), token_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`, \
        *optional*):
            Where a search for delimiters stands after the last token, and the ids of all tokens where they are known:
            what a cache keeps.
        max_length (`int`, *optional*):
            No block is longer, together with the previous blocks that are local with it. By default the
            configuration says so.
    """

    blocks: Blocks
    state: BlockState | None = None
    token_ids: torch.Tensor | None = None
    max_length: int | None = None

    def keep(self, cached: CacheLayerMixin, num_tokens: int) -> None:
        """Has a cache's first layer remember where the search stands."""
        if self.state is not None and isinstance(cached, SearchLayer):
            cached.keep_search(self.state, self.blocks.starts, num_tokens)
            if not isinstance(cached, LocalCacheLayer):
                cached.token_ids = self.token_ids  # tokens may be removed again


def token_blocks(
    config: LocalityFields,
    input_ids: torch.Tensor | None,
    documents: torch.Tensor,
    cache: DynamicCache | None,
    needs_all: bool = False,
) -> TokenBlocks | None:
    """
    The blocks of a partition that does not look at values; `None` for one that does.

    Args:
        config ([`LocalityFields`]):
            How blocks are found.
        input_ids (`torch.LongTensor` of shape `(batch_size, num_new_tokens)`, *optional*):
            The new tokens.
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`), cache ([`~transformers.DynamicCache`], \
        *optional*), needs_all (`bool`, *optional*, defaults to `False`):
            As for [`BlockSearch`].

    Raises:
        ValueError: where the tokens are not known.
    """
    if config.block_partition == "window":
        starts = window_block_starts(documents, config.window_length)
        return TokenBlocks(with_previous_blocks(starts, documents, config.num_previous_blocks))
    if config.block_partition != "delimiter":
        return None
    seen = cache.get_seq_length() if cache is not None else 0
    cached = cache.layers[0] if seen else None
    state = _state_after(seen, cached, needs_all) if seen else None
    known = cached.token_ids if isinstance(cached, SearchLayer) else None
    is_known = not seen or (known is not None and known.shape[1] == seen)
    if input_ids is None or (state is None and not is_known):
        raise ValueError(
            "`block_partition='delimiter'` needs the `input_ids` of all tokens, from the first one on: not "
            "`inputs_embeds`, nor a cache that was filled without a search for delimiters. Pass `block_starts` instead."
        )
    all_ids = None
    if is_known:
        all_ids = input_ids if known is None else torch.cat((known.to(input_ids.device), input_ids), dim=1)
    if state is None:  # at the beginning, or where tokens were removed
        input_ids, seen, state = all_ids, 0, BlockState.at_first(documents, config.num_previous_blocks)
    limits = (config.min_block_length, config.max_block_length)
    blocks, state = delimiter_blocks(input_ids, documents[:, seen:], config.delimiter_token_ids, *limits, state, seen)
    if seen and needs_all:
        blocks = _with_starts_before(blocks, cached)
    return TokenBlocks(blocks, state, all_ids)


def _state_after(num_tokens: int, cached: CacheLayerMixin, needs_all: bool) -> BlockState | StepState | None:
    """Where the search for blocks stands after so many tokens, if the layer's cache knows it."""
    return cached.state_after(num_tokens, needs_all) if isinstance(cached, SearchLayer) else None


def _with_starts_before(blocks: Blocks, cached: SearchLayer) -> Blocks:
    """The blocks of new tokens, with the starts of those of all tokens before."""
    before = cached.block_starts.to(blocks.starts.device)
    return blocks._replace(starts=torch.cat((before, blocks.starts), dim=1))
