# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
One forward pass: what is asked of it, the blocks as they are found, what is measured, and the dial.

A [`LocalityRequest`] holds the arguments of a call. [`build_locality`] makes a [`Locality`] of it, anew for every
forward pass, which is handed down to every attention with the keyword arguments; nothing is kept on modules.
"""

import math
import numbers
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_greater_or_equal

from .block_attention import NOWHERE, attend_once, local_attention, local_shares
from .block_partition import (
    Blocks,
    BlockState,
    delimiter_blocks,
    document_starts,
    semantic_blocks,
    semantic_step,
    value_lengths,
    value_norms,
    window_block_starts,
    with_previous_blocks,
)
from .explicit_attention import explicit_attention
from .fused_attention import attention_with_lse
from .local_cache import BlockCacheLayer, LocalCacheLayer, SearchLayer, SlidingBlockCacheLayer
from .locality_config import LocalityFields
from .locality_dial import check_share, current_setting


logger = logging.get_logger(__name__)

# What a mask adds to the scores of keys that are not seen is below, in any dtype.
_MASKED = -1e4

_BOUNDED_CACHE = (
    "The key-value cache was filled at dial 1 (or `min_fidelity` 1), and keeps of the layers that attend to their "
    "blocks no more than those; it cannot go on at another dial. Start with a new cache."
)
# How other kinds of attention are told where packed documents start, and what they make of that.
_DOCUMENT_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")
# What may reach an attention beside queries, keys, values and mask. `attend` does what the first two say; the masks are
# those that the next two make; `sliding_window` is compared with the configuration, and starts of documents with those
# of `position_ids`; the others concern no attention.
_KNOWN_ARGUMENTS = frozenset((
    "softcap", "s_aux", "position_ids", "is_causal", "sliding_window", *_DOCUMENT_ARGUMENTS, "use_cache",
    "cache_position", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
    "shift_labels",
))  # fmt: skip
# Torch 2.11 compiles gradients through our attention that are wrong.
_COMPILES_GRADIENTS = is_torch_greater_or_equal("2.12")
_PACKED_AND_CACHED = (
    "`position_ids` start anew, which marks packed documents; transformers keeps them apart only where there is no "
    "cache. Pass `use_cache=False`, or, where a row is one text, an `attention_mask`."
)


@dataclass(frozen=True)
class LocalityRequest:
    """
    The arguments that localist models add to those of the native ones, as their `forward` says.
    """

    output_fidelity: bool | Sequence[int] | None = None
    output_entropy: bool = False
    block_starts: torch.LongTensor | None = None
    local_starts: torch.LongTensor | None = None
    locality_dial: float | None = None
    min_fidelity: float | None = None


# This folder may be loaded several times, once for each model from the Hub: each copy has attention of its own.
_COPY = re.sub(r"\W", "_", __package__, flags=re.ASCII)
#: The attention implementations that come here, by the one that a model has without them. For callers their name is
#: `"localist"`.
LOCALIST_ATTENTION = {"sdpa": f"localist_{_COPY}", "eager": f"localist_eager_{_COPY}"}

#: What the native models call their key-value cache: from transformers 5.24 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")

#: The names of these arguments.
REQUEST_ARGUMENTS = tuple(field.name for field in fields(LocalityRequest))


@dataclass
class Locality:
    """
    One forward pass's request, the blocks as they are found, and what is measured, by layer.

    Args:
        config ([`LocalityFields`]):
            Says how local each layer is and how blocks are found.
        measured (`frozenset[int]`):
            Layers to measure.
        entropy (`bool`):
            Whether to measure the entropy too; it costs one more pass of the attention kernel.
        dial (`float`):
            d in [0, 1]: weights outside the local set are multiplied by `1 - d * lambda_l` and renormalised.
        min_fidelity (`float`):
            The fidelity of every query of layer l is raised to `lambda_l * min_fidelity` where it is below.
        documents (`torch.LongTensor` of shape `(batch_size, key_length)`):
            First position of each position's document, -1 on padding.
        fixed_blocks ([`Blocks`], *optional*):
            The blocks of all positions, or of the queries, where they do not depend on the model's values.
        max_local_length (`int`):
            No block is longer, together with the previous blocks that are local with it.
        cache ([`~transformers.DynamicCache`], *optional*):
            The key-value cache; the queries follow its tokens.
        is_packed (`bool`, *optional*, defaults to `False`):
            Whether rows may hold several documents.
        delimiter_state ([`BlockState`], *optional*):
            Where the search for delimiter blocks stands after this pass.
        token_ids (`torch.LongTensor` of shape `(batch_size, key_length)`, *optional*):
            The ids of all tokens that it has been through.
    """

    config: LocalityFields
    measured: frozenset[int]
    entropy: bool
    dial: float
    min_fidelity: float
    documents: torch.Tensor
    fixed_blocks: Blocks | None
    max_local_length: int
    cache: DynamicCache | None = None
    is_packed: bool = False
    delimiter_state: BlockState | None = None
    token_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        lambdas = self.config.locality_lambdas
        #: Factor of the weights outside the local set, and least fidelity, of each layer.
        self.weights = [1 - self.dial * value for value in lambdas]
        self.floors = [self.min_fidelity * value for value in lambdas]
        dialled = {layer for layer in range(len(lambdas)) if self.weights[layer] < 1 or self.floors[layer] > 0}
        #: Layers that attend to their local sets only.
        self.only_local = {
            layer for layer in range(len(lambdas)) if self.weights[layer] == 0 or self.floors[layer] == 1
        }
        #: Layers that need blocks; the others are plain attention.
        self.layers = self.measured | dialled
        # Read once: a configuration's attributes are slow. A text has no more sinks than tokens.
        self.num_sink_tokens = min(self.config.num_sink_tokens, self.documents.shape[1])
        self.sliding_windows = self.config.sliding_windows
        self.seen = self.cache.get_seq_length() if self.cache is not None else 0
        #: The layers whose values define the blocks of every layer above them.
        self.semantic_band = self.config.semantic_band
        #: Layers that define blocks, their own or also those of the layers above.
        self.defining = frozenset() if self.fixed_blocks is not None else frozenset(map(self._defined_by, self.layers))
        # Of each position, or, where a row holds one document, of the row.
        self._first_keys = self.documents if self.is_packed else self.documents.amax(dim=1, keepdim=True)
        self.fidelities: dict[int, torch.Tensor] = {}
        self.shares: dict[int, tuple[torch.Tensor, ...]] = {}
        self.entropies: dict[int, torch.Tensor] = {}
        self._blocks: dict[int, Blocks] = {}
        self._states = self._states_of_search()
        #: By each layer whose values the search for blocks needs, the layers whose blocks are searched anew with them.
        self._anew: dict[int, list[int]] = {}
        for layer in sorted(self.defining):
            for other in self._band_below(layer):
                self._anew.setdefault(other, []).extend([] if layer in self._states else [layer])
        # Most tokens whose values are searched in any layer.
        self._num_searched = self.documents.shape[1] - (0 if any(self._anew.values()) else self.seen)
        config = self.config
        self._search_settings = (config.semantic_threshold, config.min_block_length, config.max_block_length)
        self._value_lengths: dict[int, torch.Tensor] = {}
        self._needs_grad = torch.is_grad_enabled()
        self._arrived: set[int] = set()
        self._attended: set[int] = set()
        self._is_over = False
        self._masks: list[tuple[torch.Tensor | None, int | None, bool, torch.Tensor | None]] = []

    def _defined_by(self, layer: int) -> int:
        """The layer at which this layer's blocks are found."""
        return min(layer, self.semantic_band[-1])

    def _band_below(self, layer: int) -> range:
        """The layers in whose values the blocks of a defining layer are found."""
        return range(min(layer, self.semantic_band[0]), layer + 1)

    def arrive(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, **arguments: Any) -> None:
        """
        Takes note of a layer, and refuses what cannot be trusted of what its attention is handed.

        Args:
            module (`nn.Module`):
                The layer's attention module.
            query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
            shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
                Its queries and keys.
            arguments:
                What else it is handed.

        Raises:
            ValueError: for a layer that attends twice, keys of other tokens than those of the text and its cache, and
                arguments that are set and change an attention in ways unknown here.
        """
        layer, length, name = module.layer_idx, self.documents.shape[1], type(module).__name__
        # Gradient checkpointing comes here again, after the forward pass.
        if layer in self._arrived and not self._is_over:
            raise ValueError(
                f"{name} attends more than once in layer {layer}; its locality can be neither measured nor held."
            )
        if not self._arrived:
            self._check_documents(arguments)
        self._arrived.add(layer)
        cached = self.cache.layers[layer] if self.cache is not None else None
        is_short = isinstance(cached, DynamicSlidingWindowLayer) and query.shape[2] <= key.shape[2] < length
        if key.shape[2] != length and not is_short:
            raise ValueError(
                f"{name} attends to {key.shape[2]} keys in layer {layer}, where the text and its cache have {length} "
                "tokens; its locality can be neither measured nor held. The model may keep keys elsewhere than in "
                f"the cache, or this version of localist-hf may not know transformers {transformers.__version__}."
            )
        for argument, value in arguments.items():
            if argument not in _KNOWN_ARGUMENTS and value is not None and value is not False:
                raise ValueError(
                    f"`{argument}` reaches the attention of layer {layer} ({name}) and may change it in ways that are "
                    "not known here; its locality can be neither measured nor held."
                )
        for argument in ("softcap", "s_aux"):
            # In this order: a configuration's attributes are slow.
            is_given = arguments.get(argument) is not None
            if is_given and module.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]:
                raise ValueError(
                    f"`{argument}` reaches the attention of layer {layer} ({name}), and `sdpa` does nothing with it; "
                    "its locality can be neither measured nor held. If it is the model's own, load that with "
                    "`attn_implementation='eager'` and localise it then."
                )
        window = arguments.get("sliding_window")
        if window is not None and window != self.sliding_windows[layer]:
            raise ValueError(
                f"{name} has a sliding window of {window} keys in layer {layer}, of which the configuration says "
                f"{self.sliding_windows[layer]}; its locality can be neither measured nor held."
            )

    def _check_documents(self, arguments: dict[str, Any]) -> None:
        """Refuses packed documents that start elsewhere than those of `position_ids`."""
        given = {name: arguments[name] for name in _DOCUMENT_ARGUMENTS[:3] if arguments.get(name) is not None}
        if not given:  # as in every step of a generation
            return
        position = torch.arange(self.documents.shape[1], device=self.documents.device)
        expected = (self.documents == position).flatten()
        for name, value in given.items():
            value = value.to(expected.device)
            if name == "seq_idx":  # the number of each token's document
                starts = F.pad(value.diff(dim=-1) != 0, (1, 0), value=True).flatten()
            else:  # positions in all rows, one after the other, and their end
                starts = torch.zeros(len(expected) + 1, dtype=torch.bool, device=expected.device)
                starts = starts.scatter(0, value.long().flatten(), True)[:-1]
            refuse_where(
                (starts != expected).any(),
                f"`{name}` has documents start elsewhere than `position_ids`, by which they are told apart here.",
            )

    def check_attended(self, model: str, cache: Cache | None) -> None:
        """
        Refuses what cannot be trusted at the end of a forward pass: a model some of whose layers have not come here, or
        that gives back another cache than the one that was prepared.

        Raises:
            ValueError: which names the model and the layers.
        """
        self._is_over = True
        if missing := sorted(self.layers - self._attended):
            raise ValueError(
                f"{model} does not hand its keyword arguments on to the attention of the layers {missing}, or these do "
                "not attend through transformers' attention interface: their locality can be neither measured nor held."
            )
        cache = getattr(cache, "self_attention_cache", cache)
        if self.cache is not None and cache is not None and cache is not self.cache:
            raise ValueError(
                f"{model} has filled another cache than the one that it was given; its locality can be neither "
                "measured nor held."
            )

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

    def visible_keys(
        self,
        module: nn.Module,
        attention_mask: torch.Tensor | None,
        query_length: int,
        is_causal: bool | None = None,
    ) -> torch.BoolTensor | None:
        """
        What a layer's queries see, from the mask that its attention is handed.

        Args:
            module (`nn.Module`):
                The layer's attention module.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
                True, or 0 where it is added to the scores, where a query sees a key; None is causal.
            query_length (`int`):
                Number of queries.
            is_causal (`bool`, *optional*):
                What the attention is told in place of the module's `is_causal`, which says what no mask means.

        Returns:
            `torch.BoolTensor` of the mask's shape, or None.

        Raises:
            ValueError: where that is not what locality counts on, the earlier keys of a query's document, or those of
                the layer's sliding window: as where a bias is added to the scores.
        """
        window, name = self.sliding_windows[module.layer_idx], type(module).__name__
        # As transformers' own attention functions read it; one query sees what there is either way.
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        is_causal = is_causal or query_length == 1
        for known, *others, visible in self._masks:
            if known is attention_mask and others == [window, is_causal]:
                return visible
        visible = attention_mask
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            visible = attention_mask == 0
            refuse_where(
                ((attention_mask > _MASKED) & ~visible).any(),
                f"{name} adds a bias to its scores; its locality can be neither measured nor held.",
            )
        # What the masks of a text's later tokens say, those of its first have said.
        if query_length == self.documents.shape[1]:
            refuse_where(
                self._differs(module.layer_idx, visible, is_causal),
                f"{name} lets documents that are packed in one row see each other, whatever `position_ids` say; pass "
                "one document in each row."
                if self.is_packed
                else f"{name} does not see the earlier tokens, or those of its sliding window, and nothing else; its "
                "locality can be neither measured nor held.",
            )
        self._masks.append((attention_mask, window, is_causal, visible))
        return visible

    def _differs(self, layer: int, visible: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """Whether queries see other keys than locality counts on, the first tokens' being these."""
        first = self._first_visible(layer, self.documents)
        if visible is None:
            sees_others = first > 0 if is_causal else self.documents >= 0
            return (sees_others & (self.documents >= 0)).any()
        position = torch.arange(first.shape[1], device=visible.device)
        first, is_token = first.to(visible.device), (self.documents >= 0).to(visible.device)
        expected = (position >= first[..., None]) & (position <= position[:, None])
        return ((visible[:, 0] != expected) & is_token[..., None]).any()

    # --- blocks

    def block_starts(self, layer: int) -> torch.Tensor:
        """
        The block start of each position at this layer: `torch.LongTensor` of shape `(batch_size, key_length)`, or of
        the queries only.
        """
        return self._blocks_of(layer).starts

    def _blocks_of(self, layer: int) -> Blocks:
        return self._blocks[self._defined_by(layer)] if self.fixed_blocks is None else self.fixed_blocks

    def local_starts(self, layer: int) -> torch.Tensor:
        """
        First key of the stretch of keys that ends with each query and is local to it: that of the earliest previous
        block that counts, or, if sinks stand there, the key after them, unless they are in the query's own block; never
        a key before the layer's sliding window. Of the block starts' shape.
        """
        starts, local_starts = self._blocks_of(layer)
        if self.num_sink_tokens:
            after_sinks = torch.minimum(starts, self._documents_of(starts) + self.num_sink_tokens)
            local_starts = torch.maximum(local_starts, after_sinks)
        elif self.sliding_windows[layer] is None:
            return local_starts
        return torch.where(starts < 0, -1, torch.maximum(local_starts, self._first_visible(layer, starts)))

    def fidelity_mask(self, layer: int) -> torch.Tensor:
        """True where a token sees more than its local set; elsewhere its fidelity is 1 by construction."""
        local_starts = self._blocks_of(layer).local_starts
        documents = self._documents_of(local_starts)
        after_sinks = documents + self.num_sink_tokens
        return (documents >= 0) & (local_starts > torch.maximum(after_sinks, self._first_visible(layer, local_starts)))

    def context_mask(self, layer: int) -> torch.Tensor:
        """`fidelity_mask` without the tokens whose local set holds no other key but sinks: a block's first token."""
        local_starts = self.local_starts(layer)
        end = self.documents.shape[1]
        position = torch.arange(end - local_starts.shape[1], end, device=local_starts.device)
        return self.fidelity_mask(layer) & (local_starts < position)

    def _first_visible(self, layer: int, starts: torch.Tensor) -> torch.Tensor:
        """The first key that each query sees: of its document, or of the layer's sliding window."""
        documents, window = self._documents_of(starts), self.sliding_windows[layer]
        if window is None:
            return documents
        end = self.documents.shape[1]
        position = torch.arange(end - starts.shape[1], end, device=starts.device)
        return torch.maximum(documents, position - window + 1)

    def _documents_of(self, starts: torch.Tensor) -> torch.Tensor:
        return self.documents[:, -starts.shape[1] :].to(starts.device)

    def prepare_cache(self) -> None:
        """
        Prepares an empty cache: layers that attend to their local sets hold no more than those, and those that define
        blocks remember where the search for them stands.
        """
        cache = self.cache
        if cache is None:
            return
        if not self.seen:
            num_layers = self.config.num_hidden_layers
            cache.layers += [DynamicLayer() for _ in range(len(cache.layers), num_layers)]
            searching = self.defining | ({0} if self.delimiter_state is not None else set())
            for layer in range(num_layers):
                cached = cache.layers[layer]
                window = self.sliding_windows[layer] if isinstance(cached, DynamicSlidingWindowLayer) else None
                if isinstance(cached, BlockCacheLayer):
                    pass  # made so by a caller who wants to remove tokens again
                elif layer in self.only_local:
                    limits = (self.config.max_local_length, self.config.num_sink_tokens, window)
                    cache.layers[layer] = LocalCacheLayer(*limits)
                elif layer in searching:
                    cache.layers[layer] = BlockCacheLayer() if window is None else SlidingBlockCacheLayer(window)
        if self.delimiter_state is not None:
            self._keep_state(0, self.delimiter_state)
            if isinstance(cached := cache.layers[0], BlockCacheLayer | SlidingBlockCacheLayer):
                cached.token_ids = self.token_ids  # tokens may be removed again

    def _keep_state(self, layer: int, state: BlockState) -> None:
        cached = self.cache.layers[layer] if self.cache is not None else None
        if isinstance(cached, SearchLayer):
            cached.block_state, cached.searched = state, self.documents.shape[1]

    def _states_of_search(self) -> dict[int, BlockState]:
        """Where the searches of the defining layers stand after the cached tokens; the others start anew."""
        defining = self.defining if self.seen else ()
        states = {layer: _state_after(self.seen, self.cache.layers[layer]) for layer in defining}
        return {layer: state for layer, state in states.items() if state is not None}

    def _bounded_layer(self, layer: int) -> LocalCacheLayer | None:
        """The layer's cache, where it is bounded."""
        cached = self.cache.layers[layer] if self.cache is not None else None
        return cached if isinstance(cached, LocalCacheLayer) else None

    def find_blocks(self, layer: int, value: torch.Tensor) -> None:
        """
        Finds blocks in the values `(batch_size, num_key_value_heads, key_length, head_dim)` of a layer, if it defines
        some, alone or with those of the band below it.
        """
        # Gradient checkpointing comes here again in the backward pass, with the blocks known.
        if layer not in self._anew or layer in self._value_lengths:
            return
        # Cached tokens are searched again for the layers of which it is not known where the search stands after them.
        num_searched = self.documents.shape[1] - (0 if self._anew[layer] else self.seen)
        if value.shape[2] < num_searched:
            kept = "sliding window" if self._bounded_layer(layer) is None else "blocks"
            raise ValueError(
                f"The key-value cache keeps of layer {layer} its {kept} only, and not where the search for the blocks "
                f"of layer {self._anew[layer][0]} stands: it was filled without one, or tokens were removed. Pass "
                "`block_starts`, or start with a new cache."
            )
        # One token's numbers are looked at where that is free; of more, or elsewhere, tensors are made.
        is_step = self._num_searched == 1 and self.documents.device.type == "cpu"
        if is_step:
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
        seen = self.seen if layer in self._states else 0
        documents = self.documents[:, seen:].to(value.device)
        state = self._states.get(layer) or BlockState.at_first(documents, self.config.num_previous_blocks)
        settings = (*self._search_settings, state, seen)
        if is_step:
            self._blocks[layer], state = semantic_step(lengths, documents, *settings)
        else:
            lengths = [entry[:, -documents.shape[1] :].to(value.device) for entry in lengths]
            lengths = torch.stack(lengths).mean(dim=0)
            self._blocks[layer], state = semantic_blocks(lengths, documents, *settings)
        self._keep_state(layer, state)

    # --- attention

    def _is_plain_step(self, layer: int, query_length: int, dropout: float) -> bool:
        """Whether this is a step of a generation that asks for the dial only: then one kernel call does it all."""
        return (
            query_length == 1
            and layer not in self.measured
            and (self.floors[layer] == 0 or layer in self.only_local)
            and dropout == 0
            and not torch.is_grad_enabled()
            and not torch.compiler.is_exporting()  # no length is known there
        )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scale: float,
        dropout: float,
        softcap: float | None = None,
        learned_sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The attention output of one of `layers`, under the dial; measures the layer if that is asked for.

        Args:
            layer (`int`):
                Which layer it is.
            query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
            shape `(batch_size, num_key_value_heads, key_length, head_dim)`), value (`torch.Tensor` of shape \
            `(batch_size, num_key_value_heads, key_length, value_head_dim)`):
                The queries are those of the last `query_length` keys.
            attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
                True where a query sees a key; None is causal.
            scale (`float`), dropout (`float`):
                Factor of the scores, and dropout of the weights.
            softcap (`float`, *optional*):
                Scores s become `softcap * tanh(s / softcap)`.
            learned_sinks (`torch.Tensor` of shape `(num_heads,)`, *optional*):
                A score for each head of a sink that is no token, and has no value.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_heads, query_length, value_head_dim)`.
        """
        if self._needs_grad and not torch.is_grad_enabled():
            raise ValueError(
                "`use_reentrant` is True; gradient checkpointing of that kind gives the fidelity no gradient. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        is_dialled = self.weights[layer] < 1 or self.floors[layer] > 0
        if dropout and (is_dialled or softcap is not None):
            raise ValueError(
                f"The attention dropout of layer {layer} is {dropout}; "
                f"{'under the dial' if is_dialled else 'where soft-capped scores are measured'} it must be 0. Set it "
                "so in the model's configuration."
            )
        self._attended.add(layer)
        query_length, value_dim = query.shape[2], value.shape[-1]
        device = query.device  # layers may be spread over several
        cached, sink_keys, sink_values = self._bounded_layer(layer), None, None
        if cached is not None and self.num_sink_tokens:
            cached.keep_sinks(self._first_keys[:, 0].to(device), key, value)
            sink_keys, sink_values = cached.sinks
        dropped = self.documents.shape[1] - key.shape[2]
        starts = self.local_starts(layer)[:, -query_length:].to(device)
        documents = self._first_keys[:, -query_length:].to(device)
        window = self.sliding_windows[layer]
        max_local_length = self.max_local_length if window is None else min(window, self.max_local_length)
        local_set = (starts, documents, max_local_length, self.num_sink_tokens, scale)
        weight, floor = (0.0, 0.0) if layer in self.only_local else (self.weights[layer], self.floors[layer])
        if softcap is None and learned_sinks is None and self._is_plain_step(layer, query_length, dropout):
            step = (*local_set, weight, dropped, sink_keys, sink_values, window)
            return attend_once(query, key, value, attention_mask, *step)
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        if sink_keys is not None:
            sink_keys, sink_values = repeat_kv(sink_keys, groups), repeat_kv(sink_values, groups)
        if softcap is not None:
            sinks, sizes = (sink_keys, sink_values), (scale, softcap, weight, floor, window)
            return self._attend_explicitly(
                layer, query, key, value, attention_mask, starts, documents, dropped, sinks, sizes
            )
        if value_dim != query.shape[-1]:  # zeros change no score and no output
            width = max(value_dim, query.shape[-1])
            query, key, value, sink_keys, sink_values = (
                rows if rows is None else F.pad(rows, (0, width - rows.shape[-1]))
                for rows in (query, key, value, sink_keys, sink_values)
            )
        if dropped:
            local_set = (torch.where(starts < 0, -1, starts - dropped), documents - dropped, *local_set[2:])
        is_measured = layer in self.measured
        needs_entropy = self.entropy and is_measured
        sinks = None if learned_sinks is None else learned_sinks.float()[None, :, None]

        def of_learned_sinks(lse: torch.Tensor) -> torch.Tensor:
            """The share of the learned sinks, of what has this log-sum-exp."""
            return (sinks - lse).exp()

        def with_learned_sinks(output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if sinks is None:
                return output, lse
            total = torch.logaddexp(lse, sinks)
            return (output * (lse - total).exp()[..., None]).to(output.dtype), total

        def attend_locally(query, key, value, sink_keys, sink_values) -> tuple[torch.Tensor, torch.Tensor]:
            return local_attention(query, key, value, *local_set, sink_keys, sink_values, window)

        def entropy(attention: Callable, lse: torch.Tensor) -> torch.Tensor:
            """`LSE_i - scale * q_i . (mean key)_i`, in nats; float32, being a difference of large numbers."""
            wide_sinks = None if sink_keys is None else sink_keys.float()
            with torch.autocast(query.device.type, enabled=False):
                mean_key = attention(query.float(), key.float(), key.float(), wide_sinks, wide_sinks)
                return (lse - scale * (query.float() * mean_key).sum(-1)).clamp(min=0)

        def entropy_with_learned_sinks(keys_entropy: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            """That of the choice between keys and learned sinks, and of the choice among the keys."""
            if sinks is None:
                return keys_entropy
            share = 1 - of_learned_sinks(total)
            return _binary_entropy(share) + share * keys_entropy

        if is_dialled:
            local_output, local_keys_lse = attend_locally(query, key, value, sink_keys, sink_values)
            local_output, local_lse = with_learned_sinks(local_output, local_keys_lse)
            if needs_entropy:
                local_entropy = entropy(lambda *inputs: attend_locally(*inputs)[0], local_keys_lse)
                local_entropy = entropy_with_learned_sinks(local_entropy, local_lse)
        if layer in self.only_local:
            output, fidelity = local_output, torch.ones_like(local_lse)
            total_entropy = local_entropy if needs_entropy else None
        else:
            is_counted = self.fidelity_mask(layer)[:, None, -query_length:].to(device)
            is_causal = attention_mask is None and query_length > 1
            output, keys_lse = attention_with_lse(query, key, value, attention_mask, is_causal, scale, dropout)
            output, lse = with_learned_sinks(output, keys_lse)
            if is_dialled:
                # Where the fidelity is not counted it is 1, whatever the log-sum-exps of padding are.
                free_fidelity = torch.where(is_counted, local_lse - lse, 0.0).exp()
            else:
                shares = self._shares(query, key, lse, local_set, None, window, sinks)
                free_fidelity = sum(shares)
            fidelity = free_fidelity = torch.where(is_counted, free_fidelity.clamp(max=1), 1.0)
            if is_dialled:
                fidelity, share = dialled_fidelity(free_fidelity, weight, floor)
                output = (output + share[..., None] * (local_output - output)).to(output.dtype)
            if needs_entropy:
                mask = {"attn_mask": attention_mask, "is_causal": is_causal, "scale": scale}
                total_entropy = entropy(lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, **mask), keys_lse)
                total_entropy = entropy_with_learned_sinks(total_entropy, lse)
                if is_dialled:
                    # Entropy of the choice between the local set and the rest, and of the choice within each; the dial
                    # changes the first only, and the rest's part shrinks by `1 - share`.
                    rest = total_entropy - _binary_entropy(free_fidelity) - free_fidelity * local_entropy
                    total_entropy = _binary_entropy(fidelity) + fidelity * local_entropy + (1 - share) * rest
        if is_measured:
            if is_dialled:  # the dial leaves the choice within the local set as it is
                shares = self._shares(query, key, local_lse, local_set, sink_keys, window, sinks)
                shares = [part * fidelity for part in shares]
            self.fidelities[layer] = fidelity
            self.shares[layer] = (*shares, 1 - fidelity)
        if needs_entropy:
            is_token = (self.documents[:, None, -query_length:] >= 0).to(device)
            self.entropies[layer] = torch.where(is_token, total_entropy.clamp(min=0) / math.log(2), 0.0)
        return output[..., :value_dim]

    def _attend_explicitly(
        self, layer, query, key, value, attention_mask, starts, documents, dropped, sinks, sizes
    ) -> torch.Tensor:
        """As `attend`, with explicit weights. Positions count from the first token of the row."""
        query_length, device = query.shape[2], query.device
        positions = torch.arange(dropped, dropped + key.shape[2], device=device)[None]
        if layer in self.only_local:
            attention_mask = None  # what is not local counts for nothing
        if sinks[0] is not None:  # a bounded cache keeps them apart; those that it still holds come first too
            key, value = torch.cat((sinks[0], key), dim=2), torch.cat((sinks[1], value), dim=2)
            of_sinks = documents + torch.arange(sinks[0].shape[2], device=device)
            # Each stands once: a sink in the stretch of some query is counted with it.
            first = torch.where(starts < 0, NOWHERE, starts).amin(dim=1, keepdim=True)
            of_keys = torch.where(positions < first, NOWHERE, positions)
            of_sinks = torch.where(of_sinks < first, of_sinks, NOWHERE)
            positions = torch.cat((of_sinks, of_keys), dim=1)
        local_set = (starts, documents, self.num_sink_tokens)
        result = explicit_attention(query, key, value, attention_mask, *local_set, positions, *sizes)
        if layer in self.measured:
            shares = (result.own, result.sink, result.block)
            is_counted = self.fidelity_mask(layer)[:, None, -query_length:].to(device)
            self.fidelities[layer] = torch.where(is_counted, sum(shares).clamp(max=1), 1.0)
            self.shares[layer] = (*shares, 1 - self.fidelities[layer])
            if self.entropy:
                self.entropies[layer] = result.entropy.clamp(min=0) / math.log(2)
        return result.output

    @staticmethod
    def _shares(query, key, lse, local_set, sink_keys, window, learned_sinks) -> tuple[torch.Tensor, ...]:
        """The shares of the attention on its own token, on sinks, and on the rest of the local set."""
        own, sink, block = local_shares(query, key, lse, *local_set, sink_keys, window)
        if learned_sinks is not None:
            is_token = local_set[0][:, None] >= 0
            sink = sink + torch.where(is_token, learned_sinks - lse, float("-inf")).exp()
        return own, sink, block


def context_fidelity(block: torch.Tensor, outside: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """
    psi, of the attention that goes to other words the share in the block: `block / (block + outside + eps)`.
    Attention that moves to the query's own token or to a sink leaves it as it is.

    Args:
        block (`torch.Tensor`), outside (`torch.Tensor` of the same shape):
            Shares of the attention, or sums of them over many queries: a mean of psi is the ratio of the sums.
        eps (`float`, *optional*, defaults to 0.0):
            What a loss needs, where hardly any attention may go to other words.

    Returns:
        `torch.Tensor`: in [0, 1]; no number where all are 0.
    """
    return block / (block + outside + eps)


def dialled_fidelity(fidelity: torch.Tensor, weight: float, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The fidelity under the dial, `phi' = phi / (phi + w * (1 - phi))`, raised to `floor` where it is below, and the
    share of the local attention's output in the dialled one: `out' = out + share * (out_local - out)` with
    `share = (phi' - phi) / (1 - phi)`.

    Args:
        fidelity (`torch.Tensor`):
            phi, in [0, 1].
        weight (`float`):
            w in (0, 1], the factor of the weights outside the local set.
        floor (`float`):
            Least fidelity, in [0, 1).
    """
    dialled = fidelity / (fidelity + weight * (1 - fidelity))
    share = (1 - weight) * dialled  # the same as above, and exact at phi = 1
    # Where nothing is to be raised the quotient is not used; it must only stay finite, and so must its gradient.
    raised = (floor - fidelity) / (1 - fidelity).clamp(min=torch.finfo(fidelity.dtype).eps)
    is_below = dialled < floor
    return torch.where(is_below, floor, dialled), torch.where(is_below, raised, share)


def _binary_entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a choice with this probability."""
    is_certain = (share <= 0) | (share >= 1)
    share = torch.where(is_certain, 0.5, share)  # where the gradient of the formula is no number
    return torch.where(is_certain, 0.0, -share * share.log() - (1 - share) * (1 - share).log())


def build_locality(
    model_config: PreTrainedConfig,
    request: LocalityRequest,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    use_cache: bool | None = None,
    is_causal: bool | None = None,
    is_training: bool = False,
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
    check_share("locality_dial", dial)
    check_share("min_fidelity", floor)
    layers = _measured_layers(request, config.num_hidden_layers)
    is_dialled = (dial > 0 or floor > 0) and any(config.locality_lambdas)
    if (dial > 0 or floor > 0) and not is_dialled:
        logger.warning_once(
            f"`locality_dial` is {dial} and `min_fidelity` {floor}, which change nothing: no layer is local under the "
            f"`locality_schedule` {config.locality_schedule!r}."
        )
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache  # attention to an encoder has no blocks
    if not layers and not is_dialled:
        check_cache(cache, only_local=())
        return None
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise ValueError("`input_ids` and `inputs_embeds` are both None; one of them must be given.")
    for name, value in (("is_causal", is_causal), ("config.is_causal", getattr(model_config, "is_causal", None))):
        if value is not None and not value:
            raise ValueError(f"`{name}` is {value}; locality is of attention to the tokens before, and needs True.")
    attention = model_config._attn_implementation
    if attention not in LOCALIST_ATTENTION.values():
        raise ValueError(
            f"`output_fidelity` and `locality_dial` need the attention implementation 'localist', the model uses "
            f"{attention!r}. Call `model.set_attn_implementation('localist')`."
        )
    if torch.jit.is_tracing():
        raise ValueError(
            "`output_fidelity` and `locality_dial` do not work under `torch.jit.trace`, which would keep the blocks of "
            "the example's length; use `torch.export` or `torch.compile`."
        )
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _COMPILES_GRADIENTS:
        _refuse_compiled(
            f"`output_fidelity` and `locality_dial` have wrong gradients where torch {torch.__version__} compiles "
            "them; it needs 2.12. Train without `torch.compile`, or wrap what needs no gradient in `torch.no_grad()`."
        )
    if torch.compiler.is_exporting() and isinstance(tokens.shape[1], torch.SymInt):
        raise ValueError(
            "`output_fidelity` and `locality_dial` can be exported for texts of one length only: tiles of the band "
            "depend on it. Leave the length out of `dynamic_shapes`, or export at dial 0."
        )
    if cache is not None and not isinstance(cache, DynamicCache):
        kind = "of fixed size" if getattr(cache, "is_compileable", False) else "of this kind"
        raise ValueError(
            f"`output_fidelity` and `locality_dial` do not work with a cache {kind} ({type(cache).__name__}); use a "
            "`DynamicCache`."
        )

    batch_size, query_length = tokens.shape[:2]
    if query_length == 0:
        raise ValueError("`input_ids` or `inputs_embeds` hold no token; there is nothing to measure or to hold.")
    cached = cache.get_seq_length() if cache is not None else 0
    length = cached + query_length
    if attention_mask is not None:
        check_attention_mask(attention_mask, batch_size, length)
    packed = None
    # As in transformers, packed documents are told apart only where there is no cache.
    if attention_mask is None and position_ids is not None and cache is None:
        default = model_config.use_cache and not is_training
        packed = _packed_positions(position_ids, use_cache, default)
    documents = document_starts(batch_size, length, attention_mask, packed, tokens.device)

    blocks, delimiter_state, token_ids, max_local_length = None, None, None, config.max_local_length
    if request.local_starts is not None:
        if request.block_starts is not None:
            raise ValueError("`block_starts` and `local_starts` are both given; only one can tell.")
        starts = _given_starts("local_starts", request.local_starts, documents)
        _check_local_starts(starts, documents)
        starts = torch.where(documents < 0, -1, starts)
        blocks = Blocks(starts, starts)
        max_local_length = _check_local_length("local_starts", blocks, query_length, cache)
    elif request.block_starts is not None:
        starts = _given_starts("block_starts", request.block_starts, documents)
        _check_block_starts(starts, documents)
        starts = torch.where(documents < 0, -1, starts)
        blocks = with_previous_blocks(starts, documents, config.num_previous_blocks)
        max_local_length = _check_local_length("block_starts", blocks, query_length, cache)
    elif config.block_partition == "window":
        starts = window_block_starts(documents, config.window_length)
        blocks = with_previous_blocks(starts, documents, config.num_previous_blocks)
    elif config.block_partition == "delimiter":
        blocks, delimiter_state, token_ids = _delimiter_blocks(config, input_ids, documents, cache)
    locality = Locality(
        config,
        layers,
        request.output_entropy,
        dial,
        floor,
        documents,
        blocks,
        max_local_length,
        cache,
        is_packed=packed is not None,
        delimiter_state=delimiter_state,
        token_ids=token_ids,
    )
    check_cache(cache, locality.only_local)
    return locality


@torch.compiler.disable  # raised in a graph, it would be traced no further and done again outside
def _refuse_compiled(message: str) -> None:
    raise ValueError(message)


def _packed_positions(position_ids: torch.Tensor, use_cache: bool | None, default: bool) -> torch.Tensor | None:
    """
    The `position_ids` where they mark packed documents. A cache is then refused where it is asked for, and not made
    where nothing is said.
    """
    starts_anew = (position_ids.diff(dim=-1) != 1).any()
    makes_cache = default if use_cache is None else use_cache
    if torch.compiler.is_compiling():  # no value can be read: with a cache documents are refused, and else looked for
        if makes_cache:
            refuse_where(starts_anew, _PACKED_AND_CACHED)
        return None if makes_cache else position_ids
    if starts_anew and use_cache:
        raise ValueError(_PACKED_AND_CACHED)
    return position_ids if starts_anew else None


def _state_after(num_tokens: int, cached: CacheLayerMixin) -> BlockState | None:
    """Where the search for blocks stands after so many tokens, if the layer's cache knows it."""
    return cached.state_after(num_tokens) if isinstance(cached, SearchLayer) else None


def _delimiter_blocks(
    config: LocalityFields, input_ids: torch.Tensor | None, documents: torch.Tensor, cache: DynamicCache | None
) -> tuple[Blocks, BlockState, torch.Tensor | None]:
    """The blocks of the new tokens, where the search stands after them, and the ids of all tokens where known."""
    seen = cache.get_seq_length() if cache is not None else 0
    cached = cache.layers[0] if seen else None
    state = _state_after(seen, cached) if seen else None
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
    return blocks, state, all_ids


def _measured_layers(request: LocalityRequest, num_layers: int) -> frozenset[int]:
    output_fidelity = request.output_fidelity
    if output_fidelity is None or output_fidelity is False:
        if request.output_entropy:
            raise ValueError("`output_entropy=True` needs `output_fidelity`, which says for which layers.")
        return frozenset()
    if output_fidelity is True:
        return frozenset(range(num_layers))
    if not isinstance(output_fidelity, Collection):
        raise ValueError(f"`output_fidelity` is {output_fidelity}; it must be a bool or a list of layers.")
    if not all(isinstance(layer, numbers.Integral) and 0 <= layer < num_layers for layer in output_fidelity):
        raise ValueError(
            f"`output_fidelity` asks for layers {list(output_fidelity)}; the model has 0 to {num_layers - 1}."
        )
    return frozenset(map(int, output_fidelity))


def check_cache(cache: Cache | None, only_local: Collection[int]) -> None:
    """
    Refuses a cache that was filled at dial 1 where a layer that kept only its blocks would see more. One that is empty
    again is as a new one.
    """
    for layer, cached in enumerate(cache.layers if isinstance(cache, Cache) else ()):
        if isinstance(cached, LocalCacheLayer) and layer not in only_local:
            if cached.get_seq_length():
                raise ValueError(_BOUNDED_CACHE)
            cache.layers[layer] = cached.native_layer()


def check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int) -> None:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch_size, length):
        is_tensor = isinstance(attention_mask, torch.Tensor)
        given = f"has the shape {tuple(attention_mask.shape)}" if is_tensor else f"is a {type(attention_mask).__name__}"
        raise ValueError(
            f"`attention_mask` {given}; to measure locality its shape must be "
            f"{(batch_size, length)}: one entry for each token, those in the cache included."
        )
    is_token = attention_mask.bool()
    if not torch.compiler.is_compiling() and is_token.all():
        return
    stretches = is_token[:, 0] + (is_token[:, 1:] & ~is_token[:, :-1]).sum(1)
    refuse_where(
        stretches.max() > 1,
        "`attention_mask` has padding between tokens; to measure locality it may only stand at the ends.",
    )


def refuse_where(condition: torch.Tensor, message: str) -> None:
    """
    A `ValueError` where the condition is true. A compiled graph reads no value back: there it is an assertion, by which
    the graph fails with the message (on a GPU as a device-side assertion).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~condition, message)
    elif condition:
        raise ValueError(message)


def _given_starts(name: str, starts: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """The starts that are passed, on the device of the text; an error where they are not of its shape."""
    if not isinstance(starts, torch.Tensor) or starts.is_floating_point():
        kind = starts.dtype if isinstance(starts, torch.Tensor) else f"a {type(starts).__name__}"
        raise ValueError(f"`{name}` is {kind}; it must be a tensor of whole numbers.")
    if starts.shape != documents.shape:
        raise ValueError(
            f"`{name}` has the shape {tuple(starts.shape)}; it must be {tuple(documents.shape)}: one entry for each "
            "token, those in the cache included."
        )
    return starts.to(documents.device)


@torch.compiler.disable  # it reads values back, which is no part of a graph
def _check_block_starts(starts: torch.Tensor, documents: torch.Tensor) -> None:
    """An error where the starts are no partition of the text."""
    position = torch.arange(documents.shape[1], device=documents.device)
    is_token = documents >= 0
    own = starts.gather(1, starts.clamp(0, len(position) - 1))
    falls = F.pad(starts.diff(dim=1) < 0, (1, 0)) & F.pad(documents.diff(dim=1) == 0, (1, 0))
    wrong = is_token & ((starts < documents) | (starts > position) | (own != starts) | falls)
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`block_starts[{row}, {at}]` is {starts[row, at]}; it must lie between the start of the text "
            f"({documents[row, at]}) and the position itself, be the start of its own block, and not go back to an "
            "earlier one."
        )


@torch.compiler.disable
def _check_local_starts(starts: torch.Tensor, documents: torch.Tensor) -> None:
    """An error where a stretch does not lie between the start of the text and its query."""
    position = torch.arange(documents.shape[1], device=documents.device)
    wrong = (documents >= 0) & ((starts < documents) | (starts > position))
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`local_starts[{row}, {at}]` is {starts[row, at]}; it must lie between the start of the text "
            f"({documents[row, at]}) and the position itself."
        )


@torch.compiler.disable
def _check_local_length(name: str, blocks: Blocks, query_length: int, cache: DynamicCache | None) -> int:
    """The longest local stretch of explicit blocks; an error where it needs keys that a cache has dropped."""
    length = blocks.starts.shape[1]
    is_token = blocks.starts >= 0
    # A bounded layer keeps one token less than its window.
    windows = [layer.sliding_window for layer in getattr(cache, "layers", ()) if isinstance(layer, LocalCacheLayer)]
    dropped = length - query_length - min(windows) + 1 if windows else 0
    if dropped > 0 and (is_token & (blocks.local_starts < dropped))[:, -query_length:].any():
        raise ValueError(
            f"`{name}` has a block longer than those of the configuration, which are all that the cache keeps at "
            "dial 1; pass the whole text with `use_cache=False`."
        )
    position = torch.arange(length, device=is_token.device)
    return int(torch.where(is_token, position - blocks.local_starts, 0).max()) + 1
