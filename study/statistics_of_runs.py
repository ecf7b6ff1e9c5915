"""Comparisons of runs with their intervals, over seeds and documents together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from records_of_runs import Run, Study

from localist_hf.evaluation.statistics import Interval, paired_difference, ratio_values
from localist_hf.evaluation.tables import with_ends


class Comparison(NamedTuple):
    """
    How two things differ: by Student's t, of seeds and documents together, Hedges' g of the differences over seeds, and
    the p-value of the test that belongs to the interval.
    """

    estimate: Interval
    effect_size: float
    p_value: float

    def __str__(self) -> str:
        return with_ends(self.estimate)

    def says(self, below: str, above: str, neither: str = "no demonstrably other") -> str:
        """One of three, by where the interval of a ratio lies."""
        return above if self.estimate.low > 1 else below if self.estimate.high < 1 else neither


def cost(
    study: Study,
    name: str,
    baseline: str | None = None,
    setting: str = "dial 0",
    baseline_setting: str = "dial 0",
    expected: float = 1.0,
) -> Comparison:
    """
    Perplexity as a multiple of another run's, by default the reference's, each in a setting of the controls; p is for
    the `expected` one.
    """
    runs = study.runs_of(name)
    others = study.runs_of(study.reference if baseline is None else baseline)
    of_baseline = losses_of(others, baseline_setting)
    return quotient(losses_of(runs, setting), of_baseline, runs, expected)


def cost_at_dial_1(study: Study, name: str, other: str | None = None) -> Comparison:
    """Perplexity at dial 1 / at dial 0; as a multiple of another run's."""
    if other is None:
        return cost(study, name, name, "dial 1")
    runs, others = study.runs[name], study.runs[other]
    lost, by_other = (losses_of(each, "dial 1") - losses_of(each, "dial 0") for each in (runs, others))
    return quotient(lost, by_other, runs)


def own_minus(study: Study, name: str, kind: str) -> Comparison:
    """psi of the last layer on own blocks, less that on blocks of another kind."""
    number = study.settings[name]["num_previous_blocks"]
    shares = (_of_documents(study.runs[name], "shares", f"{each} {number}") for each in ("own", kind))
    return Comparison(*paired_difference(*(ratio_values(each[..., 0], each.sum(-1)) for each in shares)))


def losses_of(runs: Sequence[Run], setting: str) -> np.ndarray:
    """The sum of the losses of each document in a setting of the controls, `(num_seeds, num_documents)`."""
    return _of_documents(runs, "losses", setting)


def _of_documents(runs: Sequence[Run], figure: str, setting: str) -> np.ndarray:
    """What the controls have of each document, `(num_seeds, num_documents, ...)`."""
    return np.array([run["controls"]["documents"][figure][setting] for run in runs])


def quotient(losses: np.ndarray, others: np.ndarray, runs: Sequence[Run], expected: float = 1.0) -> Comparison:
    """exp(losses - others), sums of each document of runs over all labels; p is for the `expected` quotient."""
    labels = np.array([run["controls"]["documents"]["labels"] for run in runs])
    found = paired_difference(ratio_values(losses, labels), ratio_values(others, labels), math.log(expected))
    mean, low, high, count = found.difference
    estimate = Interval(math.exp(mean), math.exp(low), math.exp(high), count)
    return Comparison(estimate, found.effect_size, found.p_value)
