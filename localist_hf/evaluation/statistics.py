"""Means, differences and their intervals over seeds and documents."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """
    A mean and its confidence interval.

    Args:
        mean (`float`), low (`float`), high (`float`):
            The mean and the ends of the interval; the ends are no number where one value cannot tell.
        count (`int`):
            Number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the interval's width, for "mean ± interval"; of an interval that is not symmetric the larger side."""
        return max(self.high - self.mean, self.mean - self.low)


class PairedDifference(NamedTuple):
    """
    How values differ from those of a baseline on the same seeds.

    Args:
        difference ([`Interval`]):
            Of the mean difference.
        effect_size (`float`):
            Mean difference in standard deviations of the differences, with Hedges' correction for few values. NaN for
            two values and fewer, and where all differences are alike.
        p_value (`float`):
            Of the paired t-test, two-sided. NaN for one value, and where all differences are alike.
    """

    difference: Interval
    effect_size: float
    p_value: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """
    The mean of independent values, such as those of several seeds, and its interval by Student's t.

    Args:
        values (`Sequence[float]`):
            At least one.
        confidence (`float`, *optional*, defaults to 0.95):
            In (0, 1).

    Raises:
        ValueError: for no value, or a confidence outside of (0, 1).
    """
    _check(values, confidence)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = stats.sem(values) * stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """
    Compares values with those of a baseline, pair by pair: the same seed, the same text.

    Args:
        values (`Sequence[float]`), baseline (`Sequence[float]`):
            As many, in the same order.
        confidence (`float`, *optional*, defaults to 0.95):
            Of the interval, in (0, 1).

    Raises:
        ValueError: for numbers of values that differ, or none, or a confidence outside of (0, 1).
    """
    if len(values) != len(baseline):
        raise ValueError(f"`values` are {len(values)} and `baseline` {len(baseline)}; each needs its pair.")
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    interval = mean_interval(differences, confidence)
    deviation = np.std(differences, ddof=1) if len(differences) > 1 else math.nan
    if not deviation > 0:  # one value, or all alike: nothing to measure by
        return PairedDifference(interval, math.nan, math.nan)
    degrees = len(differences) - 1
    correction = math.nan  # which is not defined for two values
    if degrees > 1:
        correction = math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) * math.sqrt(2 / degrees)
    p_value = float(stats.ttest_rel(values, baseline).pvalue)
    return PairedDifference(interval, float(interval.mean / deviation * correction), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values corrected for their number by Holm's step-down procedure: those at most alpha are significant together,
    with a chance of at most alpha that any of them is by chance.

    Args:
        p_values (`Sequence[float]`):
            In [0, 1].
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def bootstrap_interval(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """
    The interval of a statistic by bootstrap over seeds and documents together (percentiles): each resample draws seeds,
    and documents, with replacement, and takes every drawn seed's every drawn document.

    Args:
        sums (`numpy.ndarray` of shape `(num_seeds, num_documents, ...)`):
            What the statistic is made of, for each seed and document: losses and numbers of tokens, for one. The same
            documents for all seeds.
        statistic (`Callable`):
            Takes the sums over seeds and documents, `(num_resamples, ...)`, and gives `(num_resamples,)` numbers.
        confidence (`float`, *optional*, defaults to 0.95):
            In (0, 1).
        num_resamples (`int`, *optional*, defaults to 2000), seed (`int`, *optional*, defaults to 0):
            Number of resamples, and the seed that draws them.

    Raises:
        ValueError: for no seed or document, or a confidence outside of (0, 1).

    Example:

    ```python
    >>> # Perplexity ratio of two models: losses[seed, document] of each, and the numbers of tokens
    >>> sums = np.stack([losses, baseline_losses, tokens], axis=-1)
    >>> bootstrap_interval(sums, lambda total: np.exp((total[..., 0] - total[..., 1]) / total[..., 2]))
    ```
    """
    _check(sums, confidence)
    num_seeds, num_documents = sums.shape[:2]
    if num_documents == 0:
        raise ValueError("`sums` has no document.")
    generator = np.random.default_rng(seed)
    # How often each seed and each document is drawn.
    of_seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, num_resamples)
    of_documents = generator.multinomial(num_documents, [1 / num_documents] * num_documents, num_resamples)
    resampled = statistic(np.einsum("rs,rd,sd...->r...", of_seeds, of_documents, sums, optimize=True))
    mean = float(statistic(sums.sum(axis=(0, 1))[None])[0])
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), num_seeds * num_documents)


def _check(values: Sequence[float] | np.ndarray, confidence: float) -> None:
    if len(values) == 0:
        raise ValueError("There are no values to take a mean of.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}; it must lie in (0, 1).")
