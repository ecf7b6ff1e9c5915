"""Separators recruited from the model: the tokens across which its attention reaches least."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from ..modeling import LocalityMeasurements
from ..modeling.block_partition import place_block_starts
from .check_model import check_model, core_model
from .kept_attention import KeptAttention
from .measure import evaluation_batches


#: How far behind a token the queries stand whose attention is asked.
_OFFSETS = range(2, 9)
#: A token that occurs less often is no candidate.
_LEAST_OCCURRENCES = 60
#: Rank correlation of the need in two halves of the text below which it says nothing of tokens.
_LEAST_RELIABILITY = 0.3


@dataclass(frozen=True)
class Separators:
    """
    Tokens after which blocks are to start, and how they were found.

    Args:
        token_ids (`list[int]`), need (`list[float]`), occurrences (`list[int]`):
            The separators, least need first; the need of each, in [0, 1]; and how often each occurs in the data set.
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
        return {"block_partition": "delimiter", "delimiter_token_ids": self.token_ids}

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
    heads taken together ([definition](../method.md#recruited)). The tokens with the least need are taken until blocks
    are as short as is wanted. One pass over the data, at dial 0.

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
        ValueError: for a model of another class, for a length outside the limits, and for text without separators: too
            few tokens that come again, or none across which less attention reaches than elsewhere. The model is left as
            it was.

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
    limits = locality.min_block_length, locality.max_block_length
    if not limits[0] < mean_length <= limits[1]:
        raise ValueError(
            f"`mean_length` is {mean_length}; blocks have {limits[0]} to {limits[1]} tokens (`min_block_length` and "
            "`max_block_length`), so that it must be above the first and at most the second."
        )
    if not len(dataset):
        raise ValueError("`dataset` holds no sequence: there is no text to find separators in.")
    sums, counts, occurrences, texts = _needs(model, dataset, batch_size)
    candidates = occurrences >= _LEAST_OCCURRENCES
    num_candidates = int(candidates.sum())
    if num_candidates < 3:
        raise ValueError(
            f"`dataset` has {num_candidates} token(s) that occur {_LEAST_OCCURRENCES} times and are followed by "
            "enough text: no separators can be found among so few. Pass more text."
        )
    need = sums.sum(0) / counts.sum(0)
    halves = (sums / counts)[:, candidates & (counts > 0).all(0)]
    reliability = float(spearmanr(*halves).statistic) if halves.shape[1] > 2 else float("nan")
    if not reliability >= _LEAST_RELIABILITY:  # no number either, where all are alike
        raise ValueError(
            f"`dataset` has no separators for this model: how far attention reaches back does not depend on the token "
            f"(in two halves of the text the ranks of {num_candidates} tokens correlate by {reliability:.2f}; "
            f"{_LEAST_RELIABILITY} is needed)."
        )
    order = torch.where(candidates, need, torch.inf).argsort(stable=True)[:num_candidates]
    rank = torch.full((len(need),), num_candidates)
    rank[order] = torch.arange(num_candidates)
    number, length = _how_many(rank, num_candidates, texts, limits, mean_length)
    chosen = order[:number]
    separators = Separators(
        token_ids=chosen.tolist(),
        need=[round(value, 4) for value in need[chosen].tolist()],
        occurrences=occurrences[chosen].tolist(),
        num_candidates=num_candidates,
        mean_need=(sums[:, candidates].sum() / counts[:, candidates].sum()).item(),
        mean_need_at_separators=(sums[:, chosen].sum() / counts[:, chosen].sum()).item(),
        reliability=reliability,
        mean_length=length,
    )
    locality.delimiter_token_ids = separators.token_ids
    locality.block_partition = "delimiter"
    return separators


def _needs(
    model: PreTrainedModel, dataset: Dataset, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """
    For each token of the vocabulary the sums of the need over its occurrences in the one and in the other half of the
    sequences, and their weights, `(2, vocab_size)` each in float64; how often it occurs; and of each batch the tokens
    and the starts of their documents.
    """
    decoder = core_model(model.eval()).base_model
    config = core_model(model).config
    locality = config.locality
    layers = range(locality.num_hidden_layers // 2, locality.num_hidden_layers)
    sums, counts = (torch.zeros(2 * locality.vocab_size, dtype=torch.float64) for _ in range(2))
    occurrences, texts, num_rows = torch.zeros(locality.vocab_size, dtype=torch.long), [], 0
    for inputs, _ in evaluation_batches(model, dataset, batch_size, None):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        attended = KeptAttention(config)
        outputs = attended.run(decoder, inputs)
        tokens, documents = inputs["input_ids"], outputs.document_starts
        position = torch.arange(tokens.shape[1], device=tokens.device)
        # Odd rows and even ones, whatever the batches.
        of_half = (num_rows + torch.arange(len(tokens), device=tokens.device)) % 2 * locality.vocab_size
        index = tokens + of_half[:, None]
        for offset in _OFFSETS:
            starts = torch.where(documents < 0, position, torch.maximum(documents, position - offset + 1))
            measured = attended.measure(inputs, layers, local_starts=starts)
            for of_layer, is_counted in zip(_reaching(measured), measured.fidelity_mask, strict=True):
                is_counted = is_counted[:, offset:].cpu()
                place = index[:, :-offset].cpu()[is_counted]
                sums.index_add_(0, place, of_layer[:, offset:].cpu().double()[is_counted])
                counts.index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
        tokens, documents = tokens.cpu(), documents.cpu()
        occurrences += tokens[documents >= 0].bincount(minlength=locality.vocab_size)
        texts.append((tokens, documents))
        num_rows += len(tokens)
    sums, counts = (each.view(2, -1) for each in (sums, counts))
    # At the end of a text no query is left to ask.
    return sums, counts, torch.where(counts.sum(0) > 0, occurrences, 0), texts


def _reaching(measured: LocalityMeasurements) -> list[torch.Tensor]:
    """Of the attention to other words the part that goes beyond the stretch, in each layer: `(batch_size, length)`."""
    shares = zip(measured.block_share, measured.outside_share, strict=True)
    parts = [(block.mean(1), outside.mean(1)) for block, outside in shares]
    return [outside / (block + outside).clamp(min=torch.finfo(outside.dtype).tiny) for block, outside in parts]


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
    if (shortest := mean_length(most)) > wanted:
        raise ValueError(
            f"`mean_length` is {wanted}; with all {num_candidates} tokens that occur {_LEAST_OCCURRENCES} times blocks "
            f"have {shortest:.1f} tokens on average. Pass more text, ask for longer blocks, or lower "
            "`min_block_length`."
        )
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if mean_length(middle) <= wanted else (middle + 1, most)
    lengths = {number: mean_length(number) for number in (max(1, most - 1), most)}
    return min(lengths.items(), key=lambda item: abs(item[1] - wanted))
