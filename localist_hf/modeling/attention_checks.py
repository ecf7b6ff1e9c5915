# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What reaches the attention of a model's layers in one forward pass: all that cannot be trusted is refused by name."""

from collections.abc import Collection
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer

from .locality_request import LOCALIST_ATTENTION, refuse_where


# What a mask adds to the scores of keys that are not seen is below, in any dtype.
_MASKED = -1e4
# How other kinds of attention are told where packed documents start, and what they make of that.
_DOCUMENT_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")
# What may reach an attention beside queries, keys, values and mask. `attend` does what the first three say; the masks
# are those that the next two make; `sliding_window` is compared with the configuration, and starts of documents with
# those of `position_ids`; the others concern no attention.
_KNOWN_ARGUMENTS = frozenset((
    "dropout", "softcap", "s_aux", "position_ids", "is_causal", "sliding_window", *_DOCUMENT_ARGUMENTS, "use_cache",
    "cache_position", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
    "shift_labels",
))  # fmt: skip


class AttentionChecks:
    """
    Takes note of what the layers of one pass hand to their attention.

    Args:
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            First position of each token's document, -1 on padding; those in the cache come first.
        sliding_windows (`list[int | None]`):
            Keys that each layer sees, where that is a sliding window, as the configuration says.
        is_packed (`bool`):
            Whether rows may hold several documents.
        layers (`Collection[int]`):
            The layers that are measured or dialled.
        cache ([`~transformers.Cache`], *optional*):
            The key-value cache.
    """

    def __init__(
        self,
        documents: torch.Tensor,
        sliding_windows: list[int | None],
        is_packed: bool,
        layers: Collection[int],
        cache: Cache | None,
    ) -> None:
        self._documents = documents
        self._sliding_windows = sliding_windows
        self._is_packed = is_packed
        self._layers = layers
        #: The cache, which may be made after this.
        self.cache = cache
        self._needs_grad = torch.is_grad_enabled()
        self._arrived: set[int] = set()
        self._attended: set[int] = set()
        self._is_over = False
        self._masks: list[tuple[torch.Tensor | None, int | None, bool, torch.Tensor | None]] = []

    def arrive(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, **arguments: Any) -> None:
        """
        Takes note of a layer, and refuses what cannot be trusted of what its attention is handed.

        Args:
            module (`nn.Module`):
                The layer's attention module.
            query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of \
            shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
                Its queries and keys.
            arguments:
                What else it is handed.

        Raises:
            ValueError: for a layer that attends twice, keys of other tokens than those of the text and its cache, and
                arguments that are set and change an attention in ways unknown here.
        """
        layer, length, name = module.layer_idx, self._documents.shape[1], type(module).__name__
        # Gradient checkpointing comes here again, after the forward pass.
        if layer in self._arrived and not self._is_over:
            raise ValueError(
                f"{name} attends more than once in layer {layer}; its locality can be neither measured nor held."
            )
        if not self._arrived:
            self._check_documents(arguments)
        self._arrived.add(layer)
        cached = self.cache.layers[layer] if self.cache is not None else None
        is_short = isinstance(cached, DynamicSlidingWindowLayer) and query.shape[2] <= key.shape[2] < length
        if key.shape[2] != length and not is_short:
            raise ValueError(
                f"{name} attends to {key.shape[2]} keys in layer {layer}, where the text and its cache have {length} "
                "tokens; its locality can be neither measured nor held. The model may keep keys elsewhere than in "
                f"the cache, or this version of localist-hf may not know transformers {transformers.__version__}."
            )
        for argument, value in arguments.items():
            if argument not in _KNOWN_ARGUMENTS and value is not None and value is not False:
                raise ValueError(
                    f"`{argument}` reaches the attention of layer {layer} ({name}) and may change it in ways that are "
                    "not known here; its locality can be neither measured nor held."
                )
        for argument in ("softcap", "s_aux"):
            # In this order: a configuration's attributes are slow.
            is_given = arguments.get(argument) is not None
            if is_given and module.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]:
                raise ValueError(
                    f"`{argument}` reaches the attention of layer {layer} ({name}), and `sdpa` does nothing with it; "
                    "its locality can be neither measured nor held. If it is the model's own, load that with "
                    "`attn_implementation='eager'` and localise it then."
                )
        window = arguments.get("sliding_window")
        if window is not None and window != self._sliding_windows[layer]:
            raise ValueError(
                f"{name} has a sliding window of {window} keys in layer {layer}, of which the configuration says "
                f"{self._sliding_windows[layer]}; its locality can be neither measured nor held."
            )

    def _check_documents(self, arguments: dict[str, Any]) -> None:
        """Refuses packed documents that start elsewhere than those of `position_ids`."""
        given = {name: arguments[name] for name in _DOCUMENT_ARGUMENTS[:3] if arguments.get(name) is not None}
        if not given:  # as in every step of a generation
            return
        position = torch.arange(self._documents.shape[1], device=self._documents.device)
        expected = (self._documents == position).flatten()
        for name, value in given.items():
            value = value.to(expected.device)
            if name == "seq_idx":  # the number of each token's document
                starts = F.pad(value.diff(dim=-1) != 0, (1, 0), value=True).flatten()
            else:  # positions in all rows, one after the other, and their end
                starts = torch.zeros(len(expected) + 1, dtype=torch.bool, device=expected.device)
                starts = starts.scatter(0, value.long().flatten(), True)[:-1]
            refuse_where(
                (starts != expected).any(),
                f"`{name}` has documents start elsewhere than `position_ids`, by which they are told apart here.",
            )

    def check_attention(self, layer: int, dropout: float, is_dialled: bool, is_explicit: bool) -> None:
        """
        Takes note that a layer attends here, and refuses dropout and gradient checkpointing that cannot be had.

        Raises:
            ValueError: which names the argument.
        """
        if self._needs_grad and not torch.is_grad_enabled():
            raise ValueError(
                "`use_reentrant` is True; gradient checkpointing of that kind gives the fidelity no gradient. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        if dropout and (is_dialled or is_explicit):
            raise ValueError(
                f"The attention dropout of layer {layer} is {dropout}; "
                f"{'under the dial' if is_dialled else 'where weights are made one by one'} it must be 0. Set it "
                "so in the model's configuration."
            )
        self._attended.add(layer)

    def check_attended(self, model: str, cache: Cache | None) -> None:
        """
        Refuses what cannot be trusted at the end of a forward pass: a model some of whose layers have not come here, or
        that gives back another cache than the one that was prepared.

        Raises:
            ValueError: which names the model and the layers.
        """
        self._is_over = True
        if missing := sorted(self._layers - self._attended):
            raise ValueError(
                f"{model} does not hand its keyword arguments on to the attention of the layers {missing}, or these do "
                "not attend through transformers' attention interface: their locality can be neither measured nor held."
            )
        cache = getattr(cache, "self_attention_cache", cache)
        if self.cache is not None and cache is not None and cache is not self.cache:
            raise ValueError(
                f"{model} has filled another cache than the one that it was given; its locality can be neither "
                "measured nor held."
            )

    def seen_keys(
        self,
        module: nn.Module,
        attention_mask: torch.Tensor | None,
        query_length: int,
        is_causal: bool | None = None,
    ) -> torch.BoolTensor | None:
        """
        What a layer's queries see, from the mask that its attention is handed.

        Args:
            module (`nn.Module`):
                The layer's attention module.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
                True, or 0 where it is added to the scores, where a query sees a key; None is causal.
            query_length (`int`):
                Number of queries.
            is_causal (`bool`, *optional*):
                What the attention is told in place of the module's `is_causal`, which says what no mask means.

        Returns:
            `torch.BoolTensor` of the mask's shape, or None.

        Raises:
            ValueError: where that is not what locality counts on, the earlier keys of a query's document, or those of
                the layer's sliding window: as where a bias is added to the scores.
        """
        window, name = self._sliding_windows[module.layer_idx], type(module).__name__
        # As transformers' own attention functions read it; one query sees what there is either way.
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        is_causal = is_causal or query_length == 1
        for known, *others, visible in self._masks:
            if known is attention_mask and others == [window, is_causal]:
                return visible
        visible = attention_mask
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            visible = attention_mask == 0
            refuse_where(
                ((attention_mask > _MASKED) & ~visible).any(),
                f"{name} adds a bias to its scores; its locality can be neither measured nor held.",
            )
        # What the masks of a text's later tokens say, those of its first have said.
        if query_length == self._documents.shape[1]:
            refuse_where(
                self._differs(module.layer_idx, visible, is_causal),
                f"{name} lets documents that are packed in one row see each other, whatever `position_ids` say; pass "
                "one document in each row."
                if self._is_packed
                else f"{name} does not see the earlier tokens, or those of its sliding window, and nothing else; its "
                "locality can be neither measured nor held.",
            )
        self._masks.append((attention_mask, window, is_causal, visible))
        return visible

    def _differs(self, layer: int, visible: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """Whether queries see other keys than locality counts on, the first tokens' being these."""
        first, window = self._documents, self._sliding_windows[layer]
        if window is not None:
            first = torch.maximum(first, torch.arange(first.shape[1], device=first.device) - window + 1)
        if visible is None:
            sees_others = first > 0 if is_causal else self._documents >= 0
            return (sees_others & (self._documents >= 0)).any()
        position = torch.arange(first.shape[1], device=visible.device)
        first, is_token = first.to(visible.device), (self._documents >= 0).to(visible.device)
        expected = (position >= first[..., None]) & (position <= position[:, None])
        return ((visible[:, 0] != expected) & is_token[..., None]).any()
