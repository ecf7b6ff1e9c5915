"""What configurations cost in perplexity against a baseline, seed by seed."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

from .statistics import Interval, holm, paired_difference


class PerplexityDifference(NamedTuple):
    """
    How the perplexity of a configuration differs from the baseline's, on the seeds that both have.

    Args:
        ratio ([`Interval`]):
            Of the perplexities: the exponential of the mean paired difference of the losses, and of the ends of its
            95 % interval by Student's t. `count` is the number of seeds.
        effect_size (`float`):
            Hedges' g of the differences of the losses; NaN for two seeds, for which its correction is not defined.
        p_value (`float`):
            Of the paired t-test of the losses, two-sided, corrected by Holm for all configurations that are compared.
            NaN where the differences are all alike.
    """

    ratio: Interval
    effect_size: float
    p_value: float


def perplexity_differences(
    results: Mapping[str, Mapping[int, Mapping[str, float]]], baseline: str
) -> dict[str, PerplexityDifference]:
    """
    Compares the perplexity of each configuration with the baseline's, pair by pair: the same seed, on the same text.

    Args:
        results (`Mapping[str, Mapping[int, Mapping[str, float]]]`):
            Name of each configuration to its runs: the seed of each to its metrics, of which `"perplexity"` is read.
            All are measured on the same text.
        baseline (`str`):
            The configuration that the others are compared with; one of `results`.

    Returns:
        `dict[str, PerplexityDifference]`: for each other configuration that has at least two seeds in common with the
        baseline, in their order. Seeds that only one of the two has are left out of a comparison.

    Raises:
        ValueError: when `baseline` is not among the results.

    Example:

    ```python
    >>> quintic = {0: {"perplexity": 24.2}, 1: {"perplexity": 24.5}, 2: {"perplexity": 24.1}}
    >>> distributed = {0: {"perplexity": 22.9}, 1: {"perplexity": 23.0}, 2: {"perplexity": 22.9}}
    >>> perplexity_differences({"distributed": distributed, "quintic": quintic}, "distributed")["quintic"].ratio
    Interval(mean=1.0581..., low=1.0420..., high=1.0744..., count=3)
    ```
    """
    check_baseline(results, baseline)
    found = {}
    for name, runs in results.items():
        seeds = sorted(runs.keys() & results[baseline].keys())
        if name != baseline and len(seeds) > 1:
            # The logarithm of a perplexity is the loss.
            losses, others = (
                [math.log(group[seed]["perplexity"]) for seed in seeds] for group in (runs, results[baseline])
            )
            found[name] = paired_difference(losses, others)
    # A comparison without a p-value is one all the same.
    corrected = holm([1.0 if math.isnan(pair.p_value) else pair.p_value for pair in found.values()])
    return {
        name: PerplexityDifference(
            Interval(*map(_exp, pair.difference[:3]), pair.difference.count),
            pair.effect_size,
            math.nan if math.isnan(pair.p_value) else p_value,
        )
        for (name, pair), p_value in zip(found.items(), corrected, strict=True)
    }


def perplexity_ratio(runs: Iterable[Mapping[str, float]], baseline_runs: Iterable[Mapping[str, float]]) -> float:
    """
    The perplexity of some runs as a multiple of that of others: the ratio of their geometric means, which is that of
    [`perplexity_differences`] where both have the same seeds.
    """
    losses, others = (fmean(math.log(run["perplexity"]) for run in group) for group in (runs, baseline_runs))
    return _exp(losses - others)


def check_baseline(results: Mapping[str, object], baseline: str) -> None:
    """Refuses a baseline without results."""
    if baseline not in results:
        raise ValueError(f"`baseline` is {baseline!r}; the results are of {', '.join(map(repr, results))}.")


def _exp(value: float) -> float:
    """The exponential; infinite where it is too large for a number, as two seeds that differ much may make it."""
    return math.inf if value > 700 else math.exp(value)
