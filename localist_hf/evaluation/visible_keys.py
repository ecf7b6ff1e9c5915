"""How many keys are local to a query."""

import torch

from ..modeling import LocalityFields
from ..modeling.block_partition import with_previous_blocks


def visible_keys(block_starts: torch.Tensor, locality: LocalityFields, layer: int) -> torch.Tensor:
    """
    The number of keys in the local set of each counted position; elsewhere the number has no meaning.

    Args:
        block_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            As a model puts them out.
        locality ([`LocalityFields`]):
            The model's, with `num_previous_blocks`, `num_sink_tokens` and the `sliding_windows` of its layers.
        layer (`int`):
            The layer. Where it has a sliding window, the sinks of all but the first of several documents in a row are
            left out.
    """
    # Where documents start does not matter: a position whose local set reaches up to there is not counted.
    nowhere = torch.full_like(block_starts, -1)
    local_starts = with_previous_blocks(block_starts, nowhere, locality.num_previous_blocks).local_starts
    position = torch.arange(block_starts.shape[1], device=block_starts.device)
    first = (block_starts >= 0).int().argmax(dim=1, keepdim=True)
    return local_set_sizes(position, local_starts, first, locality, layer)


def local_set_sizes(
    position: torch.Tensor, local_starts: torch.Tensor, first: torch.Tensor, locality: LocalityFields, layer: int
) -> torch.Tensor:
    """
    The same where more is known: the position of each query, the first key of the stretch that is local to it, and the
    first position of its text. All `torch.LongTensor` of shapes that can be broadcast.
    """
    sinks, window = locality.num_sink_tokens, locality.sliding_windows[layer]
    seen = first if window is None else torch.maximum(first, position - window + 1)
    return position - torch.maximum(local_starts, seen) + 1 + (first + sinks - seen).clamp(0, sinks)
