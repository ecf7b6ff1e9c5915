"""Tables and pictures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from matplotlib.figure import Figure


def layer_series(metrics: Mapping[str, float], quantity: str) -> list[float]:
    """`metrics[f"{quantity}_layer_{l}"]` for l = 0, 1, ... as far as there are any."""
    series = []
    while (name := f"{quantity}_layer_{len(series)}") in metrics:
        series.append(metrics[name])
    return series


def layer_table(metrics: Mapping[str, float], lambdas: Sequence[float]) -> str:
    """A table of one model, a line for each layer: its place in the schedule, fidelity and entropy in bits."""
    columns = zip(lambdas, layer_series(metrics, "fidelity"), layer_series(metrics, "entropy"), strict=True)
    lines = ["layer  lambda  fidelity  entropy (bits)"]
    lines += [
        f"{layer:5d}  {value:6.3f}  {fidelity:8.3f}  {entropy:14.2f}"
        for layer, (value, fidelity, entropy) in enumerate(columns)
    ]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean of several runs and, in brackets, the least and the greatest; of one run, its number."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def comparison_table(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    labels: Mapping[str, str] | None = None,
    every_layer: bool = True,
) -> str:
    """
    A Markdown table of several configurations: perplexity and its ratio to the baseline's, fidelity of every layer (or
    the mean of all, and the last layer's), the last layer's as a multiple of the baseline's, and mean entropy in bits.
    Of several runs the means, and for perplexity and the last fidelity the least and the greatest.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs (see [`LocalityMeter.compute`]).
        baseline (`str`):
            The configuration that the ratios refer to; one of `results`.
        labels (`Mapping[str, str]`, *optional*):
            What the table calls a configuration, where not by its name.
        every_layer (`bool`, *optional*, defaults to `True`):
            A column for each layer's fidelity.

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    if baseline not in results:
        raise ValueError(f"`baseline` is {baseline!r}; the results are of {', '.join(map(repr, results))}.")

    def series(name: str, metric: str) -> list[float]:
        return [metrics[metric] for metrics in results[name]]

    num_layers = len(layer_series(results[baseline][0], "fidelity"))
    last = f"fidelity_layer_{num_layers - 1}"
    layers = [f"fidelity_layer_{layer}" for layer in range(num_layers)] if every_layer else ["fidelity", last]
    header = ["configuration", "perplexity", f"/ {baseline}"]
    header += [f"fidelity {layer}" for layer in range(num_layers)] if every_layer else ["fidelity", "last layer's"]
    header += [f"last / {baseline}", "entropy (bits)"]
    rows = []
    for name in results:
        row = [(labels or {}).get(name, name), spread(series(name, "perplexity"))]
        row.append(f"{fmean(series(name, 'perplexity')) / fmean(series(baseline, 'perplexity')):.3f}")
        row += [f"{fmean(series(name, metric)):.2f}" for metric in layers[:-1]] + [spread(series(name, last))]
        row.append(f"{fmean(series(name, last)) / fmean(series(baseline, last)):.1f}")
        rows.append([*row, f"{fmean(series(name, 'entropy')):.2f}"])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


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


def plot_fidelity_over_depth(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | Path,
    title: str | None = None,
    lambdas: Sequence[float] | None = None,
) -> None:
    """
    Draws the fidelity of every layer, a line for each configuration; with several runs of one, the mean and a band from
    the least to the greatest.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`, *optional*):
            Title above the picture.
        lambdas (`Sequence[float]`, *optional*):
            A schedule to draw with them.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    if lambdas is not None:
        axes.plot(lambdas, linestyle=":", marker=".", color="#555555", label="schedule (lambda)")
    for name, runs in results.items():
        layers = list(zip(*(layer_series(metrics, "fidelity") for metrics in runs), strict=True))
        (line,) = axes.plot([fmean(values) for values in layers], marker="o", label=name, color=_COLOURS.get(name))
        if len(runs) > 1:
            least, greatest = [min(values) for values in layers], [max(values) for values in layers]
            axes.fill_between(range(len(layers)), least, greatest, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set(xlabel="layer", ylabel="fidelity: share of attention inside the block", ylim=(0, 1.02), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


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
