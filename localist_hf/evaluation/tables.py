"""Tables of what was measured."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

import torch

from ..modeling.measurements import SHARES
from .differences import PerplexityDifference, check_baseline, perplexity_differences, perplexity_ratio
from .locality_report import LocalityReport
from .statistics import Interval, mean_interval


Item = TypeVar("Item")


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
    attention that go to other words, to the token itself and to sinks, its fidelity, and its entropy in bits; where it
    was measured, over how many blocks the attention to other words is spread, and the part that goes to the top one.

    Args:
        metrics (`Mapping[str, float]`):
            As [`LocalityMeter.compute`] gives them.
        lambdas (`Sequence[float]`):
            The locality of each layer that the schedule says.
    """
    columns = {title: (layer_series(metrics, name), 3) for name, title in _TITLES.items()}
    columns |= {"entropy (bits)": (layer_series(metrics, "entropy"), 2), **_of_blocks(metrics)}
    return _layer_table({"lambda": (lambdas, 3), **columns})


def _of_blocks(metrics: Mapping[str, float]) -> dict[str, tuple[list[float], int]]:
    """The columns on all blocks of the text, where they were measured."""
    titles = {"blocks": ("blocks_looked_at", 1), "top": ("top_block_share", 2)}
    columns = {title: (layer_series(metrics, name), digits) for title, (name, digits) in titles.items()}
    return {title: column for title, column in columns.items() if column[0]}


def report_table(report: LocalityReport, lambdas: Sequence[float]) -> str:
    """
    A table of all that was measured of one model's layers, and what its columns are.

    Args:
        report ([`LocalityReport`]):
            From [`measure`].
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
    columns |= {"bits": (values["entropy"], 2), "keys": (values["visible_keys"], 1), **_of_blocks(report.metrics)}
    legend = [
        "psi: context fidelity; of the attention to other words (context) the part inside the local set (block)",
        "bits: entropy of the attention; keys: keys in the local set",
        "blocks: over how many blocks of the text the attention to other words is spread; top: its part on the top one",
    ]
    if controls is not None:
        legend.append(
            "own, wrong: psi at dial 0 on the last layer's blocks, and on those of another text, at the positions that "
            f"count under both ({controls.num_counted} in the last layer)"
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


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """
    The mean of several runs ± half of its 95 % interval by Student's t; of one run, its number. A hyphen where one of
    them is undefined (NaN).

    Args:
        values (`Sequence[float]`):
            One of each run.
        digits (`int`, *optional*, defaults to 2):
            After the point; one or two more where half of the interval has its first figure there.
    """
    interval = mean_interval(values)
    if math.isnan(half := interval.half_width):
        return _number(interval.mean, digits)
    if half > 0 and digits < (needed := -math.floor(math.log10(half))) <= digits + 2:
        digits = needed
    return f"{interval.mean:.{digits}f} ± {half:.{digits}f}"


def comparison_table(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    baseline: str,
    labels: Mapping[str, str] | None = None,
    every_layer: bool = True,
) -> str:
    """
    A Markdown table of several configurations: perplexity and its ratio to the baseline's, context fidelity (of every
    layer, or the last), and of the last layer the shares of the attention that go to other words, to the token itself
    and to sinks, and the fidelity. Of several runs the means, perplexity and the last layer's context fidelity ± half
    of the 95 % interval (see [`with_interval`]); the ratio is that of the geometric means, as in [`differences_table`].

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
    check_baseline(results, baseline)

    last = len(layer_series(results[baseline][0], "fidelity")) - 1
    psi, *others = _TITLES.values()
    columns = {f"last layer: {psi}": f"context_fidelity_layer_{last}"}
    if every_layer:
        columns = {str(layer) if layer else f"{psi} 0": f"context_fidelity_layer_{layer}" for layer in range(last + 1)}
        others[0] = f"last layer: {others[0]}"
    columns |= {title: f"{metric}_layer_{last}" for title, metric in zip(others, list(_TITLES)[1:], strict=True)}
    ratios = {name: perplexity_ratio(results[name], results[baseline]) for name in results}
    return runs_table(results, columns, last, {f"/ {baseline}": ratios}, labels)


def runs_table(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, str],
    layer: int,
    ratios: Mapping[str, Mapping[str, float]],
    labels: Mapping[str, str] | None = None,
) -> str:
    """
    A Markdown table of several configurations and their metrics: the means over runs, perplexity and the context
    fidelity of one layer ± half of the 95 % interval.

    Args:
        results (`Mapping[str, Sequence[Mapping[str, float]]]`):
            Name of each configuration to the metrics of each of its runs.
        columns (`Mapping[str, str]`):
            The title of each column to its metric; perplexity stands before them.
        layer (`int`):
            The layer whose context fidelity has its interval.
        ratios (`Mapping[str, Mapping[str, float]]`):
            Columns of other numbers after the perplexity, by title: of each configuration one.
        labels (`Mapping[str, str]`, *optional*):
            What the table calls a configuration, where not by its name.
    """

    def of_metric(metric: str) -> Callable[[str], str]:
        digits = 1 if metric.startswith("visible_keys") else 2
        if metric in ("perplexity", f"context_fidelity_layer_{layer}"):
            return lambda name: with_interval([run[metric] for run in results[name]], digits)
        return lambda name: _number(fmean(run[metric] for run in results[name]), digits)

    def of_ratio(values: Mapping[str, float]) -> Callable[[str], str]:
        return lambda name: _number(values[name], 3)

    cells = {"configuration": lambda name: (labels or {}).get(name, name), "perplexity": of_metric("perplexity")}
    cells |= {title: of_ratio(values) for title, values in ratios.items()}
    return table_of(results, cells | {title: of_metric(metric) for title, metric in columns.items()})


def differences_table(
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    baseline: str,
    labels: Mapping[str, str] | None = None,
) -> str:
    """
    A Markdown table of what each configuration costs in perplexity, paired by seed with the baseline: the number of
    seeds, the ratio of perplexities with its 95 % interval in brackets, the effect size (Hedges' g), and the p-value of
    the paired t-test, corrected by Holm for the configurations of the table. A hyphen stands where there is none. Of
    other text they speak where the losses of each document are given.

    Args:
        results (`Mapping[str, Mapping[int, Mapping[str, Any]]]`), baseline (`str`):
            As for [`perplexity_differences`]: the metrics of each run by its seed.
        labels (`Mapping[str, str]`, *optional*):
            What the table calls a configuration, where not by its name.

    Returns:
        `str`: empty where no configuration has two seeds in common with the baseline.

    Raises:
        ValueError: when `baseline` is not among the results.
    """
    differences = perplexity_differences(results, baseline)
    if not differences:
        return ""
    columns: dict[str, Callable[[tuple[str, PerplexityDifference]], str]] = {
        "configuration": lambda each: (labels or {}).get(each[0], each[0]),
        "seeds": lambda each: str(each[1].ratio.count),
        f"perplexity / {baseline} [95 % interval]": lambda each: with_ends(each[1].ratio),
        "Hedges' g": lambda each: with_interval([each[1].effect_size], 1),
        "p (Holm)": lambda each: p_value_cell(each[1].p_value),
    }
    return table_of(differences.items(), columns)


def with_ends(interval: Interval, digits: int = 3) -> str:
    """A mean and the ends of its interval, `"1.021 [1.015, 1.027]"`."""
    # Two seeds that differ much leave an interval of any width.
    mean, low, high = (f"{value:.{digits}f}" if value < 1000 else f"{value:.0e}" for value in interval[:3])
    return f"{mean} [{low}, {high}]"


def p_value_cell(p_value: float) -> str:
    """What a table shows of a p-value: three digits, and a hyphen for one that is undefined (NaN)."""
    return "< 0.001" if p_value < 0.001 else _number(p_value, 3)


def table_of(items: Iterable[Item], columns: Mapping[str, Callable[[Item], str]]) -> str:
    """
    A Markdown table of items, a line for each.

    Args:
        items (`Iterable`):
            What the lines are about.
        columns (`Mapping[str, Callable]`):
            The title of each column to the cell that it has for an item.
    """
    return markdown_table([[*columns], *([cell(item) for cell in columns.values()] for item in items)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
