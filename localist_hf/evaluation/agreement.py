"""Does attention say what predictions rest on? How it agrees with the influence that erasure finds, beside nearness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import rankdata
from transformers import PreTrainedModel

from .check_model import check_model, check_own_places, core_model
from .check_model import num_positions as num_positions_of
from .guesses import NEARNESS, RANDOM, attention_guesses, check_captum, gradient_guesses
from .influence import measure_influence


#: So many tokens must stand before a position that is looked at, and be compared there.
_FIRST, LEAST_COMPARED = 16, 5
_FIGURES = ("spearman", "beyond_nearness", "top_1", "top_5")


@dataclass(frozen=True)
class Agreement:
    """
    What [`measure_agreement`] found: for each guess at what a prediction rests on a figure of each text, the mean over
    the positions that were looked at; NaN where there is none.

    Args:
        spearman (`dict[str, list[float]]`):
            Spearman's correlation with the influence, over the tokens before a position.
        beyond_nearness (`dict[str, list[float]]`):
            The same with the rank of the distance taken out of both; none of nearness.
        top_1 (`dict[str, list[float]]`), top_5 (`dict[str, list[float]]`):
            How often the token with the most influence is the guess's first, or one of its first five.
        num_positions (`list[int]`):
            Positions that were looked at in each text.
    """

    spearman: dict[str, list[float]]
    beyond_nearness: dict[str, list[float]]
    top_1: dict[str, list[float]]
    top_5: dict[str, list[float]]
    num_positions: list[int]

    def means(self) -> dict[str, dict[str, float]]:
        """`dict[str, dict[str, float]]`: for each guess the mean of each figure over the texts."""
        return {
            guess: {name: mean_of_numbers(getattr(self, name).get(guess, ())) for name in _FIGURES}
            for guess in self.spearman
        }


@torch.no_grad()
def measure_agreement(
    model: PreTrainedModel,
    dataset: Dataset,
    num_positions: int = 16,
    num_draws: int = 4,
    locality_dial: float = 0.0,
    in_sight: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    method: str = "erasure",
    with_gradients: bool = False,
) -> Agreement:
    """
    Compares, position by position, the attention of a model with the influence of the tokens before on its prediction
    (see [`measure_influence`] and the [definition](../method.md#agreement)). The guesses are the attention of each
    layer, mean over its heads; the mean of all layers, and of the localised ones weighted by the length of the values;
    rollout (arXiv:2005.00928); and, as controls, nearness and random numbers. A model whose attention is near agrees
    more without saying more: see `beyond_nearness`.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            Texts in `"input_ids"`, each of more than 16 tokens, in one sequence each.
        num_positions (`int`, *optional*, defaults to 16):
            Positions of each text to look at, evenly spread from its 17th token to its last.
        num_draws (`int`, *optional*, defaults to 4):
            As for [`measure_influence`]: so many passes over each text for each of its tokens.
        locality_dial (`float`, *optional*, defaults to 0.0):
            The dial, for predictions and attention.
        in_sight (`bool`, *optional*, defaults to `False`):
            Whether to compare over the tokens of each position's local set only. Under a hard mask all others have
            neither attention nor influence, so that over all tokens both agree by construction.
        batch_size (`int`, *optional*, defaults to 8), seed (`int`, *optional*, defaults to 0), method (`str`, \
        *optional*, defaults to `"erasure"`):
            As for [`measure_influence`].
        with_gradients (`bool`, *optional*, defaults to `False`):
            Whether gradients are among the guesses: times the embeddings, and integrated (by Captum, which the extra
            `gradients` installs).

    Returns:
        [`Agreement`]

    Raises:
        ValueError: for a model of another class, and for texts that are too short, too long, or of one token.
    """
    check_texts(model, dataset, num_positions)
    if with_gradients:
        check_captum()
    generator = np.random.default_rng(seed)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in _FIGURES}
    numbers = []
    for tokens in dataset["input_ids"]:
        ids = torch.tensor(tokens)
        places = places_of(len(ids), num_positions)
        influence = measure_influence(
            model, ids, "token", places, num_draws, batch_size, seed, locality_dial, min_fidelity=0.0, method=method
        ).values.numpy()
        guesses, sights = attention_guesses(model, ids, places, locality_dial)
        if with_gradients:
            guesses |= gradient_guesses(model, ids, places, locality_dial)
        found = {name: {guess: [] for guess in (*guesses, NEARNESS, RANDOM)} for name in _FIGURES}
        number = 0
        for at, place in enumerate(places):
            keys = np.flatnonzero(sights[at][:place]) if in_sight else np.arange(place)
            if len(keys) < LEAST_COMPARED:
                continue
            number += 1
            candidates = {name: rows[at][keys] for name, rows in guesses.items()}
            candidates |= {NEARNESS: keys.astype(float), RANDOM: generator.random(len(keys))}
            for name, guess in candidates.items():
                for figure, value in compare(guess, influence[keys, at], keys, name != NEARNESS).items():
                    found[figure][name].append(value)
        numbers.append(number)
        for figure, by_guess in found.items():
            for name, values in by_guess.items():
                figures[figure].setdefault(name, []).append(mean_of_numbers(values))
    del figures["beyond_nearness"][NEARNESS]
    return Agreement(**figures, num_positions=numbers)


def check_texts(model: PreTrainedModel, dataset: Dataset, num_positions: int) -> None:
    """Refuses a model of another class, and texts that are too short, too long or of one token."""
    check_model("model", model)
    check_own_places("model", model)
    if type(num_positions) is not int or num_positions < 1:
        raise ValueError(f"`num_positions` is {num_positions!r}; it must be a whole number above 0.")
    if not len(dataset):
        raise ValueError("`dataset` holds no text.")
    limit = num_positions_of(core_model(model).config)
    for row, tokens in enumerate(dataset["input_ids"]):
        if len(tokens) <= _FIRST:
            raise ValueError(f"`dataset` has {len(tokens)} tokens in row {row}; each text needs more than {_FIRST}.")
        if limit is not None and len(tokens) > limit:
            raise ValueError(f"`dataset` has {len(tokens)} tokens in row {row}; the model has positions for {limit}.")
        if len({*tokens}) < 2:
            raise ValueError(f"`dataset` has one token only in row {row}; there is nothing to replace it by.")


def places_of(length: int, num_positions: int) -> list[int]:
    """The positions of a text that are looked at, from its 17th token to its last."""
    return np.unique(np.linspace(_FIRST, length - 1, num_positions).round().astype(int)).tolist()


def mean_of_numbers(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def compare(guess: np.ndarray, truth: np.ndarray, nearness: np.ndarray, has_nearness: bool = True) -> dict[str, float]:
    """The figures of one position: of a guess, the influence, and how near each token is; NaN where there is none."""
    ranks = [rankdata(values) for values in (guess, truth, nearness)]  # ties have their mean rank
    of_guess, between, of_truth = (_correlation(ranks[one], ranks[other]) for one, other in ((0, 2), (0, 1), (1, 2)))
    hits = {"top_1": math.nan, "top_5": math.nan}
    if truth.max() > 0:
        # Of equal guesses any may come first; of equal influences any may be meant.
        best = np.flatnonzero(truth == truth.max())
        before, same = ((compared(guess[None], guess[best, None])).sum(1) for compared in (np.greater, np.equal))
        hits = {f"top_{most}": float(np.clip((most - before) / same, 0, 1).mean()) for most in (1, 5)}
    found = {"spearman": between, **hits}
    if has_nearness:
        rest = math.sqrt(max(0.0, (1 - of_guess**2) * (1 - of_truth**2)))
        found["beyond_nearness"] = (between - of_guess * of_truth) / rest if rest > 1e-9 else math.nan
    return found


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt((one @ one) * (other @ other))
    return float(one @ other / scale) if scale else math.nan
