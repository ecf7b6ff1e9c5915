# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The attention of one layer under the dial, and what is measured of it: no state, and no matrix of attention but where no
fused kernel makes the scores.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv

from .block_attention import local_attention, local_shares
from .explicit_attention import explicit_attention
from .fidelity import LayerDial, Shares, binary_entropy, counted_fidelity, dialled_entropy, fidelity_of_sums
from .fused_attention import Scoring, attention_with_lse
from .local_set import LOCAL_SET_SCHEMA, LocalSet
from .opaque_ops import opaque_without_gradient
from .pointer_set import PointerSet


# Queries that are told where to look, at a time.
_TOLD = 256


class Wanted(NamedTuple):
    """
    What is measured of a layer's attention.

    Args:
        shares (`bool`, *optional*, defaults to `False`):
            Where it goes.
        entropy (`bool`, *optional*, defaults to `False`):
            Its entropy, which costs one more pass of the attention kernel.
        block_choice (`bool`, *optional*, defaults to `False`), block_shares (`bool`, *optional*, defaults to `False`):
            How its part on other words is spread over blocks, and all shares of them (see `block_shares.py`); not by
            [`attend`].
    """

    shares: bool = False
    entropy: bool = False
    block_choice: bool = False
    block_shares: bool = False


class Attended(NamedTuple):
    """
    The attention of some queries.

    Args:
        output (`torch.Tensor` of shape `(batch_size, num_heads, query_length, value_head_dim)`):
            The attention output, of the query's dtype.
        shares ([`Shares`], *optional*):
            Where it goes; float32 (float64 for float64 inputs), differentiable.
        entropy (`torch.Tensor` of shape `(batch_size, num_heads, query_length)`, *optional*):
            Its entropy in bits; 0 on padding.
        lse (`torch.Tensor` of the same shape, *optional*):
            The log-sum-exp of all that it goes to, where a fused kernel makes it and no dial turns anything down.
    """

    output: torch.Tensor
    shares: Shares | None = None
    entropy: torch.Tensor | None = None
    lse: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    local_set: LocalSet | PointerSet,
    dial: LayerDial,
    wanted: Wanted,
) -> Attended:
    """
    Attention with the weights outside the local set turned down.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
        shape `(batch_size, num_key_value_heads, key_length, head_dim)`), value (`torch.Tensor` of shape \
        `(batch_size, num_key_value_heads, key_length, value_head_dim)`):
            The queries are those of the last `query_length` keys.
        mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            True where a query sees a key; None is causal.
        scoring ([`Scoring`]):
            How weights are made of queries and keys.
        local_set ([`LocalSet`] or [`PointerSet`]):
            What is local to each query.
        dial ([`LayerDial`]):
            What becomes of the rest.
        wanted ([`Wanted`]):
            What is measured.

    Returns:
        [`Attended`]
    """
    is_soft_capped, has_learned_sinks = scoring.softcap is not None, scoring.learned_sinks is not None
    is_step = query.shape[2] == 1 and not wanted.shares and dial.floor == 0 and scoring.dropout == 0
    # No length is known where a graph is exported.
    is_plain = not (is_soft_capped or has_learned_sinks or torch.is_grad_enabled() or torch.compiler.is_exporting())
    is_pointed = isinstance(local_set, PointerSet)
    if is_step and is_plain and not is_pointed:
        return Attended(_attend_once(query, key, value, mask, scoring.scale, dial.weight, *local_set))
    groups = query.shape[1] // key.shape[1]
    key, value, local_set = repeat_kv(key, groups), repeat_kv(value, groups), local_set.for_heads(groups)
    lse = None
    is_native = not (is_soft_capped or has_learned_sinks)
    is_fused = is_native and query.shape[-1] == value.shape[-1]
    if is_pointed and not wanted.shares and is_fused and not torch.is_grad_enabled():
        return Attended(_attend_pointed(query, key, value, mask, scoring, local_set, dial))
    if is_soft_capped or is_pointed:
        mask = None if dial.is_hard else mask  # what is not local counts for nothing
        output, *parts, entropy = explicit_attention(query, key, value, mask, scoring, local_set, dial)
        fidelity = counted_fidelity(sum(parts), local_set.is_counted()[:, None] & (not dial.is_hard))
    else:
        output, parts, fidelity, entropy, lse = _attend_fused(query, key, value, mask, scoring, local_set, dial, wanted)
    if is_pointed and not dial.is_on and is_native:
        output = _plain(query, key, value, mask, scoring)  # as it would be if nothing were measured
    shares = Shares(*parts, 1 - fidelity) if wanted.shares else None
    if wanted.entropy:
        is_token = local_set.starts[:, None] >= 0
        entropy = torch.where(is_token, entropy.clamp(min=0) / math.log(2), 0.0)
    return Attended(output, shares, entropy if wanted.entropy else None, lse)


def _attend_pointed(query, key, value, mask, scoring, local_set: PointerSet, dial: LayerDial) -> torch.Tensor:
    """As `attend`, by fused kernels without gradients: some queries at a time of those that are told where to look."""
    output = _plain(query, key, value, mask, scoring)
    named = local_set.is_named().any(dim=0).nonzero().flatten()
    if not len(named) or not dial.is_on:
        return output
    positions = torch.arange(local_set.num_tokens - key.shape[2], local_set.num_tokens, device=key.device)[None]
    for rows in named.split(_TOLD):
        visible, is_local, *_ = (each[:, None] for each in local_set.masks(rows, positions))
        queries = query[:, :, rows]
        found, local_lse = attention_with_lse(queries, key, value, is_local, False, scoring.scale)
        if not dial.is_hard:
            whole, lse = attention_with_lse(queries, key, value, visible, False, scoring.scale)
            is_counted = (visible & ~is_local).any(-1)
            _, share = dial.turn(fidelity_of_sums(local_lse, lse, is_counted))
            found = whole + share[..., None] * (found - whole)
        output[:, :, rows] = found.to(output.dtype)
    return output


def _plain(query, key, value, mask, scoring: Scoring) -> torch.Tensor:
    """The attention without a dial."""
    is_causal, dropout = mask is None and query.shape[2] > 1, scoring.dropout
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scoring.scale)


class _Part(NamedTuple):
    """The attention over some keys: its output, log-sum-exp and entropy in nats."""

    output: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None


def _attend_fused(
    query, key, value, mask, scoring: Scoring, local_set: LocalSet, dial: LayerDial, wanted: Wanted
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    As `attend`, by fused kernels: output, parts of the fidelity, fidelity, and entropy in nats, as far as wanted, and
    the log-sum-exp where no dial is on.
    """
    width, value_dim = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    if query.shape[-1] != value_dim:  # zeros change no score and no output
        query, key, value, sink_keys, sink_values = (
            rows if rows is None else F.pad(rows, (0, width - rows.shape[-1]))
            for rows in (query, key, value, local_set.sink_keys, local_set.sink_values)
        )
        local_set = local_set._replace(sink_keys=sink_keys, sink_values=sink_values)
    scale, is_causal = scoring.scale, mask is None and query.shape[2] > 1
    sinks = None if scoring.learned_sinks is None else scoring.learned_sinks.float()[None, :, None]

    def part(output: torch.Tensor, lse: torch.Tensor, mean_key: Callable[..., torch.Tensor]) -> _Part:
        """With the entropy `LSE_i - scale * q_i . (mean key)_i`, and with the learned sinks, which have no value."""
        entropy = None
        if wanted.entropy:  # in float32, being a difference of large numbers
            with torch.autocast(query.device.type, enabled=False):
                wide = query.float(), key.float(), key.float()
                entropy = (lse - scale * (wide[0] * mean_key(*wide)).sum(-1)).clamp(min=0)
        if sinks is None:
            return _Part(output, lse, entropy)
        total = torch.logaddexp(lse, sinks)
        if entropy is not None:  # of the choice between keys and learned sinks, and among the keys
            share = 1 - (sinks - total).exp()
            entropy = binary_entropy(share) + share * entropy
        return _Part((output * (lse - total).exp()[..., None]).to(output.dtype), total, entropy)

    def mean_local_key(query, key, value) -> torch.Tensor:
        wide_sinks = None if local_set.sink_keys is None else local_set.sink_keys.float()
        wide_set = local_set._replace(sink_keys=wide_sinks, sink_values=wide_sinks)
        return local_attention(query, key, value, wide_set, scale)[0]

    def mean_key(query, key, value) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)

    def parts(lse: torch.Tensor) -> list[torch.Tensor]:
        own, sink, block = local_shares(query, key, lse, local_set, scale)
        if sinks is not None:
            is_token = local_set.starts[:, None] >= 0
            sink = sink + torch.where(is_token, sinks - lse, float("-inf")).exp()
        return [own, sink, block]

    if dial.is_on:
        # Where there is no other attention, the projection that queries are a view of is not to be kept for them.
        queries = query.clone() if dial.is_hard and torch.is_grad_enabled() else query
        local = part(*local_attention(queries, key, value, local_set, scale), mean_local_key)
    if dial.is_hard:
        output, fidelity, entropy = local.output, torch.ones_like(local.lse), local.entropy
    else:
        whole = part(*attention_with_lse(query, key, value, mask, is_causal, scale, scoring.dropout), mean_key)
        output, entropy = whole.output, whole.entropy
        is_counted = local_set.is_counted()[:, None]
        if not dial.is_on:
            inside = parts(whole.lse) if wanted.shares else []
            fidelity = counted_fidelity(sum(inside), is_counted) if wanted.shares else None
        else:
            free = fidelity_of_sums(local.lse, whole.lse, is_counted)
            fidelity, share = dial.turn(free)
            output = output.lerp(local.output, share[..., None].to(output.dtype))  # keeps no difference for gradients
            if wanted.entropy:
                entropy = dialled_entropy(entropy, local.entropy, free, fidelity, share)
    if dial.is_on and wanted.shares:  # the dial leaves the choice within the local set as it is
        inside = [share * fidelity for share in parts(local.lse)]
    lse = None if dial.is_on else whole.lse
    return output[..., :value_dim], inside if wanted.shares else [], fidelity, entropy, lse


@opaque_without_gradient(
    f"(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float weight, {LOCAL_SET_SCHEMA}) -> Tensor",
    lambda query, key, value, *_: query.new_empty(*query.shape[:3], value.shape[-1]),
)
def _attend_once(query, key, value, mask, scale, weight, *fields) -> torch.Tensor:
    """
    A step of a generation: one query a row, in one kernel call without tiles. Where the weights outside the local set
    have a factor, its logarithm is added to their scores; where it is 0, only the local keys are read.
    """
    local_set = LocalSet(*fields)
    starts, documents, end, max_length, num_sinks, window, *kept_sinks = local_set
    dropped = end - key.shape[2]
    if weight > 0:
        position = torch.arange(dropped, end, device=key.device)
        is_outside = position < starts
        if num_sinks:
            is_outside &= position >= documents + num_sinks
        bias = (is_outside.to(query.dtype) * math.log(weight))[:, None, None]
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
    else:
        length, differs = min(max_length, key.shape[2]), True
        if starts.device.type == "cpu":  # elsewhere to look would be to wait
            of_rows = {start for (start,) in starts.tolist()}
            length, differs = min(length, end - min(of_rows)), len(of_rows) > 1
        sinks = ()
        if num_sinks and kept_sinks[0] is not None:
            sinks = kept_sinks
        elif num_sinks:
            sinks = local_set.counted_from(dropped).sinks_of(key, value)[1:]
        first, bias = key.shape[2] - length, None
        key, value = key.narrow(2, first, length), value.narrow(2, first, length)
        if differs or sinks:
            bias = torch.arange(end - length, end, device=key.device) >= starts
        if sinks:
            key, value = torch.cat((sinks[0], key), dim=2), torch.cat((sinks[1], value), dim=2)
            position = documents + torch.arange(sinks[0].shape[2], device=key.device)
            is_sink = position < starts  # those that stand in the stretch are counted with it
            if window is not None:
                is_sink &= position >= end - window
            bias = torch.cat((is_sink, bias), dim=1)
        bias = bias if bias is None else bias[:, None, None]
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    # Heads that share keys stand where a text's queries do.
    queries = query.view(len(query), key.shape[1], -1, query.shape[3])
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=bias, scale=scale)
    return output.reshape(*query.shape[:3], -1)
