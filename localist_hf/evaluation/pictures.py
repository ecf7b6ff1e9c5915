"""Pictures of what was measured: for eyes that see no colours too, and small enough to be published."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..configuration import VARIANTS
from .differences import check_baseline
from .statistics import Interval, mean_interval
from .tables import layer_series


# Of Okabe and Ito, who chose them for the colour-blind; grey in place of their yellow, which is faint on white. As many
# markers as have no common factor with the colours, so that no two of the first 88 configurations look alike.
_COLOURS = ("#000000", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#7f7f7f")
_MARKERS = "osD^vPXp*<>"

#: What can be drawn over depth, and what the picture calls it: title and axis.
_QUANTITIES = {
    "context_fidelity": (
        "Attention to other words that stays in the local set",
        "context fidelity (share, 0 to 1)",
    ),
    "context_share": ("Attention that goes to other words", "context share (of all attention, 0 to 1)"),
    "self_share": ("Attention on the token itself", "self share (of all attention, 0 to 1)"),
    "sink_share": ("Attention on the first tokens", "sink share (of all attention, 0 to 1)"),
    "block_share": ("Attention on other words in the local set", "block share (of all attention, 0 to 1)"),
    "outside_share": ("Attention outside of the local set", "outside share (of all attention, 0 to 1)"),
    "fidelity": ("Attention inside the local set", "fidelity (share of all attention, 0 to 1)"),
    "entropy": ("How widely the attention is spread", "entropy of the attention (bits)"),
}


def plot_over_depth(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    quantity: str,
    path: str | Path | BinaryIO,
    title: str | None = None,
    lambdas: Sequence[float] | None = None,
) -> Figure:
    """
    Draws a quantity of every layer, a line for each configuration; with several runs of one, the mean and a band, the
    95 % interval by Student's t.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs.
        quantity (`str`):
            `"context_fidelity"`, `"context_share"`, `"self_share"`, `"sink_share"`, `"block_share"`, `"outside_share"`,
            `"fidelity"` or `"entropy"`.
        path (`str`, `Path` or binary file):
            PNG file to write.
        title (`str`, *optional*):
            Title above the picture. Defaults to what the quantity is, in plain words.
        lambdas (`Sequence[float]`, *optional*):
            A schedule to draw with them.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.

    Raises:
        ValueError: for another quantity.
    """
    if quantity not in _QUANTITIES:
        raise ValueError(f"`quantity` is {quantity!r}; allowed are {', '.join(map(repr, _QUANTITIES))}.")
    figure, axes = _figure_with_axes()
    if lambdas is not None:
        axes.plot(lambdas, linestyle=":", marker=".", color="#555555", label="schedule (lambda)")
    for (name, runs), style in zip(results.items(), _styles(results), strict=True):
        layers = zip(*(layer_series(metrics, quantity) for metrics in runs), strict=True)
        intervals = [mean_interval(values) for values in layers]
        _draw_line(axes, range(len(intervals)), intervals, name, style)
    words, axis = _QUANTITIES[quantity]
    axes.set(xlabel="layer", ylabel=axis, title=words if title is None else title)
    if quantity == "entropy":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _add_legend(figure, results.values())
    figure.savefig(path, dpi=120)
    return figure


def plot_over_dial(
    dials: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    path: str | Path | BinaryIO,
    labels: Mapping[str, str] | None = None,
    title: str = "Perplexity as the dial closes the local sets",
) -> Figure:
    """
    Draws the perplexity over the dial, a line for each configuration; with several runs of one, the mean and a band,
    the 95 % interval by Student's t. What has one place of the dial only, as a configuration with free attention, is a
    dashed line right across.

    Args:
        dials (`Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]`):
            Name of each configuration to what each of its runs has at each place of the dial, `"dial"` and
            `"perplexity"`: the `controls["dials"]` of a [`RunRecord`], the same dials for all runs of a configuration.
        path (`str`, `Path` or binary file):
            PNG file to write.
        labels (`Mapping[str, str]`, *optional*):
            What the picture calls a configuration, where not by its name.
        title (`str`, *optional*):
            Title above the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.

    Raises:
        ValueError: where two runs of a configuration were measured at other dials.
    """
    figure, axes = _figure_with_axes()
    for (name, runs), (colour, marker) in zip(dials.items(), _styles(dials), strict=True):
        places = [place["dial"] for place in runs[0]]
        if any([place["dial"] for place in run] != places for run in runs):
            raise ValueError(f"`dials[{name!r}]` holds runs at dials that differ; all must be at those of the first.")
        intervals = [
            mean_interval([math.nan if place["perplexity"] is None else place["perplexity"] for place in of_runs])
            for of_runs in zip(*runs, strict=True)
        ]
        label = (labels or {}).get(name, name)
        if len(places) > 1:
            _draw_line(axes, places, intervals, label, (colour, marker))
        else:
            axes.axhline(intervals[0].mean, linestyle="--", color=colour, label=label)
            if len(runs) > 1:
                axes.axhspan(intervals[0].low, intervals[0].high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="dial d (0: attention as trained, 1: closed)", ylabel="perplexity (per token)", title=title)
    axes.set_xlim(-0.02, 1.02)
    _add_legend(figure, dials.values())
    figure.savefig(path, dpi=120)
    return figure


# Where a name may stand beside its point: how far in points, and which side of the name is nearest.
_PLACES = (
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((5, 5), "left", "bottom"),
    ((-5, 5), "right", "bottom"),
    ((5, -5), "left", "top"),
    ((-5, -5), "right", "top"),
)


def plot_frontier(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    path: str | Path | BinaryIO,
    labels: Mapping[str, str] | None = None,
    title: str = "What locality costs, and what it gives",
) -> Figure:
    """
    Draws the perplexity, as a multiple of the baseline's mean, against the context fidelity of the last layer: a point
    for each configuration, with the 95 % intervals by Student's t as bars where it has several runs. Names stand beside
    the points, or in a legend where they would cover one another. A configuration whose context fidelity is undefined
    is left out.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs (see [`LocalityMeter.compute`]).
        baseline (`str`):
            The configuration that the perplexities refer to; one of `results`.
        path (`str`, `Path` or binary file):
            PNG file to write.
        labels (`Mapping[str, str]`, *optional*):
            What the picture calls a configuration, where not by its name.
        title (`str`, *optional*):
            Title above the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    check_baseline(results, baseline)
    last = len(layer_series(results[baseline][0], "fidelity")) - 1
    reference = fmean(metrics["perplexity"] for metrics in results[baseline])
    figure, axes = _figure_with_axes()
    points = []
    for (name, runs), (colour, marker) in zip(results.items(), _styles(results), strict=True):
        psi = mean_interval([metrics[f"context_fidelity_layer_{last}"] for metrics in runs])
        ratio = mean_interval([metrics["perplexity"] / reference for metrics in runs])
        if math.isnan(psi.mean):
            continue
        label = (labels or {}).get(name, name)
        points.append((label, psi, ratio))
        bars = {}
        if len(runs) > 1:
            bars = {
                "xerr": psi.half_width,
                "yerr": ratio.half_width,
                "capsize": 2,
                "elinewidth": 1,
                "ecolor": "#555555",
            }
        axes.errorbar(
            psi.mean,
            ratio.mean,
            **bars,
            marker=marker,
            color=colour,
            markersize=7,
            linestyle="",
            label=label,
        )
    axes.axhline(1, linestyle="--", linewidth=1, color="#7f7f7f", zorder=0)
    axes.set(
        xlabel="context fidelity of the last layer (share, 0 to 1)",
        ylabel=f"perplexity (multiple of the mean of {(labels or {}).get(baseline, baseline)})",
        title=f"{title}\nmean and 95 % interval over seeds" if max(map(len, results.values())) > 1 else title,
    )
    axes.margins(0.12)
    axes.set_xlim(max(-0.02, axes.get_xlim()[0]), min(1.02, axes.get_xlim()[1]))
    if not _label_points(figure, axes, points):
        figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    return figure


def _label_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, Interval, Interval]]) -> bool:
    """Writes each point's name beside it, if that can be done without covering anything; whether it could."""
    figure.draw_without_rendering()  # by this all places on the page are known
    _, line = axes.transData.transform((0, 1))  # of the baseline's mean
    taken = [Bbox.from_extents(axes.bbox.x0, line - 1, axes.bbox.x1, line + 1)]
    for _, psi, ratio in points:
        across, up = ((at.mean, at.mean) if math.isnan(at.low) else (at.low, at.high) for at in (psi, ratio))
        for corners in ([(end, ratio.mean) for end in across], [(psi.mean, end) for end in up]):
            (left, bottom), (right, top) = axes.transData.transform(corners)
            taken.append(Bbox.from_extents(left - 5, bottom - 5, right + 5, top + 5))
    names = []
    for label, psi, ratio in points:
        for offset, side, edge in _PLACES:
            name = axes.annotate(
                label, (psi.mean, ratio.mean), offset, textcoords="offset points", ha=side, va=edge, fontsize=9
            )
            name.set_in_layout(False)
            box = name.get_window_extent()
            is_inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if is_inside and not any(map(box.overlaps, taken)):
                break
            name.remove()
        else:
            for name in names:
                name.remove()
            return False
        names.append(name)
        taken.append(box.padded(2))  # matplotlib before 3.11 rounds the size of a text
    return True


def _figure_with_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles(names: Collection[str]) -> list[tuple[str, str]]:
    """A colour and a marker for each configuration: a variant has its own everywhere, others what is left."""
    order = {name: place for place, name in enumerate(VARIANTS)}
    free = (place for place in count() if place not in {order.get(name) for name in names})
    places = [order[name] if name in order else next(free) for name in names]
    return [(_COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]) for place in places]


def _draw_line(
    axes: Axes, places: Sequence[float], intervals: Sequence[Interval], label: str, style: tuple[str, str]
) -> None:
    """A line through the means, and a band between the ends of the intervals where there are any."""
    colour, marker = style
    axes.plot(places, [interval.mean for interval in intervals], marker=marker, markersize=5, color=colour, label=label)
    if any(interval.count > 1 for interval in intervals):
        low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _add_legend(figure: Figure, groups: Iterable[Sequence[Any]]) -> None:
    """Beside the axes, so that it covers nothing; it tells what bands and bars are, where there are any."""
    title = "mean and 95 % interval over seeds" if any(len(runs) > 1 for runs in groups) else None
    figure.legend(loc="outside right center", frameon=False, title=title, title_fontsize="medium")


# From the bottom to the top: what a reader sees as one line is then the fidelity, below "outside". Colours of Okabe and
# Ito, who chose them for the colour-blind; hatches tell the bands apart without colours.
_BANDS = {
    "self_share": ("self: the token itself", "#e69f00", "///"),
    "sink_share": ("sink: the first tokens", "#cc79a7", "..."),
    "block_share": ("block: other words in the local set", "#0072b2", ""),
    "outside_share": ("outside: other words elsewhere", "#d9d9d9", "xx"),
}
_PANELS_IN_A_ROW = 4


def plot_shares_over_depth(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    path: str | Path | BinaryIO,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """
    Draws where the attention of every layer goes, as bands one above the other that add up to 1: a panel for the
    baseline and one beside it for each other configuration. Of several runs the means.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs (see [`LocalityMeter.compute`]).
        baseline (`str`):
            The configuration that comes first; one of `results`, perhaps the only one.
        path (`str`, `Path` or binary file):
            PNG file to write.
        labels (`Mapping[str, str]`, *optional*):
            What a panel calls a configuration, where not by its name.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    check_baseline(results, baseline)
    names = [baseline, *(name for name in results if name != baseline)]
    num_columns = min(len(names), _PANELS_IN_A_ROW)
    num_rows = -(-len(names) // num_columns)
    # Wide enough for the legend below, however few panels there are.
    size = (max(5.6, 3.2 * num_columns + 0.6), 3.0 * num_rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    handles = {}
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.flat[: len(names)], names, strict=True):
        bottom = None
        for share, (label, colour, hatch) in _BANDS.items():
            layers = zip(*(layer_series(metrics, share) for metrics in results[name]), strict=True)
            values = [fmean(of_layer) for of_layer in layers]
            bottom = [0.0] * len(values) if bottom is None else bottom
            bars = panel.bar(
                range(len(values)), values, 1.0, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5
            )
            if any(value > 0 for value in values):
                handles.setdefault(label, bars)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        panel.set(title=(labels or {}).get(name, name), ylim=(0, 1), xlim=(-0.5, len(bottom) - 0.5), xlabel="layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("share of the attention")
    handles = {label: handles[label] for label, *_ in reversed(_BANDS.values()) if label in handles}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100)
    return figure


def plot_heads(values: torch.Tensor, path: str | Path | BinaryIO, title: str | None = None) -> Figure:
    """
    Draws the context fidelity of every head, layers from left to right and heads one above the other; grey where it is
    undefined.

    Args:
        values (`torch.Tensor` of shape `(num_layers, num_heads)`):
            From a [`LocalityProfile`].
        path (`str`, `Path` or binary file):
            PNG file to write.
        title (`str`, *optional*):
            Title above the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.
    """
    num_layers, num_heads = values.shape
    size = (min(12.0, max(4.8, 0.24 * num_layers + 1.8)), min(9.0, max(2.2, 0.24 * num_heads + 1.2)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    # Cividis is made for the colour-blind, and grows lighter throughout, so that it reads without colours too.
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#bbbbbb")
    image = axes.imshow(values.T.numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set(xlabel="layer", ylabel="head", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="context fidelity", ticks=[0, 0.25, 0.5, 0.75, 1])
    figure.savefig(path, dpi=110)
    return figure


def plot_explanation(blocks: Sequence[Mapping[str, Any]], title: str, path: str | Path | BinaryIO) -> Figure:
    """
    Draws what a prediction rests on, block by block: what changes without each, and beside it the attention that each
    has.

    Args:
        blocks (`Sequence[Mapping[str, Any]]`):
            Of each block, in the order of the text, its `"text"`, its `"influence"` in bits, and its `"attention"` by
            layer.
        title (`str`):
            Title above the picture.
        path (`str`, `Path` or binary file):
            PNG file to write.

    Returns:
        [`~matplotlib.figure.Figure`]: what was written.
    """
    places = range(len(blocks))
    figure = Figure(figsize=(9.0, min(24.0, 1.4 + 0.32 * len(blocks))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [block["influence"] for block in blocks], color=_COLOURS[0])
    left.set(xlabel="change without it, bits")
    names = list(blocks[0]["attention"])
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        shares = [block["attention"][name] for block in blocks]
        offset = (number - (len(names) - 1) / 2) * height
        right.barh([place + offset for place in places], shares, height, color=_COLOURS[number + 1], label=name)
    right.set(xlabel="share of the attention")
    figure.legend(loc="outside lower right", ncols=len(names), frameon=False)
    # A dollar sign would begin a formula.
    words = [" ".join(block["text"].split()).replace("$", r"\$") or "(space)" for block in blocks]
    shown = [text if len(text) <= 32 else f"{text[:20]} ... {text[-7:]}" for text in words]
    left.set_yticks(places, [f"{place}: {text}" for place, text in zip(places, shown, strict=True)])
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title.replace("$", r"\$"))
    figure.savefig(path, dpi=100)
    return figure
