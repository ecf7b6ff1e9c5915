# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""The attention function `"localist"`, by which transformers' attention modules come here: nothing but the way in."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .locality import Locality


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
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = locality.attend(module.layer_idx, query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("localist", localist_attention_forward)
AttentionMaskInterface.register("localist", sdpa_mask)
