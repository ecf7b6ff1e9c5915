"""The tables of a model card: configurations side by side, and layers."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation.differences import perplexity_ratio
from ..evaluation.tables import differences_table, runs_table, table_of, with_interval
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


def figures(runs: Sequence[Mapping[str, float]], layer: int) -> dict[str, Any]:
    """Perplexity with its interval, and means of what the summary says of one layer, from the metrics of runs."""
    shares = ("context_fidelity", "context_share", "self_share", "sink_share")
    means = {name: mean_over_runs(runs, f"{name}_layer_{layer}") for name in shares}
    return {"perplexity": with_interval([metrics["perplexity"] for metrics in runs]), **means}


def _columns(record: RunRecord) -> dict[str, str]:
    """The shares that tables show, by their metric."""
    columns = {"context_fidelity": "psi", "context_share": "other words", "self_share": "self"}
    return columns | ({"sink_share": "sink"} if record.locality["num_sink_tokens"] else {})


def comparison(
    record: RunRecord, results: Mapping[str, Mapping[int, Mapping[str, float]]], baseline: str | None, layer: int
) -> str:
    """
    A row for each configuration, from the metrics of each seed, this card's own in bold; with the one layer that the
    card speaks of.
    """
    columns = {title: f"{metric}_layer_{layer}" for metric, title in _columns(record).items()}
    columns |= {"phi": f"fidelity_layer_{layer}", "visible keys": f"visible_keys_layer_{layer}"}
    columns["entropy (bits)"] = "entropy"
    ratios = {}
    if baseline is not None and len(results) > 1:
        ratios[f"/ {baseline}"] = {name: _ratio(by_seed, results[baseline]) for name, by_seed in results.items()}
    metrics = {name: list(by_seed.values()) for name, by_seed in results.items()}
    return runs_table(metrics, columns, layer, ratios, {record.name: f"**{record.name}**"})


def _ratio(by_seed: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]]) -> float:
    """Of perplexities over the seeds that both have, where there are any, as in the table of differences."""
    seeds = [seed for seed in others if seed in by_seed]
    runs, baseline_runs = ([each[seed] for seed in seeds or each] for each in (by_seed, others))
    return perplexity_ratio(runs, baseline_runs)


def differences(record: RunRecord, results: Mapping[str, Mapping[int, Mapping[str, Any]]], baseline: str | None) -> str:
    """What each configuration costs against the baseline from the same seeds; empty where none has two of them."""
    if baseline is None:
        return ""
    return differences_table(results, baseline, {record.name: f"**{record.name}**"})


def layer_table(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str:
    def mean(metric: str, name: str) -> Callable[[int], str]:
        return lambda layer: with_interval([mean_over_runs(metrics[name], f"{metric}_layer_{layer}")])

    metrics, lambdas = metrics_of_runs(groups), record.lambdas
    columns: dict[str, Callable[[int], str]] = {"layer": str, "lambda": lambda layer: f"{lambdas[layer]:.3g}"}
    for metric, title in (_columns(record) | {"entropy": "entropy (bits)"}).items():
        columns |= {f"{title}, {name}": mean(metric, name) for name in reversed(metrics)}  # this card's own first
    return table_of(range(len(lambdas)), columns)
