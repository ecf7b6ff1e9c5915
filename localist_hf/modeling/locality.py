# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
One forward pass: its dial, its blocks, its cache, and what is measured, by layer.

[`build_locality`] makes a [`Locality`] of a call's arguments, anew for every forward pass. It is handed down to every
attention with the keyword arguments; nothing is kept on modules.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils import logging

from .attention_checks import AttentionChecks
from .block_partition import Blocks, document_starts
from .block_search import BlockSearch, TokenBlocks, token_blocks
from .block_shares import (
    Attention,
    BlockChoice,
    Membership,
    block_choice,
    block_choice_by_lse,
    block_shares,
)
from .dialled_attention import Attended, Wanted, attend
from .fidelity import LayerDial, Shares
from .fused_attention import Scoring
from .local_cache import LocalCacheLayer, check_cache, prepare_cache
from .local_set import LocalSet
from .locality_config import LocalityFields
from .locality_dial import check_share, current_setting
from .locality_request import LocalityRequest, NativeInputs, rows_by_dial
from .opaque_ops import warn_once
from .pointer_set import PointerSet


logger = logging.get_logger(__name__)


class LayerResult(NamedTuple):
    """
    What is measured of a layer: its shares, its entropy if it is wanted, its block starts and its local set; and, as
    far as they are wanted, how many blocks it looks at and all shares of them.
    """

    shares: Shares
    entropy: torch.Tensor | None
    block_starts: torch.Tensor
    local_set: LocalSet | PointerSet
    block_choice: BlockChoice | None = None
    block_shares: torch.Tensor | None = None


class RowDials(NamedTuple):
    """The dial of each layer, for some rows of a batch; `None` for all of them."""

    rows: torch.LongTensor | None
    of_layers: list[LayerDial]


class Locality:
    """
    One forward pass.

    Args:
        config ([`LocalityFields`]):
            Says how local each layer is and how blocks are found.
        measured (`frozenset[int]`):
            Layers to measure.
        wanted ([`Wanted`]):
            What is measured of them.
        dials (`list[RowDials]`):
            The dial of each layer; where rows have dials of their own, for each dial.
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            First position of each position's document, -1 on padding; those in the cache come first.
        is_packed (`bool`, *optional*, defaults to `False`):
            Whether rows may hold several documents.
        blocks ([`TokenBlocks`], *optional*):
            The blocks, where they do not depend on the model's values.
        cache ([`~transformers.DynamicCache`], *optional*):
            The key-value cache; the queries follow its tokens.
        pointers ([`PointerSet`], *optional*):
            What the queries are told to look at, in place of their blocks.
    """

    def __init__(
        self,
        config: LocalityFields,
        measured: frozenset[int],
        wanted: Wanted,
        dials: list[RowDials],
        documents: torch.Tensor,
        is_packed: bool = False,
        blocks: TokenBlocks | None = None,
        cache: DynamicCache | None = None,
        pointers: PointerSet | None = None,
    ) -> None:
        self.config, self.measured, self.wanted = config, measured, wanted
        self._rows = [each.rows for each in dials]
        self._dials = list(zip(*(each.of_layers for each in dials), strict=True))  # of each layer
        self.documents, self.is_packed = documents, is_packed
        self._blocks, self._cache = blocks, cache
        self.seen = cache.get_seq_length() if cache is not None else 0
        self._pointers = pointers
        #: Layers that need the keys of their blocks only.
        self.only_local = {layer for layer, some in enumerate(self._dials) if all(dial.is_hard for dial in some)}
        if pointers is not None:  # which may be to any key
            self.only_local = set()
        #: Layers that need blocks; the others are plain attention.
        self.layers = measured | {layer for layer, some in enumerate(self._dials) if any(dial.is_on for dial in some)}
        #: What is measured, by layer.
        self.results: dict[int, LayerResult] = {}
        # Read once: a configuration's attributes are slow. A text has no more sinks than tokens.
        self._num_sinks = min(config.num_sink_tokens, documents.shape[1])
        self._sliding_windows = config.sliding_windows
        max_length = None if blocks is None else blocks.max_length
        self._max_length = config.max_local_length if max_length is None else max_length
        # Of each position, or, where a row holds one document, of the row.
        self._first_keys = documents if is_packed else documents.amax(dim=1, keepdim=True)
        needs_all = wanted.block_choice or wanted.block_shares
        fixed = None if blocks is None else blocks.blocks
        self._search = BlockSearch(config, documents, self.layers, cache, fixed, needs_all)
        self._checks = AttentionChecks(documents, self._sliding_windows, is_packed, self.layers, cache)
        self._local_sets: dict[tuple, LocalSet | PointerSet] = {}

    @property
    def has_row_dials(self) -> bool:
        """`bool`: whether rows have dials of their own."""
        return len(self._rows) > 1

    @property
    def num_new_tokens(self) -> int:
        """`int`: how many queries there are in a row."""
        return self.documents.shape[1] - self.seen

    def positions_in_text(self) -> torch.LongTensor | None:
        """
        The position of each new token in its row's text, `(batch_size, num_new_tokens)`; `None` where no row begins
        with padding, so that native models take it to be the same.
        """
        first = self._first_keys.clamp(min=0)
        if not torch.compiler.is_compiling() and not first.any():
            return None
        position = torch.arange(self.seen, self.documents.shape[1], device=self.documents.device)
        return (position - first).clamp(min=0)

    def prepare_cache(self, made: DynamicCache | None) -> None:
        """Prepares the cache of this pass, or one that is made for it, for what is asked, where it is empty."""
        if made is not None:
            self._cache = self._search.cache = self._checks.cache = made
        if (cache := self._cache) is None:
            return
        state = None if self._blocks is None else self._blocks.state
        if not self.seen:
            searching = self._search.defining if state is None else {0}
            prepare_cache(cache, self.config, self.only_local, searching)
        if state is not None:
            self._blocks.keep(cache.layers[0], self.documents.shape[1])

    def arrive(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any):
        """
        Takes note of what a layer hands to its attention, and finds the blocks that its values tell.

        Raises:
            ValueError: for what cannot be trusted.
        """
        self._checks.arrive(module, query, key, **arguments)
        self._search.look_at(module.layer_idx, value)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scoring: Scoring,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """
        The attention of one of `layers`, under the dial; measures the layer if that is asked for.

        Args:
            module (`nn.Module`):
                Its attention module.
            query, key, value, scoring:
                As for [`attend`].
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
                True, or 0 where it is added to the scores, where a query sees a key; None is causal.
            is_causal (`bool`, *optional*):
                What the attention is told in place of the module's `is_causal`, which says what no mask means.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_heads, query_length, value_head_dim)`.
        """
        layer = module.layer_idx
        mask = self._checks.seen_keys(module, attention_mask, query.shape[2], is_causal)
        dials = self._dials[layer]
        is_dialled = any(dial.is_on for dial in dials)
        is_explicit = scoring.softcap is not None or (self._pointers is not None and layer in self.measured)
        self._checks.check_attention(layer, scoring.dropout, is_dialled, is_explicit)
        local_set = self.local_set(layer, query.shape[2], query.device)
        cached = self._cache.layers[layer] if self._cache is not None else None
        if self._num_sinks and isinstance(cached, LocalCacheLayer):
            cached.keep_sinks(self._first_keys[:, 0].to(query.device), key, value)
            local_set = local_set._replace(sink_keys=cached.sinks[0], sink_values=cached.sinks[1])
        wanted = self.wanted if layer in self.measured else Wanted()

        rows = self._rows

        # Not of this object: what is made again in the backward pass holds it, and this object the outputs.
        def over(values: torch.Tensor, scoring: Scoring, local_set: LocalSet | PointerSet, wanted: Wanted) -> Attended:
            if all(dial == dials[0] for dial in dials):
                return attend(query, key, values, mask, scoring, local_set, dials[0], wanted)
            return _attend_by_rows(rows, query, key, values, mask, scoring, local_set, dials, wanted)

        attended = over(value, scoring, local_set, wanted)
        if layer in self.measured:
            starts = self._search.blocks_of(layer).starts
            of_blocks = (None, None)
            if wanted.block_choice or wanted.block_shares:
                # Weights are measured as they are, before any dropout.
                kept = None if local_set.sink_keys is None else torch.zeros_like(local_set.sink_keys)
                others = scoring._replace(dropout=0.0), local_set._replace(sink_values=kept), Wanted()
                of_blocks = self._measure_blocks(
                    query, key, starts, scoring.scale, mask is None, attended, wanted,
                    lambda values: over(values, *others).output,
                )  # fmt: skip
            starts = starts[:, -query.shape[2] :]
            self.results[layer] = LayerResult(attended.shares, attended.entropy, starts, local_set, *of_blocks)
        return attended.output

    @torch.compiler.disable  # how many blocks there are is read from a tensor
    def _measure_blocks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        starts: torch.Tensor,
        scale: float,
        is_causal: bool,
        attended: Attended,
        wanted: Wanted,
        attention: Attention,
    ) -> tuple[BlockChoice | None, torch.Tensor | None]:
        """How a layer's attention to other words is spread over all blocks, as far as it is wanted."""
        members = Membership.of_blocks(starts, self.documents, self._num_sinks, key.shape[2], query.shape[2])
        choice = shares = None
        if wanted.block_choice:
            is_known = is_causal and query.shape[2:] == key.shape[2:] and attended.lse is not None
            if is_known and members.num_blocks > key.shape[-1]:  # of fewer blocks there is one slice
                keys = repeat_kv(key, query.shape[1] // key.shape[1])
                choice = block_choice_by_lse(query, keys, attended.lse, scale, members, attended.shares)
            else:
                choice = block_choice(attention, key, members, attended.shares)
        if wanted.block_shares:
            shares = block_shares(attention, key, members, attended.shares)
        return choice, shares

    def local_set(self, layer: int, query_length: int, device: torch.device) -> LocalSet | PointerSet:
        """What is local to the last queries of a layer; layers may be spread over several devices."""
        window = self._sliding_windows[layer]
        if self._pointers is not None:
            if (window, device) not in self._local_sets:
                self._local_sets[window, device] = self._pointers.for_layer(self._num_sinks, window, device)
            return self._local_sets[window, device]
        which = (self._search.defined_by(layer), window, device)
        if which not in self._local_sets:
            blocks = self._search.blocks_of(layer).last(query_length, device)
            documents = self._first_keys[:, -query_length:] if self.is_packed else self._first_keys
            limits = (self.documents.shape[1], self._max_length, self._num_sinks, window)
            self._local_sets[which] = LocalSet.of_blocks(blocks, documents.to(device), *limits)
        return self._local_sets[which]

    def check_attended(self, model: str, cache: Cache | None) -> None:
        """
        Refuses what cannot be trusted at the end of a forward pass (see [`AttentionChecks.check_attended`]).
        """
        self._checks.check_attended(model, cache)


def _attend_by_rows(rows_of_dials, query, key, value, mask, scoring, local_set, dials, wanted) -> Attended:
    """As `attend`, the rows of each dial together, so that what is local to one is not paid for by others."""
    parts, of_dials = [], [rows.to(query.device) for rows in rows_of_dials]  # layers may lie on several devices
    for rows, dial in zip(of_dials, dials, strict=True):
        tensors = [each if each is None or len(each) == 1 else each[rows] for each in (query, key, value, mask)]
        parts.append(attend(*tensors, scoring, local_set.of_rows(rows), dial, wanted))
    order = torch.cat(of_dials).argsort()
    output = torch.cat([part.output for part in parts])[order]
    shares = entropy = None
    if wanted.shares:
        shares = Shares(*(torch.cat(share)[order] for share in zip(*(part.shares for part in parts), strict=True)))
    if wanted.entropy:
        entropy = torch.cat([part.entropy for part in parts])[order]
    return Attended(output, shares, entropy)


def build_locality(
    model_config: PreTrainedConfig, request: LocalityRequest, inputs: NativeInputs, is_training: bool = False
) -> Locality | None:
    """
    The [`Locality`] of a forward pass with these arguments, in training or not, or None when nothing is measured and
    the dial changes nothing.

    Raises:
        ValueError: for a request that cannot be met; the message names the argument.
    """
    config = model_config.locality
    dial, floor = request.locality_dial, request.min_fidelity
    if dial is None or floor is None:
        setting = current_setting(model_config)
        dial = setting.dial if dial is None else dial
        floor = setting.min_fidelity if floor is None else floor
    is_one = not isinstance(dial, torch.Tensor)
    by_dial = {check_share("locality_dial", dial): None} if is_one else rows_by_dial(dial, inputs)
    check_share("min_fidelity", floor)
    measured, lambdas = request.measured_layers(config.num_hidden_layers), config.locality_lambdas
    is_asked = floor > 0 or any(each > 0 for each in by_dial)
    is_dialled = is_asked and any(lambdas)
    if is_asked and not is_dialled:
        warn_once(
            logger,
            f"`locality_dial` is {dial} and `min_fidelity` {floor}, which change nothing: no layer is local under the "
            f"`locality_schedule` {config.locality_schedule!r}.",
        )
    if isinstance(inputs.cache, EncoderDecoderCache):  # attention to an encoder has no blocks
        inputs = inputs._replace(cache=inputs.cache.self_attention_cache)
    cache = inputs.cache
    if not measured and not is_dialled:
        check_cache(cache, only_local=())
        request.check_unused()
        return None
    attention_mask = inputs.check(model_config)
    batch_size, query_length = inputs.tokens.shape[:2]
    length = query_length + (cache.get_seq_length() if cache is not None else 0)
    packed = inputs.packed_positions(default=model_config.use_cache and not is_training)
    documents = document_starts(batch_size, length, attention_mask, packed, inputs.tokens.device)
    windows = {window: layer for layer, window in enumerate(config.sliding_windows) if window and lambdas[layer]}
    pointers = request.pointers(documents, packed is not None, query_length, windows)
    blocks = request.given_blocks(documents, config.num_previous_blocks, query_length, cache)
    if blocks is None and pointers is not None:  # which need none
        blocks = TokenBlocks(Blocks(documents, documents), max_length=length)
    if blocks is None:
        blocks = token_blocks(config, inputs.input_ids, documents, cache, request.needs_members)
    dials = [
        RowDials(rows, [LayerDial.of_layer(each, floor, value) for value in lambdas]) for each, rows in by_dial.items()
    ]
    wanted = Wanted(True, request.output_entropy, request.output_block_choice, request.output_block_shares)
    locality = Locality(config, measured, wanted, dials, documents, packed is not None, blocks, cache, pointers)
    check_cache(cache, locality.only_local)
    return locality
