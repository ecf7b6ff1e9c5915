"""The attention weights of single queries, by the model's own attention: never a length x length matrix."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.fidelity import LayerDial
from ..modeling.localist_attention import eager_attention
from .kept_attention import KeptAttention


_FREE = LayerDial(1.0)


class AttentionRows(KeptAttention):
    """
    The attention weights of any query of one text, each made when it is asked for.

    A row is made by the function that the model itself calls under `attn_implementation="eager"`, so that grouped
    queries, soft-capping, learned sinks and whatever else an architecture does to its scores are as they are there.
    """

    def keep(self, module: nn.Module, *tensors: torch.Tensor | None, **arguments: Any) -> None:
        """
        Takes note of what a layer's attention is handed for the text.

        Raises:
            ValueError: for a model that has no attention with explicit weights.
        """
        if eager_attention(module) is None:
            raise ValueError(f"{type(module).__name__} has no attention with explicit weights, which could be shown.")
        super().keep(module, *tensors, **arguments)

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """`list[torch.Tensor]`: all that is kept of the text."""
        return [tensor for _, *tensors, _ in self._layers.values() for tensor in tensors]

    @property
    def has_learned_sink(self) -> bool:
        """`bool`: whether the attention knows a sink that is no token."""
        return any(layer.arguments.get("s_aux") is not None for layer in self._layers.values())

    def values(self, layer: int) -> torch.Tensor:
        """`torch.Tensor` of shape `(1, num_key_value_heads, length, head_dim)`: the values of a layer."""
        return self._layers[layer].value

    def row(
        self, layer: int, position: int, is_local: torch.Tensor | None = None, dial: LayerDial = _FREE
    ) -> torch.Tensor:
        """
        The attention weights of one query.

        Args:
            layer (`int`):
                Layer, from 0.
            position (`int`):
                Position of the query, from 0.
            is_local (`torch.BoolTensor` of shape `(position + 1,)`, *optional*), dial ([`LayerDial`], *optional*):
                The query's local set, and what turns down the rest, without a guarantee; by default nothing is.

        Returns:
            `torch.Tensor` of shape `(num_heads, position + 1)`: the weight of each key, 0 before a sliding window;
            float32, on the CPU. A row sums to 1, less the share of a learned sink, which is no token.
        """
        return self.rows(layer, position, position + 1, is_local, dial)[:, 0]

    @torch.no_grad()
    def rows(
        self, layer: int, first: int, end: int, is_local: torch.Tensor | None = None, dial: LayerDial = _FREE
    ) -> torch.Tensor:
        """
        The attention weights of some queries that follow each other.

        Args:
            layer (`int`):
                Layer, from 0.
            first (`int`), end (`int`):
                Position of the first query, and of the one after the last.
            is_local (`torch.BoolTensor` of shape `(end - first, end)`, *optional*), dial ([`LayerDial`], *optional*):
                As for [`row`].

        Returns:
            `torch.Tensor` of shape `(num_heads, end - first, end)`: see [`row`]; 0 after the query.
        """
        module, query, key, _, _, arguments = self._layers[layer]
        window = self._config.locality.sliding_windows[layer]
        start = 0 if window is None else max(0, first - window + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query[:, :, first:end].to(wide), key[:, :, start:end].to(wide)
        mask, none = None, torch.finfo(wide).min
        if end - first > 1 or dial.is_on:
            before = torch.arange(first, end)[:, None] - torch.arange(start, end)
            mask = torch.zeros(before.shape, dtype=wide)
            if dial.is_on:  # the logarithm of a factor of the weights, as it is added to the scores
                factor = math.log(dial.weight) if dial.weight else none
                mask = mask.masked_fill(~is_local.expand(end - first, end)[:, start:], factor)
            mask = mask.masked_fill((before < 0) | (before >= (window or end)), none)[None, None].to(query.device)
        # What becomes of the values is not looked at; the keys stand in for them.
        _, weights = eager_attention(module)(module, query, key, key, mask, **arguments)
        return F.pad(weights[0].float().cpu(), (start, 0))
