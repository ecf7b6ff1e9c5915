"""A model on its own blocks and on others, all on the same positions."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..modeling import LocalityMeasurements
from ..modeling.local_set import LocalSet
from .check_model import core_model
from .control_results import BlockControls, LocalityFigures
from .kept_attention import KeptAttention
from .locality_meter import label_losses, perplexity
from .share_sums import add_rows, share_means, share_sums
from .texts import Texts


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
        return perplexity(self.sums.sum().item(), self.num_labels)

    def between(self, other: "Losses", weight: float) -> "Losses":
        """What lies between these and the others, which have this weight."""
        result = Losses()
        result.sums, result.labels = torch.lerp(self.sums, other.sums, weight), self.labels
        return result

    def rounded(self) -> list[float]:
        """The sums, to what a perplexity can show."""
        return [round(value, 3) for value in self.sums.tolist()]


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
    windows, num_sinks = locality.sliding_windows, locality.num_sink_tokens
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

    def local_set(starts: torch.Tensor, window: int | None) -> LocalSet:
        return texts.local_set(starts, num_sinks, window)

    matched = {
        window: _match(local_starts, local_set, kinds, {window: 1}) for window in {windows[layer] for layer in layers}
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
            of_rows = torch.cat((sums["block_share"], sums["outside_share"]), -1)
            for at, (layer, of_layer) in enumerate(zip(some, _figures(add_rows(sums)), strict=True)):
                figures[kind, length, layer], rows[kind, length, layer] = of_layer, of_rows[:, at]
        if at_dial_1:  # one length for all layers that are local
            local = Counter(window for window, value in zip(windows, locality.locality_lambdas, strict=True) if value)
            _, lengths, weights = _match(local_starts, local_set, kinds, local)
            for kind, (low, high) in lengths.items():
                argument, starts = kinds[kind]
                found = {each: _losses_at_dial_1(model, batches, texts, argument, starts(each)) for each in {low, high}}
                losses[kind] = found[low].between(found[high], weights[kind])

    def between(values: dict[tuple[str, int | None, int], torch.Tensor], kind: str, layer: int) -> torch.Tensor:
        found = matched[windows[layer]]
        low, high = found.lengths[kind]
        return torch.lerp(values[kind, low, layer], values[kind, high, layer], found.weights[kind])

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
    local_starts: Callable[[str, int | None], torch.Tensor],
    local_set: Callable[[torch.Tensor, int | None], LocalSet],
    kinds: Iterable[str],
    num_layers: Mapping[int | None, int],
) -> Matched:
    """
    Lengths of windows and of last tokens that show as many keys as the own blocks do, on average over layers: so many
    with each of these sliding windows. `local_set` is of local starts and such a window.
    """

    def counted_too(counted: dict[int | None, torch.Tensor], *others: torch.Tensor) -> dict[int | None, torch.Tensor]:
        for each in others:
            counted = {window: mask & local_set(each, window).is_counted()[0] for window, mask in counted.items()}
        return counted

    def is_any(counted: dict[int | None, torch.Tensor]) -> bool:
        return any(mask.any() for mask in counted.values())

    def mean_keys(of_kind: torch.Tensor, counted: dict[int | None, torch.Tensor]) -> float:
        keys = count = 0.0
        for window, mask in counted.items():
            keys += num_layers[window] * local_set(of_kind, window).sizes()[0, mask].double().sum().item()
            count += num_layers[window] * mask.sum().item()
        return keys / count

    own = local_starts("own", None)
    everywhere = torch.ones_like(own, dtype=torch.bool)
    counted = counted_too(dict.fromkeys(num_layers, everywhere), own, local_starts("wrong", None))
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
) -> list[dict[str, torch.Tensor]]:
    """
    The sums of all rows (see [`share_sums`]) over the positions that are `counted` in each layer, on each of these
    starts, given by the argument that takes them, and of these layers; float64, on the CPU.
    """
    decoder = core_model(model).base_model
    sums: list[list[dict[str, torch.Tensor]]] = [[] for _ in on_starts]
    for index, (inputs, _) in enumerate(batches):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "block_starts"}
        attended = KeptAttention(model.config)
        attended.run(decoder, inputs)
        masks = {layer: texts.rows(line, index, padding=False) for layer, line in counted.items()}
        for found, (argument, starts, layers) in zip(sums, on_starts, strict=True):
            rows = {argument: texts.rows(starts, index).to(decoder.device)}
            of_batch = share_sums(attended.measure(inputs, layers, **rows), [masks[layer] for layer in layers])
            found.append({name: each.cpu().double() for name, each in of_batch.items()})
    return [{name: torch.cat([each[name] for each in found]) for name in found[0]} for found in sums]


def figures_of(totals: Mapping[str, torch.Tensor]) -> LocalityFigures:
    """The figures that totals (see [`add_rows`]) come to."""
    return LocalityFigures(*_figures(totals).T.tolist())


def _figures(totals: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The fields of [`LocalityFigures`] of each layer, `(num_layers, 4)`."""
    means = share_means(totals)
    fidelity = 1 - means["outside_share"]  # no number where no position counts, as the others
    return torch.cat((means["visible_keys"], means["context_fidelity"], means["context_share"], fidelity), -1)
