"""What a browser is handed of readings: JSON, with the numbers as packed arrays."""

import base64
import gzip
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..modeling import LocalityFields
from ..modeling.fidelity import context_fidelity
from .reading import Reading


#: Numbers in [0, 1] are sent as integers of 16 bits: rounding changes them by at most 8e-6.
_FULL_16 = 65535
#: Those of single heads in a saved page as 8 bits of the largest of their row: by at most 0.2 % of that.
_FULL_8 = 255


def page_data(readings: Sequence[Reading], has_rows: bool) -> dict[str, Any]:
    """
    What the page draws.

    Args:
        readings (`Sequence[Reading]`):
            One model, or several that have read the same tokens on the same blocks.
        has_rows (`bool`):
            Whether all attention weights go with it, for a page without a server.

    Returns:
        `dict[str, Any]`: JSON.
    """
    first = readings[0]
    return {
        "tokens": first.passage.pieces,
        "blockStarts": first.block_starts.tolist(),
        "readings": [_reading_data(reading, has_rows) for reading in readings],
    }


def _reading_data(reading: Reading, has_rows: bool) -> dict[str, Any]:
    locality: LocalityFields = reading.model.config.locality
    profile = reading.profile
    of_layers = context_fidelity(profile.block_share.sum(1), profile.outside_share.sum(1))
    return {
        "name": reading.name,
        "numHeads": reading.num_heads,
        "lambdas": locality.locality_lambdas,
        "partition": locality.block_partition,
        "numSinks": locality.num_sink_tokens,
        "numPreviousBlocks": locality.num_previous_blocks,
        "hasLearnedSink": reading.has_learned_sink,
        "localStarts": reading.local_starts.tolist(),
        "shares": pack(_whole(reading.shares, _FULL_16, np.uint16)),
        "layerFidelity": _defined(of_layers),
        "headFidelity": [_defined(heads) for heads in profile.context_fidelity],
        "blocksLookedAt": _over_heads(profile.blocks_looked_at, profile.context_share),
        "topBlockShare": _over_heads(profile.top_block_share, profile.context_share),
        "rows": _rows(reading) if has_rows else None,
        "blocks": _blocks(reading) if has_rows else None,
    }


def _rows(reading: Reading) -> dict[str, str]:
    """The attention weights of all queries, one triangle after the other: of each layer's mean, and of each head."""
    means, heads, largest = [], [], []
    for layer in range(reading.num_layers):
        weights = [reading.weights(layer, position) for position in range(len(reading.passage))]
        means += [row.mean(0) for row in weights]
        largest.append(torch.stack([row.amax(1) for row in weights], dim=1))  # (num_heads, length)
        parts = [row / row.amax(1, keepdim=True) for row in weights]
        heads += [row[head] for head in range(reading.num_heads) for row in parts]
    return {
        "mean": pack(_whole(torch.cat(means), _FULL_16, np.uint16)),
        "heads": pack(_whole(torch.cat(heads), _FULL_8, np.uint8)),
        "largest": pack(_whole(torch.stack(largest), _FULL_16, np.uint16)),
    }


def _blocks(reading: Reading) -> list[str]:
    """Which blocks the words of each block look at: of each layer's mean, and then of each of its heads."""
    layers = map(reading.block_attention, range(reading.num_layers))
    return [packed_blocks(shares) for heads in layers for shares in (heads.mean(0), *heads)]


def packed_blocks(shares: torch.Tensor) -> str:
    """Shares of blocks, packed row by row."""
    return pack(_whole(shares, _FULL_16, np.uint16))


def pack(array: np.ndarray) -> str:
    """An array's bytes, the lowest first, compressed, in base64."""
    content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _whole(values: torch.Tensor, full: int, dtype: type) -> np.ndarray:
    return (values.double().clamp(0, 1) * full).round().numpy().astype(dtype)


def _over_heads(values: torch.Tensor, others: torch.Tensor) -> list[list[float | None]]:
    """Of each layer, that of all heads, over the attention to other words that they have, and that of each."""
    means = (values * others).nansum(1, keepdim=True) / others.nansum(1, keepdim=True)
    return [_defined(layer) for layer in torch.cat((means, values), dim=1)]


def _defined(values: torch.Tensor) -> list[float | None]:
    """Four digits; JSON has no NaN."""
    return [None if value != value else round(value, 4) for value in values.tolist()]
