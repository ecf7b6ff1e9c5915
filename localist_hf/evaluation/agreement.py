"""Does attention say what predictions rest on? How it agrees with the influence that erasure finds, beside nearness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import rankdata
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.fidelity import LayerDial
from .attention_rows import AttentionRows
from .check_model import check_model, core_model
from .check_model import num_positions as num_positions_of
from .influence import measure_influence


#: What is compared with influence beside attention.
_NEARNESS, _RANDOM = "nearness", "random"
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
            guess: {name: _mean(getattr(self, name).get(guess, ())) for name in _FIGURES} for guess in self.spearman
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
        batch_size (`int`, *optional*, defaults to 8), seed (`int`, *optional*, defaults to 0):
            As for [`measure_influence`].

    Returns:
        [`Agreement`]

    Raises:
        ValueError: for a model of another class, and for texts that are too short, too long, or of one token.
    """
    check_model("model", model)
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
    generator = np.random.default_rng(seed)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in _FIGURES}
    numbers = []
    for tokens in dataset["input_ids"]:
        ids = torch.tensor(tokens)
        places = np.unique(np.linspace(_FIRST, len(ids) - 1, num_positions).round().astype(int)).tolist()
        influence = measure_influence(
            model, ids, "token", places, num_draws, batch_size, seed, locality_dial=locality_dial, min_fidelity=0.0
        ).values.numpy()
        guesses, sights = attention_guesses(model, ids, places, locality_dial)
        found = {name: {guess: [] for guess in (*guesses, _NEARNESS, _RANDOM)} for name in _FIGURES}
        number = 0
        for at, place in enumerate(places):
            keys = np.flatnonzero(sights[at][:place]) if in_sight else np.arange(place)
            if len(keys) < LEAST_COMPARED:
                continue
            number += 1
            candidates = {name: rows[at][keys] for name, rows in guesses.items()}
            candidates |= {_NEARNESS: keys.astype(float), _RANDOM: generator.random(len(keys))}
            for name, guess in candidates.items():
                for figure, value in compare(guess, influence[keys, at], keys, name != _NEARNESS).items():
                    found[figure][name].append(value)
        numbers.append(number)
        for figure, by_guess in found.items():
            for name, values in by_guess.items():
                figures[figure].setdefault(name, []).append(_mean(values))
    del figures["beyond_nearness"][_NEARNESS]
    return Agreement(**figures, num_positions=numbers)


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def attention_guesses(
    model: PreTrainedModel, ids: torch.Tensor, places: Sequence[int], dial: float, with_rollout: bool = True
) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray]]:
    """
    What attention says of where predictions come from: for each guess of [`measure_agreement`] that is made of it a
    number for each token of the text, at each of these positions, and which tokens these see under the dial. Rollout
    needs the attention of all others too.
    """
    core = core_model(model)
    locality, length = core.config.locality, len(ids)
    tokens = ids[None].to(core.device)
    last_layer = locality.num_hidden_layers - 1
    settings = {"locality_dial": dial, "min_fidelity": 0.0, "use_cache": False}
    starts = core.base_model(tokens, **settings, output_fidelity=[last_layer]).block_starts[0]
    kept = AttentionRows(core.config)
    core.base_model(tokens, **settings, output_fidelity=[last_layer], block_starts=starts, observer=kept.keep)
    documents = document_starts(1, length, device=starts.device)
    local = with_previous_blocks(starts, documents, locality.num_previous_blocks).local_starts[0].cpu()
    position = torch.arange(length)
    asked = list(range(length)) if with_rollout else list(places)
    sight = ((position >= local[:, None]) | (position < locality.num_sink_tokens))[asked]
    lambdas = torch.tensor(locality.locality_lambdas)
    # (num_layers, num_heads, number asked, length), as the dial leaves it: texts are short here.
    weights = []
    for layer, value in enumerate(lambdas.tolist()):
        of_layer = LayerDial.of_layer(dial, 0.0, value)
        rows = (kept.row(layer, place, seen[: place + 1], of_layer) for place, seen in zip(asked, sight, strict=True))
        weights.append(torch.stack([F.pad(row, (0, length - row.shape[1])) for row in rows], dim=1))
    attention = torch.stack(weights)
    means = attention.mean(1)
    lengths = torch.stack([
        repeat_kv(kept.values(layer).norm(dim=-1, keepdim=True), attention.shape[1] // kept.values(layer).shape[1])
        for layer in range(len(lambdas))
    ])[:, 0, :, :, 0].cpu()  # fmt: skip
    guesses = {f"layer {layer}": means[layer] for layer in range(len(means))}
    guesses["all layers"] = means.mean(0)
    if (is_local := lambdas > 0).any():
        weighted = (attention * lengths[:, :, None]).mean(1)[is_local]
        guesses["localised layers, by value length"] = (weighted * lambdas[is_local, None, None]).mean(0)
    if with_rollout:
        rollout = torch.eye(length)
        for of_layer in means:
            rollout = (0.5 * of_layer + 0.5 * torch.eye(length)) @ rollout
        guesses["rollout"] = rollout
    rows = [asked.index(place) for place in places]
    by_guess = {name: [matrix[row].double().numpy() for row in rows] for name, matrix in guesses.items()}
    return by_guess, [sight[row].numpy() for row in rows]


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
