"""How many sequences a batch holds, of which a packed row may have several."""

from collections.abc import Mapping
from typing import Any

import torch

from ..modeling.block_partition import document_starts


def count_sequences(inputs: Mapping[str, torch.Tensor]) -> int | torch.Tensor:
    """The number of a batch's sequences."""
    if "input_ids" not in inputs:
        held = ", ".join(map(repr, inputs)) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ValueError(f"A batch holds {held}; the locality loss needs 'input_ids'.")
    input_ids = inputs["input_ids"]
    if not is_packed(inputs):
        return len(input_ids)
    position_ids = inputs["position_ids"]
    return count_documents(document_starts(*input_ids.shape, position_ids=position_ids, device=input_ids.device))


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether rows of a batch may hold several documents, by what the model tells that too."""
    return inputs.get("position_ids") is not None and inputs.get("attention_mask") is None


def count_documents(documents: torch.Tensor) -> torch.Tensor:
    """The number of documents in packed rows, of the first position of each token's."""
    # Of every document of two tokens or more there is one second token. Shorter ones are padding of packed rows.
    position = torch.arange(documents.shape[1], device=documents.device)
    return (position - documents == 1).sum().clamp(min=1)
