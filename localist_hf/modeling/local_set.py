# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What is local to each query of a layer."""

from typing import NamedTuple

import torch
from transformers.integrations.sdpa_attention import repeat_kv

from .block_partition import Blocks


#: A position that no key has.
NOWHERE = 2**62


class KeyMasks(NamedTuple):
    """
    Where some queries see a key, where it is local to them, and which part of the local set it is; each `(batch_size,
    num_queries, num_keys)`.
    """

    visible: torch.Tensor
    is_local: torch.Tensor
    is_sink: torch.Tensor
    is_own: torch.Tensor


class LocalSet(NamedTuple):
    """
    The keys that are local to each query: the stretch of keys that ends with it, and the sinks before that stretch.
    Positions count all tokens of the row, those that a cache has dropped too.

    Args:
        starts (`torch.LongTensor` of shape `(batch_size, query_length)`):
            First key of each query's stretch; -1 on padding.
        documents (`torch.LongTensor` of shape `(batch_size, 1 or query_length)`):
            First key of each row's document, or, in packed rows, of each query's.
        num_tokens (`int`):
            Tokens of the row up to the last query.
        max_length (`int`):
            No stretch is longer.
        num_sinks (`int`, *optional*, defaults to 0):
            Keys at the start of a document that are local to every query of it, as far as the layer sees them.
        window (`int`, *optional*):
            Keys that each query sees, where that is a sliding window.
        sink_keys (`torch.Tensor` of shape `(batch_size, num_heads, num_sinks, head_dim)`, *optional*), sink_values \
        (`torch.Tensor`, *optional*):
            Those of the sinks, where a cache has dropped keys.
    """

    starts: torch.Tensor
    documents: torch.Tensor
    num_tokens: int
    max_length: int
    num_sinks: int = 0
    window: int | None = None
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None

    @classmethod
    def of_blocks(
        cls,
        blocks: Blocks,
        documents: torch.Tensor,
        num_tokens: int,
        max_length: int,
        num_sinks: int = 0,
        window: int | None = None,
    ) -> "LocalSet":
        """
        That of queries in these blocks: a stretch begins with the earliest previous block that counts, or, if sinks
        stand there, after them, unless they are in the query's own block; never before the layer's sliding window.
        """
        starts = blocks.local_starts
        max_length = max_length if window is None else min(window, max_length)
        local_set = cls(starts, documents, num_tokens, max_length, num_sinks, window)
        if num_sinks:
            starts = torch.maximum(starts, torch.minimum(blocks.starts, documents + num_sinks))
        elif window is None:
            return local_set
        return local_set._replace(
            starts=torch.where(blocks.starts < 0, -1, torch.maximum(starts, local_set._first_visible()))
        )

    def is_counted(self) -> torch.Tensor:
        """
        True where a query sees more than its local set, `(batch_size, query_length)`; elsewhere its fidelity is 1 by
        construction.
        """
        return self.starts > torch.maximum(self.documents + self.num_sinks, self._first_visible())

    def has_context(self) -> torch.Tensor:
        """True where the stretch holds another key than the query's own: not on a block's first token."""
        return self.starts < self._position()

    def sizes(self) -> torch.Tensor:
        """The number of keys in each local set, `(batch_size, query_length)`; on padding it has no meaning."""
        seen = self._first_visible()
        sinks = (torch.minimum(self.documents + self.num_sinks, self.starts) - seen).clamp(min=0)
        return self._position() - self.starts + 1 + sinks

    def counted_from(self, first: int) -> "LocalSet":
        """The same, with positions that count from this key on."""
        if not first:
            return self
        starts = torch.where(self.starts < 0, -1, self.starts - first)
        return self._replace(starts=starts, documents=self.documents - first, num_tokens=self.num_tokens - first)

    def masks(self, rows: slice | torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None) -> KeyMasks:
        """
        For some queries, which keys they see and what these are to them.

        Args:
            rows (`slice` or `torch.LongTensor`):
                The queries.
            positions (`torch.LongTensor` of shape `(1 or batch_size, num_keys)`):
                Those of the keys, [`NOWHERE`] of what is none.
            mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, num_keys)`, *optional*):
                True where a query sees a key; None is causal.
        """
        place = self._position()[rows][:, None]
        starts = self.starts[:, rows][..., None]
        first = (self.documents if self.documents.shape[1] == 1 else self.documents[:, rows])[..., None]
        keys = positions[:, None]
        visible = keys <= place if mask is None else mask[:, 0, rows]
        if mask is None and self.window is not None:
            visible = visible & (keys > place - self.window)
        visible = visible & (starts >= 0)
        is_sink = (keys >= first) & (keys < first + self.num_sinks) & visible & (keys < starts)
        return KeyMasks(visible, is_sink | (visible & (keys >= starts)), is_sink, visible & (keys == place))

    def of_rows(self, rows: torch.Tensor) -> "LocalSet":
        """That of some rows of the batch; there is no cache."""
        return self._replace(starts=self.starts[rows], documents=self.documents[rows])

    def for_heads(self, groups: int) -> "LocalSet":
        """The same, its sinks repeated for the query heads that share keys."""
        if self.sink_keys is None:
            return self
        return self._replace(
            sink_keys=repeat_kv(self.sink_keys, groups), sink_values=repeat_kv(self.sink_values, groups)
        )

    def sinks_of(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Where the sinks are none for a query, `(batch_size, 1, query_length, num_sinks)`, and their rows of
        `(batch_size, num_heads, key_length, head_dim)` tensors: `(batch_size, num_heads, num_sinks, head_dim)`, or, in
        packed rows, `(batch_size, num_heads, query_length, num_sinks, head_dim)`. For positions that count from the
        first of these keys on.
        """
        key_length = tensors[0].shape[2]
        position = self.documents[..., None] + torch.arange(self.num_sinks, device=self.documents.device)
        # Padding, or counted with the stretch already.
        is_outside = (self.starts[..., None] < 0) | (position >= self.starts[..., None])
        if self.window is not None:
            is_outside = is_outside | (position <= self._position()[:, None] - self.window)
        index = position.clamp(0, key_length - 1).flatten(1)[:, None, :, None]
        rows = [tensor.gather(2, index.expand(*tensor.shape[:2], -1, tensor.shape[-1])) for tensor in tensors]
        if self.documents.shape[1] > 1:
            rows = [tensor.unflatten(2, position.shape[1:]) for tensor in rows]
        return is_outside[:, None], *rows

    def _position(self) -> torch.Tensor:
        """That of each query."""
        return torch.arange(self.num_tokens - self.starts.shape[1], self.num_tokens, device=self.starts.device)

    def _first_visible(self) -> torch.Tensor:
        """The first key that each query sees: of its document, or of the layer's sliding window."""
        if self.window is None:
            return self.documents
        return torch.maximum(self.documents, self._position() - self.window + 1)


#: The fields in the form that [`torch.library.custom_op`] wants.
LOCAL_SET_SCHEMA = (
    "Tensor starts, Tensor documents, SymInt num_tokens, SymInt max_length, SymInt num_sinks, SymInt? window, "
    "Tensor? sink_keys, Tensor? sink_values"
)
