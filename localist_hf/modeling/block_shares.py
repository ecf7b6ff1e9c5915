# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
How the attention to other words is spread over all blocks of the text: attention with the membership in blocks in place
of the values, as many blocks at a time as a head is wide, by the kernels that make the output.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .fidelity import Shares
from .fused_attention import attention_with_lse


#: Less attention to other words than this is taken for none: what is left of it is the rounding of the others.
_LEAST = 1e-4
# Where the gradient of s log s is not finite.
_TINY = 1e-12


class BlockChoice(NamedTuple):
    """
    How each query's attention to other words is spread over the blocks that it sees; float32, differentiable.

    Args:
        looked_at (`torch.Tensor` of shape `(batch_size, num_heads, query_length)`):
            `exp(H(q))`, the number of blocks that it looks at: 1 where all of it is in one block, and on padding.
        top (`torch.Tensor` of the same shape):
            The largest share of it that goes to one block; 1 where there is none, and on padding.
    """

    looked_at: torch.Tensor
    top: torch.Tensor


class Membership(NamedTuple):
    """
    Which block each token belongs to.

    Args:
        keys (`torch.LongTensor` of shape `(batch_size, key_length)`):
            Number of each key's block, from 0 in each row; -1 on padding, and on sinks, which count with the block of
            their own only.
        queries (`torch.LongTensor` of shape `(batch_size, query_length)`):
            Number of each query's block; -1 on padding.
        is_first (`torch.BoolTensor` of shape `(batch_size, query_length)`):
            Whether a query is the first of its block, in which there is no other word then.
        num_blocks (`int`):
            Blocks of the row with the most.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    is_first: torch.Tensor
    num_blocks: int

    @classmethod
    def of_blocks(
        cls, starts: torch.Tensor, documents: torch.Tensor, num_sinks: int, key_length: int, query_length: int
    ) -> "Membership":
        """That of a text with these block starts and documents, `(batch_size, num_tokens)`, for its last keys."""
        position = torch.arange(starts.shape[1], device=starts.device)
        number = torch.where(starts < 0, -1, (starts == position).cumsum(dim=1) - 1)
        keys = torch.where(position < documents + num_sinks, -1, number)
        of_queries = number[:, -query_length:], (starts == position)[:, -query_length:]
        return cls(keys[:, -key_length:], *of_queries, max(1, int(number.max()) + 1))

    def values(self, first: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """
        Of the blocks from this one on, which each key belongs to, one-hot: `(batch_size, num_heads, key_length, width)`
        of the dtype of the keys.
        """
        columns = torch.arange(first, first + width, device=like.device)
        of_keys = (self.keys.to(like.device)[..., None] == columns).to(like.dtype)
        return of_keys[:, None].expand(-1, like.shape[1], -1, -1)

    def is_other(self, first: int, width: int, device: torch.device) -> torch.Tensor:
        """Of these blocks, which are not a query's own; none on padding: `(batch_size, 1, query_length, width)`."""
        columns, own = torch.arange(first, first + width, device=device), self.queries.to(device)[..., None]
        return ((own != columns) & (own >= 0))[:, None]


#: Attention over some values, `(batch_size, num_key_value_heads, key_length, width)`, in place of the layer's own.
Attention = Callable[[torch.Tensor], torch.Tensor]


def block_choice(attention: Attention, key: torch.Tensor, members: Membership, shares: Shares) -> BlockChoice:
    """
    How many blocks each query looks at (docs/method.md#block-shares). No more than a slice of the shares of all blocks
    is held, and each is made again in the backward pass.

    Args:
        attention (`Callable`):
            The layer's attention over other values.
        key (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
            Its keys, of which the values have the shape.
        members ([`Membership`]):
            Which block each token belongs to.
        shares ([`Shares`]):
            Where the attention goes, which tells what goes to other words.
    """
    total = shares.block + shares.outside
    sums = _Sums.none(total)
    for first in range(0, members.num_blocks, key.shape[-1]):
        sums = sums.add(_again(functools.partial(_slice, attention, key, members, first), total))
    return sums.choice(total, members.is_first)


def block_choice_by_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    members: Membership,
    shares: Shares,
) -> BlockChoice:
    """
    As [`block_choice`], of causal attention to a text without padding whose log-sum-exp is known: each slice of blocks
    needs the scores of its own keys only, so that all of them together cost what one pass over the text does.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`), key (`torch.Tensor` of the same
            shape), lse (`torch.Tensor` of shape `(batch_size, num_heads, length)`), scale (`float`):
            The layer's, and the factor of its scores.
        members, shares:
            As in [`block_choice`].
    """
    total, rows = shares.block + shares.outside, []
    for row in range(len(query)):  # where a slice begins differs from row to row
        only = slice(row, row + 1)
        of_row = Membership(*(each[only].to(key.device) for each in members[:3]), members.num_blocks)
        sums = _Sums.none(total[only])
        for first in range(0, int(of_row.queries[0, -1]) + 1, key.shape[-1]):
            reduce = functools.partial(_slice_by_lse, query[only], key[only], lse[only], scale, of_row, first)
            sums = sums.add(_again(reduce, total))
        rows.append(sums)
    return _Sums(*(torch.cat(each) for each in zip(*rows, strict=True))).choice(total, members.is_first)


def _slice_by_lse(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, scale: float, members: Membership, first: int
) -> "_Sums":
    """The sums over the blocks of a slice, of one row: attention to their keys, put into proportion to all."""
    width, number = key.shape[-1], members.queries[0]
    start, end = torch.searchsorted(number, number.new_tensor([first, first + width])).tolist()
    keys, values = key[:, :, start:end], members.values(first, width, key)[:, :, start:end]
    found = [attention_with_lse(query[:, :, start:end], keys, values, None, True, scale)]
    if end < len(number):  # who sees all of them
        found.append(attention_with_lse(query[:, :, end:], keys, values, None, False, scale))
    output, of_slice = (torch.cat(each, dim=2) for each in zip(*found, strict=True))
    part = output.to(of_slice.dtype) * (of_slice - lse[:, :, start:]).exp()[..., None]
    sums = _Sums.of(part * members.is_other(first, width, part.device)[:, :, start:])
    return _Sums(*(F.pad(each, (start, 0)) for each in sums))


class _Sums(NamedTuple):
    """Of the shares of blocks that are not a query's own, their sum, that of their entropies, and the largest."""

    shares: torch.Tensor
    entropy: torch.Tensor
    top: torch.Tensor

    @classmethod
    def none(cls, like: torch.Tensor) -> "_Sums":
        return cls(*(torch.zeros_like(like) for _ in range(3)))

    @classmethod
    def of(cls, part: torch.Tensor) -> "_Sums":
        return cls(part.sum(-1), _entropy(part).sum(-1), part.amax(-1))

    def add(self, other: "_Sums") -> "_Sums":
        return _Sums(self.shares + other[0], self.entropy + other[1], torch.maximum(self.top, other[2]))

    def choice(self, total: torch.Tensor, is_first: torch.Tensor) -> BlockChoice:
        """With the own block, whose part is what is left of all that goes to other words."""
        own = _own(total, self.shares, is_first)
        entropy, top = self.entropy + _entropy(own), torch.maximum(self.top, own)
        # The sum of the parts themselves: of little, rounding may leave less than they are.
        total = self.shares + own
        is_some, total = total > _LEAST, total.clamp(min=_LEAST)
        looked_at = (entropy / total + total.log()).clamp(min=0).exp()
        return BlockChoice(torch.where(is_some, looked_at, 1.0), torch.where(is_some, (top / total).clamp(max=1), 1.0))


def _again(function: Callable[[], _Sums], total: torch.Tensor) -> _Sums:
    """What a function gives, which a backward pass is to make again."""
    if torch.is_grad_enabled() and total.requires_grad:
        return _Sums(*checkpoint(lambda: tuple(function()), use_reentrant=False))
    return function()


def block_shares(attention: Attention, key: torch.Tensor, members: Membership, shares: Shares) -> torch.Tensor:
    """
    The attention of each query to each block, without itself and without sinks (see [`block_choice`] for the
    arguments): `(batch_size, num_heads, query_length, num_blocks)`, float32, differentiable; they sum to 1 - self -
    sink, in half precision to about 4e-3, and are 0 on padding and on blocks that a row does not have.
    """
    width = key.shape[-1]
    parts = [_others(attention, key, members, first) for first in range(0, members.num_blocks, width)]
    others = torch.cat(parts, dim=-1)[..., : members.num_blocks]
    own = _own(shares.block + shares.outside, others.sum(-1), members.is_first)
    columns = torch.arange(members.num_blocks, device=others.device)
    is_own = (members.queries.to(others.device)[..., None] == columns)[:, None]
    return torch.where(is_own, own[..., None], others)


def _others(attention: Attention, key: torch.Tensor, members: Membership, first: int) -> torch.Tensor:
    """The attention to the blocks of a slice, but for a query's own, whose part is what is left of all."""
    width = key.shape[-1]
    found = attention(members.values(first, width, key))
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return found * members.is_other(first, width, found.device)


def _slice(attention: Attention, key: torch.Tensor, members: Membership, first: int) -> "_Sums":
    return _Sums.of(_others(attention, key, members, first))


def _own(total: torch.Tensor, others: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """What goes to the own block: nothing, and no rounding either, of its first token."""
    return torch.where(is_first.to(total.device)[:, None], 0.0, (total - others).clamp(min=0))


def _entropy(share: torch.Tensor) -> torch.Tensor:
    """-s log s of each share, in nats."""
    share = share.clamp(min=_TINY)
    return -share * share.log()
