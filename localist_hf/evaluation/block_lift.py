# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""Whether blocks start where a reader would start them."""

import torch
from torch.nn import functional as F


def block_lift(block_starts: torch.Tensor, boundaries: torch.Tensor, tolerance: int = 1) -> float:
    """
    How many times more often than chance a block starts at a boundary that a reader would mark:

    `lift = P(a block starts near i | i is a boundary) / P(a block starts near i)`

    where *near* is at most `tolerance` tokens away and `i` goes over the tokens of all rows. A row is one text: its
    first token starts a block whatever the partition, so neither that start nor that token counts.

    1 is chance: what a partition that knows nothing of the boundaries comes to over many of them, whatever the lengths
    of its blocks. 0: no block starts at a boundary. The most that can be reached is 1 / P(a block starts near i), when
    one starts at every boundary: for blocks of n tokens at least `2 * tolerance + 1` long about
    `n / (2 * tolerance + 1)`, so compare partitions of like mean length.

    Args:
        block_starts (`torch.LongTensor` of shape `(batch_size, length)`):
            Position at which each token's block starts, -1 on padding: an entry of the outputs' `block_starts`.
        boundaries (`torch.BoolTensor` of shape `(batch_size, length)`):
            True on each token that a reader would begin a part with: the first of a sentence, a line, a topic.
        tolerance (`int`, *optional*, defaults to 1):
            Tokens between a boundary and the start of a block that still count as the same place; at least 0.

    Returns:
        `float`: the lift, at least 0; nan where there is no boundary, or no block starts but with its text.

    Raises:
        ValueError: for tensors of different shapes, boundaries that are not boolean, and a negative tolerance.

    Example:

    ```python
    >>> outputs = model(**inputs, output_fidelity=True)
    >>> is_full_stop = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(".")
    >>> block_lift(outputs.block_starts[-1], is_full_stop.roll(1, dims=1))  # the tokens after full stops
    4.9
    ```
    """
    if block_starts.ndim != 2 or block_starts.shape != boundaries.shape:
        raise ValueError(
            f"`block_starts` has the shape {tuple(block_starts.shape)} and `boundaries` {tuple(boundaries.shape)}; "
            "both must have the same, (batch_size, length)."
        )
    if boundaries.dtype != torch.bool:
        raise ValueError(f"`boundaries` has the dtype {boundaries.dtype}; it must be torch.bool.")
    if tolerance < 0:
        raise ValueError(f"`tolerance` is {tolerance}; it must be at least 0.")
    position = torch.arange(block_starts.shape[1], device=block_starts.device)
    is_token = block_starts >= 0
    is_first = is_token & (is_token.cumsum(dim=1) == 1)
    is_counted = is_token & ~is_first
    is_start = is_counted & (block_starts == position)
    is_near = F.max_pool1d(is_start.float(), 2 * tolerance + 1, stride=1, padding=tolerance).bool() & is_counted
    is_boundary = boundaries.to(block_starts.device) & is_counted
    num_hits, num_near = (is_near & is_boundary).sum().item(), is_near.sum().item()
    if not num_near or not (num_boundaries := is_boundary.sum().item()):
        return float("nan")
    return (num_hits / num_boundaries) / (num_near / is_counted.sum().item())
