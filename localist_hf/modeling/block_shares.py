# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
How the attention to other words is spread over all blocks of the text: attention with the membership in blocks in place
of the values, as many blocks at a time as a head is wide, by the kernels that make the output.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .fidelity import Shares


#: Less attention to other words than this is taken for none.
_LEAST = 1e-6
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
        num_blocks (`int`):
            Blocks of the row with the most.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    num_blocks: int

    @classmethod
    def of_blocks(
        cls, starts: torch.Tensor, documents: torch.Tensor, num_sinks: int, key_length: int, query_length: int
    ) -> "Membership":
        """That of a text with these block starts and documents, `(batch_size, num_tokens)`, for its last keys."""
        position = torch.arange(starts.shape[1], device=starts.device)
        number = torch.where(starts < 0, -1, (starts == position).cumsum(dim=1) - 1)
        keys = torch.where(position < documents + num_sinks, -1, number)
        return cls(keys[:, -key_length:], number[:, -query_length:], max(1, int(number.max()) + 1))

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

    def reduce(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = _others(attention, key, members, first)
        return part.sum(-1), _entropy(part).sum(-1), part.amax(-1)

    is_differentiated = torch.is_grad_enabled() and shares.block.requires_grad
    total = shares.block + shares.outside
    others, entropy, top = torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(total)
    for first in range(0, members.num_blocks, key.shape[-1]):
        parts = checkpoint(reduce, first, use_reentrant=False) if is_differentiated else reduce(first)
        others, entropy, top = others + parts[0], entropy + parts[1], torch.maximum(top, parts[2])
    own = (total - others).clamp(min=0)
    entropy, top = entropy + _entropy(own), torch.maximum(top, own)
    is_some, total = total > _LEAST, total.clamp(min=_LEAST)
    looked_at = (entropy / total + total.log()).clamp(min=0).exp()
    return BlockChoice(torch.where(is_some, looked_at, 1.0), torch.where(is_some, (top / total).clamp(max=1), 1.0))


def block_shares(attention: Attention, key: torch.Tensor, members: Membership, shares: Shares) -> torch.Tensor:
    """
    The attention of each query to each block, without itself and without sinks (see [`block_choice`] for the
    arguments): `(batch_size, num_heads, query_length, num_blocks)`, float32, differentiable; they sum to 1 - self -
    sink, and are 0 on padding and on blocks that a row does not have.
    """
    width = key.shape[-1]
    parts = [_others(attention, key, members, first) for first in range(0, members.num_blocks, width)]
    others = torch.cat(parts, dim=-1)[..., : members.num_blocks]
    own = (shares.block + shares.outside - others.sum(-1)).clamp(min=0)
    columns = torch.arange(members.num_blocks, device=others.device)
    is_own = (members.queries.to(others.device)[..., None] == columns)[:, None]
    return torch.where(is_own, own[..., None], others)


def _others(attention: Attention, key: torch.Tensor, members: Membership, first: int) -> torch.Tensor:
    """The attention to the blocks of a slice, but for a query's own, whose part is what is left of all."""
    width = key.shape[-1]
    found = attention(members.values(first, width, key))
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return found * members.is_other(first, width, found.device)


def _entropy(share: torch.Tensor) -> torch.Tensor:
    """-s log s of each share, in nats."""
    share = share.clamp(min=_TINY)
    return -share * share.log()
