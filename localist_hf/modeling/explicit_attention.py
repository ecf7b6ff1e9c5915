# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Attention under the dial, and what is measured of it, with explicit weights for a few queries at a time: for scores that
no fused kernel makes, such as soft-capped ones, and for local sets that are no stretch of keys.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from .fidelity import LayerDial
from .fused_attention import Scoring
from .local_set import NOWHERE, LocalSet
from .opaque_ops import warn_once
from .pointer_set import PointerSet


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
    mask: torch.Tensor | None,
    scoring: Scoring,
    local_set: LocalSet | PointerSet,
    dial: LayerDial,
) -> ExplicitAttention:
    """
    Softmax attention, with the weights outside of a query's local set times what the dial says (`docs/method.md#dial`).

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
        shape `(batch_size, num_heads, key_length, head_dim)`), value (`torch.Tensor` of shape `(batch_size, \
        num_heads, key_length, value_head_dim)`):
            Any floating dtype; the queries are those of the last `query_length` keys.
        mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            True where a query sees a key; None is causal.
        scoring ([`Scoring`]):
            With a softcap, scores s are `softcap * tanh(scale * q.k / softcap)`.
        local_set ([`LocalSet`] or [`PointerSet`]):
            What is local to each query; its `sink_keys` have as many heads as the keys.
        dial ([`LayerDial`]):
            What becomes of the rest.
    """
    scale, _, softcap, learned_sinks = scoring
    if softcap is not None:
        warn_once(
            logger,
            "The attention scores of this model are soft-capped, which no fused kernel with a log-sum-exp does: "
            "locality is measured and held with explicit weights for a few queries at a time, several times slower.",
        )
    key, value, positions = _with_kept_sinks(key, value, local_set)

    num_keys = key.shape[2]

    def attend(query, key, value, rows):
        # Made here, and again in the backward pass: they would be kept for each layer.
        visible, is_local, is_sink, is_own = (each[:, None] for each in local_set.masks(rows, positions, mask))
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        is_padding = ~visible.any(-1, keepdim=True)
        if learned_sinks is not None:  # one more key for each query, without a value
            sinks = learned_sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), dim=-1)
            is_local, is_sink, is_own = (F.pad(each, (0, 1)) for each in (is_local, is_sink, is_own))
            is_local[..., -1] = is_sink[..., -1] = True
        scores = scores.masked_fill(is_padding, 0.0)
        if dial.is_on:
            log_odds = scores[..., :1] if dial.floor == 0 else _log_odds(scores, is_local, is_padding)
            scores = torch.where(is_local | is_padding, scores, scores + dial.log_factor(log_odds))
        log_weights = scores.log_softmax(-1)
        weights = log_weights.exp() * ~is_padding
        # Where a weight is 0, the gradient of 0 log 0 would be no number.
        entropy = -(weights * log_weights.masked_fill(log_weights.isneginf(), 0.0)).sum(-1)
        shares = ((weights * part).sum(-1) for part in (is_own, is_sink, is_local & ~is_sink & ~is_own))
        return weights[..., :num_keys].to(value.dtype) @ value, *shares, entropy

    chunks = []
    for start in range(0, query.shape[2], _CHUNK):
        rows = slice(start, start + _CHUNK)
        with torch.autocast(query.device.type, enabled=False):
            chunks.append(checkpoint(attend, query[:, :, rows], key, value, rows, use_reentrant=False))
    return ExplicitAttention(*(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)))


def _log_odds(scores: torch.Tensor, is_local: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """`log(phi / (1 - phi))` of scores that are minus infinite where a query sees no key."""
    sums = []
    for part in (is_local, ~is_local):
        is_none = ~(part & ~scores.isneginf()).any(-1, keepdim=True) | is_padding
        sum_of_part = scores.masked_fill(~part & ~is_none, float("-inf")).logsumexp(-1, keepdim=True)
        sums.append(torch.where(is_none, float("-inf"), sum_of_part))
    # Where all is local there is nothing to turn down.
    return torch.where(sums[1].isneginf(), float("inf"), sums[0] - sums[1])


def _with_kept_sinks(
    key: torch.Tensor, value: torch.Tensor, local_set: LocalSet | PointerSet
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The keys and values, before them those of the sinks that a bounded cache keeps apart, and their positions,
    `(1 or batch_size, key_length)`.
    """
    positions = torch.arange(local_set.num_tokens - key.shape[2], local_set.num_tokens, device=key.device)[None]
    if local_set.sink_keys is None:
        return key, value, positions
    of_sinks = local_set.documents + torch.arange(local_set.sink_keys.shape[2], device=key.device)
    # Each stands once: a sink in the stretch of some query is counted with it.
    first = torch.where(local_set.starts < 0, NOWHERE, local_set.starts).amin(dim=1, keepdim=True)
    of_keys = torch.where(positions < first, NOWHERE, positions)
    of_sinks = torch.where(of_sinks < first, of_sinks, NOWHERE)
    key, value = torch.cat((local_set.sink_keys, key), dim=2), torch.cat((local_set.sink_values, value), dim=2)
    return key, value, torch.cat((of_sinks, of_keys), dim=1)
