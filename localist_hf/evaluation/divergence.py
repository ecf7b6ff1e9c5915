"""How much the dial changes what a model predicts."""

import math

import torch


def divergence_bits(free_logits: torch.Tensor, dialled_logits: torch.Tensor) -> torch.Tensor:
    """
    `KL(p || q) = sum_v p_v log2(p_v / q_v)` of each prediction, in bits: p at dial 0, q under the dial.

    Args:
        free_logits (`torch.Tensor` of shape `(..., vocab_size)`), dialled_logits (`torch.Tensor` of the same shape):
            Logits, or log-probabilities, of any floating dtype.

    Returns:
        `torch.Tensor` of shape `(...)`, float32 (float64 for float64 logits): at least 0, up to rounding.
    """
    wide = torch.promote_types(free_logits.dtype, torch.float32)
    free, dialled = (logits.to(wide).log_softmax(-1) for logits in (free_logits, dialled_logits))
    return torch.nn.functional.kl_div(dialled, free, reduction="none", log_target=True).sum(-1) / math.log(2)
