"""What a prediction rests on: what changes in it when the attention to parts of the text before it is cut."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..modeling.local_cache import whole_cache
from .check_model import core_model
from .divergence import divergence_bits
from .progress import progress


def knock_out(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    stretches: Sequence[tuple[int, int]],
    positions: Sequence[int],
    batch_size: int,
    told: Mapping[str, Any],
) -> torch.Tensor:
    """
    As [`measure_influence`], by cutting, in every layer and head, the attention of all later tokens to a stretch; of a
    position within the stretch, its own attention to what stands before it there. The other weights stay as they are:
    made to sum to 1 again they would take over what is cut, and hide what it was worth. So the stretch keeps its keys
    and has values of 0.

    Args:
        tokens (`torch.LongTensor` of shape `(1, length)`):
            The text, on the model's device.
        told (`Mapping[str, Any]`):
            What else the model is told of the text, the same in every pass.

    Returns:
        `torch.DoubleTensor` of shape `(num_stretches, num_positions)`: in bits.
    """
    core = core_model(model)
    kept_logits = "logits_to_keep" in core._native_arguments
    # From where on the attention is cut: by unit, the places at which its last cut token would be followed.
    cuts: dict[int, dict[int, list[int]]] = {}
    for unit, (first, end) in enumerate(stretches):
        for at, place in enumerate(positions):
            if place > first:
                cuts.setdefault(min(place, end), {}).setdefault(unit, []).append(at)
    values = torch.zeros(len(stretches), len(positions), dtype=torch.float64)
    cache, filled = whole_cache(core.config), 0
    for cut in progress(sorted(cuts), "Cutting"):
        _pass(model, tokens[:, filled:cut], cache, cut, told)
        filled = cut
        for some in _chunks(list(cuts[cut]), batch_size):
            places = sorted({positions[at] for unit in some for at in cuts[cut][unit]})
            without = copy.deepcopy(cache)
            without.batch_repeat_interleave(len(some) + 1)  # the first row stays whole
            firsts = [stretches[unit][0] for unit in some]

            # Where attention is handed its values: a cache may hold what they are made of.
            def empty(
                module: Any, query: Any, key: Any, value: torch.Tensor, *_: Any, firsts=firsts, cut=cut, **__: Any
            ):
                for row, first in enumerate(firsts, 1):
                    value[row, :, first:cut] = 0

            rest = tokens[:, cut : places[-1] + 1].expand(len(some) + 1, -1)
            kept = torch.tensor([place - cut for place in places], device=tokens.device)
            of_logits = {"logits_to_keep": kept} if kept_logits else {}
            logits = _pass(model, rest, without, places[-1] + 1, told, observer=empty, **of_logits)
            logits = logits if kept_logits else logits[:, kept]
            changed = divergence_bits(logits[:1].expand(len(some), -1, -1), logits[1:]).cpu().double().clamp(min=0)
            for row, unit in enumerate(some):
                for at in cuts[cut][unit]:
                    values[unit, at] = changed[row, places.index(positions[at])]
    return values


def _pass(
    model: PreTrainedModel, tokens: torch.Tensor, cache: DynamicCache, end: int, told: Mapping[str, Any], **others: Any
) -> torch.Tensor:
    """The logits of the next tokens of a text, up to `end` of it."""
    starts = told.get("block_starts")
    of_text = {} if starts is None else {"block_starts": starts[:, :end].expand(len(tokens), -1)}
    return model(tokens, past_key_values=cache, **{**told, **of_text, **others}).logits


def _chunks(units: list[int], size: int) -> list[list[int]]:
    return [units[at : at + size] for at in range(0, len(units), size)]
