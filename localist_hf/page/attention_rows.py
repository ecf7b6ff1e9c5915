"""The attention weights of single queries, by the model's own attention: never a length x length matrix."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..modeling.localist_attention import eager_attention


class _Layer(NamedTuple):
    """What an attention module was handed in one forward pass."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    arguments: dict[str, Any]


class AttentionRows:
    """
    The attention weights of any query of one text, each made when it is asked for. What is held are the queries and
    keys of every layer, as much as a key-value cache.

    A row is made by the function that the model itself calls under `attn_implementation="eager"`, so that grouped
    queries, soft-capping, learned sinks and whatever else an architecture does to its scores are as they are there.
    """

    def __init__(self, sliding_windows: list[int | None]) -> None:
        self._sliding_windows = sliding_windows
        self._layers: dict[int, _Layer] = {}

    def keep(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Notes what a layer's attention is handed for the text."""
        self._layers[module.layer_idx] = _Layer(module, query.detach(), key.detach(), arguments)

    @property
    def has_learned_sink(self) -> bool:
        """`bool`: whether the attention knows a sink that is no token."""
        return any(layer.arguments.get("s_aux") is not None for layer in self._layers.values())

    @torch.no_grad()
    def row(self, layer: int, position: int) -> torch.Tensor:
        """
        The attention weights of one query.

        Args:
            layer (`int`):
                Layer, from 0.
            position (`int`):
                Position of the query, from 0.

        Returns:
            `torch.Tensor` of shape `(num_heads, position + 1)`: the weight of each key, 0 before a sliding window;
            float32, on the CPU. A row sums to 1, less the share of a learned sink, which is no token.
        """
        module, query, key, arguments = self._layers[layer]
        window = self._sliding_windows[layer]
        first = 0 if window is None else max(0, position - window + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query[:, :, position : position + 1].to(wide)
        key = key[:, :, first : position + 1].to(wide)
        # What becomes of the values is not looked at; the keys stand in for them.
        _, weights = eager_attention(module)(module, query, key, key, None, **arguments)
        return F.pad(weights[0, :, 0].float().cpu(), (first, 0))


@torch.no_grad()
def attention_rows(decoder: PreTrainedModel, input_ids: torch.Tensor) -> AttentionRows:
    """
    What makes the attention weights of any query of a text, from one forward pass at dial 0, in which the attention is
    the native one. Meanwhile no other thread may use the model: its attention implementation is another.

    Args:
        decoder ([`~transformers.PreTrainedModel`]):
            A localised transformer, in evaluation mode, without its language modeling head.
        input_ids (`torch.LongTensor` of shape `(1, length)`):
            The text, without padding.

    Raises:
        ValueError: for a model that has no attention with explicit weights.
    """
    name = decoder.config._attn_implementation
    rows = AttentionRows(decoder.config.locality.sliding_windows)
    # Some architectures are used with `eager` where they have nothing else.
    decoder.set_attn_implementation(_KEEPING["eager" if name.startswith("localist_eager_") else "sdpa"])
    try:
        with decoder.set_locality_dial(0.0):
            decoder(input_ids=input_ids, use_cache=False, rows=rows)
    finally:
        decoder.set_attn_implementation(name)
    return rows


def _keeping_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, *inputs: Any, rows: AttentionRows, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The native attention, of whose queries and keys `rows` takes note."""
    kwargs.pop("locality")
    eager = eager_attention(module)
    if eager is None:
        raise ValueError(f"{type(module).__name__} has no attention with explicit weights, which could be shown.")
    rows.keep(module, query, key, kwargs)
    attention = eager if module.config._attn_implementation == _KEEPING["eager"] else sdpa_attention_forward
    return attention(module, query, key, *inputs, **kwargs)


#: The attention implementations that do so, by the native one.
_KEEPING = {"sdpa": "localist_rows_sdpa", "eager": "localist_rows_eager"}
for _native, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(_KEEPING[_native], _keeping_attention)
    AttentionMaskInterface.register(_KEEPING[_native], _mask)
