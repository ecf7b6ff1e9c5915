"""What the controls say on a model card: tables and sentences."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation.statistics import mean_interval
from ..evaluation.tables import markdown_table, with_interval
from .run_record import RunRecord


#: Perplexities of the controls, by what the card calls them.
_PERPLEXITIES = {
    "dial 1": lambda controls: controls["dials"][-1]["perplexity"],
    "self only": lambda controls: controls["self_only_perplexity"],
    "all local": lambda controls: controls["all_local_perplexity"],
    "all self only": lambda controls: controls["all_local_self_only_perplexity"],
}


def block_controls(groups: Mapping[str, Sequence[RunRecord]], layer: int, emphasised: str | None = None) -> str:
    """
    psi on the own blocks and on others, with no previous blocks and with some; one configuration in bold. Of several
    runs the means, psi with its interval.
    """
    kinds = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}
    titles = ["configuration", "blocks before", "visible keys", "other words"]
    rows = [titles + [f"psi, {title}" for title in kinds.values()]]
    for name, runs in groups.items():
        label = f"**{name}**" if name == emphasised else name
        for setting in range(len(runs[0].controls["blocks"])):
            row = [label, str(runs[0].controls["blocks"][setting]["num_previous_blocks"])]
            cells = [("own", "visible_keys", 1), ("own", "context_share", 2)]
            for kind, figure, digits in cells + [(kind, "context_fidelity", 2) for kind in kinds]:
                values = [_at_layer(run, run.controls["blocks"][setting][kind], figure, layer) for run in runs]
                row.append(with_interval(values if figure == "context_fidelity" else [fmean(values)], digits))
            rows.append(row)
    return markdown_table(rows)


def dial_controls(groups: Mapping[str, Sequence[RunRecord]], emphasised: str | None = None) -> str:
    """Perplexities under the dial, of several runs with intervals; one configuration in bold."""
    rows = [["configuration", "dial 0", *_PERPLEXITIES, "divergence (bits)"]]
    for name, runs in groups.items():
        controls = [run.controls for run in runs]
        row = [f"**{name}**" if name == emphasised else name]
        row.append(with_interval([_or_nan(each["perplexity"]) for each in controls]))
        for ratio in _PERPLEXITIES:
            is_changed = any(runs[0].lambdas) or ratio.startswith("all")
            row.append(with_interval([_ratio(each, ratio) for each in controls] if is_changed else [math.nan], 3))
        divergences = [_or_nan(each["divergence"]) for each in controls] if any(runs[0].lambdas) else [math.nan]
        rows.append([*row, with_interval(divergences, 3)])
    return markdown_table(rows)


def wrong_blocks(runs: Sequence[RunRecord], layer: int) -> dict[str, Any]:
    """psi on the own blocks and on those of another text, as the card shows it, and how far apart runs have them."""
    psi = {kind: _psi_on(runs, kind, layer) for kind in ("own", "wrong")}
    apart = [own - wrong for own, wrong in zip(psi["own"], psi["wrong"], strict=True)]
    return {kind: float(f"{fmean(values):.2f}") for kind, values in psi.items()} | {
        "num_runs": len(runs),
        "apart": with_interval(apart),
        "are_apart": mean_interval(apart).low > 0,
    }


def _psi_on(runs: Sequence[RunRecord], kind: str, layer: int) -> list[float]:
    """psi of each run on these blocks of the controls, with as many before a token's own as the configuration has."""
    number = runs[0].locality["num_previous_blocks"]
    of_runs = [next(each for each in run.controls["blocks"] if each["num_previous_blocks"] == number) for run in runs]
    return [_at_layer(run, blocks[kind], "context_fidelity", layer) for run, blocks in zip(runs, of_runs, strict=True)]


def costs(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Perplexities as multiples of that at dial 0, by name; of several runs the means."""
    return {name: f"{fmean(_ratio(run.controls, name) for run in runs):.3f}" for name in _PERPLEXITIES}


def _ratio(controls: Mapping[str, Any], name: str) -> float:
    """A perplexity, as a multiple of that at dial 0."""
    return _or_nan(_PERPLEXITIES[name](controls)) / _or_nan(controls["perplexity"])


def _at_layer(record: RunRecord, figures: Mapping[str, Any] | None, name: str, layer: int) -> float:
    """A figure of one layer; NaN where it was not measured or is no number."""
    if figures is None or layer not in record.controls["layers"]:
        return math.nan
    return _or_nan(figures[name][record.controls["layers"].index(layer)])


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
