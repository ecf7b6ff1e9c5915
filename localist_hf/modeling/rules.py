# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""Rules that name what queries are to look at, and the same said by the data, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .pointer_set import PointerSet


#: Some tokens of a text: the name of an anchor, a position, a stretch from a position to the one before another
#: (`None`: to the end, however long the text grows), a mask `(batch_size, num_tokens)`, or a list of such.
Part = str | int | tuple[int, int | None] | torch.Tensor | list
#: What names parts of a text, by name; where rows differ, one for each row.
Anchors = Mapping[str, Part] | Sequence[Mapping[str, Part]]

_PART = (
    "it must be the name of an anchor, a position (a whole number, 0 or more), a stretch (first, end) with first < end "
    "or an end of None, a mask of bools of the shape (batch_size, num_tokens), or a list of these"
)
#: No position is further on.
_FURTHEST = 2**62
_MOST_RULES = 62  # which of them name a query is said by the bits of one number


@dataclass(frozen=True, eq=False)
class Rule:
    """
    What some tokens are to look at: under the dial, layers turn down what is neither a target, the token itself nor an
    attention sink, as far as their lambda says. Positions count from the first token of each row's text, padding left
    out, and those of tokens that are still to come count too.

    Args:
        queries (`str`, `int`, `tuple[int, int | None]`, `torch.BoolTensor` of shape `(batch_size, num_tokens)`, or a \
        list of these):
            The tokens that look: the name of an anchor, a position, a stretch from a position to the one before
            another (`None`: however long the text grows), a mask, or several of these. A stretch is a tuple: a list of
            two numbers, as JSON has them, is two tokens.
        targets (as `queries`):
            The tokens that they may look at, as far as they stand before them.

    Raises:
        ValueError: for what is none of these.

    Example:

    ```python
    >>> anchors = {"source 1": (0, 80), "source 2": (80, 190), "question": (190, 210), "answer": (210, None)}
    >>> rules = [Rule("answer", ["source 2", "question", "answer"])]
    >>> model.generate(**inputs, rules=rules, anchors=anchors, locality_dial=1.0)
    ```
    """

    queries: Part
    targets: Part

    def __post_init__(self) -> None:
        for name in ("queries", "targets"):
            _check_part(f"`{name}` of a rule", getattr(self, name), may_be_name=True)


def check_rules(rules: Sequence[Rule], anchors: Anchors | None) -> None:
    """
    Raises:
        ValueError: for what is no rule, no anchors, and anchors that are not there.
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence) or not 1 <= len(rules) <= _MOST_RULES:
        given = f"a list of {len(rules)}" if isinstance(rules, list) else f"a {type(rules).__name__}"
        raise ValueError(f"`rules` is {given}; it must be a list of 1 to {_MOST_RULES} rules.")
    for number, rule in enumerate(rules):
        # A rule of another copy of this code is told by its name.
        if Rule.__name__ not in {cls.__name__ for cls in type(rule).__mro__}:
            raise ValueError(f"`rules[{number}]` is {rule!r}; it must be a `Rule`.")
    for row, names in enumerate(_anchors_of_rows(anchors)):
        for name, part in names.items():
            _check_part(f"The anchor {name!r}", part, may_be_name=False)
        for number, rule in enumerate(rules):
            for part in (*_names(rule.queries), *_names(rule.targets)):
                if part not in names:
                    known = ", ".join(map(repr, names)) or "none"
                    raise ValueError(
                        f"`rules[{number}]` names the anchor {part!r}; the `anchors` of row {row} are {known}."
                    )


def repeated(rules: Sequence[Rule], anchors: Anchors | None, repeats: int) -> tuple[Sequence[Rule], Anchors | None]:
    """The same for rows that are repeated, as for beams and samples."""

    def of_rows(part: Part) -> Part:
        if isinstance(part, list):
            return [of_rows(each) for each in part]
        return part.repeat_interleave(repeats, dim=0) if isinstance(part, torch.Tensor) else part

    is_one = isinstance(anchors, Mapping | None)
    rows = [{name: of_rows(part) for name, part in row.items()} for row in _anchors_of_rows(anchors)]
    rows = rows[0] if is_one else [row for row in rows for _ in range(repeats)]
    return [Rule(of_rows(rule.queries), of_rows(rule.targets)) for rule in rules], rows


def pointers_of_rules(
    rules: Sequence[Rule],
    anchors: Anchors | None,
    documents: torch.Tensor,
    query_length: int,
    windows: Mapping[int, int],
) -> PointerSet:
    """
    What rules tell the last queries of a text to look at; where several name a query, the targets of all.

    Args:
        rules (`Sequence[Rule]`), anchors (`Mapping` or `Sequence[Mapping]`, *optional*):
            The rules, and what names parts of the text.
        documents (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            First position of each token's text, -1 on padding.
        query_length (`int`):
            Number of queries.
        windows (`Mapping[int, int]`):
            The sliding windows of local layers, each with one such layer.

    Raises:
        ValueError: as [`check_rules`], for masks of another shape, and for a rule whose targets one of its queries
            cannot see.
    """
    check_rules(rules, anchors)
    of_rows = _anchors_of_rows(anchors)
    if not isinstance(anchors, Mapping | None) and len(of_rows) != len(documents):
        raise ValueError(f"`anchors` is a list of {len(of_rows)}; the batch has {len(documents)} rows.")
    queries, targets = (
        torch.stack([_mask(f"rules[{at}]", getattr(rule, name), of_rows, documents) for at, rule in enumerate(rules)])
        for name in ("queries", "targets")
    )  # (num_rules, batch_size, num_tokens)
    position = torch.arange(documents.shape[1], device=documents.device)
    queries[..., : documents.shape[1] - query_length] = False
    # The last target up to each token.
    last = torch.where(targets, position, -1).cummax(-1).values
    for window, layer in ((None, None), *windows.items()):
        first = documents if window is None else torch.maximum(documents, position - window + 1)
        sees_none = queries & (last < first)
        if sees_none.any():
            number, row, at = sees_none.nonzero()[0].tolist()
            rule = rules[number]
            why = (
                "before which none of the targets stands."
                if window is None
                else f"from which the sliding window of layer {layer}, {window} keys, hides all targets; choose a "
                "schedule in which layers with such windows are not local."
            )
            raise ValueError(
                f"`rules[{number}]` ({_shown(rule.queries)} to look at {_shown(rule.targets)}) names the token at "
                f"position {at - int(documents[row, at])} of row {row}, {why}"
            )
    bits = 2 ** torch.arange(len(rules), device=documents.device)
    code = (queries[..., -query_length:] * bits[:, None, None]).sum(0)
    return _pointer_set(code - 1, lambda told: targets[((told + 1) & bits) > 0].any(0), documents)


def pointers_of_blocks(
    pointer_blocks: torch.Tensor,
    block_starts: torch.Tensor,
    documents: torch.Tensor,
    query_length: int,
    windows: Mapping[int, int],
) -> PointerSet:
    """
    What the data tells the last queries of a text to look at: for each token the number of a block, or -1.

    Args:
        pointer_blocks (`torch.LongTensor` of shape `(batch_size, num_tokens)`), block_starts (`torch.LongTensor` of \
        the same shape), documents (`torch.LongTensor` of the same shape):
            The blocks to look at, numbered from 0 in each row; where each token's block starts; and the first position
            of each token's text.
        query_length (`int`), windows (`Mapping[int, int]`):
            As for [`pointers_of_rules`].

    Raises:
        ValueError: for pointers of another shape or dtype, and to a block that a token cannot see.
    """
    if not isinstance(pointer_blocks, torch.Tensor) or pointer_blocks.is_floating_point():
        raise ValueError(f"`pointer_blocks` is {_shown(pointer_blocks)}; it must be a tensor of whole numbers.")
    if pointer_blocks.shape != documents.shape:
        raise ValueError(
            f"`pointer_blocks` has the shape {tuple(pointer_blocks.shape)}; it must be {tuple(documents.shape)}: one "
            "entry for each token, those in the cache included."
        )
    pointers = pointer_blocks.to(documents.device)
    position = torch.arange(documents.shape[1], device=documents.device)
    starts = block_starts.to(documents.device)
    block = torch.where(documents < 0, -2, (starts == position).cumsum(1) - 1)
    first = torch.where(documents < 0, 0, torch.gather(block, 1, documents.clamp(min=0)))  # of each token's text
    wrong = (pointers != -1) & ((pointers < first) | (pointers > block))
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        if block[row, at] < 0:
            raise ValueError(f"`pointer_blocks[{row}, {at}]` is {pointers[row, at]}; on padding it must be -1.")
        raise ValueError(
            f"`pointer_blocks[{row}, {at}]` is {pointers[row, at]}; it must be -1, or the number of a block that the "
            f"token can see: {first[row, at]} to {block[row, at]}."
        )
    found = _pointer_set(pointers[:, -query_length:], lambda told: block == told, documents)
    for window, layer in windows.items():
        if (sees_none := found._replace(window=window).sees_none()).any():
            row, at = sees_none.nonzero()[0].tolist()
            raise ValueError(
                f"`pointer_blocks` tells token {documents.shape[1] - query_length + at} of row {row} to look at a "
                f"block that the sliding window of layer {layer}, {window} keys, hides from it; choose a schedule in "
                "which layers with such windows are not local."
            )
    return found


def _pointer_set(
    told: torch.Tensor, targets: Callable[[torch.Tensor], torch.Tensor], documents: torch.Tensor
) -> PointerSet:
    """Of what each query is told, a number or -1, and the targets that a number stands for."""
    found, of_query = told.unique(return_inverse=True)
    is_told = found >= 0
    sets = [targets(each) for each in found[is_told]] or [torch.zeros_like(documents, dtype=torch.bool)]
    number = torch.where(is_told, is_told.cumsum(0) - 1, -1)
    return PointerSet(torch.stack(sets, dim=1), number[of_query], documents)


def _check_part(name: str, part: Part, may_be_name: bool) -> None:
    if isinstance(part, list):
        if not part:
            raise ValueError(f"{name} is an empty list; {_PART}.")
        for each in part:
            _check_part(name, each, may_be_name)
        return
    is_position = type(part) is int and 0 <= part < _FURTHEST
    is_stretch = (
        isinstance(part, tuple)
        and len(part) == 2
        and type(part[0]) is int
        and (part[1] is None or type(part[1]) is int)
        and part[0] >= 0
        and part[0] < (_FURTHEST if part[1] is None else part[1]) <= _FURTHEST
    )
    is_mask = isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.dim() == 2
    if not (is_position or is_stretch or is_mask or (may_be_name and isinstance(part, str))):
        raise ValueError(f"{name} is {_shown(part)}; {_PART}.")


def _anchors_of_rows(anchors: Anchors | None) -> list[Mapping[str, Part]]:
    """Those of each row, or one for all."""
    of_rows = [{}] if anchors is None else [anchors] if isinstance(anchors, Mapping) else anchors
    is_list = isinstance(of_rows, Sequence) and not isinstance(of_rows, str) and len(of_rows)
    if not is_list or not all(isinstance(row, Mapping) for row in of_rows):
        raise ValueError(f"`anchors` is {anchors!r}; it must map names to parts of the text, or be a list of such.")
    return list(of_rows)


def _names(part: Part) -> list[str]:
    """The anchors that a part names."""
    if isinstance(part, list):
        return [name for each in part for name in _names(each)]
    return [part] if isinstance(part, str) else []


def _mask(rule: str, part: Part, anchors: Sequence[Mapping[str, Part]], documents: torch.Tensor) -> torch.Tensor:
    """Where tokens belong to a part: `(batch_size, num_tokens)`, False on padding."""
    is_token = documents >= 0
    if isinstance(part, list):
        return torch.stack([_mask(rule, each, anchors, documents) for each in part]).any(0)
    if isinstance(part, str):
        masks = [_mask(rule, names[part], anchors, documents) for names in anchors]
        return masks[0] if len(masks) == 1 else torch.stack([mask[row] for row, mask in enumerate(masks)])
    if isinstance(part, torch.Tensor):
        batch_size, length = documents.shape
        if len(part) != batch_size or part.shape[1] > length:
            raise ValueError(
                f"`{rule}` has a mask of the shape {tuple(part.shape)}; it must be ({batch_size}, {length}) at most: "
                "one entry for each token of the text so far."
            )
        padded = torch.zeros_like(is_token)
        padded[:, : part.shape[1]] = part.to(documents.device)
        return padded & is_token
    first, end = (part, part + 1) if isinstance(part, int) else part
    position = torch.arange(documents.shape[1], device=documents.device) - documents
    return is_token & (position >= first) & (position < (_FURTHEST if end is None else end))


def _shown(part: object) -> str:
    return f"a {type(part).__name__} of the shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else repr(part)
