"""What was set before anything was measured: the primary comparisons and the aims, with how each came out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from records_of_runs import BASELINE, KINDS, Study, mean_figure
from statistics_of_runs import Comparison, cost, cost_at_dial_1, own_minus

from localist_hf.evaluation.statistics import holm
from localist_hf.evaluation.tables import markdown_table, p_value_cell, table_of, with_interval


class Primary(NamedTuple):
    """
    A comparison that was named beforehand, of a study that has the runs; and on which side of what is neither,
    `neutral`, the paper would have it.
    """

    question: str
    unit: str
    compare: Callable[[Study], Comparison]
    is_expected_below: bool = True
    neutral: float = 1.0
    undecided: str = "no difference shown"
    needs: Sequence[str] = ()


class Finding(NamedTuple):
    """What a primary comparison found; its p-value is for `neutral`, corrected for the number of them."""

    primary: Primary
    found: Comparison
    p_value: float

    @property
    def verdict(self) -> str:
        """By the interval and the corrected p-value together."""
        interval, neutral = self.found.estimate, self.primary.neutral
        if interval.low <= neutral <= interval.high or not self.p_value < 0.05:
            return self.primary.undecided
        return "as claimed" if (interval.mean < neutral) == self.primary.is_expected_below else "not as claimed"


PRIMARIES = (
    Primary(
        "quintic against distributed (claim: within 5 %)",
        "perplexity, ratio",
        partial(cost, name="quintic", baseline=BASELINE, expected=1.05),
        neutral=1.05,
        undecided="not decided",
    ),
    Primary(
        "own against another text's blocks (quintic, no block before)",
        "psi of the last layer, difference",
        partial(own_minus, name="quintic", kind="wrong"),
        is_expected_below=False,
        neutral=0.0,
    ),
    *(
        Primary(
            f"semantic blocks against {KINDS[kind]} at as many visible keys (quintic)",
            "perplexity at dial 1, ratio",
            partial(cost, name="quintic", baseline="quintic", setting="own", baseline_setting=kind),
        )
        for kind in ("windows", "recency")
    ),
    *(
        Primary("quintic against its reverse", f"{figure}, ratio", compare, needs=("reverse_quintic",))
        for figure, compare in (
            ("perplexity", partial(cost, name="quintic", baseline="reverse_quintic")),
            ("cost at dial 1", partial(cost_at_dial_1, name="quintic", other="reverse_quintic")),
        )
    ),
)


def findings(study: Study) -> list[Finding]:
    asked = [primary for primary in PRIMARIES if study.runs.keys() >= {*primary.needs}]
    found = [primary.compare(study) for primary in asked]
    return list(map(Finding, asked, found, holm([each.p_value for each in found])))


def primary_table(study: Study) -> str:
    columns: dict[str, Callable[[Finding], str]] = {
        "comparison": lambda each: each.primary.question,
        "figure": lambda each: each.primary.unit,
        "estimate [95 % interval]": lambda each: str(each.found),
        "Hedges' g": lambda each: with_interval([each.found.effect_size], 1),
        "p (Holm)": lambda each: p_value_cell(each.p_value),
        "verdict": lambda each: each.verdict,
    }
    return table_of(findings(study), columns)


#: The number that an aim is about, and how it is shown.
Measured = tuple[float, str]


class Aim(NamedTuple):
    """A bound, `"at least"` or `"at most"`, on what is measured of a configuration."""

    figure: str
    kind: str
    bound: float
    measure: Callable[[Study, str], Measured]
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.figure}: {self.kind} {self.bound:g}{self.unit}"

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.kind == "at least" else value <= self.bound


def _mean(title: str, digits: int) -> Callable[[Study, str], Measured]:
    def measure(study: Study, name: str) -> Measured:
        value = mean_figure(study.runs[name], title)
        return value, f"{value:.{digits}f}"

    return measure


def _context_share(study: Study, name: str) -> Measured:
    share, free = (mean_figure(study.runs[each], "other words") for each in (name, BASELINE))
    return share / free, f"{share / free:.2f} ({share:.3f} against {free:.3f})"


def _estimate(found: Comparison) -> Measured:
    return found.estimate.mean, str(found)


def _cost(bound: float, setting: str = "dial 1", **against: str) -> Aim:
    """What a way to train may cost."""
    at = setting.replace("dial", "perplexity at dial")
    of = f" times {against['baseline']}'s there" if against else " times the reference's"
    return Aim(at, "at most", bound, lambda *run: _estimate(cost(*run, setting=setting, **against)), of)


#: What configurations are to meet, as far as a study has them.
AIMS = {
    ("quintic-hold",): (_cost(1.07),),
    ("upper_half-hold-delimiter-previous1",): (_cost(1.04),),
    ("localist-hold-delimiter-previous1",): (
        _cost(1.1),
        Aim("share of the context out of reach", "at least", 0.2, _mean("out of reach", 2)),
    ),
    ("quintic-both",): (
        _cost(1.005, "dial 0"),
        _cost(1.01, baseline="quintic-hold", baseline_setting="dial 1"),
    ),
    ("quintic-taught0.9-budget0.01",): (
        _cost(1.01, "dial 0"),
        Aim("psi of the last layer, on the base's blocks", "at least", 0.6, _mean("unmoved psi", 3)),
        Aim("attention to other words", "at least", 0.9, _context_share, " of distributed's"),
    ),
    ("quintic", "quintic-contrast", "quintic-delimiter"): (
        Aim("psi of the last layer, on blocks that training does not move", "at least", 0.85, _mean("unmoved psi", 3)),
        Aim("own above another text's blocks", "at least", 0.1, lambda *run: _estimate(own_minus(*run, "wrong"))),
        Aim("attention to other words", "at least", 0.8, _context_share, " of distributed's"),
    ),
    ("quintic-previous1", "quintic-previous1-weight0-dial1"): (
        Aim("perplexity", "at most", 1.02, lambda *run: _estimate(cost(*run)), " times the reference's"),
        Aim("cost at dial 1", "at most", 1.01, lambda *run: _estimate(cost_at_dial_1(*run))),
        Aim("visible keys", "at most", 48, _mean("visible keys", 1)),
    ),
}


#: Those of a study whose model is another one.
AIMS_OF = {
    "smollm2_training": {
        ("quintic-hold",): (_cost(1.02),),
        ("upper_half-hold",): (_cost(1.25),),
        ("upper_half-hold-delimiter-previous1",): (_cost(1.1),),
    }
}


def aims(study: Study) -> str:
    """How near a study comes to them."""
    rows, are_met = [["aim", "configuration", "measured", ""]], {}
    for names, bounds in AIMS_OF.get(study.name, AIMS).items():
        for name in study.those_of(names):
            measured = [(aim, *aim.measure(study, name)) for aim in bounds]
            verdicts = ["met" if aim.is_met_by(value) else "missed" for aim, value, _ in measured]
            rows += [[str(aim), name, shown, each] for (aim, _, shown), each in zip(measured, verdicts, strict=True)]
            are_met[name] = "missed" not in verdicts
    all_met = ", ".join(name for name in are_met if are_met[name])
    return f"{markdown_table(rows)}\n\nAll of its aims are met by: {all_met or 'none'}."
