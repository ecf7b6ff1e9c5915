"""What a fidelity is worth: the same model and text on other blocks, and at other dials."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import LocalityFields, LocalityMeasurements
from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.locality import context_fidelity
from .block_lift import block_lift
from .check_model import check_model, core_model
from .faithfulness import divergence_bits
from .locality_meter import label_losses
from .measure import evaluation_batches
from .visible_keys import local_set_sizes, visible_keys


_DIALS = tuple(tenth / 10 for tenth in range(11))
#: What `num_previous_blocks` is set to, beside what the model has.
_NUM_PREVIOUS_BLOCKS = (0, 1)


@dataclass(frozen=True)
class LocalityFigures:
    """
    The locality of some layers on some local sets.

    Args:
        visible_keys (`list[float]`):
            For each layer, the mean number of keys in the local set of a counted position.
        context_fidelity (`list[float]`):
            For each layer, of the attention that goes to other words the part that stays in the local set, in [0, 1];
            NaN where none goes to other words or no position is counted.
        context_share (`list[float]`):
            For each layer, the share of the attention that goes to other words at all.
        fidelity (`list[float]`):
            For each layer, the share of the attention that stays in the local set.
    """

    visible_keys: list[float]
    context_fidelity: list[float]
    context_share: list[float]
    fidelity: list[float]


@dataclass(frozen=True)
class BlockControls:
    """
    The model's own blocks against others, at dial 0, all on the same positions: those that count under every one.

    Args:
        num_previous_blocks (`int`):
            Blocks before its own that are local to a token too.
        num_counted (`int`):
            Positions that the figures are of.
        own (`LocalityFigures`):
            On the model's own blocks: those of its last layer, for every layer.
        wrong (`LocalityFigures`):
            On the blocks of the texts that follow in the data set. Own blocks must beat them, or the locality is not
            about this text.
        windows (`LocalityFigures`, *optional*):
            On windows that show as many keys as the own blocks on average, as many windows before them being local too:
            interpolated between the two `window_lengths`. `None` where the text is too short for any.
        recency (`LocalityFigures`, *optional*):
            On the last n tokens with no blocks at all, likewise, between the two `recency_lengths`.
        window_lengths (`tuple[int, int]`, *optional*), recency_lengths (`tuple[int, int]`, *optional*):
            In tokens.
    """

    num_previous_blocks: int
    num_counted: int
    own: LocalityFigures
    wrong: LocalityFigures
    windows: LocalityFigures | None
    recency: LocalityFigures | None
    window_lengths: tuple[int, int] | None
    recency_lengths: tuple[int, int] | None


@dataclass(frozen=True)
class DialFigures:
    """
    The model at one place of the dial.

    Args:
        dial (`float`):
            d in [0, 1].
        perplexity (`float`):
            Of the labels.
        locality (`LocalityFigures`):
            Under the dial, on the blocks that the model finds there.
    """

    dial: float
    perplexity: float
    locality: LocalityFigures


@dataclass(frozen=True)
class DocumentSums:
    """
    What intervals over documents are made of (see [`bootstrap_interval`]): sums over each sequence of the data set.

    Args:
        labels (`list[int]`):
            Number of labels.
        losses (`dict[str, list[float]]`):
            Sums of the labels' cross-entropies in nats: at each dial, as `"dial 0.2"`; as `"self only"`, and at dial 1
            with these blocks given to every layer, as `"own"`, `"wrong"`, `"windows"` and `"recency"`.
        shares (`dict[str, list[tuple[float, float]]]`):
            Block and outside share of the last layer, summed over the positions that count, on the blocks of every
            [`BlockControls`], as `"own 0"`: their kind, and the number of blocks before.
    """

    labels: list[int]
    losses: dict[str, list[float]]
    shares: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class ControlResults:
    """
    What [`measure_controls`] found.

    Args:
        layers (`list[int]`):
            The layers that the figures are of: those that the schedule localises, and the last.
        num_sink_tokens (`int`):
            The first tokens of a text, local to every one of it; visible keys count them.
        blocks (`list[BlockControls]`):
            Own, wrong and no blocks, for 0 and 1 previous blocks and for as many as the model has.
        dials (`list[DialFigures]`):
            The dial from 0 to 1, under the model's own schedule; 0 only where that localises no layer.
        perplexity_on_blocks (`dict[str, float]`):
            At dial 1, as many blocks before being local as the model has, with the same blocks given to every layer:
            `"own"` (those of the last layer), `"wrong"`, and, where the text is long enough for them, `"windows"` and
            `"recency"`, which show as many keys. Empty where no layer is local.
        self_only_perplexity (`float`):
            At dial 1 with blocks of one token. Its distance from the perplexity at dial 1 is what the local part of the
            attention is worth.
        all_local_perplexity (`float`), all_local_self_only_perplexity (`float`):
            At dial 1 with every layer fully local (schedule `"localist"`) and no previous blocks: on the model's own
            blocks, and with blocks of one token. Both must be clearly worse than at dial 0, or the model does not use
            its attention, and constraining that proves nothing.
        divergence (`float`):
            Faithfulness: the mean of KL(p at dial 0 || p at dial 1) over the predictions of the labels, in bits.
        documents ([`DocumentSums`]):
            What of this belongs to each sequence of the data set.
        block_lift (`float`, *optional*):
            Of the own blocks at the given boundaries (see [`block_lift`]).
    """

    layers: list[int]
    num_sink_tokens: int
    blocks: list[BlockControls]
    dials: list[DialFigures]
    perplexity_on_blocks: dict[str, float]
    self_only_perplexity: float
    all_local_perplexity: float
    all_local_self_only_perplexity: float
    divergence: float
    documents: DocumentSums
    block_lift: float | None = None

    @property
    def perplexity(self) -> float:
        """`float`: at dial 0."""
        return self.dials[0].perplexity

    @property
    def retention(self) -> float:
        """`float`: perplexity at dial 1 / perplexity at dial 0."""
        return self.dials[-1].perplexity / self.perplexity

    @property
    def all_local_retention(self) -> float:
        """`float`: perplexity at dial 1 with every layer fully local / perplexity at dial 0."""
        return self.all_local_perplexity / self.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Everything, the ratios too, as JSON has it: `None` for what is undefined."""
        ratios = {"perplexity": self.perplexity, "retention": self.retention}
        return as_json(asdict(self) | ratios | {"all_local_retention": self.all_local_retention})


@torch.no_grad()
def measure_controls(
    model: PreTrainedModel,
    dataset: Dataset,
    batch_size: int = 8,
    block_model: PreTrainedModel | None = None,
    boundaries: Sequence[Sequence[bool]] | None = None,
    dials: Sequence[float] = _DIALS,
    num_previous_blocks: Sequence[int] = _NUM_PREVIOUS_BLOCKS,
) -> ControlResults:
    """
    Measures what no fidelity should be reported without: the same model and text on other blocks and at other dials.
    One pass over the data for each setting: 32 for a model with no or one previous block.

    The model's configuration is changed for some of them and restored: leave the model to this call meanwhile.

    Args:
        model ([`LocalistGPT2LMHeadModel`] or a [`~peft.PeftModel`] around one):
            The model to measure; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`]; two texts at least. Read into memory.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.
        block_model ([`LocalistGPT2LMHeadModel`] or [`LocalistGPT2Model`], *optional*):
            The model whose blocks count as the own ones, as for [`measure`].
        boundaries (`Sequence[Sequence[bool]]`, *optional*):
            For each sequence of the data set, True on each token that a reader would begin a part with; for the block
            lift.
        dials (`Sequence[float]`, *optional*, defaults to 0, 0.1, ... 1):
            Places of the dial to measure, from 0 to 1, both among them.
        num_previous_blocks (`Sequence[int]`, *optional*, defaults to 0 and 1):
            Numbers of blocks before a token's own to measure own and other blocks with, beside what the model has.

    Returns:
        [`ControlResults`]

    Raises:
        ValueError: for a model of another class, for fewer than two texts, for boundaries that do not fit them, and for
            dials that do not rise from 0 to 1.

    Example:

    ```python
    >>> results = measure_controls(model, dataset)
    >>> own, wrong = results.blocks[0].own, results.blocks[0].wrong
    >>> own.context_fidelity[-1], wrong.context_fidelity[-1], results.retention
    (0.86, 0.7, 1.02)
    ```
    """
    check_model("model", model)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    check_dials(dials)
    batches = list(evaluation_batches(model, dataset, batch_size, block_model))
    texts = Texts([inputs for inputs, _ in batches])
    if texts.number < 2:
        raise ValueError(
            f"`dataset` holds {texts.number} text(s); it must hold two at least, so that each can be measured on the "
            "blocks of another."
        )
    marks = None if boundaries is None else texts.line_of_lists("boundaries", boundaries)

    config = model.config
    localised = {layer for layer, value in enumerate(config.locality.locality_lambdas) if value > 0}
    layers = sorted(localised | {config.locality.num_hidden_layers - 1})
    if not localised:
        dials = dials[:1]  # the others would change nothing
    sweep, others, divergence, losses, own_starts = _at_dials(model, batches, texts, layers, dials)
    own = texts.line(own_starts)
    blocks, shares, on_blocks_losses = [], {}, {}
    for number in sorted({*num_previous_blocks, config.locality.num_previous_blocks}):
        is_own = localised and number == config.locality.num_previous_blocks
        measured = on_blocks(model, batches, texts, layers, own, number, at_dial_1=bool(is_own))
        blocks.append(measured.controls)
        shares |= {f"{kind} {number}": rows for kind, rows in measured.shares.items()}
        on_blocks_losses |= measured.losses
    losses |= {"self only": others["self_only"]} if localised else {}
    losses |= on_blocks_losses
    return ControlResults(
        layers=layers,
        num_sink_tokens=config.locality.num_sink_tokens,
        blocks=blocks,
        dials=sweep,
        perplexity_on_blocks={name: each.perplexity for name, each in on_blocks_losses.items()},
        **{f"{name}_perplexity": each.perplexity for name, each in others.items()},
        divergence=divergence,
        documents=DocumentSums(
            labels=losses["dial 0"].labels.int().tolist(),
            losses={name: each.rounded() for name, each in losses.items()},
            shares={
                name: [tuple(round(value, 4) for value in row) for row in rows.tolist()]
                for name, rows in shares.items()
            },
        ),
        block_lift=None if marks is None else _block_lift(texts, own, marks),
    )


def check_dials(dials: Sequence[float]) -> None:
    """
    Raises:
        ValueError: for places of the dial that do not rise from 0 to 1.
    """
    if [*dials] != sorted(set(dials)) or len(dials) < 2 or (dials[0], dials[-1]) != (0, 1):
        raise ValueError(f"`dials` are {[*dials]}; they must rise from 0 to 1, both among them.")


def _block_lift(texts: "Texts", own: torch.Tensor, marks: torch.Tensor) -> float:
    return block_lift(texts.apart(own - texts.first), texts.apart(marks, padding=False))


# --- dials


def _at_dials(
    model: PreTrainedModel,
    batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: "Texts",
    layers: list[int],
    dials: Sequence[float],
) -> tuple[list[DialFigures], dict[str, "_Losses"], float, dict[str, "_Losses"], list[torch.Tensor]]:
    """
    The dial sweep, the losses of other settings by name, the divergence, the losses at each dial, and the last layer's
    blocks of each batch.
    """
    config, own_starts = model.config, []
    losses = {dial: _Losses() for dial in dials}
    sums = dict.fromkeys(dials, 0.0)
    others = {name: _Losses() for name in ("self_only", "all_local", "all_local_self_only")}
    divergence = 0.0
    for index, (inputs, labels) in enumerate(batches):
        arguments = {"use_cache": False, "min_fidelity": 0.0}
        for dial in dials:
            outputs = model(**inputs, **arguments, locality_dial=dial, output_fidelity=layers)
            losses[dial].add(outputs, labels)
            sums[dial] = sums[dial] + _sums(outputs, outputs.fidelity_mask, config, layers).sum(-1)
            if dial == 0:
                free_logits = outputs.logits
                own_starts.append(outputs.block_starts[-1].cpu())
        divergence += _divergence(free_logits, outputs.logits, labels)
        del free_logits, outputs

        alone = inputs | {"block_starts": texts.rows(texts.place, index).to(labels.device)}
        with _set(config.locality, num_previous_blocks=0):
            others["self_only"].add(model(**alone, **arguments, locality_dial=dials[-1]), labels)
            with _set(config.locality, locality_schedule="localist"):
                others["all_local"].add(model(**inputs, **arguments, locality_dial=1.0), labels)
                others["all_local_self_only"].add(model(**alone, **arguments, locality_dial=1.0), labels)
    sweep = [DialFigures(dial, losses[dial].perplexity, _figures(sums[dial])) for dial in dials]
    num_labels = losses[dials[0]].num_labels
    by_name = {f"dial {dial:g}": each for dial, each in losses.items()}
    return sweep, others, divergence / num_labels if num_labels else math.nan, by_name, own_starts


class _Losses:
    """The losses of the labels, of each sequence: their sums, and how many there are."""

    def __init__(self) -> None:
        self.sums = self.labels = torch.zeros(0, dtype=torch.float64)

    def add(self, outputs: LocalityMeasurements, labels: torch.Tensor) -> None:
        sums, count = label_losses(outputs.logits, labels)
        self.sums = torch.cat((self.sums, sums.cpu().double()))  # not every device has float64
        self.labels = torch.cat((self.labels, count.cpu().double()))

    @property
    def num_labels(self) -> int:
        return int(self.labels.sum())

    @property
    def perplexity(self) -> float:
        return (self.sums.sum() / self.labels.sum()).exp().item()  # NaN without labels

    def between(self, other: "_Losses", weight: float) -> "_Losses":
        """What lies between these and the others, which have this weight."""
        result = _Losses()
        result.sums, result.labels = torch.lerp(self.sums, other.sums, weight), self.labels
        return result

    def rounded(self) -> list[float]:
        """The sums, to what a perplexity can show."""
        return [round(value, 3) for value in self.sums.tolist()]


def _divergence(free: torch.Tensor, dialled: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of `KL(free || dialled)` over the predictions of labels, in bits."""
    is_prediction = F.pad(labels != -100, (0, 1), value=False)[:, 1:].to(free.device)
    total = 0.0
    for row, places in enumerate(is_prediction):  # not all at once: logits are the largest thing there is
        total += divergence_bits(free[row, places], dialled[row, places]).sum().item()
    return total


@contextmanager
def _set(config: LocalityFields, **fields: Any) -> Iterator[None]:
    """Other settings, for as long as this lasts."""
    former = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(config, name, value)


# --- blocks


class Texts:
    """
    The texts of some batches in one line, one after the other without padding: `line` tensors have one entry for each
    token, and positions count along it.
    """

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        documents = [
            document_starts(*inputs["input_ids"].shape, inputs.get("attention_mask"), inputs.get("position_ids")).cpu()
            for inputs in batches
        ]
        self._is_token = [rows >= 0 for rows in documents]
        columns = [torch.arange(rows.shape[1]).expand_as(rows) for rows in documents]
        columns = torch.cat([rows[is_token] for rows, is_token in zip(columns, self._is_token, strict=True)])
        self._counts = [int(is_token.sum()) for is_token in self._is_token]
        #: Every token's own position.
        self.place = torch.arange(len(columns))
        self._shift = columns - self.place
        #: The first position of every token's text.
        self.first = self.line(documents)
        self._firsts = self.place[self.first == self.place]

    @property
    def number(self) -> int:
        """How many texts there are."""
        return len(self._firsts)

    def line(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The line of positions of each batch's rows, `(batch_size, length)` each."""
        entries = [each[is_token] for each, is_token in zip(rows, self._is_token, strict=True)]
        return torch.cat(entries) - self._shift

    def line_of_lists(self, name: str, lists: Sequence[Sequence[bool]]) -> torch.Tensor:
        """A line of truth values, given for each sequence of the data set; padding that stands in it too."""
        batches, entries = iter(lists), []
        num_rows = sum(len(each) for each in self._is_token)
        if len(lists) != num_rows:
            raise ValueError(f"`{name}` has {len(lists)} entries; the data set has {num_rows} sequences.")
        for is_token in self._is_token:
            for row in is_token:
                marks = torch.as_tensor(next(batches), dtype=torch.bool)
                if len(marks) > len(row) or row[len(marks) :].any():
                    raise ValueError(f"`{name}` holds {len(marks)} values for a sequence of another length.")
                entries.append(marks[row[: len(marks)]])
        return torch.cat(entries)

    def rows(self, line: torch.Tensor, index: int, padding: int | bool = -1) -> torch.Tensor:
        """The rows of one batch, `(batch_size, length)`, of a line of positions or truth values."""
        before = sum(self._counts[:index])
        part = slice(before, before + self._counts[index])
        is_token = self._is_token[index]
        rows = torch.full(is_token.shape, padding, dtype=line.dtype)
        rows[is_token] = line[part] if line.dtype == torch.bool else line[part] + self._shift[part]
        return rows

    def apart(self, line: torch.Tensor, padding: int | bool = -1) -> torch.Tensor:
        """A row for each text: `(num_texts, length of the longest)`."""
        return pad_sequence(line.tensor_split(self._firsts[1:]), batch_first=True, padding_value=padding)

    def of_next_text(self, starts: torch.Tensor) -> torch.Tensor:
        """The blocks of the text that follows each, and of those after it where that one is shorter."""
        end = len(starts)
        firsts = torch.cat((self._firsts[1:], torch.tensor([end])))[(self.first == self.place).cumsum(0) - 1]
        twice = torch.cat((starts, starts + end))
        return twice[firsts + self.place - self.first] - firsts + self.first

    def windows(self, length: int) -> torch.Tensor:
        return self.place - (self.place - self.first) % length

    def recent(self, length: int) -> torch.Tensor:
        """The first of the last `length` tokens, of the same text, at each position."""
        return torch.maximum(self.first, self.place - length + 1)

    def with_previous(self, starts: torch.Tensor, number: int) -> torch.Tensor:
        """Where the local set of each position begins that has these block starts."""
        return with_previous_blocks(starts[None], self.first[None], number).local_starts[0]


class MeasuredBlocks(NamedTuple):
    """
    Figures on the model's own blocks and on others; by the kind of blocks also what is apart for each sequence: block
    and outside share of the last layer, `(num_rows, 2)`, and, where they are asked for, the losses at dial 1.
    """

    controls: BlockControls
    shares: dict[str, torch.Tensor]
    losses: dict[str, _Losses]


def on_blocks(
    model: PreTrainedModel,
    batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: Texts,
    layers: list[int],
    own: torch.Tensor,
    num_previous_blocks: int,
    is_brief: bool = False,
    at_dial_1: bool = False,
) -> MeasuredBlocks:
    """
    Some layers on the model's own blocks and on others.

    Args:
        model ([`~transformers.PreTrainedModel`]), batches, texts ([`Texts`]), layers (`list[int]`):
            The model, what [`evaluation_batches`] gives, the texts in it, and the layers to measure.
        own (`torch.Tensor`):
            The line of block starts that the model finds.
        num_previous_blocks (`int`):
            Blocks before its own that are local to a token.
        is_brief (`bool`, *optional*, defaults to `False`):
            Whether wrong blocks are enough, without windows and recency.
        at_dial_1 (`bool`, *optional*, defaults to `False`):
            Whether to measure the losses at dial 1 too.
    """
    locality = model.config.locality
    num_sinks = locality.num_sink_tokens

    def local(starts: torch.Tensor) -> torch.Tensor:
        return texts.with_previous(starts, num_previous_blocks)

    def is_counted(local_starts: torch.Tensor) -> torch.Tensor:
        return local_starts - texts.first > num_sinks

    def mean_keys(local_starts: torch.Tensor, counted: torch.Tensor) -> float:
        return (texts.place - local_starts + 1)[counted].double().mean().item() + num_sinks

    wrong = texts.of_next_text(own)
    of_own, of_wrong = local(own), local(wrong)
    counted = is_counted(of_own) & is_counted(of_wrong)

    # By name, the argument that takes such starts, what they are at each length, and the local starts that they make.
    others = {
        "windows": ("block_starts", texts.windows, lambda length: local(texts.windows(length))),
        "recency": ("local_starts", texts.recent, texts.recent),
    }
    if is_brief:
        others = {}
    lengths = {}
    for name, (_, _, local_starts) in others.items():
        length = 1
        while (common := counted & is_counted(at_length := local_starts(length))).any():
            if mean_keys(at_length, common) >= mean_keys(of_own, common):
                lengths[name] = (max(1, length - 1), length)
                break
            length += 1
    for name, both in lengths.items():
        for length in both:
            counted = counted & is_counted(others[name][2](length))

    figures: dict[str, LocalityFigures] = {}
    shares: dict[str, torch.Tensor] = {}
    losses: dict[str, _Losses] = {}

    def measured(argument: str, starts: torch.Tensor, local_starts: torch.Tensor) -> tuple[Any, ...]:
        rows = _block_sums(model, batches, texts, layers, counted, argument, starts)
        sums = rows.sum(-1)
        sizes = [local_set_sizes(texts.place, local_starts, texts.first, locality, layer) for layer in layers]
        sums[:, 2] = torch.stack([size[counted].double().sum() for size in sizes])
        at_1 = _losses_at_dial_1(model, batches, texts, argument, starts) if at_dial_1 else _Losses()
        return _figures(sums), rows[-1, :2].T, at_1

    with _set(locality, num_previous_blocks=num_previous_blocks):
        for kind, starts, local_starts in (("own", own, of_own), ("wrong", wrong, of_wrong)):
            figures[kind], shares[kind], losses[kind] = measured("block_starts", starts, local_starts)
        for kind, both in lengths.items():
            argument, starts, local_starts = others[kind]
            low, high = (measured(argument, starts(length), local_starts(length)) for length in both)
            least, most = (mean_keys(local_starts(length), counted) for length in both)
            step, wanted = most - least, mean_keys(of_own, counted) - least
            weight = wanted / step if step else 0.0
            figures[kind], shares[kind] = _between(low[0], high[0], weight), torch.lerp(low[1], high[1], weight)
            losses[kind] = low[2].between(high[2], weight)
    controls = BlockControls(
        num_previous_blocks=num_previous_blocks,
        num_counted=int(counted.sum()),
        own=figures["own"],
        wrong=figures["wrong"],
        windows=figures.get("windows"),
        recency=figures.get("recency"),
        window_lengths=lengths.get("windows"),
        recency_lengths=lengths.get("recency"),
    )
    return MeasuredBlocks(controls, shares, losses if at_dial_1 else {})


def _losses_at_dial_1(
    model: PreTrainedModel,
    batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: Texts,
    argument: str,
    starts: torch.Tensor,
) -> _Losses:
    losses = _Losses()
    for index, (inputs, labels) in enumerate(batches):
        rows = {argument: texts.rows(starts, index).to(labels.device)}
        others = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        losses.add(model(**others, **rows, use_cache=False, locality_dial=1.0, min_fidelity=0.0), labels)
    return losses


def _block_sums(
    model: PreTrainedModel,
    batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: Texts,
    layers: list[int],
    counted: torch.Tensor,
    argument: str,
    starts: torch.Tensor,
) -> torch.Tensor:
    """`_sums` of all batches over the `counted` positions, on these starts; the number of keys is left at that."""
    decoder, sums = core_model(model).base_model, []
    for index, (inputs, _) in enumerate(batches):
        rows = {argument: texts.rows(starts, index).to(decoder.device)}
        others = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        outputs = decoder(
            **others, **rows, use_cache=False, output_fidelity=layers, locality_dial=0.0, min_fidelity=0.0
        )
        masks = [texts.rows(counted, index, padding=False)] * len(layers)
        sums.append(_sums(outputs, masks, model.config, layers))
    return torch.cat(sums, -1)


def _sums(
    outputs: LocalityMeasurements, masks: Sequence[torch.Tensor], config: PreTrainedConfig, layers: Sequence[int]
) -> torch.Tensor:
    """Of each row block and outside share, visible keys and number of the masked positions: `(num_layers, 4, rows)`."""
    measured = zip(layers, outputs.block_share, outputs.outside_share, outputs.block_starts, masks, strict=True)
    rows = []
    for layer, block, outside, starts, mask in measured:
        mask = mask.to(block.device)
        sums = [(share.mean(1) * mask).sum(1) for share in (block, outside)]
        sums += [(visible_keys(starts, config.locality, layer) * mask).sum(1), mask.sum(1)]
        # Not every device has float64.
        rows.append(torch.stack([each.float() for each in sums]).cpu().double())
    return torch.stack(rows)


def _figures(sums: torch.Tensor) -> LocalityFigures:
    block, outside, keys, count = sums.T
    return LocalityFigures(
        visible_keys=(keys / count).tolist(),
        context_fidelity=context_fidelity(block, outside).tolist(),
        context_share=((block + outside) / count).tolist(),
        fidelity=(1 - outside / count).tolist(),
    )


def _between(low: LocalityFigures, high: LocalityFigures, weight: float) -> LocalityFigures:
    """What lies between two figures, the second having this weight."""
    return LocalityFigures(
        **{
            name: [(1 - weight) * one + weight * other for one, other in zip(values, asdict(high)[name], strict=True)]
            for name, values in asdict(low).items()
        }
    )


def as_json(value: Any) -> Any:
    """What JSON can say of a value: `None` for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
