"""The tables of a model card: configurations side by side, and layers."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation import differences_table, markdown_table, with_interval
from ..evaluation.differences import perplexity_ratio
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
    columns = _columns(record) | {"fidelity": "phi", "visible_keys": "visible keys"}
    ratio = [f"/ {baseline}"] if baseline is not None and len(results) > 1 else []
    rows = [["configuration", "perplexity", *ratio, *columns.values(), "entropy (bits)"]]
    for name, by_seed in results.items():
        metrics = list(by_seed.values())
        row = [f"**{name}**" if name == record.name else name, with_interval([run["perplexity"] for run in metrics])]
        if ratio:
            # Over the seeds that both have, where there are any, as in the table of differences.
            pairs = [(by_seed[seed], other) for seed, other in results[baseline].items() if seed in by_seed]
            compared = zip(*pairs, strict=True) if pairs else (metrics, results[baseline].values())
            row.append(f"{perplexity_ratio(*compared):.3f}")
        for metric in columns:
            values = [run[f"{metric}_layer_{layer}"] for run in metrics]
            if metric == "context_fidelity":
                row.append(with_interval(values))
            else:
                row.append(with_interval([fmean(values)], digits=1 if metric == "visible_keys" else 2))
        rows.append([*row, with_interval([mean_over_runs(metrics, "entropy")])])
    return markdown_table(rows)


def differences(record: RunRecord, results: Mapping[str, Mapping[int, Mapping[str, Any]]], baseline: str | None) -> str:
    """What each configuration costs against the baseline from the same seeds; empty where none has two of them."""
    if baseline is None:
        return ""
    return differences_table(results, baseline, {record.name: f"**{record.name}**"})


def layer_table(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str:
    metrics = metrics_of_runs(groups)
    names = list(reversed(metrics))  # this card's own first
    columns = _columns(record) | {"entropy": "entropy (bits)"}
    rows = [["layer", "lambda", *(f"{title}, {name}" for title in columns.values() for name in names)]]
    for layer, value in enumerate(record.lambdas):
        cells = [
            with_interval([mean_over_runs(metrics[name], f"{metric}_layer_{layer}")])
            for metric in columns
            for name in names
        ]
        rows.append([str(layer), f"{value:.3g}", *cells])
    return markdown_table(rows)
