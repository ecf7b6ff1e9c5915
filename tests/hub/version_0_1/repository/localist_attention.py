# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The attention function `"localist"`: what share of its attention each query keeps in its own block, and the dial that
changes it.

Without a `locality` argument it is transformers' `sdpa`. With one, the function also finds the blocks, measures each
layer's fidelity and entropy, and applies the dial. The argument is a [`Locality`], made anew for every forward pass and
handed down to the attention of each layer with the keyword arguments; nothing is kept on modules.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .block_attention import local_attention, local_fidelity
from .block_partition import (
    continue_semantic_blocks,
    delimiter_block_starts,
    document_starts,
    semantic_block_starts,
    window_block_starts,
)
from .configuration_localist_gpt2 import LocalistGPT2Config, check_share
from .fused_attention import attention_with_lse
from .local_cache import BlockCacheLayer, LocalCacheLayer


_BOUNDED_CACHE = (
    "`past_key_values` was filled at dial 1, and keeps of the layers that attend to their blocks no more than those; "
    "it cannot go on at another dial. Start with a new cache."
)


@dataclass
class Locality:
    """
    One forward pass's request, the blocks as they are found, and what is measured, by layer.

    Args:
        config ([`LocalistGPT2Config`]):
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
        fixed_block_starts (`torch.LongTensor` of shape `(batch_size, key_length)`, *optional*):
            The block starts, where they do not depend on the model's values.
        max_block_length (`int`):
            No block is longer.
        cache ([`~transformers.Cache`], *optional*):
            The key-value cache; the queries follow its tokens.
    """

    config: LocalistGPT2Config
    measured: frozenset[int]
    entropy: bool
    dial: float
    min_fidelity: float
    documents: torch.Tensor
    fixed_block_starts: torch.Tensor | None
    max_block_length: int
    cache: Cache | None = None

    def __post_init__(self) -> None:
        lambdas = self.config.locality_lambdas
        #: Factor of the weights outside the local set, and least fidelity, of each layer.
        self.weights = [1 - self.dial * value for value in lambdas]
        self.floors = [self.min_fidelity * value for value in lambdas]
        dialled = {layer for layer in range(len(lambdas)) if self.weights[layer] < 1 or self.floors[layer] > 0}
        #: Layers that attend to their blocks only.
        self.only_local = {
            layer for layer in range(len(lambdas)) if self.weights[layer] == 0 or self.floors[layer] == 1
        }
        #: Layers that need blocks; the others are plain attention.
        self.layers = self.measured | dialled
        layer = self.config.semantic_layer
        self.seen = self.cache.get_seq_length() if self.cache is not None else 0
        #: The layer whose values define the blocks of every layer above it.
        self.semantic_layer = self.config.num_hidden_layers // 2 if layer is None else layer
        self.fidelities: dict[int, torch.Tensor] = {}
        self.entropies: dict[int, torch.Tensor] = {}
        self._semantic_block_starts: dict[int, torch.Tensor] = {}
        self._needs_grad = torch.is_grad_enabled()

    def block_starts(self, layer: int) -> torch.Tensor:
        """
        The block start of each position at this layer: `torch.LongTensor` of shape `(batch_size, key_length)`, or of
        the queries only where the cache does not keep all values.
        """
        if self.fixed_block_starts is not None:
            return self.fixed_block_starts
        return self._semantic_block_starts[min(layer, self.semantic_layer)]

    def fidelity_mask(self, layer: int) -> torch.Tensor:
        """True where a token sees more than its local set; elsewhere its fidelity is 1 by construction."""
        starts = self.block_starts(layer)
        documents = self.documents[:, -starts.shape[1] :]
        return (documents >= 0) & (starts - documents > self.config.num_sink_tokens)

    def use_cache(self, cache: Cache) -> None:
        """
        Takes note of the cache, and prepares an empty one: layers that attend to their blocks hold no more than they
        need, and those in whose values blocks are found remember where the search stands.
        """
        self.cache = cache
        config = self.config
        if self.seen or not isinstance(cache, DynamicCache):
            return
        cache.layers += [DynamicLayer() for _ in range(len(cache.layers), config.num_hidden_layers)]
        length = config.window_length if config.block_partition == "window" else config.max_block_length
        for layer in range(config.num_hidden_layers):
            if layer in self.only_local:
                window = config.semantic_window if layer <= self.semantic_layer else 0
                cache.layers[layer] = LocalCacheLayer(length, window, config.num_sink_tokens)
            elif self._defines_blocks(layer):
                cache.layers[layer] = BlockCacheLayer()

    def _bounded_layer(self, layer: int) -> LocalCacheLayer | None:
        """The layer's cache, where it is bounded."""
        cached = self.cache.layers[layer] if self.cache is not None else None
        if not isinstance(cached, LocalCacheLayer):
            return None
        if layer not in self.only_local:
            raise ValueError(_BOUNDED_CACHE)
        return cached

    def _defines_blocks(self, layer: int) -> bool:
        """Whether blocks are to be found in the values of this layer."""
        if self.fixed_block_starts is not None:
            return False
        defines_own = layer < self.semantic_layer and layer in self.layers
        return defines_own or (layer == self.semantic_layer and any(other >= layer for other in self.layers))

    def find_blocks(self, layer: int, value: torch.Tensor) -> None:
        """Finds blocks in the values `(batch_size, num_heads, key_length, head_dim)` of a layer that defines some."""
        # Gradient checkpointing comes here again in the backward pass, with the blocks known.
        if layer in self._semantic_block_starts or not self._defines_blocks(layer):
            return
        config, documents = self.config, self.documents
        settings = (
            config.semantic_window,
            config.semantic_threshold,
            config.min_block_length,
            config.max_block_length,
        )
        self._bounded_layer(layer)  # which would not do for a layer that sees everything
        cached = self.cache.layers[layer] if self.cache is not None else None
        if not isinstance(cached, LocalCacheLayer | BlockCacheLayer):
            self._semantic_block_starts[layer] = semantic_block_starts(value.detach(), documents, *settings)
            return
        num_new, seen = documents.shape[1] - self.seen, self.seen
        if isinstance(cached, BlockCacheLayer):
            if cached.searched != seen:  # filled while nobody asked for blocks
                cached.forget_search()
                num_new, seen = documents.shape[1], 0
            value = value[:, :, -(num_new + config.semantic_window) :]
        kept = documents[:, -value.shape[2] :]
        starts, cached.block_state = continue_semantic_blocks(value, kept, *settings, num_new, seen, cached.block_state)
        cached.searched = documents.shape[1]
        self._semantic_block_starts[layer] = starts

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """
        The attention output of one of `layers`, `(batch_size, num_heads, query_length, head_dim)`, under the dial;
        measures the layer if that is asked for.
        """
        if self._needs_grad and not torch.is_grad_enabled():
            raise ValueError(
                "`use_reentrant` is True; gradient checkpointing of that kind gives the fidelity no gradient. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        query_length = query.shape[2]
        starts, documents = self.block_starts(layer)[:, -query_length:], self.documents[:, -query_length:]
        local_set = (starts, documents, self.max_block_length, self.config.num_sink_tokens, scale)
        is_token = documents[:, None] >= 0
        is_counted = self.fidelity_mask(layer)[:, None, -query_length:]
        weight, floor = self.weights[layer], self.floors[layer]
        needs_entropy = self.entropy and layer in self.measured

        def mean_key(attention: Callable) -> torch.Tensor:
            """The mean of the keys under an attention; float32, since the entropy is a difference of large numbers."""
            with torch.autocast(query.device.type, enabled=False):
                return attention(query.float(), key.float(), key.float())

        def entropy(lse: torch.Tensor, mean_key: torch.Tensor) -> torch.Tensor:
            """`LSE_i - scale * q_i . mean_key_i`, in nats."""
            return (lse - scale * (query.float() * mean_key).sum(-1)).clamp(min=0)

        if layer in self.only_local:
            sinks, cached = (), self._bounded_layer(layer)
            if cached is not None:
                dropped = self.documents.shape[1] - key.shape[2]
                local_set = (torch.where(starts < 0, -1, starts - dropped), documents - dropped, *local_set[2:])
                if cached.num_sink_tokens:
                    cached.keep_sinks(self.documents.amax(dim=1), key, value)
                    sinks = cached.sinks
            output, lse = local_attention(query, key, value, *local_set, *sinks)
            if needs_entropy:
                keys = tuple(sinks[0].float() for _ in sinks)
                local_mean = mean_key(lambda q, k, v: local_attention(q, k, v, *local_set, *keys)[0])
                self._record_entropy(layer, entropy(lse, local_mean), is_token)
            if layer in self.measured:
                self.fidelities[layer] = torch.ones_like(lse)
            return output

        self._bounded_layer(layer)  # which would not do here
        is_causal = attention_mask is None and query_length > 1
        output, lse = attention_with_lse(query, key, value, attention_mask, is_causal, scale, dropout)
        is_dialled = weight < 1 or floor > 0
        if is_dialled:
            local_output, local_lse = local_attention(query, key, value, *local_set)
            free_fidelity = (local_lse - lse).exp()
        else:
            free_fidelity = local_fidelity(query, key, lse, *local_set)
        free_fidelity = torch.where(is_counted, free_fidelity.clamp(max=1), 1.0)
        fidelity = free_fidelity
        if is_dialled:
            fidelity, share = dialled_fidelity(free_fidelity, weight, floor)
            output = (output + share[..., None] * (local_output - output)).to(output.dtype)
        if layer in self.measured:
            self.fidelities[layer] = fidelity
        if needs_entropy:
            mask = {"attn_mask": attention_mask, "is_causal": is_causal, "scale": scale}
            total = entropy(lse, mean_key(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **mask)))
            if is_dialled:
                local_mean = mean_key(lambda q, k, v: local_attention(q, k, v, *local_set)[0])
                local = entropy(local_lse, local_mean)
                # Entropy of the choice between the local set and the rest, and of the choice within each; the dial
                # changes the first only, and the rest's part shrinks by `1 - share`.
                rest = total - _binary_entropy(free_fidelity) - free_fidelity * local
                total = _binary_entropy(fidelity) + fidelity * local + (1 - share) * rest
            self._record_entropy(layer, total, is_token)
        return output

    def _record_entropy(self, layer: int, nats: torch.Tensor, is_token: torch.Tensor) -> None:
        self.entropies[layer] = torch.where(is_token, nats.clamp(min=0) / math.log(2), 0.0)


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
    raised = (floor - fidelity) / (1 - fidelity).clamp(min=torch.finfo(fidelity.dtype).tiny)
    is_below = dialled < floor
    return torch.where(is_below, floor, dialled), torch.where(is_below, raised, share)


def _binary_entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a choice with this probability."""
    return -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)


def build_locality(
    config: LocalistGPT2Config,
    output_fidelity: bool | Sequence[int] | None,
    output_entropy: bool,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    block_starts: torch.Tensor | None,
    locality_dial: float | None = None,
    min_fidelity: float | None = None,
) -> Locality | None:
    """
    The [`Locality`] of a forward pass with these arguments (see [`LocalistGPT2LMHeadModel.forward`]), or None when
    nothing is measured and the dial changes nothing.

    Raises:
        ValueError: for a request that cannot be met; the message names the argument.
    """
    dial = config.locality_dial if locality_dial is None else check_share("locality_dial", locality_dial)
    floor = config.min_fidelity if min_fidelity is None else check_share("min_fidelity", min_fidelity)
    is_dialled = (dial > 0 or floor > 0) and any(config.locality_lambdas)
    if output_fidelity is None or output_fidelity is False:
        if output_entropy:
            raise ValueError("`output_entropy=True` needs `output_fidelity`, which says for which layers.")
        output_fidelity = ()
    if output_fidelity == () and not is_dialled:
        if past_key_values is not None and any(
            isinstance(layer, LocalCacheLayer) for layer in getattr(past_key_values, "layers", ())
        ):
            raise ValueError(_BOUNDED_CACHE)
        return None
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise ValueError("`input_ids` and `inputs_embeds` are both None; one of them must be given.")
    num_layers = config.num_hidden_layers
    if isinstance(output_fidelity, int) and output_fidelity is not True:
        raise ValueError(f"`output_fidelity` is {output_fidelity}; it must be a bool or a list of layers.")
    layers = frozenset(range(num_layers) if output_fidelity is True else output_fidelity)
    if not layers <= set(range(num_layers)):
        raise ValueError(f"`output_fidelity` asks for layers {sorted(layers)}; the model has 0 to {num_layers - 1}.")
    if config._attn_implementation != "localist":
        raise ValueError(
            f"`output_fidelity` and `locality_dial` need the attention implementation 'localist', the model uses "
            f"{config._attn_implementation!r}. Call `model.set_attn_implementation('localist')`."
        )
    if past_key_values is not None and past_key_values.is_compileable:
        raise ValueError(
            "`output_fidelity` and `locality_dial` do not work with a cache of fixed size "
            f"({type(past_key_values).__name__}); use a `DynamicCache`."
        )

    batch_size, query_length = tokens.shape[:2]
    cached = past_key_values.get_seq_length() if past_key_values is not None else 0
    length = cached + query_length
    if attention_mask is not None:
        check_attention_mask(attention_mask, batch_size, length)
    # As in transformers, packed documents are told apart only where there is no cache, filled or not.
    packed = position_ids if past_key_values is None else None
    documents = document_starts(batch_size, length, attention_mask, packed, tokens.device)

    max_block_length = config.max_block_length
    if block_starts is not None:
        block_starts = block_starts.to(tokens.device)
        max_block_length = _check_block_starts(block_starts, documents, query_length, past_key_values)
        block_starts = torch.where(documents < 0, -1, block_starts)
    elif config.block_partition == "window":
        block_starts = window_block_starts(documents, config.window_length)
        max_block_length = config.window_length
    elif config.block_partition == "delimiter":
        if input_ids is None or cached:
            raise ValueError(
                "`block_partition='delimiter'` needs `input_ids` from the first token on; with `inputs_embeds` or a "
                "filled cache pass `block_starts` instead (see `delimiter_block_starts`)."
            )
        block_starts = delimiter_block_starts(
            input_ids, documents, config.delimiter_token_ids, config.min_block_length, max_block_length
        )
    return Locality(
        config, layers, output_entropy, dial, floor, documents, block_starts, max_block_length, past_key_values
    )


def check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int) -> None:
    if attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"`attention_mask` has the shape {tuple(attention_mask.shape)}; to measure locality it must be "
            f"{(batch_size, length)}: one entry for each token, those in the cache included."
        )
    # Reading values back is no part of a compiled graph.
    is_token = attention_mask.bool()
    stretches = is_token[:, 0] + (is_token[:, 1:] & ~is_token[:, :-1]).sum(1)
    if not torch.compiler.is_compiling() and stretches.max() > 1:
        raise ValueError(
            "`attention_mask` has padding between tokens; to measure locality it may only stand at the ends."
        )


@torch.compiler.disable  # it reads values back, which is no part of a graph
def _check_block_starts(
    block_starts: torch.Tensor, documents: torch.Tensor, query_length: int, cache: Cache | None
) -> int:
    """The length of the longest block; an error where the starts are no partition or need keys that are gone."""
    if block_starts.shape != documents.shape:
        raise ValueError(
            f"`block_starts` has the shape {tuple(block_starts.shape)}; it must be {tuple(documents.shape)}: one "
            "entry for each token, those in the cache included."
        )
    starts = block_starts
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
    # A bounded layer keeps one token less than its window.
    windows = [layer.sliding_window for layer in getattr(cache, "layers", ()) if isinstance(layer, LocalCacheLayer)]
    dropped = documents.shape[1] - query_length - min(windows) + 1 if windows else 0
    if dropped > 0 and (is_token & (starts < dropped))[:, -query_length:].any():
        raise ValueError(
            "`block_starts` has a block longer than those of the configuration, which are all that the cache keeps at "
            "dial 1; pass `use_cache=False`."
        )
    return int(torch.where(is_token, position - starts, 0).max()) + 1


def localist_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    locality: Locality | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention for transformers' `AttentionInterface`: `sdpa` where `locality` asks for nothing.

    Args:
        module (`nn.Module`):
            The attention module; its `layer_idx` says which layer this is.
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key and value (`torch.Tensor`
            of shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
            The queries are those of the last `query_length` keys.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            True where a query sees a key; None is causal.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` by default.
        locality ([`Locality`], *optional*):
            What to measure, and the dial.

    Returns:
        `tuple(torch.Tensor, None)`: the attention output of shape `(batch_size, query_length, num_heads, head_dim)`.
    """
    if locality is not None:
        locality.find_blocks(module.layer_idx, value)
    if locality is None or module.layer_idx not in locality.layers:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = locality.attend(module.layer_idx, query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("localist", localist_attention_forward)
AttentionMaskInterface.register("localist", sdpa_mask)
