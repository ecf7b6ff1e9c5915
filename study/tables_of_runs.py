"""The tables on the runs of a study: what stands in which column, and which columns a table has."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from records_of_runs import BASE, BASELINE, KINDS, Run, Study, dials_of, figures, generated, is_semantic
from statistics_of_runs import Comparison, cost, cost_at_dial_1

from localist_hf.evaluation.statistics import holm
from localist_hf.evaluation.tables import markdown_table, p_value_cell, table_of, with_interval


class Line(NamedTuple):
    """A line of a table: the runs of a study that have this name, or the base under their settings."""

    study: Study
    name: str
    runs: Sequence[Run]
    is_trained: bool = True


Cell = Callable[[Line], str]


def mean(title: str, digits: int) -> Cell:
    """Of a figure, with the interval over seeds."""

    def cell(line: Line) -> str:
        values = [figures(run).get(title) for run in line.runs]
        return "-" if None in values else with_interval(values if line.name != BASE else values[:1], digits)

    return cell


def compared(compare: Callable[..., Comparison], is_under_dial: bool = False, **settings: str) -> Cell:
    """With the interval over seeds and documents; what has no local layer has nothing under the dial."""

    def cell(line: Line) -> str:
        is_local = line.name != BASE and line.study.settings[line.name]["locality_schedule"] != BASELINE
        if not line.is_trained or (is_under_dial and not is_local):
            return "-"
        if line.name == line.study.reference:
            return "1"
        return str(compare(line.study, line.name, **settings))

    return cell


def of_untrained(title: str) -> Cell:
    return lambda line: (
        "-" if line.name == BASE else with_interval([figures(line.study.untrained(line.name))[title]], 3)
    )


def _psi_on_base_blocks(line: Line) -> str:
    if line.is_trained:
        return mean("psi, the base's semantic blocks", 3)(line)
    return "as own" if is_semantic(line.runs[0]) else "-"


_ON_KINDS = [f"{figure}, {title}" for figure in ("psi", "dial 1") for title in KINDS.values()]
_COSTS = {f"{setting} / reference": setting for setting in ("dial 0", "dial 1", "self only")}
_SHARES = ("self", "sink", "block", "outside", "other words", "psi", "another text's", "phi")
COLUMNS: dict[str, Cell] = {
    "configuration": lambda line: line.name,
    "trained on": lambda line: line.name if line.is_trained else "- untrained",
    "/ reference": compared(cost),
    **{title: compared(cost, setting != "dial 0", setting=setting) for title, setting in _COSTS.items()},
    "cost at dial 1": compared(cost_at_dial_1, True),
    "visible keys": mean("visible keys", 1),
    **{title: mean(title, 2) for title in ("perplexity", *_SHARES, "out of reach")},
    "psi at dial 0": mean("psi", 2),
    "psi, the base's semantic blocks": _psi_on_base_blocks,
    **{title: mean(title, 3) for title in (*_ON_KINDS, "self only", "KL (bits)")},
    **{f"untrained: {title}": of_untrained(title) for title in ("cost at dial 1", "KL (bits)")},
}


def table(*titles: str) -> Callable[[Study, Sequence[str]], str]:
    """Makes a table with these columns, a line for each configuration."""
    columns = {title: COLUMNS[title] for title in titles}
    return lambda study, names: table_of([Line(study, name, study.runs_of(name)) for name in (BASE, *names)], columns)


where_attention_goes = table("configuration", "/ reference", *_SHARES, "cost at dial 1")
ways_to_train = table(
    "configuration", *_COSTS, "visible keys", "out of reach", "psi, the base's semantic blocks", "other words"
)
held = table("configuration", *_COSTS, "visible keys", "psi at dial 0")
dial_1 = table(
    "configuration", "cost at dial 1", "self only", "KL (bits)", "untrained: cost at dial 1", "untrained: KL (bits)"
)


def partitions(study: Study, names: Sequence[str]) -> str:
    """Own and other blocks, after training and before."""
    titles = ("trained on", "/ reference", "visible keys", "psi, the base's semantic blocks", *_ON_KINDS)
    lines = []
    for name in names:
        lines += [Line(study, name, study.runs[name]), Line(study, name, [study.untrained(name)], is_trained=False)]
    return table_of(lines, {title: COLUMNS[title] for title in titles})


def schedules(study: Study, names: Sequence[str]) -> str:
    """What each costs; the p-values are corrected for all of them."""
    tests = {name: cost(study, name) for name in names if name != study.reference}
    sizes = {name: with_interval([test.effect_size], 1) for name, test in tests.items()}
    p_values = dict(zip(tests, map(p_value_cell, holm([test.p_value for test in tests.values()])), strict=True))
    columns = {title: COLUMNS[title] for title in ("configuration", "perplexity", "/ reference")}
    columns["Hedges' g"] = lambda line: sizes.get(line.name, "-")
    columns["p (Holm)"] = lambda line: p_values.get(line.name, "-")
    columns |= {title: COLUMNS[title] for title in ("psi", "other words", "cost at dial 1")}
    return table_of([Line(study, name, study.runs_of(name)) for name in (BASE, *names)], columns)


def dial_sweep(study: Study, names: Sequence[str]) -> str:
    """Perplexity over the dial, as a multiple of that at dial 0, and psi under it."""
    rows = [["configuration", "", *(f"dial {dial:g}" for dial in dials_of(study.runs[names[0]]))]]
    for name in names:
        runs = study.runs[name]
        ratios, psis = ["perplexity"], ["psi"]
        for at_dial in zip(*(run["controls"]["dials"] for run in runs), strict=True):
            of_runs = [at["perplexity"] / run["controls"]["perplexity"] for at, run in zip(at_dial, runs, strict=True)]
            ratios.append(with_interval(of_runs, 3))
            psis.append(with_interval([at["context_fidelity"] for at in at_dial]))
        rows += [[name, *ratios], ["", *psis]]
    return markdown_table(rows)


def generation(study: Study, names: Sequence[str]) -> str:
    """What was written at either dial, and the text itself."""

    def cells(runs: Sequence[Run], key: str) -> list[str]:
        figures = ("distinct_2", "repetition_4", "loss")
        return [with_interval([generated(run, key, figure) for run in runs], 3) for figure in figures]

    rows = [["configuration", "dial", "distinct-2", "repetition-4", "loss under the base (nats)"]]
    for name in names:
        runs = study.runs[name]
        for dial, label in (("0", name), ("1", "")):
            if f"dial {dial}" in runs[0]["controls"]["generation"]:
                rows.append([label, dial, *cells(runs, f"dial {dial}")])
    rows.append(["the text itself", "-", *cells(study.runs[names[0]][:1], "text")])
    return markdown_table(rows)
