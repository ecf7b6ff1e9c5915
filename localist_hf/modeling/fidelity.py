# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The method under its own names: where attention goes, how much of it stays near, and the dial.

A query's attention `a_ij` sums to 1 over the keys that it sees. Some of these are *local* to it: its own block of the
text, perhaps the blocks before it, and the attention sinks (see [`~.local_set.LocalSet`]). [`Shares`] are the parts of
its attention; of them come the fidelity phi and the context fidelity psi. A [`LayerDial`] turns down what is not local.

Definitions and sources: `docs/method.md`. The fused kernels that give the shares without a matrix of attention are in
`block_attention.py`, and what one layer does with all this in `dialled_attention.py`.
"""

import math
from typing import NamedTuple

import torch


class Shares(NamedTuple):
    """
    Where the attention of queries goes. The four parts sum to 1, and to 0 on padding.

    Args:
        own (`torch.Tensor` of shape `(batch_size, num_heads, query_length)`):
            On the query's own token (*self*).
        sink (`torch.Tensor` of the same shape):
            On attention sinks outside of its block: first tokens of its text, and a learned sink.
        block (`torch.Tensor` of the same shape):
            On the rest of its local set.
        outside (`torch.Tensor` of the same shape):
            On everything else.
    """

    own: torch.Tensor
    sink: torch.Tensor
    block: torch.Tensor
    outside: torch.Tensor

    @property
    def fidelity(self) -> torch.Tensor:
        """phi = 1 - outside: the share that is local."""
        return 1 - self.outside


def fidelity_of_sums(local_lse: torch.Tensor, lse: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """`phi_i = exp(LSE_local,i - LSE_i)`, of the log-sum-exps over the local set and over all keys that it sees."""
    # Those of padding may be anything.
    return counted_fidelity(torch.where(is_counted, local_lse - lse, 0.0).exp(), is_counted)


def counted_fidelity(fidelity: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """phi without what rounding has put above 1, and 1 where the local set is all that a query sees, or on padding."""
    return torch.where(is_counted, fidelity.clamp(max=1), 1.0)


def context_fidelity(block: torch.Tensor, outside: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """
    psi, of the attention that goes to other words the share in the block: `block / (block + outside + eps)`.
    Attention that moves to the query's own token or to a sink leaves it as it is.

    Args:
        block (`torch.Tensor`), outside (`torch.Tensor` of the same shape):
            Shares of the attention, or sums of them over many queries: a mean of psi is the ratio of the sums.
        eps (`float`, *optional*, defaults to 0.0):
            What a loss needs, where hardly any attention may go to other words.

    Returns:
        `torch.Tensor`: in [0, 1]; no number where all are 0.
    """
    return block / (block + outside + eps)


class LayerDial(NamedTuple):
    """
    What the dial does in one layer: weights outside the local set are multiplied by `min(weight, w_i)` and
    renormalised, with `w_i = phi_i * (1 - floor) / (floor * (1 - phi_i))`, which raises the fidelity to the floor.

    Args:
        weight (`float`):
            w in [0, 1]. At 0 only the local set counts.
        floor (`float`, *optional*, defaults to 0.0):
            Least fidelity of every query, in [0, 1).
    """

    weight: float
    floor: float = 0.0

    @classmethod
    def of_layer(cls, dial: float, min_fidelity: float, locality: float) -> "LayerDial":
        """`w = 1 - d * lambda` and `floor = lambda * min_fidelity` for a layer with this lambda."""
        weight, floor = 1 - dial * locality, min_fidelity * locality
        return cls(0.0) if weight == 0 or floor == 1 else cls(weight, floor)

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.weight < 1 or self.floor > 0

    @property
    def is_hard(self) -> bool:
        """Whether the layer attends to the local set only."""
        return self.weight == 0

    def turn(self, fidelity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The fidelity under the dial, `phi' = phi / (phi + w * (1 - phi))`, raised to the floor where it is below, and
        the share of the local attention's output in the dialled one: `out' = out + share * (out_local - out)` with
        `share = (phi' - phi) / (1 - phi)`. Not for a weight of 0.

        Args:
            fidelity (`torch.Tensor`):
                phi, in [0, 1].
        """
        weight, floor = self
        dialled = fidelity / (fidelity + weight * (1 - fidelity))
        share = (1 - weight) * dialled  # the same as above, and exact at phi = 1
        # Where nothing is to be raised the quotient is not used; it must only stay finite, and so must its gradient.
        raised = (floor - fidelity) / (1 - fidelity).clamp(min=torch.finfo(fidelity.dtype).eps)
        is_below = dialled < floor
        return torch.where(is_below, floor, dialled), torch.where(is_below, raised, share)

    def log_factor(self, log_odds: torch.Tensor) -> torch.Tensor:
        """
        The logarithm of what the weights outside the local set are multiplied by, for each query: of
        `min(weight, w_i)`, where `log(phi_i / (1 - phi_i))` is known. It has no limit below which phi is none.
        """
        weight, floor = self
        factor = torch.full_like(log_odds, math.log(weight) if weight else -math.inf)
        return factor if floor == 0 else torch.minimum(factor, log_odds + math.log1p(-floor) - math.log(floor))


def binary_entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a choice with this probability."""
    is_certain = (share <= 0) | (share >= 1)
    share = torch.where(is_certain, 0.5, share)  # where the gradient of the formula is no number
    return torch.where(is_certain, 0.0, -share * share.log() - (1 - share) * (1 - share).log())


def dialled_entropy(
    entropy: torch.Tensor, local: torch.Tensor, fidelity: torch.Tensor, dialled: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """
    The entropy of attention under the dial: that of the choice between the local set and the rest, and of the choice
    within each. The dial changes the first only; the rest's part shrinks by `1 - share`.

    Args:
        entropy (`torch.Tensor`), local (`torch.Tensor`):
            Without the dial, over all keys and over the local set alone; in nats.
        fidelity (`torch.Tensor`):
            Without the dial.
        dialled (`torch.Tensor`), share (`torch.Tensor`):
            Of [`LayerDial.turn`].
    """
    rest = entropy - binary_entropy(fidelity) - fidelity * local
    return binary_entropy(dialled) + dialled * local + (1 - share) * rest
