"""The table of a model card: configurations side by side."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation.differences import perplexity_differences, perplexity_ratio
from ..evaluation.tables import table_of, with_ends, with_interval
from .run_record import RunRecord


def metrics_of_runs(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, list[dict[str, float]]]:
    return {name: [run.metrics for run in runs] for name, runs in groups.items()}


def metrics_by_seed(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[int, dict[str, Any]]]:
    """As [`differences_table`] takes them, with the losses of each document where a run's controls have them."""
    return {name: {run.seed: run.metrics | _document_losses(run) for run in runs} for name, runs in groups.items()}


def _document_losses(run: RunRecord) -> dict[str, Any]:
    """Those that the perplexity is of: at the dial that the run was measured at."""
    documents = (run.controls or {}).get("documents")
    dial = run.dial.get("locality_dial", 0) if any(run.lambdas) else 0
    if documents is None or "min_fidelity" in run.dial or f"dial {dial:g}" not in documents["losses"]:
        return {}
    return {"document_losses": documents["losses"][f"dial {dial:g}"], "document_labels": documents["labels"]}


def mean_over_runs(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    """Over runs; NaN where one of them has no number."""
    return fmean(run[name] for run in metrics)


def figures(runs: Sequence[Mapping[str, float]], layer: int) -> dict[str, float]:
    """Means of what the summary says of one layer, from the metrics of runs."""
    return {name: mean_over_runs(runs, f"{name}_layer_{layer}") for name in ("context_fidelity", "context_share")}


def perplexities_at_ends(run: RunRecord) -> dict[int, float]:
    """What is known of both ends of the dial; NaN where nothing is."""
    set_dial = run.dial.get("locality_dial", 0)
    found = {set_dial: run.metrics["perplexity"]} if "min_fidelity" not in run.dial else {}
    found |= {dial: run.metrics.get(f"perplexity_at_dial_{dial}", found.get(dial)) for dial in (0, 1)}
    found |= {each["dial"]: each["perplexity"] for each in (run.controls or {"dials": ()})["dials"]}
    return {dial: math.nan if found[dial] is None else found[dial] for dial in (0, 1)}


def is_held(run: RunRecord) -> bool:
    """Whether it was trained at dial 1 alone, and is to be used there."""
    return any(run.lambdas) and run.training.get("training_dials") == [1]


def measures_blocks(groups: Mapping[str, Sequence[RunRecord]], layer: int) -> bool:
    """
    Whether all runs say over how many blocks attention is spread, as those of former versions do not, and none is held
    at dial 1, where there is no choice.
    """
    runs = [run for runs in groups.values() for run in runs]
    return all(f"blocks_looked_at_layer_{layer}" in run.metrics for run in runs) and not any(map(is_held, runs))


def comparison(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]], baseline: str | None, layer: int) -> str:
    """
    A row for each configuration, this card's own in bold: perplexity, as a multiple of the baseline's with the interval
    where seeds give one, and of the one layer that the card speaks of where its attention goes.
    """
    by_seed = metrics_by_seed(groups)
    columns: dict[str, Callable[[str], str]] = {
        "configuration": lambda name: f"**{name}**" if name == record.name else name,
        "perplexity": lambda name: with_interval([run.metrics["perplexity"] for run in groups[name]]),
    }
    if baseline is not None and len(groups) > 1:
        differences = perplexity_differences(by_seed, baseline)
        columns[f"/ {baseline}"] = lambda name: (
            with_ends(differences[name].ratio)
            if name in differences
            else f"{_ratio(by_seed[name], by_seed[baseline]):.3f}"
        )
    if is_held(record):  # whose attention at dial 0 is as it was
        columns["dial 1"] = lambda name: with_interval([perplexities_at_ends(run)[1] for run in groups[name]])
    else:
        columns["psi"] = lambda name: with_interval(_of_layer(groups[name], "context_fidelity", layer))
        columns["other words"] = lambda name: with_interval([fmean(_of_layer(groups[name], "context_share", layer))])
    columns["keys"] = lambda name: with_interval([fmean(_of_layer(groups[name], "visible_keys", layer))], 1)
    if measures_blocks(groups, layer):
        columns["blocks"] = lambda name: with_interval([fmean(_of_layer(groups[name], "blocks_looked_at", layer))], 1)
        columns["top block"] = lambda name: with_interval([fmean(_of_layer(groups[name], "top_block_share", layer))])
    return re.sub(r"(?<=---)-+| +(?= \|)", "", table_of(groups, columns))  # a card is short: no cell is filled up


def _of_layer(runs: Sequence[RunRecord], metric: str, layer: int) -> list[float]:
    return [run.metrics[f"{metric}_layer_{layer}"] for run in runs]


def _ratio(by_seed: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]]) -> float:
    """Of perplexities over the seeds that both have, where there are any."""
    seeds = [seed for seed in others if seed in by_seed]
    runs, baseline_runs = ([each[seed] for seed in seeds or each] for each in (by_seed, others))
    return perplexity_ratio(runs, baseline_runs)
