"""How far attention has made up its mind for its targets, and what follows from that: the framework's bounds."""

import math
from typing import NamedTuple

import torch

from ..modeling.fidelity import binary_entropy


class PointerBounds(NamedTuple):
    """
    Attention of queries to other words, renormalised over them, and bounds on it that follow from its margin.

    Args:
        fidelity (`torch.Tensor` of shape `(...)`):
            Pointer fidelity pi, the part on the targets. It is `1 / (1 + exp(-margin))`.
        margin (`torch.Tensor` of shape `(...)`):
            m, in nats: the log-sum-exp of the scores of the targets less that of the other keys.
        entropy (`torch.Tensor` of shape `(...)`):
            In bits.
        most_missed (`torch.Tensor` of shape `(...)`):
            `exp(-m)`, of which `1 - pi` is no more.
        most_entropy (`torch.Tensor` of shape `(...)`):
            In bits, `h2(pi) + pi log2(number of targets) + (1 - pi) log2(number of other keys)`, of which the entropy
            is no more.
    """

    fidelity: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    most_missed: torch.Tensor
    most_entropy: torch.Tensor


def pointer_bounds(weights: torch.Tensor, is_target: torch.Tensor, is_rest: torch.Tensor) -> PointerBounds:
    """
    Pointer fidelity, margin and entropy of attention weights, and the bounds on them
    ([definition](../method.md#pointers-and-rules)): our form of those of arXiv:2510.09338.

    Args:
        weights (`torch.Tensor` of shape `(..., num_keys)`):
            Attention weights, any floating dtype: what `output_attentions` of a plain model gives.
        is_target (`torch.BoolTensor` of shape `(..., num_keys)`), is_rest (`torch.BoolTensor` of the same shape):
            The keys that a query is to look at, and the other words that it sees, without itself and sinks. Both may
            have fewer dimensions, as those of all heads alike.

    Returns:
        [`PointerBounds`]: float64; no numbers where no weight is on either.

    Raises:
        ValueError: for weights below 0, masks that are not of bools, and keys that are both.

    Example:

    ```python
    >>> weights = torch.tensor([[0.1, 0.5, 0.2, 0.2]])  # of a query's head, the last key its own
    >>> is_target = torch.tensor([True, True, False, False])
    >>> bounds = pointer_bounds(weights, is_target, torch.tensor([False, False, True, False]))
    >>> bounds.fidelity
    tensor([0.7500], dtype=torch.float64)
    ```
    """
    for name, mask in (("is_target", is_target), ("is_rest", is_rest)):
        if mask.dtype != torch.bool:
            raise ValueError(f"`{name}` is of {mask.dtype}; it must be a mask of bools.")
    if (is_target & is_rest).any():
        raise ValueError("`is_target` and `is_rest` have keys in common; a key is a target or it is not.")
    if (weights < 0).any():
        raise ValueError(f"`weights` has {weights.min().item()}; attention weights are 0 or more.")
    weights = weights.double()
    target, rest = (torch.where(mask, weights, 0.0) for mask in (is_target, is_rest))
    of_target, of_rest = target.sum(-1), rest.sum(-1)
    total = of_target + of_rest
    part = (target + rest) / total[..., None]
    entropy = -torch.where(part > 0, part * part.log2(), 0.0).sum(-1)
    fidelity = of_target / total
    margin = of_target.log() - of_rest.log()
    numbers = (mask.expand(weights.shape).sum(-1).clamp(min=1).double().log2() for mask in (is_target, is_rest))
    log_targets, log_others = numbers
    # Of a part that is 0 the other one is all: its logarithm counts for nothing.
    most = binary_entropy(fidelity) / math.log(2) + fidelity * log_targets + (1 - fidelity) * log_others
    return PointerBounds(fidelity, margin, entropy + 0 * fidelity, (-margin).exp(), most)
