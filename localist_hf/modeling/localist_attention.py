# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The attention function `"localist"` and what it measures: how much of its attention each query keeps in its own block.

Without a `locality` argument it is transformers' `sdpa`. With one, the function also finds the blocks and computes each
layer's fidelity and entropy. The argument is a [`Locality`], made anew for every forward pass and handed down to the
attention of each layer with the keyword arguments; nothing is kept on modules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .block_attention import local_fidelity
from .block_partition import delimiter_block_starts, document_starts, semantic_block_starts, window_block_starts
from .configuration_localist_gpt2 import LocalistGPT2Config
from .fused_attention import attention_with_lse


@dataclass
class Locality:
    """
    What one forward pass measures: the request, the blocks as they are found, and the results by layer.

    Args:
        config ([`LocalistGPT2Config`]):
            Says how blocks are found.
        layers (`frozenset[int]`):
            Layers to measure.
        entropy (`bool`):
            Whether to measure the entropy too; it costs one more pass of the attention kernel.
        documents (`torch.LongTensor` of shape `(batch_size, key_length)`):
            First position of each position's document, -1 on padding.
        fixed_block_starts (`torch.LongTensor` of shape `(batch_size, key_length)`, *optional*):
            The block starts, where they do not depend on the model's values.
        max_block_length (`int`):
            No block is longer.
        needs_grad (`bool`, *optional*):
            Whether the forward pass runs with gradients, as it does now by default.
    """

    config: LocalistGPT2Config
    layers: frozenset[int]
    entropy: bool
    documents: torch.Tensor
    fixed_block_starts: torch.Tensor | None
    max_block_length: int
    needs_grad: bool = field(default_factory=torch.is_grad_enabled)
    _semantic_block_starts: dict[int, torch.Tensor] = field(default_factory=dict)
    fidelities: dict[int, torch.Tensor] = field(default_factory=dict)
    entropies: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def semantic_layer(self) -> int:
        """The layer whose values define the blocks of every layer above it."""
        layer = self.config.semantic_layer
        return self.config.num_hidden_layers // 2 if layer is None else layer

    def observe(self, layer: int, value: torch.Tensor) -> None:
        """Finds blocks in the values `(batch_size, num_heads, key_length, head_dim)` of a layer that defines some."""
        defines_own = layer < self.semantic_layer and layer in self.layers
        defines_shared = layer == self.semantic_layer and any(other >= layer for other in self.layers)
        # Gradient checkpointing comes here again in the backward pass, with the blocks known.
        if self.fixed_block_starts is not None or layer in self._semantic_block_starts:
            return
        if defines_own or defines_shared:
            config = self.config
            self._semantic_block_starts[layer] = semantic_block_starts(
                value.detach(),
                self.documents,
                config.semantic_window,
                config.semantic_threshold,
                config.min_block_length,
                config.max_block_length,
            )

    def block_starts(self, layer: int) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch_size, key_length)`: the block start of each position at this layer."""
        if self.fixed_block_starts is not None:
            return self.fixed_block_starts
        return self._semantic_block_starts[min(layer, self.semantic_layer)]

    def fidelity_mask(self, layer: int) -> torch.Tensor:
        """True where a token sees more than its local set; elsewhere its fidelity is 1 by construction."""
        return (self.documents >= 0) & (self.block_starts(layer) - self.documents > self.config.num_sink_tokens)


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
) -> Locality | None:
    """
    The [`Locality`] of a forward pass with these arguments (see [`LocalistGPT2LMHeadModel.forward`]), or None when no
    measurement is asked for.

    Raises:
        ValueError: for a request that cannot be met; the message names the argument.
    """
    if output_fidelity is None or output_fidelity is False:
        if output_entropy:
            raise ValueError("`output_entropy=True` needs `output_fidelity`, which says for which layers.")
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
            f"`output_fidelity` needs the attention implementation 'localist', the model uses "
            f"{config._attn_implementation!r}. Call `model.set_attn_implementation('localist')`."
        )
    if past_key_values is not None and past_key_values.is_compileable:
        raise ValueError(
            f"`output_fidelity` does not work with a cache of fixed size ({type(past_key_values).__name__}); use a "
            "`DynamicCache`."
        )

    batch_size, query_length = tokens.shape[:2]
    cached = past_key_values.get_seq_length() if past_key_values is not None else 0
    length = cached + query_length
    if attention_mask is not None:
        _check_attention_mask(attention_mask, batch_size, length)
    # As in transformers, packed documents are told apart only where there is no cache, filled or not.
    packed = position_ids if past_key_values is None else None
    documents = document_starts(batch_size, length, attention_mask, packed, tokens.device)

    max_block_length = config.max_block_length
    if block_starts is not None:
        position = torch.arange(length, device=tokens.device)
        _check_block_starts(block_starts, documents, position)
        block_starts = torch.where(documents < 0, -1, block_starts.to(tokens.device))
        max_block_length = int(torch.where(documents < 0, 0, position - block_starts).max()) + 1
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
    return Locality(config, layers, output_entropy, documents, block_starts, max_block_length)


def _check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int) -> None:
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


def _check_block_starts(block_starts: torch.Tensor, documents: torch.Tensor, position: torch.Tensor) -> None:
    if block_starts.shape != documents.shape:
        raise ValueError(
            f"`block_starts` has the shape {tuple(block_starts.shape)}; it must be {tuple(documents.shape)}: one "
            "entry for each token, those in the cache included."
        )
    starts = block_starts.to(documents.device)
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
    Attention for transformers' `AttentionInterface`; measures the layers that `locality` asks for.

    The fidelity of query i is the share of its attention that stays in its local set,
    `phi_i = exp(LSE_local,i - LSE_i)`; its entropy in bits is
    `(LSE_i - scale * q_i . attention(q, k, v := k)_i) / ln 2`.

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
            What to measure.

    Returns:
        `tuple(torch.Tensor, None)`: the attention output of shape `(batch_size, query_length, num_heads, head_dim)`.
    """
    layer = module.layer_idx
    if locality is not None:
        locality.observe(layer, value)
    if locality is None or layer not in locality.layers:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    if locality.needs_grad and not torch.is_grad_enabled():
        raise ValueError(
            "`use_reentrant` is True; gradient checkpointing of that kind gives the fidelity no gradient. Pass "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    is_causal = attention_mask is None and query_length > 1
    output, lse = attention_with_lse(query, key, value, attention_mask, is_causal, scaling, dropout)

    starts = locality.block_starts(layer)[:, -query_length:]
    documents = locality.documents[:, -query_length:]
    num_sink_tokens = locality.config.num_sink_tokens
    fidelity = local_fidelity(query, key, lse, starts, documents, locality.max_block_length, num_sink_tokens, scaling)
    is_counted = locality.fidelity_mask(layer)[:, None, -query_length:]
    locality.fidelities[layer] = torch.where(is_counted, fidelity.clamp(max=1), 1.0)
    if locality.entropy:
        with torch.autocast(query.device.type, enabled=False):
            query, key = query.float(), key.float()
            mean_key = F.scaled_dot_product_attention(query, key, key, attention_mask, 0.0, is_causal, scale=scaling)
            entropy = (lse - scaling * (query * mean_key).sum(-1)).clamp(min=0) / math.log(2)
        locality.entropies[layer] = torch.where(documents[:, None] >= 0, entropy, 0.0)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("localist", localist_attention_forward)
AttentionMaskInterface.register("localist", sdpa_mask)
