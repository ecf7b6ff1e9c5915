"""Separators recruited from the model: the tokens after which it costs least to see nothing of what was before."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from scipy.stats import kruskal, spearmanr
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import LocalityFields
from ..modeling.block_partition import document_starts, place_block_starts
from .block_controls import setting
from .check_model import check_model, check_own_places, core_model, num_positions
from .locality_meter import token_losses
from .measure import evaluation_batches
from .progress import progress_of_passes


#: Tokens of a block where costs are measured, at most, and how many times the blocks are moved along the text. Four
#: times as many moves find separators that are hardly better (docs/method.md#recruited-separators).
_PERIOD, _NUM_MOVES = 16, 4
#: A token that occurs less often is no candidate; and of how many candidates an order may be more than chance.
_LEAST_OCCURRENCES, _LEAST_CANDIDATES = 60, 5
#: So many times more a token is taken to have been asked, and to have cost what the mean token costs.
_DRAWN = 20
#: Tokens that belong to one half of the text, before those that belong to the other.
_STRETCH = 64
#: The p-value above which it may be chance that costs differ from token to token; those of neighbouring places are of
#: some of the same predictions, which makes it somewhat too small. In nats, the cost at any candidate below which
#: nothing is lost by a boundary, and how far that at separators must be below it.
_MOST_P_VALUE, _LEAST_COST, _LEAST_GAIN = 1e-4, 0.05, 0.05
#: How far the mean length may be from what is wanted, as a part of that.
_TOLERANCE = 0.25


@dataclass(frozen=True)
class Separators:
    """
    Tokens after which blocks are to start, and how they were found.

    Args:
        token_ids (`list[int]`), cost (`list[float]`), occurrences (`list[int]`):
            The separators, least cost first; what a boundary after each costs, in nats; and how often each occurs where
            that can be asked.
        num_candidates (`int`):
            Tokens that occur often enough to be asked.
        mean_cost (`float`):
            The cost after any occurrence of a candidate.
        mean_cost_at_separators (`float`):
            The cost after any occurrence of a separator.
        reliability (`float`):
            Spearman's correlation of the candidates' costs in one half of the text with those in the other.
        mean_length (`float`):
            Tokens of a block of the data set with these separators, within the length limits of the configuration.
    """

    token_ids: list[int]
    cost: list[float]
    occurrences: list[int]
    num_candidates: int
    mean_cost: float
    mean_cost_at_separators: float
    reliability: float
    mean_length: float

    @property
    def settings(self) -> dict[str, Any]:
        """`dict[str, Any]`: the fields of [`LocalityFields`] that these blocks are given by."""
        return {"block_partition": "delimiter", "delimiter_token_ids": [*self.token_ids]}

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def recruit_separators(
    model: PreTrainedModel, dataset: Dataset, mean_length: float = 16.0, batch_size: int = 8
) -> Separators:
    """
    Finds out from a model, without being told what a sentence or a line is, after which tokens blocks of text are to
    start, and has it start them there: `block_partition` becomes `"delimiter"` and `delimiter_token_ids` these tokens.

    The *cost* of a boundary after a token is what the next 8 tokens' predictions lose by it at dial 1, with the upper
    half of the layers local to blocks of 16 tokens, or of `max_block_length` where that is less: the sum of their
    losses where a block begins after the token, less its mean over where blocks begin otherwise too; the mean over its
    occurrences, less what is usual so far into a text ([definition](../method.md#recruited-separators)). The tokens of
    the least cost are taken until blocks are as short as is wanted. Each text is predicted four times.

    Args:
        model ([`LocalistGPT2LMHeadModel`], another localised model, or a [`~peft.PeftModel`] around one):
            The model to ask; it is set to evaluation mode. Of its settings the limits of a block's length and the sinks
            count, not its schedule, dial and blocks.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`], whatever its labels: text of the kind that the model is for, in which separators occur
            60 times at least; a hundred thousand tokens will do. Read into memory.
        mean_length (`float`, *optional*, defaults to 16.0):
            Tokens of a block on average, between `min_block_length` and `max_block_length` of the configuration.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.

    Returns:
        [`Separators`]

    Raises:
        ValueError: for a model of another class or with tokens of its own (prompt tuning), for a length outside the
            limits or that no number of separators comes to, for tokens and lengths that the model has not, and for text
            without separators: too few tokens that come again, or none after which a boundary clearly costs less than
            elsewhere. The configuration is left as it was.

    Example:

    ```python
    >>> model = localize(model, locality_schedule="upper_half")
    >>> separators = recruit_separators(model, dataset)
    >>> tokenizer.convert_ids_to_tokens(separators.token_ids[:4]), separators.mean_length
    (['ĊĊ', '")', ')', '))'], 16.2)
    >>> model.config.locality.block_partition
    'delimiter'
    ```
    """
    check_model("model", model)
    check_own_places("model", model)
    locality = core_model(model).config.locality
    check_mean_length(mean_length, locality)
    if not len(dataset):
        raise ValueError("`dataset` holds no sequence: there is no text to find separators in.")
    with progress_of_passes(model, _NUM_MOVES * math.ceil(len(dataset) / batch_size), "Recruiting"):
        found = _costs(model, dataset, batch_size)
    cost, (sums, counts) = found.cost, found.halves
    candidates = (found.occurrences >= _LEAST_OCCURRENCES) & (counts > 0).all(0)
    num_candidates = int(candidates.sum())
    if num_candidates < _LEAST_CANDIDATES:
        raise ValueError(
            f"`dataset` has {num_candidates} token(s) that occur {_LEAST_OCCURRENCES} times with enough text behind "
            f"them; separators cannot be found among fewer than {_LEAST_CANDIDATES}. Pass more or longer texts."
        )
    if not cost[candidates].isfinite().all():
        raise ValueError("`model` predicts with losses that are no finite numbers on `dataset`.")
    p_value = found.p_value(candidates)
    if not p_value < _MOST_P_VALUE:
        raise ValueError(
            "`dataset` has no separators for this model: what a boundary costs does not depend on the token before it, "
            f"as far as {int(counts[:, candidates].sum())} boundaries show (p = {p_value:.2g}, Kruskal-Wallis)."
        )
    order = torch.where(candidates, cost, torch.inf).argsort(stable=True)[:num_candidates]
    rank = torch.full((len(cost),), num_candidates)
    rank[order] = torch.arange(num_candidates)
    limits = locality.min_block_length, locality.max_block_length
    number, length = _how_many(rank, num_candidates, found.texts, limits, mean_length)
    chosen = order[:number]
    mean_cost, at_separators = (
        (cost[ids] * found.occurrences[ids]).sum().item() / found.occurrences[ids].sum().item()
        for ids in (order, chosen)
    )
    if mean_cost < _LEAST_COST or mean_cost - at_separators < _LEAST_GAIN:
        raise ValueError(
            "`dataset` has no separators for this model: after the tokens where a boundary costs least it costs nearly "
            f"as much as after any, or it costs nothing ({at_separators:.3f} and {mean_cost:.3f} nats)."
        )
    locality.delimiter_token_ids = chosen.tolist()
    locality.block_partition = "delimiter"
    return Separators(
        token_ids=chosen.tolist(),
        cost=[round(value, 4) for value in cost[chosen].tolist()],
        occurrences=found.occurrences[chosen].tolist(),
        num_candidates=num_candidates,
        mean_cost=mean_cost,
        mean_cost_at_separators=at_separators,
        reliability=float(spearmanr(*(sums / counts)[:, candidates]).statistic),
        mean_length=length,
    )


def check_mean_length(mean_length: float, locality: LocalityFields) -> None:
    """
    Raises:
        ValueError: for a mean length that blocks within these limits cannot have.
    """
    limits = locality.min_block_length, locality.max_block_length
    if not isinstance(mean_length, Real) or not limits[0] < mean_length <= limits[1]:
        raise ValueError(
            f"`mean_length` is {mean_length!r}; blocks have {limits[0]} to {limits[1]} tokens (`min_block_length` and "
            "`max_block_length`), so that it must be a number above the first and at most the second."
        )


class _Costs(NamedTuple):
    """
    What the passes over the texts have found, by token of the vocabulary: what a boundary after it costs, and how often
    it occurs where that can be asked; for either half of the texts the sums of the costs and how many there are,
    `(2, vocab_size)` in float64; of each boundary that was tried the token before it and what it cost; and of each
    batch the tokens and the starts of their documents.
    """

    cost: torch.Tensor
    occurrences: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]
    asked: tuple[torch.Tensor, torch.Tensor]
    texts: list[tuple[torch.Tensor, torch.Tensor]]

    def p_value(self, candidates: torch.Tensor) -> float:
        """Of Kruskal and Wallis' test that the costs after these tokens are drawn alike; nan where all are the same."""
        token, cost = self.asked
        groups = [cost[token == each] for each in candidates.nonzero()]
        if torch.cat(groups).unique().numel() == 1:
            return math.nan
        return float(kruskal(*(each.numpy() for each in groups)).pvalue)


def _costs(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> _Costs:
    locality, num_texts = core_model(model).config.locality, 0
    period = min(_PERIOD, locality.max_block_length)
    moves, length = sorted({period * move // _NUM_MOVES for move in range(_NUM_MOVES)}), period // 2
    # Of each boundary that is tried: the token before it, that one's half of the texts and place in its own, the cost.
    asked, halves, places, costs = ([torch.zeros(0, dtype=torch.long)] for _ in range(4))
    occurrences, texts = torch.zeros(locality.vocab_size, dtype=torch.long), []
    for inputs, _ in evaluation_batches(model, dataset, batch_size, None):
        inputs = {name: tensor for name, tensor in inputs.items() if name not in ("block_starts", "pointer_blocks")}
        _check_tokens(inputs, core_model(model).config)
        tokens, told = inputs["input_ids"], (inputs.get("attention_mask"), inputs.get("position_ids"))
        documents = document_starts(*tokens.shape, *told, device=tokens.device)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        begins_text = documents == position
        text = num_texts - 1 + begins_text.flatten().cumsum(0).view_as(documents)  # its number
        num_texts += int(begins_text.sum())
        texts.append((tokens.cpu(), documents.cpu()))
        if tokens.shape[1] <= length:
            continue
        # Not at the same places of every text.
        since = [position - documents - (text + move) % period for move in moves]
        lost = _lost(model, inputs, documents, since, period)
        first, text, (tokens, documents) = position[: lost.shape[-1]].cpu(), text.cpu(), texts[-1]
        begin, end, text = documents[:, : len(first)], documents[:, length:], text[:, : len(first)]
        # Where a token goes before, and the predictions after are all of one text.
        can_begin = (begin >= 0) & (begin < first) & (begin == end)
        before, place = tokens.roll(1, dims=1)[:, : len(first)], first - 1 - begin
        half = (text % period + text // period + place // _STRETCH) % 2  # whatever the place of its blocks
        occurrences += before[can_begin].bincount(minlength=locality.vocab_size)
        for of_move, found in zip(since, lost, strict=True):
            begins = can_begin & (of_move.cpu()[:, : len(first)] % period == 0)
            for kept, values in ((asked, before), (halves, half), (places, place), (costs, found)):
                kept.append(values[begins])
    token, half, place, cost = (torch.cat(each) for each in (asked, halves, places, costs))
    cost = cost.double()  # where nothing was tried, too
    mean = cost.mean().item() if len(cost) else math.nan
    cost = cost - _usual(cost, place) + mean

    def totals(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(2 * locality.vocab_size, dtype=torch.float64)
        return sums.index_add_(0, half * locality.vocab_size + token, values).view(2, -1)

    sums, counts = totals(cost), totals(torch.ones_like(cost))
    drawn = (sums.sum(0) + _DRAWN * mean) / (counts.sum(0) + _DRAWN)
    return _Costs(drawn, occurrences, (sums, counts), (token, cost), texts)


def _check_tokens(inputs: dict[str, torch.Tensor], config: PreTrainedConfig) -> None:
    tokens, allowed = inputs["input_ids"], num_positions(config)
    if (token := int(tokens.max())) >= config.locality.vocab_size:
        raise ValueError(
            f"`dataset` holds the token {token}; the model was localised with {config.locality.vocab_size} tokens."
        )
    if allowed is not None and tokens.shape[1] > allowed and "position_ids" not in inputs:
        raise ValueError(f"`dataset` holds a sequence of {tokens.shape[1]} tokens; the model has {allowed} positions.")


def _lost(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    documents: torch.Tensor,
    since: Sequence[torch.Tensor],
    period: int,
) -> torch.Tensor:
    """
    What the predictions at each place and after it, for half a period, lose in each move of the blocks, beyond the mean
    of all moves: `(num_moves, batch_size, sequence_length - period // 2)`, float64, on the CPU. Blocks begin where the
    places since the first that does are a multiple of the period.
    """
    position, losses = torch.arange(documents.shape[1], device=documents.device), []
    with setting(core_model(model).config.locality, locality_schedule="upper_half", num_previous_blocks=0):
        for of_move in since:
            starts = torch.where(of_move < 0, documents, position - of_move % period).masked_fill(documents < 0, -1)
            at_dial_1 = {"block_starts": starts, "locality_dial": 1.0, "min_fidelity": 0.0}
            losses.append(token_losses(model(**inputs, **at_dial_1, use_cache=False).logits, inputs["input_ids"]))
    lost = torch.stack(losses).cpu().double()  # not every device has float64
    return (lost - lost.mean(0)).unfold(-1, period // 2, 1).sum(-1)[..., :-1]


def _usual(cost: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    The mean cost as far into a text: where little stands before, little is lost, whatever the token. Exact for the
    first eight tokens, then by eighths of an octave.
    """
    far = (place + 1).double().log2()
    bucket = torch.where(place < 8, place.double(), 8 * (far - 2)).long()  # from 9 tokens on, 9 and more
    sums, counts = torch.zeros(2, int(bucket.max()) + 1 if len(bucket) else 1, dtype=torch.float64)
    sums.index_add_(0, bucket, cost)
    counts.index_add_(0, bucket, torch.ones_like(cost))
    return (sums / counts)[bucket]


def starts_after(
    separates: torch.Tensor, documents: torch.Tensor, min_block_length: int, max_block_length: int
) -> torch.Tensor:
    """
    The blocks of whole texts with these separators.

    Args:
        separates (`torch.BoolTensor` of shape `(batch_size, length)`):
            Whether each token is a separator.
        documents (`torch.LongTensor` of the same shape):
            From [`document_starts`].
        min_block_length (`int`), max_block_length (`int`):
            Length limits in tokens.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`: -1 on padding.
    """
    return place_block_starts(separates.roll(1, dims=1), documents, min_block_length, max_block_length)


def _how_many(
    rank: torch.Tensor,
    num_candidates: int,
    texts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    limits: tuple[int, int],
    wanted: float,
) -> tuple[int, float]:
    """How many of the candidates, by their rank, make blocks whose mean length is nearest to what is wanted, and it."""

    def mean_length(number: int) -> float:
        num_tokens = num_blocks = 0
        for tokens, documents in texts:
            starts = starts_after((rank < number)[tokens], documents, *limits)
            num_blocks += int((starts == torch.arange(tokens.shape[1])).sum())
            num_tokens += int((documents >= 0).sum())
        return num_tokens / num_blocks

    least, most = 1, num_candidates
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if mean_length(middle) <= wanted else (middle + 1, most)
    lengths = {number: mean_length(number) for number in (max(1, most - 1), most)}
    number, found = min(lengths.items(), key=lambda item: abs(item[1] - wanted))
    if abs(found - wanted) > _TOLERANCE * wanted:
        raise ValueError(
            f"`mean_length` is {wanted}; the nearest that the text comes to is {found:.1f}, with {number} separators "
            f"of {num_candidates} candidates, tokens that occur {_LEAST_OCCURRENCES} times. Ask for that, pass more or "
            "longer texts, or set other length limits."
        )
    return number, found
