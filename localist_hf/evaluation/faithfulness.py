"""Is what a guess puts first what a prediction rests on? Comprehensiveness and sufficiency, between best and worst."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .agreement import check_texts, mean_of_numbers, places_of
from .check_model import core_model
from .divergence import divergence_bits
from .guesses import NEARNESS, RANDOM, attention_guesses, check_captum, gradient_guesses
from .influence import replaced
from .measure import last_block_starts
from .progress import progress


#: The guess that is erasure itself, of one stretch at a time.
_ERASURE = "erasure"
#: The most stretches: what becomes of the prediction without each set of them is measured.
_MOST_STRETCHES = 12


@dataclass(frozen=True)
class Faithfulness:
    """
    What [`measure_faithfulness`] found: for each guess at what a prediction rests on a figure of each text, the mean
    over the positions that were looked at; NaN where every order is as good, or all tokens are the same.

    Args:
        comprehensiveness (`dict[str, list[float]]`):
            How much changes without what the guess puts first, from 0, of the worst order of all, to 1, of the best.
        sufficiency (`dict[str, list[float]]`):
            How little changes with nothing but what the guess puts first, likewise.
    """

    comprehensiveness: dict[str, list[float]]
    sufficiency: dict[str, list[float]]

    def means(self) -> dict[str, dict[str, float]]:
        """`dict[str, dict[str, float]]`: for each guess the mean of each figure over the texts."""
        return {
            guess: {name: mean_of_numbers(figures[guess]) for name, figures in vars(self).items()}
            for guess in self.comprehensiveness
        }


@torch.no_grad()
def measure_faithfulness(
    model: PreTrainedModel,
    dataset: Dataset,
    num_positions: int = 4,
    num_stretches: int = 8,
    num_draws: int = 2,
    locality_dial: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    with_gradients: bool = False,
) -> Faithfulness:
    """
    Measures whether what a guess puts first is what a prediction rests on, by taking it away, and by taking away all
    else ([definition](../method.md#faithfulness)). The text before a position is cut into stretches of equal length,
    which are the same for every model, and the prediction is made without each set of them, which are replaced as by
    [`measure_influence`]. That tells the best and the worst of all orders exactly, between which a guess's lies: so
    that models can be compared, of which some change more than others whatever is taken away. `num_draws *
    2^num_stretches` passes over the text before each position.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one), dataset ([`~datasets.Dataset`]), \
        locality_dial (`float`, *optional*, defaults to 0.0), with_gradients (`bool`, *optional*, defaults to `False`):
            As for [`measure_agreement`], the guesses too; and, as one more, the influence of each stretch alone.
        num_positions (`int`, *optional*, defaults to 4):
            Positions of each text to look at, evenly spread from its 17th token to its last.
        num_stretches (`int`, *optional*, defaults to 8):
            Stretches of the text before a position, from 2 to 12.
        num_draws (`int`, *optional*, defaults to 2), batch_size (`int`, *optional*, defaults to 8), seed (`int`, \
        *optional*, defaults to 0):
            As for [`measure_influence`].

    Returns:
        [`Faithfulness`]

    Raises:
        ValueError: as [`measure_agreement`], and for another number of stretches.
    """
    check_texts(model, dataset, num_positions)
    if type(num_stretches) is not int or not 2 <= num_stretches <= _MOST_STRETCHES:
        raise ValueError(
            f"`num_stretches` is {num_stretches!r}; it must be a whole number from 2 to {_MOST_STRETCHES}."
        )
    for name, value in (("num_draws", num_draws), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number above 0.")
    if with_gradients:
        check_captum()
    model.eval()
    generator, draws = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    figures: dict[str, dict[str, list[float]]] = {"comprehensiveness": {}, "sufficiency": {}}
    for tokens in progress(dataset["input_ids"], "Taking away"):
        ids = torch.tensor(tokens)
        places = places_of(len(ids), num_positions)
        guesses, _ = attention_guesses(model, ids, places, locality_dial)
        if with_gradients:
            guesses |= gradient_guesses(model, ids, places, locality_dial)
        of_text: dict[str, dict[str, list[float]]] = {name: {} for name in figures}
        for at, place in enumerate(places):
            parts = np.array_split(np.arange(place), num_stretches)
            changes = _changes(model, ids[: place + 1], parts, num_draws, batch_size, draws, locality_dial)
            orders = {name: np.array([rows[at][part].sum() for part in parts]) for name, rows in guesses.items()}
            orders[NEARNESS] = np.arange(num_stretches, dtype=float)
            orders[RANDOM] = generator.random(num_stretches)
            orders[_ERASURE] = changes[1 << np.arange(num_stretches)]
            for name, guess in orders.items():
                order = np.lexsort((generator.random(num_stretches), -guess)).tolist()  # equal ones in any order
                for figure, value in zip(figures, faithfulness(changes, order), strict=True):
                    of_text[figure].setdefault(name, []).append(value)
        for figure, by_guess in of_text.items():
            for name, values in by_guess.items():
                figures[figure].setdefault(name, []).append(mean_of_numbers(values))
    return Faithfulness(**figures)


def faithfulness(changes: np.ndarray, order: list[int]) -> tuple[float, float]:
    """
    Comprehensiveness and sufficiency of an order of `n` stretches, each between the worst and the best of all orders
    (NAOPC, arXiv:2408.08137).

    Args:
        changes (`np.ndarray` of shape `(2**n,)`):
            What changes without each set of stretches, which is the sum of 1 << stretch.
        order (`list[int]`):
            The stretches, what a prediction is guessed to rest on most first.
    """
    number = len(order)
    best, worst = (_extreme(changes, number, extreme) for extreme in (np.max, np.min))
    if not best > worst:
        return math.nan, math.nan
    first, last = (
        sum(changes[taken] for taken in itertools.accumulate(1 << stretch for stretch in each[:-1]))
        for each in (order, order[::-1])
    )
    return float((first - worst) / (best - worst)), float((best - last) / (best - worst))


def _extreme(changes: np.ndarray, number: int, extreme: Callable[..., float]) -> float:
    """The largest or the least sum of changes that any order has on its way from no stretch to all but one."""
    totals = np.zeros(len(changes))
    for taken in range(1, len(changes)):
        totals[taken] = extreme([totals[taken ^ 1 << last] for last in range(number) if taken >> last & 1])
        totals[taken] += changes[taken] if taken + 1 < len(changes) else 0
    return float(totals[-1])


def _changes(
    model, ids, parts: list[np.ndarray], num_draws: int, batch_size: int, generator, dial: float
) -> np.ndarray:
    """In bits, how the last prediction changes without each set of stretches, mean over the draws."""
    core, number = core_model(model), len(parts)
    if len(ids.unique()) < 2:  # there is nothing to replace a token by
        return np.zeros(2**number)
    dials = {"locality_dial": dial, "min_fidelity": 0.0}
    settings = dials | {"use_cache": False}
    starts = last_block_starts(core.base_model, {"input_ids": ids[None]}, **dials)
    part_of = torch.full((len(ids),), number)  # the position itself stays
    for at, part in enumerate(parts):
        part_of[part] = at
    sets = torch.arange(2**number)
    is_taken = torch.cat((sets[:, None] >> torch.arange(number) & 1, torch.zeros(2**number, 1)), dim=1).bool()[
        :, part_of
    ]
    kept = {"logits_to_keep": 1} if "logits_to_keep" in core._native_arguments else {}
    changes = np.zeros(2**number)
    for _ in range(num_draws):
        other, before = replaced(ids, [(0, len(ids) - 1)], generator)[0], None
        for rows in sets.split(batch_size):
            texts = torch.where(is_taken[rows], other, ids).to(core.device)
            of_texts = {"block_starts": starts.expand(len(texts), -1), **settings, **kept}
            logits = model(texts, **of_texts).logits[:, -1]
            before = logits[:1] if before is None else before  # the first set is empty
            changes[rows] += divergence_bits(before.expand_as(logits), logits).cpu().double().numpy() / num_draws
    return changes.clip(min=0)
