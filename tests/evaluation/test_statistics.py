import math

import numpy as np
import pytest
from scipy import stats

from localist_hf.evaluation.statistics import bootstrap_interval, holm, mean_interval, paired_difference


VALUES, BASELINE = [24.2, 24.9, 23.8, 24.4, 24.7], [22.9, 23.1, 22.8, 23.3, 23.0]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_of_a_mean_is_students(confidence: float):
    interval = mean_interval(VALUES, confidence)
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(np.mean(VALUES))
    assert interval.half_width == pytest.approx(interval.high - interval.mean)


def test_one_value_has_a_mean_and_no_interval():
    interval = mean_interval([3.0])
    assert interval.mean == 3.0 and math.isnan(interval.low) and math.isnan(interval.high)
    difference = paired_difference([3.0], [1.0])
    assert difference.difference.mean == 2.0 and math.isnan(difference.effect_size) and math.isnan(difference.p_value)


def test_a_paired_difference_is_scipys():
    result = paired_difference(VALUES, BASELINE)
    test = stats.ttest_rel(VALUES, BASELINE)
    assert result.p_value == pytest.approx(test.pvalue)
    expected = test.confidence_interval(0.95)
    assert result.difference[1:3] == pytest.approx((expected.low, expected.high))
    differences = np.subtract(VALUES, BASELINE)
    # Hedges' correction, nearly 1 - 3 / (4 * degrees of freedom - 1).
    assert result.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1) * (1 - 3 / 15), rel=0.01)


def test_two_pairs_have_an_interval_and_a_p_value_and_no_effect_size():
    result = paired_difference(VALUES[:2], BASELINE[:2])
    test = stats.ttest_rel(VALUES[:2], BASELINE[:2])
    expected = test.confidence_interval(0.95)
    assert result.difference[1:3] == pytest.approx((expected.low, expected.high))
    assert result.p_value == pytest.approx(test.pvalue)
    assert math.isnan(result.effect_size)


def test_pairing_sees_what_means_do_not():
    # Every seed is off by its own amount; the variant is always 1 above.
    baseline = [10.0, 20.0, 30.0, 40.0]
    values = [11.0, 21.1, 30.9, 41.0]
    assert paired_difference(values, baseline).p_value < 0.001 < stats.ttest_ind(values, baseline).pvalue


def test_holm_multiplies_by_what_is_left_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    # Under the null the chance of any is held: in 2000 draws of five, about 5 %.
    draws = np.random.default_rng(0).random((2000, 5))
    assert np.mean([min(holm(list(row))) <= 0.05 for row in draws]) == pytest.approx(0.05, abs=0.015)


def test_the_bootstrap_over_documents_is_scipys_where_there_is_one_seed():
    documents = np.random.default_rng(1).gamma(2.0, size=60)
    sums = np.stack([documents, np.ones(60)], axis=-1)[None]
    interval = bootstrap_interval(sums, lambda total: total[..., 0] / total[..., 1], num_resamples=5000)
    expected = stats.bootstrap((documents,), np.mean, method="percentile", n_resamples=5000, rng=0)
    low, high = expected.confidence_interval
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.03)
    assert interval.mean == pytest.approx(documents.mean())


def test_the_bootstrap_covers_the_truth_where_seeds_differ_too():
    generator, covered = np.random.default_rng(2), 0
    for _ in range(100):
        sums = generator.normal(size=(8, 1)) + generator.normal(size=(8, 40))
        sums = np.stack([sums, np.ones_like(sums)], axis=-1)
        interval = bootstrap_interval(sums, lambda total: total[..., 0] / total[..., 1], num_resamples=400)
        covered += interval.low <= 0 <= interval.high
    assert covered >= 85  # percentiles of eight seeds are a little narrow
    # Documents alone would be sure of what the seeds have by chance.
    narrow = np.mean([abs(generator.normal(0, 8**-0.5)) < 1.96 * (8 * 40) ** -0.5 for _ in range(1000)])
    assert narrow < 0.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "no values"),
        (lambda: mean_interval([1.0], confidence=1.0), r"`confidence` is 1\.0; it must lie in \(0, 1\)"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "`values` are 1 and `baseline` 2"),
        (lambda: bootstrap_interval(np.zeros((1, 0, 1)), lambda total: total), "no document"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
