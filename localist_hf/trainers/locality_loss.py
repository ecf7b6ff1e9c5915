"""The locality loss of one layer, and its weight under a budget."""

import math

import torch


# How fast the weight under a budget changes in a step, and its bounds.
_RATE, _LEAST, _MOST = 0.05, 1e-3, 1e3


def locality_loss(
    fidelity: torch.Tensor,
    fidelity_mask: torch.Tensor,
    target_fidelity: float,
    exponent: int,
    documents: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    How far one layer's attention falls short of the target, for each sequence of a batch: the mean over heads and
    counted positions of `weights * max(0, target_fidelity - fidelity) ** exponent`
    (docs/method.md#locality-loss).

    A target below 1 is the *low-fidelity* constraint of arXiv:2511.18375: a share of the attention is asked for, and
    nothing is gained beyond it.

    Args:
        fidelity (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length)`):
            What the objective asks for: psi ([`~localist_hf.modeling.fidelity.context_fidelity`]) or phi, the fidelity.
        fidelity_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Positions that count: `context_mask` of the model's output with psi, `fidelity_mask` with phi.
        target_fidelity (`float`):
            In (0, 1].
        exponent (`int`):
            1 or 2.
        documents (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            In packed rows, the first position of each token's document. Each document is then a sequence of its own.
        weights (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            How much each query's shortfall counts, in [0, 1]; 1 by default. The mean is not divided by them.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: 0 for a sequence without counted positions; with `documents`, the sum
        over each row's.
    """
    shortfall = (target_fidelity - fidelity).clamp(min=0).pow(exponent)
    shortfall = (shortfall if weights is None else shortfall * weights).mean(dim=1) * fidelity_mask
    if documents is None:
        return shortfall.sum(dim=1) / fidelity_mask.sum(dim=1).clamp(min=1)
    documents = documents.to(shortfall.device)
    totals = torch.zeros_like(shortfall).scatter_add(1, documents, shortfall)
    counts = torch.zeros_like(shortfall).scatter_add(1, documents, fidelity_mask.to(shortfall.dtype))
    return (totals / counts.clamp(min=1)).sum(dim=1)


def next_weight(weight: float, divergence: float, budget: float) -> float:
    """
    The weight of the locality loss in the next step, under a budget: more of it while the divergence from the teacher
    is below the budget, less while it is above, as GECO (arXiv:1810.00597) moves the multiplier of a constraint.

    Args:
        weight (`float`):
            That of this step.
        divergence (`float`), budget (`float`):
            KL from the teacher, the mean of the last steps, and what it may be, in nats.
    """
    slack = max(-1.0, min(1.0, 1 - divergence / budget))
    return max(_LEAST, min(_MOST, weight * math.exp(_RATE * slack)))
