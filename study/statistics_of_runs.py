"""Estimates with their intervals from the lines that `collect.py` has written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localist_hf.evaluation.statistics import Interval, bootstrap_interval, paired_difference


Run = dict[str, Any]


class Study:
    """The records of one grid: runs by name, each a list by seed, and what the untrained base does."""

    def __init__(self, path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.untrained = {line["name"]: line for line in lines if line.get("untrained")}
        self.runs: dict[str, list[Run]] = {}
        for line in lines:
            if not line.get("untrained"):
                self.runs.setdefault(line["name"], []).append(line)
        for runs in self.runs.values():
            runs.sort(key=lambda run: run["seed"])
        seeds = {name: [run["seed"] for run in runs] for name, runs in self.runs.items()}
        complete = max(seeds.values(), key=len)
        #: Seeds that every run has; what only some have is left out, so that all comparisons are of the same ones.
        self.seeds = [seed for seed in complete if all(seed in each for each in seeds.values())]
        self.runs = {name: [run for run in runs if run["seed"] in self.seeds] for name, runs in self.runs.items()}

    def any_run(self) -> Run:
        return next(iter(self.runs.values()))[0]


class Comparison(NamedTuple):
    """
    How two things differ.

    Args:
        estimate ([`Interval`]):
            By bootstrap over documents and seeds together.
        effect_size (`float`), p_value (`float`):
            Of the differences over seeds: Hedges' g, and the paired t-test.
    """

    estimate: Interval
    effect_size: float
    p_value: float


def losses(runs: Sequence[Run], name: str) -> np.ndarray:
    """Sums of the losses of each document, `(num_seeds, num_documents)`."""
    return np.array([run["controls"]["documents"]["losses"][name] for run in runs])


def labels(runs: Sequence[Run]) -> np.ndarray:
    return np.array([run["controls"]["documents"]["labels"] for run in runs], dtype=float)


def shares(runs: Sequence[Run], name: str) -> np.ndarray:
    """Block and outside share of each document, `(num_seeds, num_documents, 2)`."""
    return np.array([run["controls"]["documents"]["shares"][name] for run in runs])


def perplexity_quotient(first: np.ndarray, second: np.ndarray, num_labels: np.ndarray) -> Comparison:
    """exp(first - second), both sums of losses of the same documents and seeds."""
    sums = np.stack([first, second, num_labels], axis=-1)
    estimate = bootstrap_interval(sums, lambda total: np.exp((total[..., 0] - total[..., 1]) / total[..., 2]))
    of_seeds = sums.sum(1)
    tested = paired_difference((of_seeds[:, 0] / of_seeds[:, 2]).tolist(), (of_seeds[:, 1] / of_seeds[:, 2]).tolist())
    return Comparison(estimate, tested.effect_size, tested.p_value)


def share_difference(first: np.ndarray, second: np.ndarray) -> Comparison:
    """psi - psi, of shares of the same documents and seeds."""

    def psi(total: np.ndarray) -> np.ndarray:
        return total[..., 0] / (total[..., 0] + total[..., 1])

    sums = np.concatenate([first, second], axis=-1)
    estimate = bootstrap_interval(sums, lambda total: psi(total[..., :2]) - psi(total[..., 2:]))
    of_seeds = sums.sum(1)
    tested = paired_difference(psi(of_seeds[:, :2]).tolist(), psi(of_seeds[:, 2:]).tolist())
    return Comparison(estimate, tested.effect_size, tested.p_value)


def with_ends(interval: Interval, digits: int = 3) -> str:
    """`"1.021 [1.015, 1.027]"`."""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
