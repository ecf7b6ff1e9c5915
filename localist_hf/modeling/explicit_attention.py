# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Attention under the dial, and what is measured of it, with explicit weights for a few queries at a time: for scores that
no fused kernel makes, such as soft-capped ones.
"""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Queries per step.
_CHUNK = 128


class ExplicitAttention(NamedTuple):
    """
    Attention under the dial, and what is measured of it.

    Args:
        output (`torch.Tensor` of shape `(batch_size, num_heads, query_length, value_head_dim)`):
            The attention output, of the value's dtype.
        own, sink, block, entropy (`torch.Tensor` of shape `(batch_size, num_heads, query_length)`):
            Shares of the attention on its own token, on sinks and on the rest of the local set, and its entropy in
            nats; float32, differentiable.
    """

    output: torch.Tensor
    own: torch.Tensor
    sink: torch.Tensor
    block: torch.Tensor
    entropy: torch.Tensor


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    local_starts: torch.Tensor,
    documents: torch.Tensor,
    num_sink_tokens: int,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    weight: float,
    floor: float,
    sliding_window: int | None = None,
) -> ExplicitAttention:
    """
    Softmax attention over capped scores, with the weights outside of a query's local set times
    `min(weight, phi * (1 - floor) / (floor * (1 - phi)))` (docs/method.md#dial), phi being the share inside
    without that.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
        shape `(batch_size, num_heads, key_length, head_dim)`), value (`torch.Tensor` of shape `(batch_size, \
        num_heads, key_length, value_head_dim)`):
            Any floating dtype; the queries are those of the last `query_length` keys.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            True where a query sees a key; None is causal.
        local_starts (`torch.LongTensor` of shape `(batch_size, query_length)`):
            First key of the stretch that is local to each query; -1 on padding.
        documents (`torch.LongTensor` of shape `(batch_size, 1 or query_length)`):
            First position of each query's document, or of the row's.
        num_sink_tokens (`int`):
            Keys at the start of the document that are local to every query.
        positions (`torch.LongTensor` of shape `(batch_size or 1, key_length)`):
            Of the keys; the last `query_length` are those of the queries.
        scale (`float`), softcap (`float`):
            Scores s are `softcap * tanh(scale * q.k / softcap)`.
        weight (`float`), floor (`float`):
            Factor of the weights outside the local set, in [0, 1], and least share inside, in [0, 1).
        sliding_window (`int`, *optional*):
            Keys that a query sees, where there is no mask to say it.
    """
    logger.warning_once(
        "The attention scores of this model are soft-capped, which no fused kernel with a log-sum-exp does: locality "
        "is measured and held with explicit weights for a few queries at a time, several times slower."
    )

    def attend(query, key, value, visible, is_local, is_sink, is_own):
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~visible, float("-inf"))
        is_padding = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(is_padding, 0.0)
        if weight < 1 or floor > 0:
            factor = torch.full_like(scores[..., :1], weight)
            if floor > 0:
                share = (scores.softmax(-1) * is_local).sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
                rest = (1 - share).clamp(min=torch.finfo(wide).eps)
                factor = torch.minimum(factor, share * (1 - floor) / (floor * rest))
            scores = torch.where(is_local | is_padding, scores, scores + factor.log())
        log_weights = scores.log_softmax(-1)
        weights = log_weights.exp() * ~is_padding
        # Where a weight is 0, the gradient of 0 log 0 would be no number.
        entropy = -(weights * log_weights.masked_fill(log_weights.isneginf(), 0.0)).sum(-1)
        shares = ((weights * part).sum(-1) for part in (is_own, is_sink, is_local & ~is_sink & ~is_own))
        return weights.to(value.dtype) @ value, *shares, entropy

    query_length, chunks = query.shape[2], []
    queries = positions[:, -query_length:]
    for start in range(0, query_length, _CHUNK):
        rows = slice(start, start + _CHUNK)
        place = queries[:, rows, None]
        starts = local_starts[:, rows, None]
        first = (documents if documents.shape[1] == 1 else documents[:, rows])[..., None]
        visible = positions[:, None] <= place if attention_mask is None else attention_mask[:, 0, rows]
        if attention_mask is None and sliding_window is not None:
            visible = visible & (positions[:, None] > place - sliding_window)
        visible = visible & (starts >= 0)
        is_sink = (positions[:, None] >= first) & (positions[:, None] < first + num_sink_tokens)
        is_sink = is_sink & visible & (positions[:, None] < starts)
        is_local = is_sink | (visible & (positions[:, None] >= starts))
        is_own = visible & (positions[:, None] == place)
        masks = (mask[:, None] for mask in (visible, is_local, is_sink, is_own))
        with torch.autocast(query.device.type, enabled=False):
            chunks.append(checkpoint(attend, query[:, :, rows], key, value, *masks, use_reentrant=False))
    return ExplicitAttention(*(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)))
