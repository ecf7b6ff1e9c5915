"""The attention weights of single queries, by the model's own attention: never a length x length matrix."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.fidelity import LayerDial
from ..modeling.localist_attention import eager_attention
from .kept_attention import KeptAttention


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
        return self.rows(layer, position, position + 1)[:, 0]

    @torch.no_grad()
    def rows(self, layer: int, first: int, end: int) -> torch.Tensor:
        """
        The attention weights of some queries that follow each other.

        Args:
            layer (`int`):
                Layer, from 0.
            first (`int`), end (`int`):
                Position of the first query, and of the one after the last.

        Returns:
            `torch.Tensor` of shape `(num_heads, end - first, end)`: see [`row`]; 0 after the query.
        """
        module, query, key, _, _, arguments = self._layers[layer]
        window = self._config.locality.sliding_windows[layer]
        start = 0 if window is None else max(0, first - window + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query[:, :, first:end].to(wide), key[:, :, start:end].to(wide)
        mask = None
        if end - first > 1:
            before = torch.arange(first, end)[:, None] - torch.arange(start, end)
            is_seen = (before >= 0) & (before < (window or end))
            mask = torch.zeros(is_seen.shape, dtype=wide).masked_fill(~is_seen, torch.finfo(wide).min)
            mask = mask[None, None].to(query.device)
        # What becomes of the values is not looked at; the keys stand in for them.
        _, weights = eager_attention(module)(module, query, key, key, mask, **arguments)
        return F.pad(weights[0].float().cpu(), (start, 0))


def under_dial(rows: torch.Tensor, is_local: torch.Tensor, dial: LayerDial) -> torch.Tensor:
    """
    What a layer's dial leaves of attention weights that its pass under the dial has made (docs/method.md#dial).

    Args:
        rows (`torch.Tensor` of shape `(..., num_keys)`):
            The weights, before the dial; what they lack of 1 is on a learned sink, which is local.
        is_local (`torch.BoolTensor` that can be broadcast to this shape):
            The local set of each query.
        dial ([`LayerDial`]):
            Without a guarantee.
    """
    learned = (1 - rows.sum(-1, keepdim=True)).clamp(min=0)
    rows = torch.where(is_local, rows, rows * dial.weight)
    # Where nothing that is left has any weight, there is none.
    return rows / (rows.sum(-1, keepdim=True) + learned).clamp(min=torch.finfo(rows.dtype).tiny)
