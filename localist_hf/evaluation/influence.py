"""What a prediction rests on: what changes in it when parts of the text before it are replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling import Rule
from ..modeling.block_partition import document_starts
from ..modeling.locality_request import LocalityRequest
from .check_model import check_model, check_own_places, core_model, num_positions
from .divergence import divergence_bits
from .knock_out import knock_out
from .measure import last_block_starts
from .progress import progress


@dataclass(frozen=True, eq=False)
class Influence:
    """
    What [`measure_influence`] found. All tensors are on the CPU.

    Args:
        units (`list[tuple[int, int]]`):
            The stretches of the text that were replaced, each from a position to the one before another.
        positions (`list[int]`):
            The positions whose predictions were looked at, of the next token each.
        values (`torch.FloatTensor` of shape `(num_units, num_positions)`):
            In bits, the Kullback-Leibler divergence from the prediction with the unit to that without it, over the
            whole vocabulary, by erasure the mean over the draws; 0 where the unit begins after the position.
    """

    units: list[tuple[int, int]]
    positions: list[int]
    values: torch.Tensor


@torch.no_grad()
def measure_influence(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    units: str | Sequence[tuple[int, int]] = "block",
    positions: Sequence[int] | None = None,
    num_draws: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    locality_dial: float | None = None,
    min_fidelity: float | None = None,
    rules: Sequence[Rule] | None = None,
    anchors: Mapping[str, Any] | None = None,
    method: str = "erasure",
    block_starts: torch.Tensor | None = None,
) -> Influence:
    """
    Measures what each prediction of a text rests on: what changes in it when a unit of the text before goes, the blocks
    of the text kept as they were ([definition](../method.md#influence)). By `"erasure"` the tokens of the unit are
    replaced by others that are drawn from the same text: `num_draws` passes over the text for each unit, and one more.
    By `"knock_out"` the attention of all later tokens to it is cut in every layer, without giving its share to the
    rest: one pass for each unit, over what comes after it. Erasure takes the unit out of the text, knock-out out of the
    attention: what the model expects without having looked stays.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model; it is set to evaluation mode.
        input_ids (`torch.LongTensor` of shape `(length,)`):
            The text.
        units (`str` or `Sequence[tuple[int, int]]`, *optional*, defaults to `"block"`):
            What to replace, one after another: each `"token"`, each `"block"` of the model's last layer, or stretches
            of the text, each from a position to the one before another.
        positions (`Sequence[int]`, *optional*):
            The positions whose predictions are looked at; by default all.
        num_draws (`int`, *optional*, defaults to 4):
            How many times each unit is replaced, by other tokens each time.
        batch_size (`int`, *optional*, defaults to 8):
            Texts at a time.
        seed (`int`, *optional*, defaults to 0):
            Of the draws, which are the same for every model.
        locality_dial (`float`, *optional*), min_fidelity (`float`, *optional*), rules (`Sequence[Rule]`, *optional*), \
        anchors (`Mapping[str, ...]`, *optional*):
            As for the model's `forward`, in place of what is set.
        method (`str`, *optional*, defaults to `"erasure"`):
            `"erasure"`, or `"knock_out"`, which draws nothing and has no use for `num_draws` and `seed`.
        block_starts (`torch.LongTensor` of shape `(length,)`, *optional*):
            Position at which each token's block starts, in every layer; by default as the last one has them. Rules take
            their place in passes.

    Returns:
        [`Influence`]

    Raises:
        ValueError: for a model of another class, a text that is too long, or for erasure of fewer than two different
            tokens, units and positions that are not there, and starts that are none of the text.

    Example:

    ```python
    >>> influence = measure_influence(model, inputs["input_ids"][0], units="block", positions=[15])
    >>> influence.units[influence.values[:, 0].argmax()]  # the block that the next word rests on most
    (12, 31)
    ```
    """
    check_model("model", model)
    if method not in ("erasure", "knock_out"):
        raise ValueError(f"`method` is {method!r}; it must be 'erasure' or 'knock_out'.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 1 or input_ids.is_floating_point():
        raise ValueError("`input_ids` must be a tensor of token ids of the shape (length,): one text.")
    for name, value in (("num_draws", num_draws), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number above 0.")
    check_own_places("model", model)
    length, core = len(input_ids), core_model(model.eval())
    if not length:
        raise ValueError("`input_ids` is empty; there is no prediction to look at.")
    if method == "erasure" and len(input_ids.unique()) < 2:
        raise ValueError("`input_ids` has fewer than two different tokens; there is nothing to replace one by.")
    limit = num_positions(core.config)
    if limit is not None and length > limit:
        raise ValueError(f"`input_ids` has {length} tokens; the model has positions for {limit}.")
    if positions is not None and not isinstance(positions, Sequence):
        raise ValueError(f"`positions` is {positions!r}; it must be a list of positions of the text.")
    positions = list(range(length)) if positions is None else list(positions)
    if not positions:
        raise ValueError("`positions` is empty; there is no prediction to look at.")
    for place in positions:
        if type(place) is not int or not 0 <= place < length:
            raise ValueError(f"`positions` holds {place!r}; positions of this text are 0 to {length - 1}.")
    _check_units(units, length)
    if rules is None and anchors is not None:
        raise ValueError("`anchors` are given without `rules`, which would name them.")
    if block_starts is not None:
        _check_starts(block_starts, length)
    tokens = input_ids[None].to(core.device)
    dials = {"locality_dial": locality_dial, "min_fidelity": min_fidelity}
    dial = dials | {"use_cache": False}
    told = {} if rules is None else {"rules": rules, "anchors": anchors}
    if block_starts is None:
        starts = last_block_starts(core.base_model, {"input_ids": tokens}, **dials)
    else:
        starts = block_starts[None].to(core.device)
    stretches = _stretches(units, starts[0].tolist(), length)
    if method == "knock_out":
        told = told or {"block_starts": starts}
        values = knock_out(model, tokens, stretches, positions, batch_size, told | dial | {"use_cache": True})
        return Influence(stretches, positions, values.float())
    kept = torch.tensor(positions, device=core.device)
    takes_positions = "logits_to_keep" in core._native_arguments

    def predictions(texts: torch.Tensor) -> torch.Tensor:
        of_texts = told or {"block_starts": starts.expand(len(texts), -1)}
        if takes_positions:
            return model(texts, **of_texts, **dial, logits_to_keep=kept).logits
        return model(texts, **of_texts, **dial).logits[:, kept]

    number = torch.arange(len(stretches)).repeat_interleave(num_draws)
    batch_size = min(batch_size, len(number))
    # In batches of one size, and row by row: what nothing has changed is then the same to the last bit.
    before = predictions(tokens.expand(batch_size, -1))
    values = torch.zeros(len(stretches), len(positions), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for rows in progress(torch.arange(len(number)).split(batch_size), "Replacing"):
        texts = replaced(input_ids.cpu(), [stretches[at] for at in number[rows]], generator)
        rest = input_ids.cpu().expand(batch_size - len(texts), -1)
        after = predictions(torch.cat((texts, rest)).to(core.device))
        for place, row in enumerate(rows.tolist()):
            is_later = torch.tensor([at >= stretches[number[row]][0] for at in positions])
            changed = divergence_bits(before[place, is_later], after[place, is_later]).cpu().double().clamp(min=0)
            values[number[row], is_later] += changed / num_draws
    return Influence(stretches, positions, values.float())


def _check_units(units: str | Sequence[tuple[int, int]], length: int) -> None:
    """Refuses what are no stretches of the text."""
    if isinstance(units, str) and units in ("token", "block"):
        return
    if isinstance(units, str) or not isinstance(units, Sequence) or not units:
        raise ValueError(f"`units` is {units!r}; it must be 'token', 'block' or stretches of the text.")
    for unit in units:
        is_stretch = isinstance(unit, tuple) and len(unit) == 2 and all(type(end) is int for end in unit)
        if not is_stretch or not 0 <= unit[0] < unit[1] <= length:
            raise ValueError(
                f"`units` holds {unit!r}; a stretch of this text is (first, end), with end up to {length}."
            )


def _check_starts(block_starts: torch.Tensor, length: int) -> None:
    """Refuses what is no partition of the text, at any dial: a call in which none is on does not look at it."""
    if not isinstance(block_starts, torch.Tensor):
        raise ValueError(f"`block_starts` is a {type(block_starts).__name__}; it must be a tensor of positions.")
    if block_starts.shape != (length,):
        raise ValueError(f"`block_starts` has the shape {tuple(block_starts.shape)}; the text has {length} tokens.")
    given = LocalityRequest(block_starts=block_starts[None].cpu())
    given.given_blocks(document_starts(1, length), num_previous_blocks=0, query_length=length, cache=None)


def _stretches(units: str | Sequence[tuple[int, int]], starts: list[int], length: int) -> list[tuple[int, int]]:
    """The stretches that are replaced, in the order of the text."""
    if units == "token":
        return [(place, place + 1) for place in range(length)]
    if units == "block":
        edges = [place for place in range(length) if starts[place] == place]
        return list(zip(edges, [*edges[1:], length], strict=True))
    return list(units)


def replaced(input_ids: torch.Tensor, stretches: list[tuple[int, int]], generator: torch.Generator) -> torch.Tensor:
    """The text with each stretch replaced by other tokens of it, `(num_stretches, length)`."""
    texts = input_ids.repeat(len(stretches), 1)
    for row, (first, end) in enumerate(stretches):
        former, drawn = input_ids[first:end], input_ids[first:end].clone()
        while (is_same := drawn == former).any():  # a token is not replaced by itself
            others = torch.randint(len(input_ids), (int(is_same.sum()),), generator=generator)
            drawn[is_same] = input_ids[others]
        texts[row, first:end] = drawn
    return texts
