"""Estimates with their intervals from the lines that `collect.py` has written."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localist_hf.evaluation import Interval, paired_difference, ratio_values


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
            By Student's t, of seeds and documents together.
        effect_size (`float`):
            Hedges' g of the differences over seeds.
        p_value (`float`):
            Of the test that belongs to the interval.
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


def perplexity_quotient(
    first: np.ndarray, second: np.ndarray, num_labels: np.ndarray, expected: float = 1.0
) -> Comparison:
    """exp(first - second), both sums of losses of the same documents and seeds; p is for the `expected` quotient."""
    found = paired_difference(ratio_values(first, num_labels), ratio_values(second, num_labels), math.log(expected))
    mean, low, high, count = found.difference
    estimate = Interval(math.exp(mean), math.exp(low), math.exp(high), count)
    return Comparison(estimate, found.effect_size, found.p_value)


def share_difference(first: np.ndarray, second: np.ndarray) -> Comparison:
    """psi - psi, of shares of the same documents and seeds."""
    own, other = (ratio_values(shares[..., 0], shares.sum(-1)) for shares in (first, second))
    return Comparison(*paired_difference(own, other))


def with_ends(interval: Interval, digits: int = 3) -> str:
    """`"1.021 [1.015, 1.027]"`."""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
