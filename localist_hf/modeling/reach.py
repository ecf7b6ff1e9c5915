# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What a prediction cannot depend on, where every layer is held to its local sets: a fact about the model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .block_partition import with_previous_blocks
from .fidelity import LayerDial
from .locality_config import LocalityFields


class Reach(NamedTuple):
    """
    The tokens that each position of a text can depend on (`docs/method.md#reach`).

    Args:
        is_bounded (`bool`):
            Whether there is a bound: no token out of reach can change a prediction by a bit (of mixtures of experts, by
            more than rounding).
        first (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The first token, but for attention sinks, that each position can depend on; the start of its text where
            there is no bound, -1 on padding.
        share_outside (`float`):
            Mean, over positions with tokens before them, of the share of these that is out of reach, of which sinks are
            never; 0 without a bound, NaN where no position has any.
        statement (`str`):
            What holds, or why nothing does, in a sentence.
    """

    is_bounded: bool
    first: torch.Tensor
    share_outside: float
    statement: str


def first_in_reach(
    block_starts: Sequence[torch.Tensor], documents: torch.Tensor, locality: LocalityFields
) -> torch.LongTensor:
    """
    The first token, but for attention sinks, that each position of a text can depend on at dial 1 with every layer
    wholly local: the last layer sees its local set, whose tokens have seen theirs in the layer below, and so on.

    Args:
        block_starts (`Sequence[torch.LongTensor]` of shape `(batch_size, length)`):
            Those of every layer.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            First position of each token's text, -1 on padding.
        locality ([`LocalityFields`]):
            The model's.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: -1 on padding.
    """
    position = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = position
    # Local sets begin no earlier than those of the tokens before, so that the first token seen has seen the furthest.
    for starts, window in reversed(list(zip(block_starts, locality.sliding_windows, strict=True))):
        local = with_previous_blocks(starts, documents, locality.num_previous_blocks).local_starts.to(documents.device)
        if window is not None:
            local = torch.maximum(local, position - window + 1)
        first = local.gather(1, first.clamp(min=0))
    return torch.where(documents < 0, -1, first)


def sum_out_of_reach(first: torch.Tensor, documents: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """
    The sum, over positions with tokens before them, of the share of these that is out of reach, and the number of such
    positions: `(2,)`, on the CPU.
    """
    position = torch.arange(documents.shape[1], device=documents.device)
    has_context = (documents >= 0) & (position > documents)
    hidden = (first - documents - num_sinks).clamp(min=0)
    shares = (hidden / (position - documents).clamp(min=1))[has_context].cpu()
    return torch.stack((shares.double().sum(), torch.tensor(float(has_context.sum()), dtype=torch.float64)))


def reach_of(
    block_starts: Sequence[torch.Tensor],
    documents: torch.Tensor,
    locality: LocalityFields,
    dial: float,
    min_fidelity: float,
    are_given: bool,
    has_experts: bool = False,
) -> Reach:
    """
    The reach in a text with these blocks.

    Args:
        block_starts (`Sequence[torch.LongTensor]` of shape `(batch_size, length)`), documents (`torch.LongTensor` of \
        the same shape), locality ([`LocalityFields`]):
            As for [`first_in_reach`].
        dial (`float`), min_fidelity (`float`):
            Those that the text is read at.
        are_given (`bool`):
            Whether the caller has said where blocks start.
        has_experts (`bool`, *optional*, defaults to `False`):
            Whether the model is a mixture of experts, which work on tokens in groups.
    """
    lambdas = locality.locality_lambdas
    free = [layer for layer, value in enumerate(lambdas) if not LayerDial.of_layer(dial, min_fidelity, value).is_hard]
    if free:
        layer = free[0]
        value, floor = lambdas[layer], f" and min_fidelity {min_fidelity}" if min_fidelity else ""
        return no_bound(
            documents,
            f"layer {layer} has lambda {value} at dial {dial}{floor}, and sees what is outside of its local sets",
        )
    first = first_in_reach(block_starts, documents, locality)
    total, number = sum_out_of_reach(first, documents, locality.num_sink_tokens).tolist()
    share = total / number if number else math.nan
    # The length limits chain the starts of every other partition to earlier tokens.
    given = "" if are_given or locality.block_partition == "window" else "Given these blocks, "
    num_sinks = locality.num_sink_tokens
    sinks = f", but for the first {'token' if num_sinks == 1 else num_sinks} of its text," if num_sinks else ""
    rounding = " by more than rounding, as its experts work on tokens in groups" if has_experts else ""
    how_much = ""
    if number:  # and never said to be more than it is
        how_much = f"; {math.floor(100 * share)} % of the tokens before a position are out of its reach, on average"
    statement = f"{given}no token before those in reach{sinks} can change a prediction{rounding}{how_much}."
    return Reach(True, first, share, statement[0].upper() + statement[1:])


def of_found_blocks(found: Reach) -> Reach:
    """What holds of blocks that were handed on but found in the text, so that tokens out of reach may move them."""
    if not found.is_bounded:
        return found
    return found._replace(statement="Given these blocks, " + found.statement[0].lower() + found.statement[1:])


def no_bound(documents: torch.Tensor, why: str) -> Reach:
    """That of a text with these documents of which nothing can be said."""
    return Reach(False, documents, 0.0, f"No bound by local sets: {why}.")
