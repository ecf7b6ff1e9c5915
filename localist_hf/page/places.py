"""Which tokens and blocks of a text are meant, and what is kept of what was asked for them."""

from typing import Any

import torch

from ..modeling import Rule


def check_place(name: str, value: int, number: int) -> None:
    """
    Raises:
        ValueError: for what is none of so many.
    """
    if not 0 <= value < number:
        raise ValueError(f"`{name}` is {value}; it must be in 0 to {number - 1}.")


def rule_for(block_starts: torch.Tensor, position: int, target: int) -> list[Rule]:
    """
    What tells a position, and what is written after it, to look at a block and at what has been read of its own.

    Args:
        block_starts (`torch.LongTensor` of shape `(length,)`):
            Position at which each token's block starts.
        position (`int`), target (`int`):
            The position, and the number of the block.

    Raises:
        ValueError: for a block that does not start before it.
    """
    edges = [*block_starts.unique().tolist(), len(block_starts)]
    check_place("target", target, int(block_starts[: position + 1].unique().numel()))
    return [Rule((position, None), [(edges[target], edges[target + 1]), (int(block_starts[position]), None)])]


def keep_last(kept: dict[Any, Any], key: Any, value: Any, number: int) -> None:
    """Keeps something, and of what was kept before no more than the last ones."""
    while len(kept) >= number:
        kept.pop(next(iter(kept)), None)
    kept[key] = value
