"""A model on its own blocks and on others, all on the same positions."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import LocalityMeasurements
from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.fidelity import context_fidelity
from .attended import Attended
from .check_model import core_model
from .control_results import BlockControls, LocalityFigures
from .locality_meter import label_losses
from .visible_keys import LocalSets, visible_keys


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


class Matched(NamedTuple):
    """
    The lengths of windows and of last tokens that show as many keys as the own blocks do, and where all are compared.

    Args:
        counted (`dict[int | None, torch.BoolTensor]`):
            For each sliding window (`None`: none), the line of positions that count under every kind of blocks.
        lengths (`dict[str, tuple[int | None, int | None]]`), weights (`dict[str, float]`):
            For each kind, the two lengths between which it shows as many keys, and the weight of the second; `None` for
            own and wrong blocks, which have none.
    """

    counted: dict[int | None, torch.Tensor]
    lengths: dict[str, tuple[int | None, int | None]]
    weights: dict[str, float]


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
    Some layers on the model's own blocks and on others. What a layer's sliding window hides is no part of a local set,
    so layers with other windows count other positions, and other lengths show as many keys.

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
    windows, sets = locality.sliding_windows, LocalSets(texts.place, texts.first, locality.num_sink_tokens)
    wrong = texts.of_next_text(own)
    # By kind, the argument that takes such starts, and what they are at each length, where they have one.
    kinds: dict[str, tuple[str, Callable[[int | None], torch.Tensor]]] = {
        "own": ("block_starts", lambda _: own),
        "wrong": ("block_starts", lambda _: wrong),
    }
    if not is_brief:
        kinds |= {"windows": ("block_starts", texts.windows), "recency": ("local_starts", texts.recent)}

    def local_starts(kind: str, length: int | None) -> torch.Tensor:
        argument, starts = kinds[kind]
        line = starts(length)
        return line if argument == "local_starts" else texts.with_previous(line, num_previous_blocks)

    matched = {
        window: _match(sets, local_starts, kinds, {window: 1}) for window in {windows[layer] for layer in layers}
    }
    counted = {layer: matched[windows[layer]].counted[windows[layer]] for layer in layers}
    # What is measured of which layers.
    wanted: dict[tuple[str, int | None], list[int]] = {}
    for layer in layers:
        for kind, lengths in matched[windows[layer]].lengths.items():
            for length in {*lengths}:
                wanted.setdefault((kind, length), []).append(layer)
    figures, rows, losses = {}, {}, {}
    with setting(locality, num_previous_blocks=num_previous_blocks):
        on_starts = [(kinds[kind][0], kinds[kind][1](length), some) for (kind, length), some in wanted.items()]
        for ((kind, length), some), sums in zip(
            wanted.items(), _block_sums(model, batches, texts, counted, on_starts), strict=True
        ):
            for layer, of_rows in zip(some, sums, strict=True):
                total = of_rows.sum(-1)
                total[2] = sets.sizes(local_starts(kind, length), windows[layer])[counted[layer]].double().sum()
                figures[kind, length, layer], rows[kind, length, layer] = _figures(total), of_rows[:2].T
        if at_dial_1:  # one length for all layers that are local
            local = Counter(window for window, value in zip(windows, locality.locality_lambdas, strict=True) if value)
            _, lengths, weights = _match(sets, local_starts, kinds, local)
            for kind, (low, high) in lengths.items():
                argument, starts = kinds[kind]
                found = {each: _losses_at_dial_1(model, batches, texts, argument, starts(each)) for each in {low, high}}
                losses[kind] = found[low].between(found[high], weights[kind])

    def between(values: dict[tuple[str, int | None, int], torch.Tensor], kind: str, layer: int) -> torch.Tensor:
        match = matched[windows[layer]]
        low, high = match.lengths[kind]
        return torch.lerp(values[kind, low, layer], values[kind, high, layer], match.weights[kind])

    tables = {}
    for kind in kinds:
        of_layers = {layer: kind in matched[windows[layer]].lengths for layer in layers}
        nothing = torch.full((4,), math.nan, dtype=torch.float64)
        table = [between(figures, kind, layer) if is_there else nothing for layer, is_there in of_layers.items()]
        tables[kind] = LocalityFigures(*torch.stack(table).T.tolist()) if any(of_layers.values()) else None
    last = layers[-1]
    of_last = matched[windows[last]].lengths
    controls = BlockControls(
        num_previous_blocks=num_previous_blocks,
        num_counted=int(counted[last].sum()),
        own=tables["own"],
        wrong=tables["wrong"],
        windows=tables.get("windows"),
        recency=tables.get("recency"),
        window_lengths=of_last.get("windows"),
        recency_lengths=of_last.get("recency"),
    )
    return MeasuredBlocks(controls, {kind: between(rows, kind, last) for kind in of_last}, losses)


def _match(
    sets: LocalSets,
    local_starts: Callable[[str, int | None], torch.Tensor],
    kinds: Iterable[str],
    num_layers: Mapping[int | None, int],
) -> Matched:
    """
    Lengths of windows and of last tokens that show as many keys as the own blocks do, on average over layers: so many
    with each of these sliding windows.
    """

    def counted_too(counted: dict[int | None, torch.Tensor], *others: torch.Tensor) -> dict[int | None, torch.Tensor]:
        for each in others:
            counted = {window: mask & sets.are_counted(each, window) for window, mask in counted.items()}
        return counted

    def is_any(counted: dict[int | None, torch.Tensor]) -> bool:
        return any(mask.any() for mask in counted.values())

    def mean_keys(of_kind: torch.Tensor, counted: dict[int | None, torch.Tensor]) -> float:
        keys = count = 0.0
        for window, mask in counted.items():
            keys += num_layers[window] * sets.sizes(of_kind, window)[mask].double().sum().item()
            count += num_layers[window] * mask.sum().item()
        return keys / count

    own = local_starts("own", None)
    counted = counted_too(dict.fromkeys(num_layers, sets.first >= 0), own, local_starts("wrong", None))
    lengths: dict[str, tuple[int | None, int | None]] = {"own": (None, None), "wrong": (None, None)}
    weights, found = dict.fromkeys(lengths, 0.0), {}
    for kind in kinds:
        length = 1
        while kind not in lengths and is_any(common := counted_too(counted, at_length := local_starts(kind, length))):
            if mean_keys(at_length, common) >= mean_keys(own, common):
                found[kind] = max(1, length - 1), length
                break
            length += 1
    for kind, (low, high) in found.items():
        if is_any(common := counted_too(counted, local_starts(kind, low), local_starts(kind, high))):
            counted, lengths[kind] = common, (low, high)
    for kind, (low, high) in lengths.items():
        if low is not None:
            least, most = (mean_keys(local_starts(kind, length), counted) for length in (low, high))
            weights[kind] = (mean_keys(own, counted) - least) / (most - least) if most != least else 0.0
    return Matched(counted, lengths, weights)


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
    counted: Mapping[int, torch.Tensor],
    on_starts: Sequence[tuple[str, torch.Tensor, list[int]]],
) -> list[torch.Tensor]:
    """
    `layer_sums` of all batches over the positions that are `counted` in each layer, on each of these starts, given by
    the argument that takes them, and of these layers; the number of keys is left at that.
    """
    decoder = core_model(model).base_model
    sums: list[list[torch.Tensor]] = [[] for _ in on_starts]
    for index, (inputs, _) in enumerate(batches):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        attended = Attended(model.config)
        decoder(**inputs, use_cache=False, locality_dial=0.0, min_fidelity=0.0, observer=attended.keep)
        masks = {layer: texts.rows(line, index, padding=False) for layer, line in counted.items()}
        for found, (argument, starts, layers) in zip(sums, on_starts, strict=True):
            rows = {argument: texts.rows(starts, index).to(decoder.device)}
            measured = attended.measure(inputs, layers, **rows)
            found.append(layer_sums(measured, [masks[layer] for layer in layers], model.config, layers))
    return [torch.cat(found, -1) for found in sums]


def layer_sums(
    outputs: LocalityMeasurements,
    masks: Sequence[torch.Tensor],
    config: PreTrainedConfig,
    layers: Sequence[int],
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Of each row block and outside share, visible keys and number of the masked positions: `(num_layers, 4, rows)`; for
    `documents` see [`LocalityMeter.update`].
    """
    measured = zip(layers, outputs.block_share, outputs.outside_share, outputs.block_starts, masks, strict=True)
    rows = []
    for layer, block, outside, starts, mask in measured:
        mask = mask.to(block.device)
        sums = [(share.mean(1) * mask).sum(1) for share in (block, outside)]
        sums += [(visible_keys(starts, config.locality, layer, documents) * mask).sum(1), mask.sum(1)]
        # Not every device has float64.
        rows.append(torch.stack([each.float() for each in sums]).cpu().double())
    return torch.stack(rows)


def figures_of(sums: torch.Tensor) -> LocalityFigures:
    return LocalityFigures(*_figures(sums).T.tolist())


def _figures(sums: torch.Tensor) -> torch.Tensor:
    """The fields of [`LocalityFigures`], of sums `(..., 4)`."""
    block, outside, keys, count = sums.unbind(-1)
    shares = (block + outside) / count, 1 - outside / count
    return torch.stack((keys / count, context_fidelity(block, outside), *shares), dim=-1)
