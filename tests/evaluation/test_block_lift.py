"""Block lift: by hand, by chance, and on padding."""

import math

import pytest
import torch

from localist_hf.evaluation import block_lift
from localist_hf.modeling.block_partition import document_starts, place_block_starts


def marks(length: int, *positions: int) -> torch.Tensor:
    """True at these positions, `(1, length)`."""
    return torch.zeros(1, length, dtype=torch.bool).index_fill_(1, torch.tensor(positions, dtype=torch.long), True)


#: Blocks of 4, 3 and 5 tokens; of the tokens 1 to 11, those at 3, 4, 5 and 6, 7, 8 are near a start.
STARTS = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 7, 7]])


@pytest.mark.parametrize(
    ("boundaries", "tolerance", "lift"),
    [
        ((4, 7), 1, 1 / (6 / 11)),
        ((5, 10), 1, (1 / 2) / (6 / 11)),
        ((1, 10), 1, 0.0),
        ((4, 5, 10), 0, (1 / 3) / (2 / 11)),
        ((2, 10, 11), 2, (1 / 3) / (8 / 11)),
        ((0, 4), 1, 1 / (6 / 11)),  # that a text begins with a block says nothing
    ],
)
def test_by_hand(boundaries: tuple[int, ...], tolerance: int, lift: float) -> None:
    assert block_lift(STARTS, marks(12, *boundaries), tolerance) == pytest.approx(lift)


def test_rows_are_pooled() -> None:
    starts = torch.cat((STARTS, torch.zeros_like(STARTS)))  # the second row is one block
    boundaries = torch.cat((marks(12, 4, 7), marks(12, 4, 7)))
    assert block_lift(starts, boundaries) == pytest.approx((2 / 4) / (6 / 22))


@pytest.mark.parametrize("padding", [(3, 0), (0, 3), (2, 2)])
def test_padding_changes_nothing(padding: tuple[int, int]) -> None:
    padded = torch.nn.functional.pad(torch.where(STARTS < 0, -1, STARTS + padding[0]), padding, value=-1)
    boundaries = torch.nn.functional.pad(marks(12, 4, 10), padding, value=True)
    assert block_lift(padded, boundaries) == block_lift(STARTS, marks(12, 4, 10))


def test_a_partition_that_knows_nothing_of_the_boundaries_has_lift_1() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = document_starts(64, 512)
    candidates = torch.rand(64, 512, generator=generator) < 0.08
    boundaries = torch.rand(64, 512, generator=generator) < 0.1
    starts = place_block_starts(candidates, documents, 8, 64)
    assert block_lift(starts, boundaries) == pytest.approx(1, abs=0.06)
    # The same boundaries as candidates: nearly all are hit, but for those within a block's minimum length.
    assert block_lift(place_block_starts(boundaries, documents, 8, 64), boundaries) > 1.5


def test_nothing_to_compare_is_no_number() -> None:
    assert math.isnan(block_lift(STARTS, marks(12)))
    assert math.isnan(block_lift(torch.zeros_like(STARTS), marks(12, 4)))


@pytest.mark.parametrize(
    ("boundaries", "tolerance", "message"),
    [
        (marks(11, 4), 1, r"`block_starts` has the shape \(1, 12\) and `boundaries` \(1, 11\)"),
        (marks(12, 4).long(), 1, r"`boundaries` has the dtype torch.int64; it must be torch.bool"),
        (marks(12, 4), -1, "`tolerance` is -1; it must be at least 0"),
    ],
)
def test_bad_arguments_are_named(boundaries: torch.Tensor, tolerance: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_lift(STARTS, boundaries, tolerance)
