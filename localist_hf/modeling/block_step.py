# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The search for semantic blocks in one token a row, as every step of a generation on a CPU has it: the rule as it reads,
in numbers. As tensors they would take ten times as long.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .block_partition import SHORTEST, TOLERANCE, Blocks, BlockState, device_of_sums
from .opaque_ops import opaque_without_gradient


class StepState(NamedTuple):
    """
    A [`BlockState`] in numbers.

    Args:
        rows (`list[tuple[list[float], bool, list[int]]]`):
            `sums`, `separates` and `starts` of each row.
        blocks ([`Blocks`]):
            The blocks of each row's last token, tensors of shape `(batch_size, 1)`.
    """

    rows: list[tuple[list[float], bool, list[int]]]
    blocks: Blocks

    @classmethod
    def of(cls, state: "BlockState | StepState") -> "StepState":
        """A state in numbers."""
        if isinstance(state, StepState):
            return state
        rows = zip(*(field.tolist() for field in state), strict=True)
        return cls(list(rows), Blocks(state.starts[:, :1], state.starts[:, -1:]))

    def in_tensors(self, device: torch.device) -> BlockState:
        """The same as a [`BlockState`], for documents on this device."""
        sums, separates, starts = map(list, zip(*self.rows, strict=True))
        return BlockState(
            torch.tensor(sums, dtype=torch.float64, device=device_of_sums(device)),
            torch.tensor(separates, device=device),
            torch.tensor(starts, device=device),
        )

    def select(self, select: Callable[[torch.Tensor], torch.Tensor]) -> "StepState":
        """As [`BlockState.select`]."""
        chosen = select(torch.arange(len(self.rows))).tolist()
        return StepState([self.rows[row] for row in chosen], Blocks(*map(select, self.blocks)))


def semantic_step(
    norms: list[torch.Tensor],
    documents: torch.Tensor,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    state: BlockState | StepState,
    seen: int,
) -> tuple[Blocks, BlockState | StepState]:
    """
    [`semantic_blocks`] of one token a row, for numbers that a CPU can look at.

    Args:
        norms (`list[torch.Tensor]` of shape `(batch_size, num_key_value_heads)`):
            [`value_norms`] of the token, in one layer or in several; nu is the mean over them of its value lengths.
        documents, threshold, min_block_length, max_block_length, seen:
            As in [`semantic_blocks`].
        state ([`BlockState`] or [`StepState`]):
            Where the search stood before the token.

    Returns:
        `tuple(Blocks, BlockState | StepState)`: as [`semantic_blocks`]; numbers, but in a compiled graph.
    """
    settings = (threshold, min_block_length, max_block_length, seen)
    if torch.compiler.is_compiling():
        state = state.in_tensors(documents.device) if isinstance(state, StepState) else state
        state = BlockState(*_search_one(norms, documents, *settings, *state))
        return Blocks(state.starts[:, :1], state.starts[:, -1:]), state
    state = _after(norms, documents, *settings, StepState.of(state))
    return state.blocks, state


@opaque_without_gradient(
    "(Tensor[] norms, Tensor documents, float threshold, SymInt min_block_length, SymInt max_block_length, "
    "SymInt seen, Tensor sums, Tensor separated, Tensor before) -> (Tensor, Tensor, Tensor)",
    lambda norms, documents, *rest: tuple(entry.new_empty(entry.shape) for entry in rest[-3:]),
)
def _search_one(
    norms, documents, threshold, min_block_length, max_block_length, seen, *state
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_after` for a compiled graph, whose numbers are tensors."""
    settings = (threshold, min_block_length, max_block_length, seen)
    return tuple(_after(norms, documents, *settings, StepState.of(BlockState(*state))).in_tensors(documents.device))


def _after(
    norms: list[torch.Tensor],
    documents: torch.Tensor,
    threshold: float,
    min_block_length: int,
    max_block_length: int,
    seen: int,
    state: StepState,
) -> StepState:
    """Where the search stands after the token."""
    layers = [entry.tolist() for entry in norms]
    rows, is_new = [], False
    for row, ((document,), before) in enumerate(zip(documents.tolist(), state.rows, strict=True)):
        (count, total, square), after_separator, starts = before
        if document < 0 or document == seen:
            rows.append(([0.0, 0.0, 0.0], False, [document] * len(starts)))
            is_new = True
            continue
        nu = 0.0
        for layer in layers:
            heads = layer[row]
            if min(heads) < SHORTEST:
                heads = [max(norm, SHORTEST) for norm in heads]
            nu += sum(map(math.log, heads)) / len(heads)
        nu /= len(layers)
        count, total, square = count + 1, total + nu, square + nu * nu
        mean = total / count
        std = math.sqrt(max(0.0, square / count - mean * mean))
        if seen - starts[0] >= (min_block_length if after_separator else max_block_length):
            starts, is_new = [seen, *starts[:-1]], True
        rows.append(([count, total, square], nu < mean - threshold * std - TOLERANCE, starts))
    if not is_new:  # as in most steps
        return StepState(rows, state.blocks)
    starts = torch.tensor([(starts[0], starts[-1]) for _, _, starts in rows])
    return StepState(rows, Blocks(starts[:, :1], starts[:, 1:]))
