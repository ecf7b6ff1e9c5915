"""How many keys are local to a query."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..modeling import LocalityFields
from ..modeling.block_partition import document_starts, with_previous_blocks


def packed_documents(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The first position of each token's text in packed rows, which the model tells in the same way; else `None`."""
    if inputs.get("position_ids") is None or inputs.get("attention_mask") is not None:
        return None
    input_ids = inputs["input_ids"]
    return document_starts(*input_ids.shape, position_ids=inputs["position_ids"], device=input_ids.device)


def visible_keys(
    block_starts: torch.Tensor, locality: LocalityFields, layer: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The number of keys in the local set of each counted position; elsewhere the number has no meaning.

    Args:
        block_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            As a model puts them out.
        locality ([`LocalityFields`]):
            The model's, with `num_previous_blocks`, `num_sink_tokens` and the `sliding_windows` of its layers.
        layer (`int`):
            The layer.
        documents (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            As [`packed_documents`] gives them. By default a row holds one text.
    """
    # Where documents start does not matter here: a position whose local set reaches up to there is not counted.
    nowhere = torch.full_like(block_starts, -1)
    local_starts = with_previous_blocks(block_starts, nowhere, locality.num_previous_blocks).local_starts
    position = torch.arange(block_starts.shape[1], device=block_starts.device)
    first, window = (block_starts >= 0).int().argmax(dim=1, keepdim=True), locality.sliding_windows[layer]
    if window is not None and documents is not None:
        first = documents.to(position.device)
    return LocalSets(position, first, locality.num_sink_tokens).sizes(local_starts, window)


class LocalSets(NamedTuple):
    """
    Queries by their positions, to which the keys from a local start on and the sinks of their text are local.

    Args:
        position (`torch.LongTensor`), first (`torch.LongTensor` of a shape that can be broadcast with it):
            The position of each query, and the first of its text.
        num_sinks (`int`):
            The first tokens of a text that are local to every one of it.
    """

    position: torch.Tensor
    first: torch.Tensor
    num_sinks: int

    def sizes(self, local_starts: torch.Tensor, window: int | None) -> torch.Tensor:
        """The number of keys in each local set under a sliding window, where it is counted."""
        seen = self._seen(window)
        num_sinks = (self.first + self.num_sinks - seen).clamp(0, self.num_sinks)
        return self.position - torch.maximum(local_starts, seen) + 1 + num_sinks

    def are_counted(self, local_starts: torch.Tensor, window: int | None) -> torch.Tensor:
        """True where a query sees more than its local set, as in `fidelity_mask`."""
        return local_starts > torch.maximum(self.first + self.num_sinks, self._seen(window))

    def _seen(self, window: int | None) -> torch.Tensor:
        """The first key that each query sees."""
        return self.first if window is None else torch.maximum(self.first, self.position - window + 1)
