"""
Makes `docs/results.md`, its pictures and the answer in the README from the committed records, and from nothing else.

    python study/results.py          # or: make results
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from statistics_of_runs import (
    Comparison,
    Run,
    Study,
    labels,
    losses,
    over_seeds,
    perplexity_ratio,
    ratio_of_retentions,
    share_difference,
    shares,
    with_ends,
    with_interval,
)

from localist_hf.configuration import PAPER_VARIANTS
from localist_hf.evaluation import markdown_table
from localist_hf.evaluation.statistics import holm, mean_interval


ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
RESULTS = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
#: Between these lines of the README stands the answer.
MARKERS = ("<!-- results -->", "<!-- /results -->")
BASELINE = "distributed"
KINDS = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}


class Model(NamedTuple):
    """One of the models that the questions are asked of."""

    title: str
    study: Study
    about: str


class Primary(NamedTuple):
    """A comparison that was named beforehand: what it is of, what the paper would have, and what was found."""

    question: str
    unit: str
    found: Comparison
    is_expected: Callable[[float], bool]
    neutral: float


# --- figures of one run


def ratio(run: Run, name: str) -> float:
    """A perplexity, as a multiple of that at dial 0."""
    return run["controls"][name] / run["controls"]["perplexity"]


def psi(run: Run, kind: str, number: int | None = None) -> float:
    """Context fidelity of the last layer on blocks of a kind, so many before being local."""
    entries = run["controls"]["blocks"]
    entry = entries[-1] if number is None else next(each for each in entries if each["num_previous_blocks"] == number)
    return entry[kind]["context_fidelity"]


def previous(run: Run) -> int:
    """How many blocks before a token's own are local in a run."""
    return int(run["name"].partition("-previous")[2] or 0)


def retention_on(run: Run, kind: str) -> float:
    """Perplexity at dial 1 on these blocks / at dial 0."""
    return run["controls"]["perplexity_on_blocks"][kind] / run["controls"]["perplexity"]


def generated(run: Run, dial: str, figure: str) -> float:
    return fmean(run["controls"]["generation"][dial][figure])


def generated_loss(run: Run, dial: str) -> float:
    """Mean loss of a token that was written, under the base."""
    figures = run["controls"]["generation"][dial]
    return sum(figures["losses"]) / (len(figures["losses"]) * figures["num_tokens"])


# --- comparisons


def cost(study: Study, name: str, baseline: str = BASELINE) -> Comparison:
    """Perplexity as a multiple of another run's."""
    runs, others = study.runs[name], study.runs[baseline]
    return perplexity_ratio(losses(runs, "dial 0"), losses(others, "dial 0"), labels(runs))


def retention(study: Study, name: str, other: str | None = None, kinds: tuple[str, str] | None = None) -> Comparison:
    """
    Perplexity at dial 1 / at dial 0; as a multiple of another run's, or of the same run on another kind of blocks.
    """
    runs = study.runs[name]
    at_0 = losses(runs, "dial 0")
    if kinds is not None:
        first, second = (losses(runs, kind) for kind in kinds)
        return perplexity_ratio(first, second, labels(runs))
    at_1 = losses(runs, "dial 1")
    if other is None:
        return perplexity_ratio(at_1, at_0, labels(runs))
    others = study.runs[other]
    return ratio_of_retentions(at_1, at_0, losses(others, "dial 1"), losses(others, "dial 0"), labels(runs))


def own_minus_wrong(study: Study, name: str, number: int = 0) -> Comparison:
    runs = study.runs[name]
    return share_difference(shares(runs, f"own {number}"), shares(runs, f"wrong {number}"))


def primaries(study: Study) -> list[Primary]:
    """The comparisons that were named before anything was measured."""
    found = [
        Primary(
            "quintic against distributed",
            "perplexity, ratio",
            cost(study, "quintic"),
            lambda value: value <= 1.05,
            1.0,
        ),
        Primary(
            "own against another text's blocks (quintic, no block before)",
            "psi of the last layer, difference",
            own_minus_wrong(study, "quintic"),
            lambda value: value > 0,
            0.0,
        ),
    ]
    for kind in ("windows", "recency"):
        found.append(
            Primary(
                f"semantic blocks against {KINDS[kind]} at as many visible keys (quintic)",
                "perplexity at dial 1, ratio",
                retention(study, "quintic", kinds=("own", kind)),
                lambda value: value < 1,
                1.0,
            )
        )
    found += [
        Primary(
            "quintic against its reverse",
            "perplexity, ratio",
            cost(study, "quintic", "reverse_quintic"),
            lambda value: value < 1,
            1.0,
        ),
        Primary(
            "quintic against its reverse",
            "retention, ratio",
            retention(study, "quintic", "reverse_quintic"),
            lambda value: value < 1,
            1.0,
        ),
    ]
    return found


def verdict(each: Primary, p_value: float) -> str:
    """What a comparison says, by its interval and the corrected p-value together."""
    interval = each.found.estimate
    if interval.low <= each.neutral <= interval.high or not p_value < 0.05:
        return "no difference shown"
    return "as claimed" if each.is_expected(interval.mean) else "not as claimed"


# --- tables


def primary_table(study: Study) -> str:
    comparisons = primaries(study)
    corrected = holm([each.found.p_value for each in comparisons])
    rows = [["comparison", "figure", "estimate [95 % interval]", "Hedges' g", "p (Holm)", "verdict"]]
    for each, p_value in zip(comparisons, corrected, strict=True):
        size = f"{each.found.effect_size:.1f}"
        rows.append(
            [each.question, each.unit, with_ends(each.found.estimate), size, _p(p_value), verdict(each, p_value)]
        )
    return markdown_table(rows)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_cells(study: Study, name: str) -> list[str]:
    """Perplexity, and its ratio to the baseline's with the interval."""
    cells = [with_interval(over_seeds(study.runs[name], lambda run: run["controls"]["perplexity"]))]
    return [*cells, "1" if name == BASELINE else with_ends(cost(study, name).estimate)]


def retention_cell(study: Study, name: str) -> str:
    return "-" if name == BASELINE else with_ends(retention(study, name).estimate)


def mean_cell(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 2) -> str:
    return with_interval(mean_interval([value(run) for run in runs]), digits)


def schedules(study: Study) -> str:
    """Question 1."""
    names = [name for name in PAPER_VARIANTS if name in study.runs]
    tests = [cost(study, name) for name in names if name != BASELINE]
    corrected = dict(zip([name for name in names if name != BASELINE], holm([t.p_value for t in tests]), strict=True))
    sizes = dict(zip(corrected, (test.effect_size for test in tests), strict=True))
    rows = [
        ["configuration", "perplexity", "/ distributed", "Hedges' g", "p (Holm)", "psi", "other words", "retention"]
    ]
    for name in names:
        runs = study.runs[name]
        rows.append(
            [
                name,
                *cost_cells(study, name),
                f"{sizes[name]:.1f}" if name in sizes else "-",
                _p(corrected[name]) if name in corrected else "-",
                mean_cell(runs, lambda run: psi(run, "own", 0)),
                mean_cell(runs, lambda run: run["last_layer"]["context_share"]),
                retention_cell(study, name),
            ]
        )
    return markdown_table(rows)


def order(study: Study) -> str:
    """Whether perplexity is ordered as the paper says."""
    claimed = [BASELINE, "quintic", "quartic", "cubic", "quadratic", "linear", "localist"]
    means = {name: fmean(run["controls"]["perplexity"] for run in study.runs[name]) for name in claimed}
    found = sorted(claimed, key=means.__getitem__)
    steps = [cost(study, after, before) for before, after in pairwise(claimed)]
    corrected = holm([step.p_value for step in steps])
    shown = [
        f"{before} < {after}"
        for (before, after), step, p_value in zip(pairwise(claimed), steps, corrected, strict=True)
        if step.estimate.low > 1 and p_value < 0.05
    ]
    against = [
        f"{after} < {before}"
        for (before, after), step, p_value in zip(pairwise(claimed), steps, corrected, strict=True)
        if step.estimate.high < 1 and p_value < 0.05
    ]
    text = f"From least to most perplexity: {', '.join(found)}. "
    text += (
        "The order of the means is the paper's. " if found == claimed else "The order of the means is not the paper's. "
    )
    text += f"Of its {len(steps)} steps {len(shown)} are shown (interval and corrected p): {', '.join(shown) or 'none'}"
    return text + (f"; and against it: {', '.join(against)}." if against else "; none is shown the other way round.")


def partitions(study: Study, names: Sequence[str]) -> str:
    """Question 2: own and other blocks."""
    rows = [["trained on", "/ distributed", "visible keys"]]
    rows[0] += [f"psi, {title}" for title in KINDS.values()] + [f"dial 1, {title}" for title in KINDS.values()]
    for name in names:
        runs = study.runs[name]
        number = previous(runs[0])
        keys = mean_cell(runs, lambda run: _blocks(run)["own"]["visible_keys"], 1)
        cells = [name, cost_cells(study, name)[1], keys]
        cells += [mean_cell(runs, lambda run, kind=kind, n=number: psi(run, kind, n)) for kind in KINDS]
        cells += [mean_cell(runs, lambda run, kind=kind: retention_on(run, kind), 3) for kind in KINDS]
        rows.append(cells)
    return markdown_table(rows)


def _blocks(run: Run) -> dict:
    number = previous(run)
    return next(each for each in run["controls"]["blocks"] if each["num_previous_blocks"] == number)


def where_attention_goes(study: Study, names: Sequence[str]) -> str:
    """Questions 3 and 5: shares of the last layer."""
    titles = {"self_share": "self", "sink_share": "sink", "block_share": "block", "outside_share": "outside"}
    rows = [
        ["configuration", "/ distributed", *titles.values(), "other words", "psi", "another text's", "phi", "retention"]
    ]
    for name in names:
        runs = study.runs[name]
        cells = [name, cost_cells(study, name)[1]]
        cells += [
            mean_cell(runs, lambda run, share=share: run["last_layer"][share]) for share in (*titles, "context_share")
        ]
        number = previous(runs[0])
        cells += [mean_cell(runs, lambda run, kind=kind, n=number: psi(run, kind, n)) for kind in ("own", "wrong")]
        cells += [mean_cell(runs, lambda run: run["last_layer"]["fidelity"]), retention_cell(study, name)]
        rows.append(cells)
    return markdown_table(rows)


def dial_1(study: Study) -> str:
    """Question 6: retention and faithfulness, trained and untrained."""
    rows = [["configuration", "retention", "self only", "KL (bits)", "untrained: retention", "untrained: KL (bits)"]]
    for name, runs in study.runs.items():
        if name == BASELINE:
            continue
        cells = [name, retention_cell(study, name), mean_cell(runs, lambda run: ratio(run, "self_only_perplexity"), 3)]
        cells.append(mean_cell(runs, lambda run: run["controls"]["divergence"], 3))
        untrained = study.untrained.get(name)
        if untrained is None:
            cells += ["as above", "as above"]
        else:
            controls = untrained["controls"]
            cells += [f"{controls['retention']:.3f}", f"{controls['divergence']:.3f}"]
        rows.append(cells)
    return markdown_table(rows)


def dial_sweep(study: Study, names: Sequence[str]) -> str:
    """Question 6: perplexity over the dial, as a multiple of that at dial 0, and psi under it."""
    dials = [each["dial"] for each in study.runs[names[0]][0]["controls"]["dials"]]
    rows = [["configuration", "", *(f"dial {dial:g}" for dial in dials)]]
    for name in names:
        runs = study.runs[name]
        rows.append([name, "perplexity", *(_at_dial(runs, index, "perplexity") for index in range(len(dials)))])
        rows.append(["", "psi", *(_at_dial(runs, index, "context_fidelity") for index in range(len(dials)))])
    return markdown_table(rows)


def _at_dial(runs: Sequence[Run], index: int, figure: str) -> str:
    def value(run: Run) -> float:
        at = run["controls"]["dials"][index][figure]
        return at / run["controls"]["perplexity"] if figure == "perplexity" else at

    return mean_cell(runs, value, 3 if figure == "perplexity" else 2)


def best_dial(study: Study, names: Sequence[str]) -> str:
    """At which dial perplexity is least."""
    texts = []
    for name in names:
        runs = study.runs[name]
        points = [each["dial"] for each in runs[0]["controls"]["dials"]]
        means = [fmean(run["controls"]["dials"][i]["perplexity"] for run in runs) for i in range(len(points))]
        texts.append(f"{name} {points[means.index(min(means))]:g}")
    return f"Perplexity is least at dial: {', '.join(texts)}."


def generation(study: Study, names: Sequence[str]) -> str:
    """Question 8."""
    rows = [["configuration", "dial", "distinct-2", "repetition-4", "loss under the base (nats)"]]
    for name in names:
        runs = study.runs[name]
        for dial in ("dial 0", "dial 1"):
            if dial in runs[0]["controls"]["generation"]:
                rows.append([name if dial == "dial 0" else "", dial.removeprefix("dial "), *_generated(runs, dial)])
    any_runs = study.runs[names[0]][:1]
    rows.append(["the text itself", "-", *_generated(any_runs, "text")])
    return markdown_table(rows)


def _generated(runs: Sequence[Run], dial: str) -> list[str]:
    return [
        mean_cell(runs, lambda run: generated(run, dial, "distinct_2"), 3),
        mean_cell(runs, lambda run: generated(run, dial, "repetition_4"), 3),
        mean_cell(runs, lambda run: generated_loss(run, dial), 3),
    ]
