# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Where the text's blocks start.

A partition gives each position `i` the start `b(i) <= i` of its block. All partitions here are *causal*: `b(i)` depends
on the tokens up to `i` only, so training, scoring and step-by-step generation see the same blocks. They are tensors of
shape `(batch_size, length)` and dtype `torch.long` with -1 on padding, and no function loops over positions.

Semantic and delimiter blocks start after *separators*, tokens that end a thought: those whose value vectors are short,
or those of given ids. What the search for blocks must remember of the tokens before is a [`BlockState`].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .opaque_ops import opaque_without_gradient


#: A length closer to the threshold than this does not separate, so that rounding cannot (in a text that repeats one
#: token the standard deviation is rounding noise).
TOLERANCE = 1e-4
#: Value vectors are no shorter, for the logarithm.
SHORTEST = 1e-6


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
    if attention_mask is None and position_ids is None:
        return torch.zeros(batch_size, length, dtype=torch.long, device=device)
    if attention_mask is not None:
        is_token = attention_mask.to(device=device, dtype=torch.bool)
        first = is_token.int().argmax(dim=1, keepdim=True)
        return torch.where(is_token, first, -1)
    position = torch.arange(length, device=device).expand(batch_size, length)
    continues = F.pad(position_ids.diff(dim=1) == 1, (1, 0))  # column 0 starts a document whatever its id
    return torch.where(continues, 0, position).cummax(dim=1).values


def window_block_starts(documents: torch.Tensor, window_length: int) -> torch.Tensor:
    """Blocks of exactly `window_length` tokens, counted from the start of each document (see `document_starts`)."""
    position = torch.arange(documents.shape[1], device=documents.device)
    return torch.where(documents < 0, -1, position - (position - documents) % window_length)


class BlockState(NamedTuple):
    """
    Where the search for blocks stands after the tokens seen so far, for each row: what a key-value cache keeps of it.

    Args:
        sums (`torch.Tensor` of shape `(batch_size, 3)`):
            Number of the document's value lengths so far, their sum and the sum of their squares; float64, on the CPU
            where the device has no such numbers.
        separates (`torch.BoolTensor` of shape `(batch_size,)`):
            Whether the last token is a separator.
        starts (`torch.LongTensor` of shape `(batch_size, 1 + num_previous_blocks)`):
            Start of the current block and, going back, of those before it, as far as the document goes; -1 before its
            first token.
    """

    sums: torch.Tensor
    separates: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def at_first(cls, documents: torch.Tensor, num_previous_blocks: int) -> "BlockState":
        """The state before the first token, for the rows and on the device of `documents`."""
        sums = torch.zeros(len(documents), 3, dtype=torch.float64, device=device_of_sums(documents.device))
        starts = documents.new_full((len(documents), 1 + num_previous_blocks), -1)
        return cls(sums, starts[:, 0] >= 0, starts)

    def select(self, select: Callable[[torch.Tensor], torch.Tensor]) -> "BlockState":
        """That of other rows, as a function of tensors chooses them."""
        return BlockState(*map(select, self))


class Blocks(NamedTuple):
    """
    The blocks of some tokens.

    Args:
        starts (`torch.LongTensor` of shape `(batch_size, length)`):
            Start of each token's block, -1 on padding.
        local_starts (`torch.LongTensor` of shape `(batch_size, length)`):
            Start of the earliest of the previous blocks that count as local with it, -1 on padding.
    """

    starts: torch.Tensor
    local_starts: torch.Tensor

    def last(self, length: int, device: torch.device) -> "Blocks":
        """Those of the last tokens, on this device."""
        if self.starts.shape[1] == length and self.starts.device == device:  # as in every step of a generation
            return self
        return Blocks(*(starts[:, -length:].to(device) for starts in self))


def value_norms(values: torch.Tensor) -> torch.Tensor:
    """
    `|v_i|` for each head: float32 (float64 for float64 values), of the shape of the `values` without their last
    dimension; no gradient flows into them.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values.detach(), dim=-1, dtype=wide)


def value_lengths(values: torch.Tensor) -> torch.Tensor:
    """
    `mean over heads of log |v_i|`: how much each token passes on. Tokens that end a thought pass on little: by the
    length of their values a model's own separators are known.

    Args:
        values (`torch.Tensor` of shape `(batch_size, num_key_value_heads, length, head_dim)`):
            Value vectors of one layer, any floating dtype; no gradient flows into them.

    Returns:
        `torch.Tensor` of shape `(batch_size, length)`, float32 (float64 for float64 values).
    """
    return value_norms(values).clamp(min=SHORTEST).log().mean(dim=1)


def semantic_blocks(
    lengths: torch.Tensor,
    documents: torch.Tensor,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    state: BlockState,
    seen: int = 0,
) -> tuple[Blocks, BlockState]:
    """
    Blocks that start after the model's own separators. Token `j` separates where `nu_j < mean - threshold * std` of the
    `nu` of its document up to itself, without the first, which is a sink of its own kind.

    Args:
        lengths (`torch.Tensor` of shape `(batch_size, length)`):
            nu of the new tokens: [`value_lengths`], or their mean over several layers.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            From `document_starts`, of the same tokens.
        threshold (`float`):
            Standard deviations below the running mean.
        min_block_length (`int`), max_block_length (`int`):
            Length limits in tokens (see `place_block_starts`).
        state ([`BlockState`]):
            Where the search stood before the new tokens.
        seen (`int`, *optional*, defaults to 0):
            Number of tokens before the new ones.

    Returns:
        `tuple(Blocks, BlockState)`: the blocks of the new tokens, and where the search stands after them.
    """
    device = state.sums.device
    separators, sums = _find_separators(lengths.to(device), documents.to(device), threshold, seen, state.sums)
    blocks, state = _blocks_after(
        separators.to(documents.device), documents, min_block_length, max_block_length, state, seen
    )
    return blocks, state._replace(sums=sums)


def delimiter_blocks(
    input_ids: torch.Tensor,
    documents: torch.Tensor,
    delimiter_token_ids: list[int],
    min_block_length: int,
    max_block_length: int,
    state: BlockState,
    seen: int = 0,
) -> tuple[Blocks, BlockState]:
    """
    Blocks that start after given tokens.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            The new tokens.
        delimiter_token_ids (`list[int]`):
            Token ids that end a block.
        documents, min_block_length, max_block_length, state, seen:
            As in [`semantic_blocks`].

    Returns:
        `tuple(Blocks, BlockState)`: the blocks of the new tokens, and where the search stands after them.
    """
    separators = torch.isin(input_ids, torch.tensor(delimiter_token_ids, device=input_ids.device))
    return _blocks_after(separators, documents, min_block_length, max_block_length, state, seen)


def with_previous_blocks(starts: torch.Tensor, documents: torch.Tensor, num_previous_blocks: int) -> Blocks:
    """
    The blocks that begin at these `starts`, all of a text's.

    Args:
        starts (`torch.LongTensor` of shape `(batch_size, length)`), documents (`torch.LongTensor` of the same shape):
            Block starts, and what `document_starts` gives.
        num_previous_blocks (`int`):
            Blocks before its own that are local to a token.
    """
    nothing = starts.new_full((len(starts), 1 + num_previous_blocks), -1)
    return Blocks(starts, _going_back(starts, documents, nothing, seen=0)[0])


def device_of_sums(device: torch.device) -> torch.device:
    """Where float64 sums are made: not every device has the dtype, and they are few numbers."""
    return torch.device("cpu") if device.type == "mps" else device


@opaque_without_gradient(
    "(Tensor lengths, Tensor documents, float threshold, SymInt seen, Tensor sums) -> (Tensor, Tensor)",
    lambda lengths, documents, threshold, seen, sums: (
        torch.empty(documents.shape, dtype=torch.bool, device=documents.device),
        sums.new_empty(sums.shape),
    ),
)
def _find_separators(
    lengths: torch.Tensor, documents: torch.Tensor, threshold: float, seen: int, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens separate, `(batch_size, length)`, and the running sums after the last, `(batch_size, 3)`."""
    position = seen + torch.arange(documents.shape[1], device=documents.device)
    counts = (documents >= 0) & (documents < position)
    # Float64 sums, so that a row's blocks do not depend on what stands before it.
    lengths = torch.where(counts, lengths.double(), 0.0)
    sums = sums[:, None].where((documents < seen)[..., None], 0.0)
    powers = torch.stack((counts.double(), lengths, lengths.square()), dim=-1)
    sums = sums + _document_cumsum(powers, (documents - seen).clamp(min=0))
    mean, mean_square = (sums[..., 1:] / sums[..., :1].clamp(min=1)).unbind(-1)
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    separators = counts & (lengths < mean - threshold * std - TOLERANCE)
    return separators, sums[:, -1]


def _blocks_after(
    separators: torch.Tensor,
    documents: torch.Tensor,
    min_block_length: int,
    max_block_length: int,
    state: BlockState,
    seen: int,
) -> tuple[Blocks, BlockState]:
    """Blocks that start after separators, `(batch_size, length)`, and where the search stands after them."""
    limits = (min_block_length, max_block_length, seen)
    starts, local_starts, last = _place(separators, documents, *limits, state.separates, state.starts)
    return Blocks(starts, local_starts), state._replace(separates=separators[:, -1], starts=last)


@opaque_without_gradient(
    "(Tensor separators, Tensor documents, SymInt min_block_length, SymInt max_block_length, SymInt seen, "
    "Tensor separated, Tensor before) -> (Tensor, Tensor, Tensor)",
    lambda separators, documents, *rest: (
        *(documents.new_empty(documents.shape) for _ in range(2)),
        rest[-1].new_empty(rest[-1].shape),
    ),
)
def _place(
    separators: torch.Tensor,
    documents: torch.Tensor,
    min_block_length: int,
    max_block_length: int,
    seen: int,
    separated: torch.Tensor,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two fields of [`Blocks`] for blocks that start after separators, and those starts of a [`BlockState`]."""
    follows = torch.cat((separated[:, None], separators[:, :-1]), dim=1)
    starts = place_block_starts(follows, documents, min_block_length, max_block_length, before[:, 0], seen)
    return starts, *_going_back(starts, documents, before, seen)


def _going_back(
    starts: torch.Tensor, documents: torch.Tensor, before: torch.Tensor, seen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The start of the block that lies `n` blocks before each position's own, `(batch_size, length)`, and of the 0 to n
    before the last position's, `(batch_size, n + 1)`, where `before` are those of the token before the first of these.
    """
    is_first = starts <= documents  # of its document, or padding
    goes_on = (starts < seen) & ~is_first
    # In the column before a block's first token stands what holds for the block before; column 0 is `before`.
    column = (starts - seen).clamp(min=0)
    chain, last = starts, [starts[:, -1]]
    for back in range(1, before.shape[1]):
        previous = torch.cat((before[:, back - 1, None], chain), dim=1).gather(1, column)
        previous = torch.where(goes_on, before[:, back, None], previous)
        chain = torch.where(is_first, starts, previous)
        last.append(chain[:, -1])
    return chain, torch.stack(last, dim=1)


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
        return torch.minimum(torch.minimum(candidate, start + max_block_length), document).clamp(0, length)

    # The column `length` is its own successor.
    pointers = F.pad(successor(column), (0, 1), value=length)
    is_start = F.pad((documents == column + seen).int(), (0, 1))  # compiled for a CPU, a bool cannot be padded
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


def _document_cumsum(quantities: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sums of `(batch_size, length, n)` numbers from the column `first` up to each position, of its document's."""
    prefix = F.pad(quantities.cumsum(dim=1), (0, 0, 1, 0))
    return prefix[:, 1:] - prefix.gather(1, first[..., None].expand_as(quantities))
