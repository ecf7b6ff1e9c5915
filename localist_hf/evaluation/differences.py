"""What configurations cost in perplexity against a baseline, seed by seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from .statistics import Interval, holm, paired_difference, ratio_values


class PerplexityDifference(NamedTuple):
    """
    How the perplexity of a configuration differs from the baseline's, on the seeds that both have.

    Args:
        ratio ([`Interval`]):
            Of the perplexities: the exponential of the mean paired difference of the losses, and of the ends of its
            95 % interval by Student's t (see [`paired_difference`]). `count` is the number of seeds.
        effect_size (`float`):
            Hedges' g of the seeds' differences of the losses; NaN for two seeds, for which its correction is not
            defined.
        p_value (`float`):
            Of the paired t-test of the losses, two-sided, corrected by Holm for all configurations that are compared.
            NaN where the differences are all alike.
    """

    ratio: Interval
    effect_size: float
    p_value: float


def perplexity_differences(
    results: Mapping[str, Mapping[int, Mapping[str, Any]]], baseline: str
) -> dict[str, PerplexityDifference]:
    """
    Compares the perplexity of each configuration with the baseline's, pair by pair: the same seed, on the same text.
    Intervals and p-values are for other seeds; for other text too where the losses of each document are known.

    Args:
        results (`Mapping[str, Mapping[int, Mapping[str, Any]]]`):
            Name of each configuration to its runs: the seed of each to its metrics, of which `"perplexity"` is read,
            and where all runs have them `"document_losses"` and `"document_labels"`: for each document the sum of the
            losses, and the number of labels. All are measured on the same text.
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
    losses_of = _document_losses if are_of_documents(results) else _losses
    found = {}
    for name, runs in results.items():
        seeds = sorted(runs.keys() & results[baseline].keys())
        if name != baseline and len(seeds) > 1:
            losses, others = (losses_of([group[seed] for seed in seeds]) for group in (runs, results[baseline]))
            found[name] = paired_difference(losses, others)
    corrected = holm([pair.p_value for pair in found.values()])
    return {
        name: PerplexityDifference(
            Interval(*map(_exp, pair.difference[:3]), pair.difference.count), pair.effect_size, p_value
        )
        for (name, pair), p_value in zip(found.items(), corrected, strict=True)
    }


def are_of_documents(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> bool:
    """Whether [`perplexity_differences`] are for other text too, and not for other seeds alone."""
    return all("document_losses" in metrics for runs in results.values() for metrics in runs.values())


def _losses(runs: Sequence[Mapping[str, Any]]) -> ArrayLike:
    return [math.log(metrics["perplexity"]) for metrics in runs]


def _document_losses(runs: Sequence[Mapping[str, Any]]) -> ArrayLike:
    sums = ([metrics[name] for metrics in runs] for name in ("document_losses", "document_labels"))
    return ratio_values(*sums)


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
