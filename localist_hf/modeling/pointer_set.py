# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What is local to queries that are told where to look: by a rule, or by the data."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .local_set import KeyMasks


class PointerSet(NamedTuple):
    """
    The keys that are local to each query of a layer where some are told what to look at: themselves, the attention
    sinks, and their targets, which take the place of a block. To the other queries everything is local.

    Args:
        targets (`torch.BoolTensor` of shape `(batch_size, num_sets, num_tokens)`):
            The tokens of each set of targets; one set at least.
        of_query (`torch.LongTensor` of shape `(batch_size, query_length)`):
            Which set each query is to look at; -1 where it is told nothing.
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            First key of each token's document, -1 on padding.
        num_sinks (`int`, *optional*, defaults to 0):
            Keys at the start of a document that are local to every query of it.
        window (`int`, *optional*):
            Keys that each query sees, where that is a sliding window.
    """

    targets: torch.Tensor
    of_query: torch.Tensor
    documents: torch.Tensor
    num_sinks: int = 0
    window: int | None = None

    #: As a [`LocalSet`] has it: no cache drops keys that a target may be.
    sink_keys = None

    @property
    def num_tokens(self) -> int:
        """`int`: tokens of the row up to the last query."""
        return self.documents.shape[1]

    @property
    def starts(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch_size, query_length)`: the first key of each query's document."""
        return self.documents[:, -self.of_query.shape[1] :]

    def is_named(self) -> torch.Tensor:
        """True where a query is told what to look at, `(batch_size, query_length)`."""
        return self.of_query >= 0

    def is_counted(self) -> torch.Tensor:
        """As of a [`LocalSet`]: True where a query is told what to look at, and sees more than that."""
        targets, sinks, visible = self._num_keys()
        return self.is_named() & (1 + targets + sinks < visible)

    def has_context(self) -> torch.Tensor:
        """True where the targets hold another key than the query's own."""
        return self.is_named() & (self._num_keys()[0] > 0)

    def sees_none(self) -> torch.Tensor:
        """True where a query is told to look at targets none of which it sees, `(batch_size, query_length)`."""
        row = torch.arange(len(self.of_query), device=self.of_query.device)[:, None]
        is_own = self.targets[row, self.of_query.clamp(min=0), self._position()]
        return self.is_named() & ~is_own & (self._num_keys()[0] == 0)

    def sizes(self) -> torch.Tensor:
        """The number of local keys, `(batch_size, query_length)`; on padding it has no meaning."""
        targets, sinks, visible = self._num_keys()
        return torch.where(self.is_named(), 1 + targets + sinks, visible)

    def of_rows(self, rows: torch.Tensor) -> "PointerSet":
        """That of some rows of the batch."""
        tensors = {name: getattr(self, name)[rows] for name in ("targets", "of_query", "documents")}
        return self._replace(**tensors)

    def for_layer(self, num_sinks: int, window: int | None, device: torch.device) -> "PointerSet":
        """That of a layer with so many sinks and this sliding window."""
        tensors = (each.to(device) for each in (self.targets, self.of_query, self.documents))
        return PointerSet(*tensors, num_sinks, window)

    def for_heads(self, groups: int) -> "PointerSet":
        """The same, for the query heads that share keys."""
        return self

    def masks(self, rows: slice | torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None) -> KeyMasks:
        """As of a [`LocalSet`]; what a query sees is told by its document."""
        place = self._position()[rows][:, None]
        first = self._first_visible()[:, rows][..., None]
        visible = (positions[:, None] <= place) & (positions[:, None] >= first) & (self.starts[:, rows][..., None] >= 0)
        is_own = visible & (positions[:, None] == place)
        of_query = self.of_query[:, rows]
        is_named = (of_query >= 0)[..., None]
        row = torch.arange(len(of_query), device=of_query.device)[:, None]
        targets = self.targets[..., -positions.shape[1] :][row, of_query.clamp(min=0)]
        is_target = targets & is_named & visible & ~is_own
        is_sink = positions[:, None] < self.starts[:, rows][..., None] + self.num_sinks
        is_sink = is_sink & visible & ~is_target & ~is_own
        is_local = torch.where(is_named, is_own | is_sink | is_target, visible)
        return KeyMasks(visible, is_local, is_sink, is_own)

    def _position(self) -> torch.Tensor:
        """That of each query."""
        num_tokens = self.documents.shape[1]
        return torch.arange(num_tokens - self.of_query.shape[1], num_tokens, device=self.of_query.device)

    def _first_visible(self) -> torch.Tensor:
        """The first key that each query sees: of its document, or of the layer's sliding window."""
        if self.window is None:
            return self.starts
        return torch.maximum(self.starts, self._position() - self.window + 1)

    def _num_keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many keys each query sees of its targets and of the sinks beside them, without itself, and at all."""
        position, first = self._position(), self._first_visible().clamp(min=0)
        place = torch.arange(self.documents.shape[1], device=self.documents.device)
        is_sink = (self.documents >= 0) & (place < self.documents + self.num_sinks)
        row, number = torch.arange(len(first), device=first.device)[:, None], self.of_query.clamp(min=0)
        found = []
        for keys in (self.targets, ~self.targets & is_sink[:, None]):
            before = F.pad(keys.cumsum(-1), (1, 0))
            found.append(before[row, number, position] - before[row, number, torch.minimum(first, position)])
        return *found, position - first + 1
