# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What the outputs of localist models add to the native ones."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from .locality import LayerResult, Locality


@dataclass
class LocalityMeasurements:
    """
    What `output_fidelity` adds to a native output: one tensor for each measured layer.

    Args:
        fidelity (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            Share of each query's attention that stays in its local set, in [0, 1], float32, differentiable; 1 where
            `fidelity_mask` is False.
        fidelity_mask (`tuple(torch.BoolTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            True on tokens that see more than their local set, whose fidelity is not 1 by construction. Losses and
            means count these only.
        context_mask (`tuple(torch.BoolTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            `fidelity_mask` without the tokens that have no other key in their local set but sinks, as a block's first
            one. A loss on the context fidelity counts these only.
        self_share, sink_share, block_share, outside_share (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, \
        sequence_length)`, *optional*):
            Where each query's attention goes: to its own token; to the first tokens of its text, if they are sinks and
            not in its block; to the rest of its local set; outside of it. Float32, differentiable; they sum to 1, and
            are 0 on padding.
        block_starts (`tuple(torch.LongTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            Position at which each token's block starts; -1 on padding.
        entropy (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            Entropy of each query's attention in bits, float32; 0 on padding. Only with `output_entropy=True`.
        blocks_looked_at (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            How many blocks of the text each query's attention to other words is spread over, `exp` of its entropy over
            them: 1 where it is all in one, float32, differentiable. Only with `output_block_choice=True`.
        top_block_share (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            The largest part of that attention that goes to one block, in (0, 1]. Only with `output_block_choice=True`.
        block_shares (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length, num_blocks)`, \
        *optional*):
            The attention of each query to each block of its row, without its own token and sinks: float32,
            differentiable; they sum to `block_share + outside_share`. The blocks are those of `block_starts` in their
            order, as many as the row with the most has. Only with `output_block_shares=True`.
        visible_keys (`tuple(torch.LongTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            Number of keys in each token's local set; on padding it has no meaning.
        document_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Position of the first token of each token's text, of which packed rows hold several; -1 on padding.
    """

    fidelity: tuple[torch.Tensor, ...] | None = None
    fidelity_mask: tuple[torch.Tensor, ...] | None = None
    context_mask: tuple[torch.Tensor, ...] | None = None
    self_share: tuple[torch.Tensor, ...] | None = None
    sink_share: tuple[torch.Tensor, ...] | None = None
    block_share: tuple[torch.Tensor, ...] | None = None
    outside_share: tuple[torch.Tensor, ...] | None = None
    block_starts: tuple[torch.Tensor, ...] | None = None
    entropy: tuple[torch.Tensor, ...] | None = None
    blocks_looked_at: tuple[torch.Tensor, ...] | None = None
    top_block_share: tuple[torch.Tensor, ...] | None = None
    block_shares: tuple[torch.Tensor, ...] | None = None
    visible_keys: tuple[torch.Tensor, ...] | None = None
    document_starts: torch.Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # As `ModelOutput` does it, which goes through the names of all fields first: a step of a generation feels it.
        if value is None:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


#: Where a query's attention goes: the measurements that sum to 1.
SHARES = ("self_share", "sink_share", "block_share", "outside_share")
#: How the attention to other words is spread over all blocks.
OF_BLOCKS = ("blocks_looked_at", "top_block_share")
#: The names of all measurements.
MEASUREMENTS = tuple(field.name for field in fields(LocalityMeasurements))


def _of_blocks(locality: Locality, results: list[LayerResult]) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {}
    if locality.wanted.block_choice:
        found["blocks_looked_at"] = tuple(result.block_choice.looked_at for result in results)
        found["top_block_share"] = tuple(result.block_choice.top for result in results)
    if locality.wanted.block_shares:
        found["block_shares"] = tuple(result.block_shares for result in results)
    return found


def measurements(locality: Locality) -> dict[str, Any]:
    """The fields that the outputs add to the native ones, of the new tokens."""
    if not locality.measured:
        return {}
    results = [locality.results[layer] for layer in sorted(locality.measured)]
    shares = zip(*(result.shares for result in results), strict=True)
    counted = tuple(result.local_set.is_counted() for result in results)
    return dict(zip(SHARES, shares, strict=True)) | {
        "fidelity": tuple(result.shares.fidelity for result in results),
        "fidelity_mask": counted,
        "context_mask": tuple(
            mask & result.local_set.has_context() for mask, result in zip(counted, results, strict=True)
        ),
        "visible_keys": tuple(result.local_set.sizes() for result in results),
        "block_starts": tuple(result.block_starts for result in results),
        "document_starts": locality.documents[:, -locality.num_new_tokens :],
        "entropy": tuple(result.entropy for result in results) if locality.wanted.entropy else None,
        **_of_blocks(locality, results),
    }
