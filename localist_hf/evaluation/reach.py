"""What a prediction cannot depend on, where every layer is held to its local sets."""

import torch

from ..modeling import LocalityFields, LocalityMeasurements
from ..modeling.block_partition import with_previous_blocks


def first_in_reach(measured: LocalityMeasurements, locality: LocalityFields) -> torch.LongTensor:
    """
    The first token, but for attention sinks, that each position of a text can depend on at dial 1 with every layer
    wholly local: the last layer sees its local set, whose tokens have seen theirs in the layer below, and so on
    (docs/method.md#reach).

    Args:
        measured ([`LocalityMeasurements`]):
            What the model measured of every layer at dial 1.
        locality ([`LocalityFields`]):
            Its `locality`.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`: -1 on padding.
    """
    documents = measured.document_starts
    position = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = position
    # Local sets begin no earlier than those of the tokens before, so that the first token seen has seen the furthest.
    for starts, window in reversed(list(zip(measured.block_starts, locality.sliding_windows, strict=True))):
        local = with_previous_blocks(starts, documents, locality.num_previous_blocks).local_starts.to(documents.device)
        if window is not None:
            local = torch.maximum(local, position - window + 1)
        first = local.gather(1, first.clamp(min=0))
    return torch.where(documents < 0, -1, first)


def shares_out_of_reach(measured: LocalityMeasurements, locality: LocalityFields) -> torch.Tensor:
    """
    The sum, over positions with a context, of the share of it that is out of reach, and their number: `(2,)`, float64.
    """
    first, documents = first_in_reach(measured, locality), measured.document_starts
    position = torch.arange(documents.shape[1], device=documents.device)
    has_context = (documents >= 0) & (position > documents)
    hidden = (first - documents - locality.num_sink_tokens).clamp(min=0)
    shares = (hidden / (position - documents).clamp(min=1))[has_context]
    return torch.stack((shares.double().sum(), has_context.sum().double())).cpu()
