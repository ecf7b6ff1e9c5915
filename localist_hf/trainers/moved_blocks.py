"""The blocks of a text moved along it: as many and as long as its own, and none of its business."""

import torch


def moved_blocks(starts: torch.Tensor, documents: torch.Tensor, share: float) -> torch.Tensor:
    """
    The blocks of texts, moved along each text by a share of its length: what passes its end goes on at its start.

    Args:
        starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Where each token's block starts; -1 on padding.
        documents (`torch.LongTensor` of the same shape):
            The first position of each token's text; -1 on padding.
        share (`float`):
            In [0, 1). Texts are moved by one token at least.

    Returns:
        `torch.LongTensor` of the same shape: block starts. A text's first token starts a block in any case, so that
        there may be one more than there were.
    """
    position = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    is_token, first = documents >= 0, documents.clamp(min=0)
    ends = torch.where(is_token, position + 1, 0)
    lengths = torch.zeros_like(starts).scatter_reduce(1, first, ends, "amax").gather(1, first) - first
    distance = (share * lengths).long().clamp(min=1)
    source = first + (position - first - distance) % lengths.clamp(min=1)
    is_start = (starts == position).gather(1, source.clamp(max=starts.shape[1] - 1)) | (position == documents)
    moved = torch.where(is_start & is_token, position, 0).cummax(dim=1).values
    return torch.where(is_token, moved, -1)
