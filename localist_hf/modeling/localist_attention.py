# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""The attention functions by which transformers' attention modules come here: nothing but the way in."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from .fused_attention import Scoring
from .locality import Locality
from .locality_request import LOCALIST_ATTENTION


def eager_attention(module: nn.Module) -> Callable | None:
    """The attention with explicit weights of a module's own file, which transformers has under this name in each."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def localist_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    locality: Locality | None = None,
    observer: Callable[..., None] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention for transformers' `AttentionInterface`: the native one where `locality` asks for nothing.

    Args:
        module (`nn.Module`):
            The attention module; its `layer_idx` says which layer this is.
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
        shape `(batch_size, num_key_value_heads, key_length, head_dim)`), value (`torch.Tensor` of shape \
        `(batch_size, num_key_value_heads, key_length, value_head_dim)`):
            The queries are those of the last `query_length` keys.
        attention_mask (`torch.Tensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            What a query sees: True, or 0 where the native attention adds its mask to the scores; None is causal.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` by default.
        locality ([`Locality`], *optional*):
            What to measure, and the dial.
        observer (`Callable`, *optional*):
            Is handed all of this, but `locality`, before anything is done with it: for tools that show what no output
            holds. Given to a model's `forward`, it comes here from every layer.
        kwargs:
            What the architecture hands to its attention, such as `dropout`, `softcap`, `s_aux` and `sliding_window`. Of
            what is measured or dialled the unknown is refused.

    Returns:
        `tuple(torch.Tensor, torch.Tensor | None)`: the attention output of shape `(batch_size, query_length, num_heads,
        value_head_dim)`; the weights, where the native attention gives them.
    """
    if observer is not None:
        observer(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if locality is not None:
        locality.arrive(module, query, key, value, **kwargs)
    if locality is None or module.layer_idx not in locality.layers:
        is_eager = module.config._attn_implementation == LOCALIST_ATTENTION["eager"]
        attention = eager_attention(module) if is_eager else sdpa_attention_forward
        return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, kwargs.get("dropout", 0.0), kwargs.get("softcap"), kwargs.get("s_aux"))
    if torch.is_autocast_enabled(query.device.type):
        # After rotary positions queries and keys are float32, values are not; a fused kernel wants one dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = locality.attend(module, query, key, value, attention_mask, scoring, kwargs.get("is_causal"))
    return output.transpose(1, 2).contiguous(), None


for _native, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(LOCALIST_ATTENTION[_native], localist_attention_forward)
    AttentionMaskInterface.register(LOCALIST_ATTENTION[_native], _mask)
