# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Where the text's blocks start.

A partition gives each position `i` the start `b(i) <= i` of its block. All partitions here are *causal*: `b(i)` depends
on the tokens up to `i` only, so training, scoring and step-by-step generation see the same blocks. They are tensors of
shape `(batch_size, length)` and dtype `torch.long` with -1 on padding, and no function loops over positions.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .opaque_ops import opaque_without_gradient


# Similarities closer to the threshold than this do not start a block, so that rounding cannot (a text that repeats one
# token has r = 1 everywhere, and its standard deviation is rounding noise).
_SIMILARITY_TOLERANCE = 1e-4
# Positions whose windows are summed by one matrix product.
_TILE = 16


def document_starts(
    batch_size: int,
    length: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """
    The first position of the document that each position belongs to: the first token of its row after left padding,
    or, in a packed row, the last position before it at which `position_ids` starts anew.

    Args:
        batch_size (`int`), length (`int`):
            Shape of the result; with a key-value cache the length counts the cached tokens too.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            1 on tokens, 0 on padding, which stands left or right of the tokens.
        position_ids (`torch.Tensor` of shape `(1 or batch_size, length)`, *optional*):
            Position of each token in its document. As in transformers, it marks packed documents only where there is
            no `attention_mask`.
        device (`torch.device`, *optional*):
            Device of the result.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: -1 on padding.
    """
    position = torch.arange(length, device=device).expand(batch_size, length)
    if attention_mask is not None:
        is_token = attention_mask.to(device=device, dtype=torch.bool)
        first = is_token.int().argmax(dim=1, keepdim=True)
        return torch.where(is_token, first, -1)
    if position_ids is None:
        return torch.zeros_like(position)
    continues = F.pad(position_ids.diff(dim=1) == 1, (1, 0))  # column 0 starts a document whatever its id
    return torch.where(continues, 0, position).cummax(dim=1).values


def window_block_starts(documents: torch.Tensor, window_length: int) -> torch.Tensor:
    """Blocks of exactly `window_length` tokens, counted from the start of each document (see `document_starts`)."""
    position = torch.arange(documents.shape[1], device=documents.device)
    return torch.where(documents < 0, -1, position - (position - documents) % window_length)


def delimiter_block_starts(
    input_ids: torch.Tensor,
    documents: torch.Tensor,
    delimiter_token_ids: list[int],
    min_block_length: int,
    max_block_length: int,
) -> torch.Tensor:
    """
    A new block after each delimiter token, within the length limits (see `place_block_starts`).

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            The tokens, from the first one on.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            From `document_starts`.
        delimiter_token_ids (`list[int]`):
            Token ids that end a block.
        min_block_length (`int`), max_block_length (`int`):
            Length limits in tokens.
    """
    delimiters = torch.tensor(delimiter_token_ids, device=input_ids.device)
    follows_delimiter = F.pad(torch.isin(input_ids, delimiters)[:, :-1], (1, 0))
    return place_block_starts(follows_delimiter, documents, min_block_length, max_block_length)


class BlockState(NamedTuple):
    """
    Where the search for semantic blocks stands after the tokens seen so far, one number for each row: what a key-value
    cache that drops old values must keep.

    Args:
        count, total, square (`torch.Tensor` of shape `(batch_size,)`):
            Number of similarities so far, their sum and the sum of their squares; float64.
        start (`torch.LongTensor` of shape `(batch_size,)`):
            Start of the current block; -1 before the first token.
    """

    count: torch.Tensor
    total: torch.Tensor
    square: torch.Tensor
    start: torch.Tensor


def semantic_block_starts(
    values: torch.Tensor,
    documents: torch.Tensor,
    window: int,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
) -> torch.Tensor:
    """
    Blocks that the model finds in its own value vectors: a block starts where a token's values turn away from those
    of the tokens before it.

    `r_i` is the cosine between the unit value vector `v_i` and the mean of the `window` ones before it in its document;
    position `i` is a candidate where `r_i < mean - threshold * std` of the `r` of its document so far.

    Args:
        values (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
            Value vectors of one layer, any floating dtype; no gradient flows into them.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            From `document_starts`.
        window (`int`):
            Number of preceding tokens to compare with; fewer at the start of a document.
        threshold (`float`):
            Standard deviations below the running mean.
        min_block_length (`int`), max_block_length (`int`):
            Length limits in tokens (see `place_block_starts`).
    """
    settings = (window, threshold, min_block_length, max_block_length)
    return continue_semantic_blocks(values, documents, *settings)[0]


@torch.no_grad()
def continue_semantic_blocks(
    values: torch.Tensor,
    documents: torch.Tensor,
    window: int,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    num_new: int | None = None,
    seen: int = 0,
    state: BlockState | None = None,
) -> tuple[torch.Tensor, BlockState]:
    """
    `semantic_block_starts` of new tokens that follow `seen` ones.

    Args:
        values (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
            They end with those of the new tokens, and begin with those of the first token or of at least `window`
            tokens before the new ones.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            From `document_starts`, of the same tokens.
        num_new (`int`, *optional*):
            Number of new tokens; all by default.
        seen (`int`, *optional*, defaults to 0):
            Number of tokens before the new ones.
        state ([`BlockState`], *optional*):
            Where the search stood before the new tokens.

    Returns:
        `tuple(torch.LongTensor, BlockState)`: the block starts of the new tokens, `(batch_size, num_new)`, and where
        the search stands after them.
    """
    batch_size, _, length, _ = values.shape
    num_new = length if num_new is None else num_new
    if state is None:
        nothing = values.new_zeros(batch_size, dtype=torch.float64)
        state = BlockState(nothing, nothing, nothing, documents.new_full((batch_size,), -1))
    settings = (window, threshold, min_block_length, max_block_length)
    starts, *state = _search(values, documents, *settings, num_new, seen, *state)
    return starts, BlockState(*state)


def _fake_search(
    values: torch.Tensor,
    documents: torch.Tensor,
    window: int,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    num_new: int,
    seen: int,
    *state: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return documents.new_empty(documents.shape[0], num_new), *(torch.empty_like(entry) for entry in state)


@opaque_without_gradient(
    "(Tensor values, Tensor documents, SymInt window, float threshold, SymInt min_block_length, "
    "SymInt max_block_length, SymInt num_new, SymInt seen, Tensor count, Tensor total, Tensor square, Tensor start) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_search,
)
def _search(
    values: torch.Tensor,
    documents: torch.Tensor,
    window: int,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    num_new: int,
    seen: int,
    count: torch.Tensor,
    total: torch.Tensor,
    square: torch.Tensor,
    start: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """`continue_semantic_blocks` with tensors for all of its results."""
    similarity = _similarity_to_window(values, documents, window)[:, -num_new:]
    documents = documents[:, -num_new:]
    position = seen + torch.arange(num_new, device=values.device)
    is_token, first = documents >= 0, documents.clamp(min=0)
    defined = is_token & (position > first)  # the first token of a document has nothing before it
    # Float64 sums, so that a row's blocks do not depend on what stands before it.
    similarity = torch.where(defined, similarity, 0.0).double()
    count, total, square = (
        _document_cumsum(quantity, (first - seen).clamp(min=0)) + torch.where(first < seen, so_far[:, None], 0.0)
        for quantity, so_far in (
            (defined.double(), count),
            (similarity, total),
            (similarity.square(), square),
        )
    )
    mean = total / count.clamp(min=1)
    std = (square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    candidates = defined & (similarity < mean - threshold * std - _SIMILARITY_TOLERANCE)
    starts = place_block_starts(candidates, documents, min_block_length, max_block_length, start, seen)
    return starts, count[:, -1], total[:, -1], square[:, -1], starts[:, -1]


def place_block_starts(
    candidates: torch.Tensor,
    documents: torch.Tensor,
    min_block_length: int,
    max_block_length: int,
    current_start: torch.Tensor | None = None,
    seen: int = 0,
) -> torch.Tensor:
    """
    Picks block starts from candidates: after a start at `b` the next one is the first candidate at or after
    `b + min_block_length`, `b + max_block_length` if there is none before, or the next document if that comes first.
    Only the last block of a document can be shorter than `min_block_length`.

    The chain of starts is followed by pointer doubling in `log2(length / min_block_length)` rounds.

    Args:
        candidates (`torch.BoolTensor` of shape `(batch_size, length)`):
            Where a block would like to start.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            From `document_starts`.
        min_block_length (`int`), max_block_length (`int`):
            Length limits in tokens.
        current_start (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Start of the block that goes on, -1 for none.
        seen (`int`, *optional*, defaults to 0):
            Number of tokens before the first of these; positions count them.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: the block start of each position, -1 on padding.
    """
    batch_size, length = candidates.shape
    column = torch.arange(length, device=candidates.device).expand_as(documents)
    next_candidate = _next_column(candidates, column)
    next_document = _next_column(documents == column + seen, column)

    def successor(start: torch.Tensor) -> torch.Tensor:
        """The column that follows a start at each of these; `length` means none."""
        candidate = next_candidate.gather(1, (start + min_block_length).clamp(0, length))
        document = next_document.gather(1, (start + 1).clamp(0, length))
        return torch.minimum(torch.minimum(candidate, start + max_block_length), document).clamp(max=length)

    # The column `length` is its own successor.
    pointers = F.pad(successor(column), (0, 1), value=length)
    is_start = F.pad(documents == column + seen, (0, 1)).int()
    if current_start is None:
        current_start = documents.new_full((batch_size,), -1)
    goes_on = current_start >= 0
    is_start.scatter_reduce_(
        1, successor((current_start - seen)[:, None]), goes_on[:, None].int(), "amax", include_self=True
    )
    for _ in range(max(1, math.ceil(math.log2(length / min_block_length + 1)))):
        # Starts reached in up to 2^k - 1 steps, and in 2^k more; then pointers twice as long.
        is_start = is_start.scatter_reduce(1, pointers, is_start, "amax")
        pointers = pointers.gather(1, pointers)
    starts = torch.where(is_start[:, :length].bool(), column + seen, current_start.clamp(min=0)[:, None])
    return torch.where(documents < 0, -1, starts.cummax(dim=1).values)


def _next_column(marks: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """First marked column at or after each of 0..length, `length` where there is none: `(batch_size, length + 1)`."""
    length = marks.shape[1]
    marked = F.pad(torch.where(marks, column, length), (0, 1), value=length)
    return marked.flip(1).cummin(dim=1).values.flip(1)


def _document_cumsum(quantity: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sum of `(batch_size, length)` numbers from the start of each position's document up to the position."""
    prefix = F.pad(quantity.cumsum(dim=1), (1, 0))
    return prefix[:, 1:] - prefix.gather(1, first)


def _similarity_to_window(values: torch.Tensor, documents: torch.Tensor, window: int) -> torch.Tensor:
    """
    Cosine between each position's values, all heads together, and the mean of the unit vectors of the `window`
    positions before it, or of as many as its document has: `(batch_size, length)`, float32.

    The sums over the windows are one product with a matrix of zeros and ones for each tile of `_TILE` positions, over
    the stretch of vectors that the tile's windows reach; the stretches of all tiles are one overlapping view.
    """
    batch_size, num_heads, length, head_dim = values.shape
    reach = -(-window // _TILE) * _TILE
    num_tiles = -(-length // _TILE)
    width = reach + _TILE
    # Unit vectors, with room for the stretch of the first tile in front and for whole tiles behind.
    vectors = values.new_zeros(batch_size, reach + num_tiles * _TILE, num_heads * head_dim, dtype=torch.float32)
    unit = vectors[:, reach : reach + length]
    unit.unflatten(2, (num_heads, head_dim)).copy_(values.transpose(1, 2))
    unit.div_(unit.norm(dim=-1, keepdim=True).clamp_(min=1e-12))

    position = torch.arange(num_tiles * _TILE, device=values.device).view(num_tiles, _TILE, 1)
    column = position[:, :1] + torch.arange(width, device=values.device) - reach
    # A document's positions have one number in `documents`; what is padding, or before the text, has none of theirs.
    document = F.pad(documents, (reach, -length % _TILE), value=-1)
    own, of_stretch = document[:, reach:].unflatten(1, (num_tiles, _TILE)), document.unfold(1, width, _TILE)
    in_window = (own[..., None] == of_stretch[:, :, None]) & (column < position) & (column >= position - window)

    stretches = vectors.unfold(1, width, _TILE).transpose(2, 3)
    with torch.autocast(values.device.type, enabled=False):
        sums = [torch.bmm(rows.to(vectors.dtype), keys) for rows, keys in zip(in_window, stretches, strict=True)]
        sums = torch.stack(sums).flatten(1, 2)[:, :length]
        # The cosine needs only the direction of the mean.
        return torch.linalg.vecdot(unit, sums) / sums.norm(dim=-1).clamp(min=1e-12)
