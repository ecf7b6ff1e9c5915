"""What one forward pass handed to the attention of every layer, and what can be had of it without another."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ..modeling.localist_attention import eager_attention, localist_attention_forward
from ..modeling.localist_model import LocalityMeasurements, measurements
from ..modeling.locality import LocalityRequest, build_locality


class _Layer(NamedTuple):
    """What an attention module was handed."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]


class AttentionRows:
    """
    The attention weights of any query of one text, each made when it is asked for: never a length x length matrix. What
    is held are the queries, keys and values of every layer. It is filled by a forward pass, at dial 0, that is given
    its `keep` as the `observer`.

    A row is made by the function that the model itself calls under `attn_implementation="eager"`, so that grouped
    queries, soft-capping, learned sinks and whatever else an architecture does to its scores are as they are there.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The localised model's.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._layers: dict[int, _Layer] = {}

    def keep(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> None:
        """
        Takes note of what a layer's attention is handed for the text.

        Raises:
            ValueError: for a model that has no attention with explicit weights.
        """
        if eager_attention(module) is None:
            raise ValueError(f"{type(module).__name__} has no attention with explicit weights, which could be shown.")
        tensors = query.detach(), key.detach(), value.detach()
        self._layers[module.layer_idx] = _Layer(module, *tensors, attention_mask, arguments)

    @property
    def has_learned_sink(self) -> bool:
        """`bool`: whether the attention knows a sink that is no token."""
        return any(layer.arguments.get("s_aux") is not None for layer in self._layers.values())

    @torch.no_grad()
    def measure(self, input_ids: torch.Tensor, block_starts: torch.Tensor) -> LocalityMeasurements:
        """
        What a forward pass with `output_fidelity=True` and `output_entropy=True` would measure on these blocks.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`):
                The text.
            block_starts (`torch.LongTensor` of shape `(1, length)`):
                Its blocks, in every layer.
        """
        request = LocalityRequest(True, True, block_starts, None, 0.0, 0.0)
        locality = build_locality(self._config, request, input_ids=input_ids)
        for module, *tensors, mask, arguments in self._layers.values():
            localist_attention_forward(module, *tensors, mask, locality=locality, **arguments)
        return LocalityMeasurements(**measurements(locality, input_ids.shape[1]))

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
        module, query, key, _, _, arguments = self._layers[layer]
        window = self._config.locality.sliding_windows[layer]
        first = 0 if window is None else max(0, position - window + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query[:, :, position : position + 1].to(wide)
        key = key[:, :, first : position + 1].to(wide)
        # What becomes of the values is not looked at; the keys stand in for them.
        _, weights = eager_attention(module)(module, query, key, key, None, **arguments)
        return F.pad(weights[0, :, 0].float().cpu(), (first, 0))
