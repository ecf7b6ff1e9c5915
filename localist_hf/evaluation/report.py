"""Tables and pictures of what was measured."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

import matplotlib
import torch
from matplotlib.figure import Figure

from ..modeling.localist_model import SHARES
from .locality_report import LocalityReport


def layer_series(metrics: Mapping[str, float], quantity: str) -> list[float]:
    """`metrics[f"{quantity}_layer_{l}"]` for l = 0, 1, ... as far as there are any."""
    series = []
    while (name := f"{quantity}_layer_{len(series)}") in metrics:
        series.append(metrics[name])
    return series


#: What a column of a table is called.
_TITLES = {
    "context_fidelity": "context fidelity",
    "context_share": "context share",
    "self_share": "self",
    "sink_share": "sink",
    "fidelity": "fidelity",
}


def layer_table(metrics: Mapping[str, float], lambdas: Sequence[float]) -> str:
    """
    A table of one model, a line for each layer: its place in the schedule, its context fidelity, the shares of the
    attention that go to other words, to the token itself and to sinks, its fidelity, and its entropy in bits.

    Args:
        metrics (`Mapping[str, float]`):
            As [`LocalityMeter.compute`] gives them.
        lambdas (`Sequence[float]`):
            The locality of each layer that the schedule says.
    """
    columns = {title: (layer_series(metrics, name), 3) for name, title in _TITLES.items()}
    return _layer_table({"lambda": (lambdas, 3), **columns, "entropy (bits)": (layer_series(metrics, "entropy"), 2)})


def report_table(report: LocalityReport, lambdas: Sequence[float]) -> str:
    """
    A table of all that was measured of one model's layers, and what its columns are.

    Args:
        report ([`LocalityReport`]):
            From [`locality_report`].
        lambdas (`Sequence[float]`):
            The locality of each layer that the schedule says.
    """
    names = ("context_share", *SHARES, "fidelity", "entropy", "visible_keys")
    values = {name: layer_series(report.metrics, name) for name in ("context_fidelity", *names)}
    columns = {"lambda": (lambdas, 3), "psi": (values["context_fidelity"], 3)}
    if (controls := report.controls) is not None:
        columns["psi, own"] = (controls.own.context_fidelity, 3)
        columns["psi, wrong"] = (controls.wrong.context_fidelity, 3)
    columns |= {name.removesuffix("_share"): (values[name], 3) for name in ("context_share", *SHARES, "fidelity")}
    columns |= {"bits": (values["entropy"], 2), "keys": (values["visible_keys"], 1)}
    legend = [
        "psi: context fidelity; of the attention to other words (context) the part inside the local set (block)",
        "bits: entropy of the attention; keys: keys in the local set",
    ]
    if controls is not None:
        legend.append(
            "own, wrong: psi on the last layer's blocks, and on those of another text, at the "
            f"{controls.num_counted} positions that count under both"
        )
    return "\n".join([_layer_table(columns), "", *legend])


def heads_table(values: torch.Tensor) -> str:
    """
    A table of shares, a line for each layer and a column for each head, in percent; a hyphen where one is undefined.

    Args:
        values (`torch.Tensor` of shape `(num_layers, num_heads)`):
            Such as the context fidelity of a [`LocalityProfile`].
    """
    lines = ["layer  " + " ".join(f"{head:3d}" for head in range(values.shape[1]))]
    for layer, heads in enumerate((100 * values).tolist()):
        lines.append(f"{layer:5d}  " + " ".join(_number(value, 0).rjust(3) for value in heads))
    return "\n".join(lines)


def _layer_table(columns: Mapping[str, tuple[Sequence[float], int]]) -> str:
    """A line for each layer; each column by its title, with its values and the digits to show of them."""
    widths = [max(6, len(title)) for title in columns]
    lines = ["  ".join(["layer", *(title.rjust(width) for title, width in zip(columns, widths, strict=True))])]
    cells = [
        [_number(value, digits).rjust(width) for value in values]
        for (values, digits), width in zip(columns.values(), widths, strict=True)
    ]
    for layer, of_layer in enumerate(zip(*cells, strict=True)):
        lines.append(f"{layer:5d}  " + "  ".join(of_layer))
    return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """
    The mean of several runs and, in brackets, the least and the greatest; of one run, its number. A hyphen where one
    of them is undefined (NaN).
    """
    mean = _number(fmean(values), digits)
    is_alone = len(values) == 1 or any(map(math.isnan, values))
    return mean if is_alone else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def comparison_table(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    labels: Mapping[str, str] | None = None,
    every_layer: bool = True,
) -> str:
    """
    A Markdown table of several configurations: perplexity and its ratio to the baseline's, context fidelity (of every
    layer, or the last), and of the last layer the shares of the attention that go to other words, to the token itself
    and to sinks, and the fidelity. Of several runs the means, and for perplexity and the last layer's context fidelity
    the least and the greatest.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs (see [`LocalityMeter.compute`]).
        baseline (`str`):
            The configuration that the ratio refers to; one of `results`.
        labels (`Mapping[str, str]`, *optional*):
            What the table calls a configuration, where not by its name.
        every_layer (`bool`, *optional*, defaults to `True`):
            A column for each layer's context fidelity, and not only for the last one's.

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    _check_baseline(results, baseline)

    def series(name: str, metric: str) -> list[float]:
        return [metrics[metric] for metrics in results[name]]

    last = len(layer_series(results[baseline][0], "fidelity")) - 1
    header = ["configuration", "perplexity", f"/ {baseline}"]
    psi, *others = _TITLES.values()
    if every_layer:
        header += [f"{psi} 0", *map(str, range(1, last + 1)), f"last layer: {others[0]}", *others[1:]]
    else:
        header += [f"last layer: {psi}", *others]
    rows = []
    for name in results:
        row = [(labels or {}).get(name, name), spread(series(name, "perplexity"))]
        row.append(f"{fmean(series(name, 'perplexity')) / fmean(series(baseline, 'perplexity')):.3f}")
        if every_layer:
            earlier = [fmean(series(name, f"context_fidelity_layer_{layer}")) for layer in range(last)]
            row += [_number(value, 2) for value in earlier]
        row.append(spread(series(name, f"context_fidelity_layer_{last}")))
        means = [fmean(series(name, f"{metric}_layer_{last}")) for metric in list(_TITLES)[1:]]
        rows.append([*row, *(_number(value, 2) for value in means)])
    return markdown_table([header, *rows])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def _check_baseline(results: Mapping[str, Sequence[Mapping[str, float]]], baseline: str) -> None:
    if baseline not in results:
        raise ValueError(f"`baseline` is {baseline!r}; the results are of {', '.join(map(repr, results))}.")


# One colour for each configuration wherever it is drawn: grey and black for the uniform ends, light to dark between.
_COLOURS = {
    "distributed": "#8c8c8c",
    "linear": "#9ecae1",
    "quadratic": "#6baed6",
    "cubic": "#4292c6",
    "quartic": "#2171b5",
    "quintic": "#d6604d",
    "localist": "#222222",
    "window": "#b8a05a",
}


#: What can be drawn over depth, and what the picture calls it.
_QUANTITIES = {
    "context_fidelity": "context fidelity: share inside the local set\nof the attention that goes to other words",
    "context_share": "context share: attention that goes to other words",
    "self_share": "self share: attention on the token itself",
    "sink_share": "sink share: attention on the first tokens",
    "block_share": "block share: attention on other words in the local set",
    "outside_share": "outside share: attention outside the local set",
    "fidelity": "fidelity: share of attention inside the local set",
    "entropy": "entropy of the attention (bits)",
}


def plot_over_depth(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    quantity: str,
    path: str | Path | BinaryIO,
    title: str | None = None,
    lambdas: Sequence[float] | None = None,
) -> None:
    """
    Draws a quantity of every layer, a line for each configuration; with several runs of one, the mean and a band from
    the least to the greatest.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs.
        quantity (`str`):
            `"context_fidelity"`, `"context_share"`, `"self_share"`, `"sink_share"`, `"block_share"`, `"outside_share"`,
            `"fidelity"` or `"entropy"`.
        path (`str`, `Path` or binary file):
            PNG file to write.
        title (`str`, *optional*):
            Title above the picture.
        lambdas (`Sequence[float]`, *optional*):
            A schedule to draw with them.

    Raises:
        ValueError: for another quantity.
    """
    if quantity not in _QUANTITIES:
        raise ValueError(f"`quantity` is {quantity!r}; allowed are {', '.join(map(repr, _QUANTITIES))}.")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    if lambdas is not None:
        axes.plot(lambdas, linestyle=":", marker=".", color="#555555", label="schedule (lambda)")
    for (name, runs), marker in zip(results.items(), cycle("osD^vPX*")):
        layers = list(zip(*(layer_series(metrics, quantity) for metrics in runs), strict=True))
        means = [fmean(values) for values in layers]
        (line,) = axes.plot(means, marker=marker, label=name, color=_COLOURS.get(name))
        if len(runs) > 1:
            least, greatest = [min(values) for values in layers], [max(values) for values in layers]
            axes.fill_between(range(len(layers)), least, greatest, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set(xlabel="layer", ylabel=_QUANTITIES[quantity], title=title)
    if quantity == "entropy":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


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
) -> None:
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

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    _check_baseline(results, baseline)
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


def plot_heads(values: torch.Tensor, path: str | Path | BinaryIO, title: str | None = None) -> None:
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


def plot_attention_map(
    attentions: Mapping[str, torch.Tensor],
    block_starts: Mapping[str, torch.Tensor],
    tokens: Sequence[str],
    path: str | Path,
) -> None:
    """
    Draws attention maps side by side, with the blocks as outlines.

    Args:
        attentions (`Mapping[str, torch.Tensor]`):
            Title of each map to its attention weights, of shape `(length, length)`.
        block_starts (`Mapping[str, torch.Tensor]`):
            The same titles to block starts, of shape `(length,)`.
        tokens (`Sequence[str]`):
            The tokens, at both axes.
        path (`str` or `Path`):
            PNG file to write.
    """
    figure = Figure(figsize=(5.4 * len(attentions) + 0.8, 5.6), layout="constrained")
    panels = figure.subplots(1, len(attentions), squeeze=False)[0]
    length = len(tokens)
    for panel, (title, weights) in zip(panels, attentions.items(), strict=True):
        # The square root shows small weights; a linear scale shows little but the largest of each row.
        image = panel.imshow(weights.detach().float().sqrt().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
        starts = sorted(set(block_starts[title].tolist()) - {-1})  # which is no block but padding
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            block = matplotlib.patches.Rectangle(
                (start - 0.5, start - 0.5), end - start, end - start, fill=False, edgecolor="#d6604d", linewidth=1.4
            )
            panel.add_patch(block)
        panel.set_title(title)
        panel.set_xticks(range(length), tokens, rotation=90, fontsize=5)
        panel.set_yticks(range(length), tokens, fontsize=5)
        panel.tick_params(length=0)
    bar = figure.colorbar(image, ax=panels, shrink=0.7, ticks=[0, 0.5, 1], label="attention weight")
    bar.ax.set_yticklabels(["0", "0.25", "1"])
    panels[0].set_ylabel("query")
    panels[0].set_xlabel("key")
    figure.savefig(path, dpi=110)
