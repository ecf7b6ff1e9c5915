"""A model on its own blocks and on others, all on the same positions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import LocalityMeasurements
from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.locality import context_fidelity
from .attended import Attended
from .check_model import core_model
from .control_results import BlockControls, LocalityFigures
from .locality_meter import label_losses
from .visible_keys import local_set_sizes, visible_keys


@contextmanager
def setting(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes of a configuration or a model, for as long as this lasts."""
    former = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)


class Losses:
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

    def between(self, other: "Losses", weight: float) -> "Losses":
        """What lies between these and the others, which have this weight."""
        result = Losses()
        result.sums, result.labels = torch.lerp(self.sums, other.sums, weight), self.labels
        return result

    def rounded(self) -> list[float]:
        """The sums, to what a perplexity can show."""
        return [round(value, 3) for value in self.sums.tolist()]


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
    losses: dict[str, Losses]


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

    # What is measured: the argument, the starts that it takes, and the local starts that they make.
    measured = {("own", None): ("block_starts", own, of_own), ("wrong", None): ("block_starts", wrong, of_wrong)}
    for name, both in lengths.items():
        argument, starts, local_starts = others[name]
        measured |= {(name, length): (argument, starts(length), local_starts(length)) for length in both}
    results = {}
    with setting(locality, num_previous_blocks=num_previous_blocks):
        on_starts = [(argument, starts) for argument, starts, _ in measured.values()]
        rows = _block_sums(model, batches, texts, layers, counted, on_starts)
        for (key, (argument, starts, local_starts)), row_sums in zip(measured.items(), rows, strict=True):
            sums = row_sums.sum(-1)
            sizes = [local_set_sizes(texts.place, local_starts, texts.first, locality, layer) for layer in layers]
            sums[:, 2] = torch.stack([size[counted].double().sum() for size in sizes])
            at_1 = _losses_at_dial_1(model, batches, texts, argument, starts) if at_dial_1 else Losses()
            results[key] = figures_of(sums), row_sums[-1, :2].T, at_1

    figures, shares, losses = ({kind: results[kind, None][part] for kind in ("own", "wrong")} for part in range(3))
    for name, (low, high) in lengths.items():
        least, most = (mean_keys(others[name][2](length), counted) for length in (low, high))
        step, wanted = most - least, mean_keys(of_own, counted) - least
        weight = wanted / step if step else 0.0
        one, other = results[name, low], results[name, high]
        figures[name], shares[name] = _between(one[0], other[0], weight), torch.lerp(one[1], other[1], weight)
        losses[name] = one[2].between(other[2], weight)
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
) -> Losses:
    losses = Losses()
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
    on_starts: Sequence[tuple[str, torch.Tensor]],
) -> list[torch.Tensor]:
    """
    `layer_sums` of all batches over the `counted` positions, on each of these starts, given by the argument that takes
    them; the number of keys is left at that.
    """
    decoder = core_model(model).base_model
    sums: list[list[torch.Tensor]] = [[] for _ in on_starts]
    for index, (inputs, _) in enumerate(batches):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        attended = Attended(model.config)
        decoder(**inputs, use_cache=False, locality_dial=0.0, min_fidelity=0.0, observer=attended.keep)
        masks = [texts.rows(counted, index, padding=False)] * len(layers)
        for found, (argument, starts) in zip(sums, on_starts, strict=True):
            rows = {argument: texts.rows(starts, index).to(decoder.device)}
            found.append(layer_sums(attended.measure(inputs, layers, **rows), masks, model.config, layers))
    return [torch.cat(found, -1) for found in sums]


def layer_sums(
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


def figures_of(sums: torch.Tensor) -> LocalityFigures:
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
