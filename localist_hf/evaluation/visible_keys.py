"""How many keys are local to a query."""

import torch

from ..modeling import LocalityFields
from ..modeling.block_partition import with_previous_blocks


def visible_keys(block_starts: torch.Tensor, locality: LocalityFields) -> torch.Tensor:
    """
    The number of keys in the local set of each counted position; elsewhere the number has no meaning.

    Args:
        block_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            As a model puts them out.
        locality ([`LocalityFields`]):
            The model's, with `num_previous_blocks` and `num_sink_tokens`.
    """
    # Where documents start does not matter: a position whose local set reaches up to there is not counted.
    nowhere = torch.full_like(block_starts, -1)
    local_starts = with_previous_blocks(block_starts, nowhere, locality.num_previous_blocks).local_starts
    position = torch.arange(block_starts.shape[1], device=block_starts.device)
    return position - local_starts + 1 + locality.num_sink_tokens
