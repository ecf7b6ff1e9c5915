"""The locality loss against its formula."""

import pytest
import torch

from localist_hf.trainers import locality_loss


def test_is_the_mean_shortfall_over_heads_and_counted_positions() -> None:
    fidelity = torch.tensor([[[0.2, 0.5, 1.0], [0.4, 0.9, 1.0]]])  # one sequence, two heads
    mask = torch.tensor([[True, True, False]])
    # Shortfalls below 0.8: (0.6, 0.3) and (0.4, 0).
    assert locality_loss(fidelity, mask, 0.8, 1).item() == pytest.approx((0.6 + 0.3 + 0.4 + 0) / 4)
    assert locality_loss(fidelity, mask, 0.8, 2).item() == pytest.approx((0.36 + 0.09 + 0.16 + 0) / 4)


def test_a_sequence_without_counted_positions_adds_zero_and_no_gradient() -> None:
    fidelity = torch.full((2, 3, 5), 0.1, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    losses = locality_loss(fidelity, mask, 0.9, 1)
    losses.sum().backward()
    assert losses.tolist() == [pytest.approx(0.8), 0.0]
    assert fidelity.grad[0].abs().min() > 0
    assert fidelity.grad[1].abs().max() == 0


def test_nothing_is_gained_beyond_the_target() -> None:
    fidelity = torch.tensor([[[0.95]]], requires_grad=True)
    loss = locality_loss(fidelity, torch.tensor([[True]]), 0.9, 1)
    loss.sum().backward()
    assert loss.item() == 0
    assert fidelity.grad.item() == 0


def test_what_counts_less_counts_by_its_weight_in_the_same_mean() -> None:
    fidelity, weights = torch.tensor([[[0.2, 0.5]]]), torch.tensor([[[0.5, 0.0]]])
    mask = torch.tensor([[True, True]])
    assert locality_loss(fidelity, mask, 0.8, 2, weights=weights).item() == pytest.approx(0.36 * 0.5 / 2)


def test_packed_documents_are_sequences_of_their_own() -> None:
    fidelity, mask = torch.rand(2, 3, 9), torch.rand(2, 9) > 0.3
    documents = torch.tensor([[0, 0, 0, 0, 4, 5, 5, 5, 5], [0] * 9])
    losses = locality_loss(fidelity, mask, 0.9, 2, documents)
    pieces = [(0, slice(0, 4)), (0, slice(4, 5)), (0, slice(5, 9)), (1, slice(0, 9))]
    alone = [locality_loss(fidelity[row, None, :, at], mask[row, None, at], 0.9, 2).item() for row, at in pieces]
    assert losses.tolist() == pytest.approx([sum(alone[:3]), alone[3]])
