"""What one forward pass handed to the attention of every layer, and what can be measured of it without another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import LocalityMeasurements
from ..modeling.localist_attention import localist_attention_forward
from ..modeling.locality import build_locality
from ..modeling.locality_request import LocalityRequest, NativeInputs
from ..modeling.measurements import measurements


class AttentionInputs(NamedTuple):
    """What an attention module was handed."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]


class KeptAttention:
    """
    The queries, keys and values of every layer in one forward pass, which do not depend on the layer's own blocks: its
    attention can be measured on any. That pass is given `keep` as its `observer`; at a dial above 0 lower layers have
    been held to their blocks in it. Where it is differentiated, what is measured is too.

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
        # Weights are measured as they are, before any dropout, and in the same precision.
        arguments |= {"dropout": 0.0}
        device = query.device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._layers[module.layer_idx] = AttentionInputs(module, query, key, value, attention_mask, arguments)

    def run(self, decoder: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> LocalityMeasurements:
        """
        Runs a transformer at dial 0 and takes note of every layer.

        Args:
            decoder ([`~transformers.PreTrainedModel`]):
                The localised model without its head.
            inputs (`dict[str, torch.Tensor]`):
                Its `input_ids` and, where it has them, `attention_mask` and `position_ids`.

        Returns:
            [`LocalityMeasurements`]: its output, with each token alone as a block of the first layer.
        """
        tokens = inputs["input_ids"]
        alone = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        dial = {"locality_dial": 0.0, "min_fidelity": 0.0}
        # Where nothing is measured the native model counts left padding among its positions.
        measured = {"output_fidelity": [0], "local_starts": alone}
        return decoder(**inputs, **dial, **measured, use_cache=False, observer=self.keep)

    def measure(
        self,
        inputs: dict[str, torch.Tensor],
        layers: Sequence[int],
        locality_dial: float | None = 0.0,
        min_fidelity: float | None = 0.0,
        **request: Any,
    ) -> LocalityMeasurements:
        """
        What these layers would measure with these arguments, given what the forward pass handed them, and at the price
        of their attention alone.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                Its `input_ids` and, where it had them, `attention_mask` and `position_ids`.
            layers (`Sequence[int]`):
                The layers to measure.
            locality_dial (`float`, *optional*, defaults to 0.0), min_fidelity (`float`, *optional*, defaults to 0.0):
                The dial and the guarantee of these layers; `None` for what is set.
            request:
                What else to measure, and on which blocks: arguments of [`LocalityRequest`].

        Raises:
            ValueError: for starts that are none of these inputs.
        """
        dial = {"locality_dial": locality_dial, "min_fidelity": min_fidelity}
        locality = build_locality(self._config, LocalityRequest(layers, **dial, **request), NativeInputs(**inputs))
        with torch.autocast(*self._autocast):
            for layer in layers:
                module, *tensors, mask, arguments = self._layers[layer]
                localist_attention_forward(module, *tensors, mask, locality=locality, **arguments)
        return LocalityMeasurements(**measurements(locality))
