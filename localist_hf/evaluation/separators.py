"""Separators recruited from the model: the tokens across which its attention reaches least."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from ..modeling import LocalityFields, LocalityMeasurements
from ..modeling.block_partition import place_block_starts
from .check_model import check_model, core_model
from .kept_attention import KeptAttention
from .measure import evaluation_batches


#: How far behind a token the queries stand whose attention is asked.
_OFFSETS = range(2, 9)
#: A token that is asked less often is no candidate.
_LEAST_OCCURRENCES = 60
#: Less of the attention to other words than this is none.
_LEAST_SHARE = 1e-6
#: Tokens that belong to one half of the text, before those that belong to the other.
_STRETCH = 64
#: Rank correlation of the need in two halves of the text below which it says nothing of tokens, and the p-value above
#: which it may be chance; and the need at separators, as a part of that at any candidate, above which they are none.
_LEAST_RELIABILITY, _MOST_P_VALUE, _MOST_NEED = 0.3, 0.01, 0.97
#: How far the mean length may be from what is wanted, as a part of that.
_TOLERANCE = 0.25


@dataclass(frozen=True)
class Separators:
    """
    Tokens after which blocks are to start, and how they were found.

    Args:
        token_ids (`list[int]`), need (`list[float]`), occurrences (`list[int]`):
            The separators, least need first; the need of each, about in [0, 1]; and how often each was asked: where
            other words follow, and, but for sinks, at least one goes before.
        num_candidates (`int`):
            Tokens that occur often enough to be asked.
        mean_need (`float`):
            The need at any occurrence of a candidate.
        mean_need_at_separators (`float`):
            The need at any occurrence of a separator.
        reliability (`float`):
            Spearman's correlation of the candidates' needs in one half of the sequences with those in the other.
        mean_length (`float`):
            Tokens of a block of the data set with these separators, within the length limits of the configuration.
    """

    token_ids: list[int]
    need: list[float]
    occurrences: list[int]
    num_candidates: int
    mean_need: float
    mean_need_at_separators: float
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

    The *need* of a token is the share of the attention to other words that the 2nd to the 8th token after it, in the
    upper half of the layers, pay to it and to what is before it: the mean over these layers and over its occurrences,
    heads taken together, less what is usual so far into a text
    ([definition](../method.md#recruited-separators)). The tokens with the least need are taken until blocks are as
    short as is wanted. One pass over the data, at dial 0.

    Args:
        model (a localised model, with or without a language modeling head, or a [`~peft.PeftModel`] around one):
            The model to ask; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`]: text of the kind that the model is for, in which separators occur 60 times at least; a
            hundred thousand tokens will do. Read into memory.
        mean_length (`float`, *optional*, defaults to 16.0):
            Tokens of a block on average, between `min_block_length` and `max_block_length` of the configuration.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.

    Returns:
        [`Separators`]

    Raises:
        ValueError: for a model of another class, for a length outside the limits or that no number of separators comes
            to, and for text without separators: too few tokens that come again, or none across which clearly less
            attention reaches than elsewhere. The configuration is left as it was.

    Example:

    ```python
    >>> model = localize(model, locality_schedule="upper_half")
    >>> separators = recruit_separators(model, dataset)
    >>> tokenizer.convert_ids_to_tokens(separators.token_ids[:4]), separators.mean_length
    (['\"\"\"', '):', ')', ':'], 15.9)
    >>> model.config.locality.block_partition
    'delimiter'
    ```
    """
    check_model("model", model, needs_head=False)
    locality = core_model(model).config.locality
    check_mean_length(mean_length, locality)
    if not len(dataset):
        raise ValueError("`dataset` holds no sequence: there is no text to find separators in.")
    found = _needs(model, dataset, batch_size)
    candidates = found.occurrences >= _LEAST_OCCURRENCES
    num_candidates = int(candidates.sum())
    if num_candidates < 3:
        raise ValueError(
            f"`dataset` has {num_candidates} token(s) that occur {_LEAST_OCCURRENCES} times with more text behind "
            "them; separators cannot be found among fewer than 3. Pass more text."
        )
    need, (sums, counts) = found.need, found.halves
    if not need[candidates].isfinite().all():
        raise ValueError("`model` attends with weights that are no finite numbers on `dataset`.")
    compared = candidates & (counts > 0).all(0)
    halves = (sums / counts)[:, compared]
    test = spearmanr(*halves, alternative="greater") if compared.sum() > 2 else None
    reliability = math.nan if test is None else float(test.statistic)
    # Of few tokens a high correlation is chance.
    if test is None or not (reliability >= _LEAST_RELIABILITY and test.pvalue < _MOST_P_VALUE):
        raise ValueError(
            "`dataset` has no separators for this model: how far attention reaches back does not depend on the token "
            f"(in two halves of the text the ranks of {int(compared.sum())} tokens correlate by {reliability:.2f})."
        )
    order = torch.where(candidates, need, torch.inf).argsort(stable=True)[:num_candidates]
    rank = torch.full((len(need),), num_candidates)
    rank[order] = torch.arange(num_candidates)
    limits = locality.min_block_length, locality.max_block_length
    number, length = _how_many(rank, num_candidates, found.texts, limits, mean_length)
    chosen = order[:number]
    mean_need, at_separators = (
        (need[ids] * found.occurrences[ids]).sum().item() / found.occurrences[ids].sum().item()
        for ids in (order, chosen)
    )
    if at_separators > _MOST_NEED * mean_need:
        raise ValueError(
            "`dataset` has no separators for this model: attention reaches across the tokens that it keeps to most "
            f"nearly as much as across any (need {at_separators:.3f} and {mean_need:.3f})."
        )
    locality.delimiter_token_ids = chosen.tolist()
    locality.block_partition = "delimiter"
    return Separators(
        token_ids=chosen.tolist(),
        need=[round(value, 4) for value in need[chosen].tolist()],
        occurrences=found.occurrences[chosen].tolist(),
        num_candidates=num_candidates,
        mean_need=mean_need,
        mean_need_at_separators=at_separators,
        reliability=reliability,
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


class _Needs(NamedTuple):
    """
    What a pass over the texts has found, by token of the vocabulary: the need, and how often it was asked; for either
    half of the texts the sums of the need and their weights, `(2, vocab_size)` in float64; and of each batch the tokens
    and the starts of their documents.
    """

    need: torch.Tensor
    occurrences: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]
    texts: list[tuple[torch.Tensor, torch.Tensor]]


def _needs(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> _Needs:
    decoder, config = core_model(model.eval()).base_model, core_model(model).config
    locality = config.locality
    layers = range(locality.num_hidden_layers // 2, locality.num_hidden_layers)
    # Of each query that is asked: the token, its half of the text, how far in the text it is, and the share.
    tokens_asked, halves, places, shares, weights = ([] for _ in range(5))
    occurrences, texts, num_rows = torch.zeros(locality.vocab_size, dtype=torch.long), [], 0
    for inputs, _ in evaluation_batches(model, dataset, batch_size, None):
        inputs = {name: tensor for name, tensor in inputs.items() if name not in ("block_starts", "pointer_blocks")}
        attended = KeptAttention(config)
        documents = attended.run(decoder, inputs).document_starts
        tokens = inputs["input_ids"]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        # Stretches of either half by turns, whatever the batches.
        row = num_rows + torch.arange(len(tokens), device=tokens.device)[:, None]
        half, is_asked = (row + position // _STRETCH) % 2, torch.zeros_like(tokens, dtype=torch.bool)
        place = (position - documents).expand_as(tokens)
        for offset in _OFFSETS:
            starts = torch.where(documents < 0, position, torch.maximum(documents, position - offset + 1))
            share, weight = _reaching(attended.measure(inputs, layers, local_starts=starts))
            share, weight = share[:, offset:], weight[:, offset:]
            is_some = weight > 0
            before = slice(None, -offset)
            is_asked[:, before] |= is_some
            for kept, values in (
                (tokens_asked, tokens[:, before]), (halves, half[:, before]), (places, place[:, before]),
                (shares, share), (weights, weight),
            ):  # fmt: skip
                kept.append(values[is_some].cpu())
        tokens, documents = tokens.cpu(), documents.cpu()
        occurrences += tokens[is_asked.cpu()].bincount(minlength=locality.vocab_size)
        texts.append((tokens, documents))
        num_rows += len(tokens)
    token, half, place, weight = (torch.cat(each) for each in (tokens_asked, halves, places, weights))
    share, weight = torch.cat(shares).double(), weight.double()
    mean = (share * weight).sum() / weight.sum()
    share = share - _usual(share, weight, place) + mean

    def totals(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(2 * locality.vocab_size, dtype=torch.float64)
        return sums.index_add_(0, half * locality.vocab_size + token, values).view(2, -1)

    sums, counts = totals(share * weight), totals(weight)
    return _Needs(sums.sum(0) / counts.sum(0), occurrences, (sums, counts), texts)


def _usual(share: torch.Tensor, weight: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    The mean share as far into a text: where little stands before, little attention can go there, whatever the token.
    Exact for the first eight tokens, then by eighths of an octave.
    """
    far = (place + 1).double().log2()
    bucket = torch.where(place < 8, place.double(), 8 * (far - 2)).long()  # from 9 tokens on, 9 and more
    sums, weights = torch.zeros(2, int(bucket.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, bucket, share * weight)
    weights.index_add_(0, bucket, weight)
    return (sums / weights)[bucket]


def _reaching(measured: LocalityMeasurements) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of the attention to other words the part that goes beyond the stretch, its mean over layers, `(batch_size, length)`,
    and how many layers that is of: those in which a query sees more than the stretch, and other words.
    """
    total = weight = 0.0
    shares = zip(measured.block_share, measured.outside_share, measured.fidelity_mask, strict=True)
    for block, outside, is_counted in shares:
        block, outside = block.mean(1), outside.mean(1)
        is_counted = (is_counted & (block + outside > _LEAST_SHARE)).to(outside.dtype)
        share = is_counted * outside / (block + outside).clamp(min=_LEAST_SHARE)
        # Layers may lie on different devices.
        total, weight = share.to(measured.document_starts.device) + total, is_counted.to(share.device) + weight
    return total / weight.clamp(min=1), weight


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
