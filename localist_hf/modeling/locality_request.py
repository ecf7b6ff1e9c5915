# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""A call's arguments, as far as locality is concerned, and every refusal of what cannot be met."""

import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_greater_or_equal

from .block_partition import Blocks, with_previous_blocks
from .block_search import TokenBlocks
from .local_cache import LocalCacheLayer
from .locality_dial import check_share
from .opaque_ops import warn_once
from .pointer_set import PointerSet
from .rules import Anchors, Rule, check_rules, pointers_of_blocks, pointers_of_rules


logger = logging.get_logger(__name__)

# This folder may be loaded several times, once for each model from the Hub: each copy has attention of its own.
_COPY = re.sub(r"\W", "_", __package__, flags=re.ASCII)
#: The attention implementations that come here, by the one that a model has without them. For callers their name is
#: `"localist"`.
LOCALIST_ATTENTION = {"sdpa": f"localist_{_COPY}", "eager": f"localist_eager_{_COPY}"}

#: What the native models call their key-value cache: from transformers 5.24 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")

# Torch 2.11 compiles gradients through our attention that are wrong.
_COMPILES_GRADIENTS = is_torch_greater_or_equal("2.12")
_PACKED_AND_CACHED = (
    "`position_ids` start anew, which marks packed documents; transformers keeps them apart only where there is no "
    "cache. Pass `use_cache=False`, or, where a row is one text, an `attention_mask`."
)


@dataclass(frozen=True)
class LocalityRequest:
    r"""
    The arguments that localist models add to those of the native ones.

    Args:
        output_fidelity (`bool` or `Sequence[int]`, *optional*):
            Measure the fidelity and the attention shares of every layer, or of these layers only. Without it no
            block is computed and the model is the native one. The `attention_mask` must then have padding at its
            ends only. Without a mask and a cache, `position_ids` that start anew mark packed documents, which then
            attend and are measured as if each stood alone (plain models separate them only with
            `use_cache=False`); architectures that do not separate them, such as OPT and gpt-oss, are refused.
        output_entropy (`bool`, *optional*, defaults to `False`):
            Measure the entropy of the same layers too.
        output_block_choice (`bool`, *optional*, defaults to `False`):
            Measure how many blocks of the text each query of these layers looks at, and the largest share of its
            attention to other words that goes to one of them: one or more passes of the attention for each layer, and
            no more memory than its output.
        output_block_shares (`bool`, *optional*, defaults to `False`):
            Measure the attention of each query of these layers to every block of the text:
            `batch_size * num_heads * sequence_length * num_blocks` numbers for each layer.
        block_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            The position at which each token's block starts, in place of the partition of the configuration, for
            all layers. With a filled cache it covers the cached tokens too.
        local_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            In place of blocks, for measuring what is no partition, such as the last n keys: the first key of the
            stretch that is local to each token. The whole stretch then counts as its block.
        rules (`list[Rule]`, *optional*):
            What some tokens are to look at. Their targets then take the place of a block: in the shares and the
            fidelity that are measured, and under the dial and the guarantee. Tokens that no rule names look where they
            like, and are not counted.
        anchors (`dict[str, ...]`, or a list of one for each row, *optional*):
            Names for parts of the text, by which `rules` may call them: `{"source 1": (12, 80)}`.
        pointer_blocks (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            As `rules`, by the data: for each token the number of the block that it is to look at, from 0 in each row,
            or -1. Needs `block_starts`, which say what the blocks are.
        locality_dial (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*), min_fidelity (`float`, \
        *optional*):
            The dial and the guarantee of the configuration, for this call in place of what is set. A tensor has a dial
            for each row, where there is no cache.
    """

    output_fidelity: bool | Sequence[int] | None = None
    output_entropy: bool = False
    output_block_choice: bool = False
    output_block_shares: bool = False
    block_starts: torch.LongTensor | None = None
    local_starts: torch.LongTensor | None = None
    rules: Sequence[Rule] | None = None
    anchors: Anchors | None = None
    pointer_blocks: torch.LongTensor | None = None
    locality_dial: float | torch.Tensor | None = None
    min_fidelity: float | None = None

    @property
    def needs_members(self) -> bool:
        """`bool`: whether the block of every token must be known, those in a cache too."""
        return self.output_block_choice or self.output_block_shares

    def measured_layers(self, num_layers: int) -> frozenset[int]:
        """
        The layers that are to be measured, of a model with so many.

        Raises:
            ValueError: for what names no layers of it.
        """
        layers = self.output_fidelity
        if layers is None or layers is False:
            for name in ("output_entropy", "output_block_choice", "output_block_shares"):
                if getattr(self, name):
                    raise ValueError(f"`{name}=True` needs `output_fidelity`, which says for which layers.")
            return frozenset()
        if layers is True:
            return frozenset(range(num_layers))
        if not isinstance(layers, Collection):
            raise ValueError(f"`output_fidelity` is {layers}; it must be a bool or a list of layers.")
        if not all(isinstance(layer, numbers.Integral) and 0 <= layer < num_layers for layer in layers):
            raise ValueError(f"`output_fidelity` asks for layers {list(layers)}; the model has 0 to {num_layers - 1}.")
        return frozenset(map(int, layers))

    def check_unused(self) -> None:
        """
        Of a call in which nothing is measured and no dial is on.

        Raises:
            ValueError: for rules that are none, and names that are not there.
        """
        if self.rules is not None:
            check_rules(self.rules, self.anchors)
        if self.rules is not None or self.pointer_blocks is not None:
            warn_once(
                logger,
                f"`{'pointer_blocks' if self.rules is None else 'rules'}` are given, and change nothing: "
                "`locality_dial` and `min_fidelity` are 0, or no layer is local, and nothing is measured.",
            )

    def pointers(
        self, documents: torch.Tensor, is_packed: bool, query_length: int, windows: Mapping[int, int]
    ) -> PointerSet | None:
        """
        What the queries of a text with these documents are told to look at, where local layers have these sliding
        windows, each with one such layer; `None` where nothing is told.

        Raises:
            ValueError: for what cannot be told, or not together.
        """
        if self.rules is None and self.pointer_blocks is None:
            if self.anchors is not None:
                raise ValueError("`anchors` are given without `rules`, which would name them.")
            return None
        name = "pointer_blocks" if self.rules is None else "rules"
        others = ("pointer_blocks", "local_starts", "output_block_choice", "output_block_shares")
        for other in others:
            value = getattr(self, other)
            if other != name and value is not None and value is not False:
                raise ValueError(f"`{name}` and `{other}` are both given; only one can say what is local.")
        if torch.compiler.is_compiling():
            _refuse_compiled(f"`{name}` is given, whose values no compiled graph reads; call the model as it is.")
        if self.rules is not None:
            if is_packed:
                raise ValueError("`rules` are given for packed documents, whose positions begin anew; pass one a row.")
            return pointers_of_rules(self.rules, self.anchors, documents, query_length, windows)
        if self.block_starts is None:
            raise ValueError("`pointer_blocks` needs `block_starts`, which say what the blocks are.")
        return pointers_of_blocks(self.pointer_blocks, self.block_starts, documents, query_length, windows)

    def given_blocks(
        self, documents: torch.Tensor, num_previous_blocks: int, query_length: int, cache: DynamicCache | None
    ) -> TokenBlocks | None:
        """
        The blocks that the caller gives for a text with these documents; `None` where none are given.

        Raises:
            ValueError: for starts that are none of this text, or need keys that a cache has dropped.
        """
        if self.local_starts is not None:
            if self.needs_members:
                raise ValueError(
                    "`local_starts` is given with `output_block_choice` or `output_block_shares`; the last n keys are "
                    "no blocks of a text. Pass `block_starts`."
                )
            if self.block_starts is not None:
                raise ValueError("`block_starts` and `local_starts` are both given; only one can tell.")
            starts = _given_starts("local_starts", self.local_starts, documents)
            _check_local_starts(starts, documents)
            starts = torch.where(documents < 0, -1, starts)
            name, blocks = "local_starts", Blocks(starts, starts)
        elif self.block_starts is not None:
            starts = _given_starts("block_starts", self.block_starts, documents)
            _check_block_starts(starts, documents)
            starts = torch.where(documents < 0, -1, starts)
            name, blocks = "block_starts", with_previous_blocks(starts, documents, num_previous_blocks)
        else:
            return None
        return TokenBlocks(blocks, max_length=_check_local_length(name, blocks, query_length, cache))


#: The names of these arguments.
REQUEST_ARGUMENTS = tuple(field.name for field in fields(LocalityRequest))


class NativeInputs(NamedTuple):
    """
    The arguments of the native model's `forward` that say what can be measured.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, query_length)`, *optional*), inputs_embeds \
        (`torch.Tensor` of shape `(batch_size, query_length, hidden_size)`, *optional*), attention_mask \
        (`torch.Tensor`, *optional*), position_ids (`torch.LongTensor`, *optional*), use_cache (`bool`, *optional*), \
        is_causal (`bool`, *optional*):
            As the native model takes them.
        cache ([`~transformers.Cache`], *optional*):
            The key-value cache, whatever the native model calls it.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    use_cache: bool | None = None
    is_causal: bool | None = None
    cache: Cache | None = None

    @property
    def tokens(self) -> torch.Tensor | None:
        """The tokens or their embeddings, `(batch_size, query_length, ...)`."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    def check(self, config: PreTrainedConfig) -> torch.Tensor | None:
        """
        Refuses a call in which locality can be neither measured nor held.

        Args:
            config ([`~transformers.PreTrainedConfig`]):
                The model's.

        Returns:
            `torch.Tensor`, *optional*: the `attention_mask`, where it has padding.

        Raises:
            ValueError: which names the argument.
        """
        tokens, cache = self.tokens, self.cache
        if tokens is None:
            raise ValueError("`input_ids` and `inputs_embeds` are both None; one of them must be given.")
        for name, value in (("is_causal", self.is_causal), ("config.is_causal", getattr(config, "is_causal", None))):
            if value is not None and not value:
                raise ValueError(f"`{name}` is {value}; locality is of attention to the tokens before, and needs True.")
        attention = config._attn_implementation
        if attention not in LOCALIST_ATTENTION.values():
            raise ValueError(
                f"`output_fidelity` and `locality_dial` need the attention implementation 'localist', the model uses "
                f"{attention!r}. Call `model.set_attn_implementation('localist')`."
            )
        if torch.jit.is_tracing():
            raise ValueError(
                "`output_fidelity` and `locality_dial` do not work under `torch.jit.trace`, which would keep the "
                "blocks of the example's length; use `torch.export` or `torch.compile`."
            )
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _COMPILES_GRADIENTS:
            _refuse_compiled(
                f"`output_fidelity` and `locality_dial` have wrong gradients where torch {torch.__version__} compiles "
                "them; it needs 2.12. Train without `torch.compile`, or wrap what needs no gradient in "
                "`torch.no_grad()`."
            )
        if torch.compiler.is_exporting() and isinstance(tokens.shape[1], torch.SymInt):
            raise ValueError(
                "`output_fidelity` and `locality_dial` can be exported for texts of one length only: tiles of the band "
                "depend on it. Leave the length out of `dynamic_shapes`, or export at dial 0."
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            kind = "of fixed size" if getattr(cache, "is_compileable", False) else "of this kind"
            raise ValueError(
                f"`output_fidelity` and `locality_dial` do not work with a cache {kind} ({type(cache).__name__}); use "
                "a `DynamicCache`."
            )
        if tokens.shape[1] == 0:
            raise ValueError("`input_ids` or `inputs_embeds` hold no token; there is nothing to measure or to hold.")
        if self.attention_mask is None:
            return None
        cached = cache.get_seq_length() if cache is not None else 0
        is_whole = check_attention_mask(self.attention_mask, len(tokens), cached + tokens.shape[1])
        return None if is_whole else self.attention_mask

    def packed_positions(self, default: bool) -> torch.Tensor | None:
        """
        The `position_ids` where they mark packed documents. A cache is then refused where it is asked for, and not made
        where nothing is said. As in transformers, packed documents are told apart only where there is no cache.

        Args:
            default (`bool`):
                Whether the model makes a cache where nothing is said.

        Raises:
            ValueError: for packed documents and a cache.
        """
        if self.attention_mask is not None or self.position_ids is None or self.cache is not None:
            return None
        starts_anew = (self.position_ids.diff(dim=-1) != 1).any()
        makes_cache = default if self.use_cache is None else self.use_cache
        if torch.compiler.is_compiling():  # no value can be read: with a cache they are refused, and else looked for
            if makes_cache:
                refuse_where(starts_anew, _PACKED_AND_CACHED)
            return None if makes_cache else self.position_ids
        if starts_anew and self.use_cache:
            raise ValueError(_PACKED_AND_CACHED)
        return self.position_ids if starts_anew else None


def rows_by_dial(dial: torch.Tensor, inputs: NativeInputs) -> dict[float, torch.LongTensor | None]:
    """
    The rows of a batch by their dial, where each has its own; `None` for all rows.

    Raises:
        ValueError: for a tensor of another shape, for a cache, and under `torch.compile`.
    """
    shape = () if inputs.tokens is None else inputs.tokens.shape[:1]
    if dial.shape != shape:
        raise ValueError(
            f"`locality_dial` has the shape {tuple(dial.shape)}; it must be a number, or, of a batch, one for each row "
            f"{tuple(shape)}."
        )
    if torch.compiler.is_compiling():
        _refuse_compiled("`locality_dial` is a tensor, whose values no compiled graph reads; compile with a number.")
    of_rows = [check_share("locality_dial", each) for each in dial.tolist()]
    if len(set(of_rows)) == 1:
        return {of_rows[0]: None}
    if inputs.cache is not None or inputs.use_cache:
        raise ValueError("`locality_dial` differs from row to row, which no cache allows; pass `use_cache=False`.")
    places = {each: [row for row, value in enumerate(of_rows) if value == each] for each in sorted(set(of_rows))}
    return {each: torch.tensor(rows, device=inputs.tokens.device) for each, rows in places.items()}


@torch.compiler.disable  # raised in a graph, it would be traced no further and done again outside
def _refuse_compiled(message: str) -> None:
    raise ValueError(message)


def check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int) -> bool:
    """Refuses what is no mask of such a text, and padding between tokens; True where it is seen that none is there."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch_size, length):
        is_tensor = isinstance(attention_mask, torch.Tensor)
        given = f"has the shape {tuple(attention_mask.shape)}" if is_tensor else f"is a {type(attention_mask).__name__}"
        raise ValueError(
            f"`attention_mask` {given}; to measure locality its shape must be "
            f"{(batch_size, length)}: one entry for each token, those in the cache included."
        )
    if not torch.compiler.is_compiling() and attention_mask.all():
        return True
    is_token = attention_mask.bool()
    stretches = is_token[:, 0] + (is_token[:, 1:] & ~is_token[:, :-1]).sum(1)
    refuse_where(
        stretches.max() > 1,
        "`attention_mask` has padding between tokens; to measure locality it may only stand at the ends.",
    )
    return False


def refuse_where(condition: torch.Tensor, message: str) -> None:
    """
    A `ValueError` where the condition is true. A compiled graph reads no value back: there it is an assertion, by which
    the graph fails with the message (on a GPU as a device-side assertion).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~condition, message)
    elif condition:
        raise ValueError(message)


def _given_starts(name: str, starts: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """The starts that are passed, on the device of the text; an error where they are not of its shape."""
    if not isinstance(starts, torch.Tensor) or starts.is_floating_point():
        kind = starts.dtype if isinstance(starts, torch.Tensor) else f"a {type(starts).__name__}"
        raise ValueError(f"`{name}` is {kind}; it must be a tensor of whole numbers.")
    if starts.shape != documents.shape:
        raise ValueError(
            f"`{name}` has the shape {tuple(starts.shape)}; it must be {tuple(documents.shape)}: one entry for each "
            "token, those in the cache included."
        )
    return starts.to(documents.device)


@torch.compiler.disable  # it reads values back, which is no part of a graph
def _check_block_starts(starts: torch.Tensor, documents: torch.Tensor) -> None:
    """An error where the starts are no partition of the text."""
    position = torch.arange(documents.shape[1], device=documents.device)
    is_token = documents >= 0
    own = starts.gather(1, starts.clamp(0, len(position) - 1))
    falls = F.pad(starts.diff(dim=1) < 0, (1, 0)) & F.pad(documents.diff(dim=1) == 0, (1, 0))
    wrong = is_token & ((starts < documents) | (starts > position) | (own != starts) | falls)
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`block_starts[{row}, {at}]` is {starts[row, at]}; it must lie between the start of the text "
            f"({documents[row, at]}) and the position itself, be the start of its own block, and not go back to an "
            "earlier one."
        )


@torch.compiler.disable
def _check_local_starts(starts: torch.Tensor, documents: torch.Tensor) -> None:
    """An error where a stretch does not lie between the start of the text and its query."""
    position = torch.arange(documents.shape[1], device=documents.device)
    wrong = (documents >= 0) & ((starts < documents) | (starts > position))
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`local_starts[{row}, {at}]` is {starts[row, at]}; it must lie between the start of the text "
            f"({documents[row, at]}) and the position itself."
        )


@torch.compiler.disable
def _check_local_length(name: str, blocks: Blocks, query_length: int, cache: DynamicCache | None) -> int:
    """The longest local stretch of explicit blocks; an error where it needs keys that a cache has dropped."""
    length = blocks.starts.shape[1]
    is_token = blocks.starts >= 0
    # A bounded layer keeps one token less than its window; where that is the native one, there is nothing more to see.
    windows = [
        layer.sliding_window
        for layer in getattr(cache, "layers", ())
        if isinstance(layer, LocalCacheLayer) and layer.sliding_window != layer.native_window
    ]
    dropped = length - query_length - min(windows) + 1 if windows else 0
    if dropped > 0 and (is_token & (blocks.local_starts < dropped))[:, -query_length:].any():
        raise ValueError(
            f"`{name}` has a block longer than those of the configuration, which are all that the cache keeps at "
            "dial 1; pass the whole text with `use_cache=False`."
        )
    position = torch.arange(length, device=is_token.device)
    return int(torch.where(is_token, position - blocks.local_starts, 0).max()) + 1
