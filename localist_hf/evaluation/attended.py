"""What one forward pass handed to the attention of every layer, and what can be measured of it without another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling import LocalityMeasurements
from ..modeling.localist_attention import localist_attention_forward
from ..modeling.localist_model import measurements
from ..modeling.locality import LocalityRequest, build_locality


class AttentionInputs(NamedTuple):
    """What an attention module was handed."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]


class Attended:
    """
    The queries, keys and values of every layer in one forward pass at dial 0, in which the attention does not depend on
    blocks: it can then be measured on any. That pass is given `keep` as its `observer`. Where it is differentiated,
    what is measured is too.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The localised model's.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._layers: dict[int, AttentionInputs] = {}

    def keep(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> None:
        """Takes note of what a layer's attention is handed."""
        # Weights are measured as they are, before any dropout.
        arguments |= {"dropout": 0.0}
        self._layers[module.layer_idx] = AttentionInputs(module, query, key, value, attention_mask, arguments)

    def measure(
        self,
        inputs: dict[str, torch.Tensor],
        layers: Sequence[int],
        output_entropy: bool = False,
        **starts: torch.Tensor,
    ) -> LocalityMeasurements:
        """
        What the forward pass would measure with these arguments, and at the price of its attention alone.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                Its `input_ids` and, where it had them, `attention_mask` and `position_ids`.
            layers (`Sequence[int]`):
                The layers to measure.
            output_entropy (`bool`, *optional*, defaults to `False`):
                As for [`LocalistGPT2LMHeadModel.forward`].
            starts (`torch.Tensor` of shape `(batch_size, length)`):
                `block_starts` or `local_starts`.

        Raises:
            ValueError: for starts that are none of these inputs.
        """
        request = LocalityRequest(layers, output_entropy, locality_dial=0.0, min_fidelity=0.0, **starts)
        locality = build_locality(self._config, request, **inputs)
        for layer in layers:
            module, *tensors, mask, arguments = self._layers[layer]
            localist_attention_forward(module, *tensors, mask, locality=locality, **arguments)
        return LocalityMeasurements(**measurements(locality, inputs["input_ids"].shape[1]))
