"""Tables hold the numbers that they are given, with intervals that scipy finds too."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from localist_hf.evaluation import layer_table
from localist_hf.evaluation.differences import perplexity_differences
from localist_hf.evaluation.statistics import holm, paired_difference, ratio_values
from localist_hf.evaluation.tables import comparison_table, differences_table, with_interval


@pytest.fixture(scope="module")
def metrics(metrics_of: Callable) -> dict[str, list[dict[str, float]]]:
    """One run each of two configurations of two layers."""
    return {
        "distributed": [metrics_of(20.0, (0.1, 0.3, 0.1, 0.5), (0.1, 0.3, 0.1, 0.5))],
        "quintic": [metrics_of(20.5, (0.1, 0.2, 0.28, 0.42), (0.25, 0.15, 0.48, 0.12))],
    }


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_comparison_holds_the_last_layers_shares_and_the_ratio_to_the_baseline(metrics: dict) -> None:
    header, rule, distributed, quintic = comparison_table(metrics, "distributed", every_layer=False).splitlines()
    names = ["configuration", "perplexity", "/ distributed", "last layer: context fidelity", "context share"]
    assert cells_of(header) == [*names, "self", "sink", "fidelity"]
    assert cells_of(quintic) == ["quintic", "20.50", "1.025", "0.80", "0.60", "0.25", "0.15", "0.88"]
    assert cells_of(distributed)[2] == "1.000"
    assert len({len(line) for line in (header, rule, distributed, quintic)}) == 1


def test_the_comparison_holds_every_layers_context_fidelity(metrics: dict) -> None:
    header, _, _, quintic = comparison_table(metrics, "distributed").splitlines()
    names = ["context fidelity 0", "1", "last layer: context share", "self", "sink", "fidelity"]
    assert cells_of(header)[3:] == names
    assert cells_of(quintic) == ["quintic", "20.50", "1.025", "0.40", "0.80", "0.60", "0.25", "0.15", "0.88"]


def test_several_runs_show_their_mean_and_interval(metrics: dict) -> None:
    """By hand, with t = 4.303 for three runs: perplexity 21 ± 4.303 / sqrt(3), psi 0.75 ± 4.303 * 0.05 / sqrt(3)."""
    run = metrics["quintic"][0]
    runs = [
        run | {"perplexity": 20.0, "context_fidelity_layer_1": 0.7},
        run | {"perplexity": 21.0, "context_fidelity_layer_1": 0.75},
        run | {"perplexity": 22.0},
    ]
    table = comparison_table(metrics | {"quintic": runs}, "distributed", {"quintic": "**quintic**"}, every_layer=False)
    ratio = (20 * 21 * 22) ** (1 / 3) / 20  # of the geometric means
    assert cells_of(table.splitlines()[3]) == [
        "**quintic**", "21.00 ± 2.48", f"{ratio:.3f}", "0.75 ± 0.12", "0.60", "0.25", "0.15", "0.88"
    ]  # fmt: skip


def test_the_interval_is_that_of_scipy() -> None:
    values = [20.31, 20.52, 20.17, 20.44, 20.29]
    low, high = stats.t.interval(0.95, 4, loc=20.346, scale=stats.sem(values))
    assert with_interval(values) == f"20.35 ± {(high - low) / 2:.2f}" == "20.35 ± 0.17"
    assert with_interval([0.5, 0.7]) == "0.60 ± 1.27"  # two runs: 12.706 standard errors
    assert with_interval([0.5], 3) == "0.500"
    # An interval that is not nothing is not shown as nothing.
    assert with_interval([20.0, 20.002, 20.004]) == "20.002 ± 0.005"
    assert with_interval([20.0, 20.0000002]) == "20.00 ± 0.00"
    assert with_interval([20.0, 20.0]) == "20.00 ± 0.00"


def test_what_is_undefined_is_a_hyphen(metrics_of: Callable) -> None:
    metrics = metrics_of(9.0, (0.7, 0.3, 0.0, 0.0))
    assert layer_table(metrics, [1.0]).splitlines()[1].split()[2:4] == ["-", "0.000"]
    assert cells_of(comparison_table({"a": [metrics]}, "a").splitlines()[2])[3] == "-"
    assert with_interval([0.5, math.nan]) == "-"


def runs_of(losses: dict[int, float]) -> dict[int, dict[str, float]]:
    return {seed: {"perplexity": math.exp(loss)} for seed, loss in losses.items()}


def test_the_differences_are_paired_by_seed_and_corrected() -> None:
    """By hand: differences 0.04, 0.05, 0.06 have mean 0.05, deviation 0.01 and t = 0.05 / (0.01 / sqrt(3)) = 8.66."""
    results = {
        "distributed": runs_of({0: 3.0, 1: 3.5, 2: 4.0, 5: 9.0}),
        "linear": runs_of({2: 4.06, 1: 3.55, 0: 3.04}),  # in another order
        "localist": runs_of({0: 3.2, 1: 3.5, 2: 4.4}),
    }
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    p_values = [2 * stats.t.sf(8.6603, 2), stats.ttest_rel([3.2, 3.5, 4.4], [3.0, 3.5, 4.0]).pvalue]
    header, _, linear, localist = differences_table(results, "distributed", {"linear": "a line"}).splitlines()
    assert cells_of(header) == [
        "configuration", "seeds", "perplexity / distributed [95 % interval]", "Hedges' g", "p (Holm)"
    ]  # fmt: skip
    ends = f"[{math.exp(0.05 - half):.3f}, {math.exp(0.05 + half):.3f}]"
    # Hedges' correction for two degrees of freedom is gamma(1) / (sqrt(1) gamma(1 / 2)) = 1 / sqrt(pi); d is 5.
    assert cells_of(linear) == ["a line", "3", f"1.051 {ends}", "2.8", f"{2 * p_values[0]:.3f}"]
    assert cells_of(linear)[2:] == ["1.051 [1.025, 1.078]", "2.8", "0.026"]
    assert cells_of(localist)[4] == f"{p_values[1]:.3f}"  # the larger one of two is not multiplied


def test_two_seeds_have_no_effect_size_and_one_no_difference() -> None:
    results = {
        "distributed": runs_of({0: 3.0, 1: 3.0}),
        "linear": runs_of({0: 3.1, 1: 9.0}),
        "cubic": runs_of({0: 3.1}),
    }
    rows = [cells_of(line) for line in differences_table(results, "distributed").splitlines()]
    assert [row[0] for row in rows[2:]] == ["linear"]
    assert rows[2][1] == "2"
    # By hand: 3.05 ± 12.706 * 2.95, exponentiated; no endless row of digits.
    assert rows[2][2] == f"{math.exp(3.05):.3f} [0.000, {math.exp(3.05 + 12.7062 * 2.95):.0e}]"
    assert rows[2][3] == "-"
    del results["linear"]
    assert differences_table(results, "distributed") == ""
    same = {"distributed": runs_of({0: 3.0, 1: 4.0}), "linear": runs_of({0: 3.0, 1: 4.0})}
    assert cells_of(differences_table(same, "distributed").splitlines()[2])[2:] == ["1.000 [1.000, 1.000]", "-", "-"]


def test_differences_are_for_other_text_where_every_run_has_the_losses_of_its_documents() -> None:
    generator, labels = np.random.default_rng(0), [255, 255, 100]
    documents = {
        name: {seed: (generator.normal(3, 0.1, 3) * labels).tolist() for seed in range(3)}
        for name in ("distributed", "quintic", "localist")
    }
    results = {
        name: {
            seed: {"perplexity": math.exp(sum(sums) / 610), "document_losses": sums, "document_labels": labels}
            for seed, sums in runs.items()
        }
        for name, runs in documents.items()
    }
    found = perplexity_differences(results, "distributed")
    values = {name: ratio_values(list(sums.values()), [labels] * 3) for name, sums in documents.items()}
    expected = {name: paired_difference(values[name], values["distributed"]) for name in found}
    corrected = holm([each.p_value for each in expected.values()])
    for (name, each), p_value in zip(expected.items(), corrected, strict=True):
        assert found[name].ratio == pytest.approx((*np.exp(each.difference[:3]), 3))
        assert found[name][1:] == pytest.approx((each.effect_size, p_value))
    # One run whose losses are not known is enough for all to be of seeds alone.
    del results["localist"][1]["document_losses"]
    of_seeds = perplexity_differences(results, "distributed")["quintic"].ratio
    assert of_seeds.mean == pytest.approx(found["quintic"].ratio.mean)
    assert of_seeds.low != pytest.approx(found["quintic"].ratio.low)
    losses = [[math.log(run["perplexity"]) for run in results[name].values()] for name in ("quintic", "distributed")]
    ends = stats.ttest_rel(*losses).confidence_interval()
    assert of_seeds[1:3] == pytest.approx((math.exp(ends.low), math.exp(ends.high)))


def test_perplexities_off_by_one_factor_give_no_p_value() -> None:
    baseline = [22.11, 22.14, 22.09]
    results = {"distributed": baseline, "quintic": [1.05 * each for each in baseline], "cubic": [23.1, 23.3, 23.0]}
    results = {name: runs_of(dict(enumerate(map(math.log, runs)))) for name, runs in results.items()}
    found = perplexity_differences(results, "distributed")
    assert math.isnan(found["quintic"].p_value) and math.isnan(found["quintic"].effect_size)
    assert found["quintic"].ratio[:3] == pytest.approx((1.05, 1.05, 1.05))
    # It is a comparison all the same: of two.
    alone = perplexity_differences({name: results[name] for name in ("distributed", "cubic")}, "distributed")
    assert found["cubic"].p_value == pytest.approx(2 * alone["cubic"].p_value)


def test_a_baseline_without_results_is_refused(metrics: dict) -> None:
    message = "`baseline` is 'linear'; the results are of 'distributed', 'quintic'"
    with pytest.raises(ValueError, match=message):
        comparison_table(metrics, "linear")
    with pytest.raises(ValueError, match=message):
        differences_table({name: dict(enumerate(runs)) for name, runs in metrics.items()}, "linear")


def test_the_layer_table_has_a_line_for_each_layer(metrics: dict) -> None:
    header, first, second = layer_table(metrics["quintic"][0], [0.0, 1.0]).splitlines()
    titles = ["context fidelity", "context share", "self", "sink", "fidelity", "entropy (bits)"]
    assert header.split() == " ".join(["layer", "lambda", *titles]).split()
    assert second.split() == ["1", "1.000", "0.800", "0.600", "0.250", "0.150", "0.880", "3.50"]
    assert len(header) == len(first) == len(second)
