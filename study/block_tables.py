"""Blocks against windows and the last n keys at as many visible keys, each trained on its own."""

from collections.abc import Sequence

from records_of_runs import BASELINE, Study, mean_figure
from statistics_of_runs import Comparison, losses_of, own_minus, quotient
from tables_of_runs import COLUMNS, Line

from localist_hf.evaluation.tables import table_of, with_interval


def kind_of(settings: dict) -> str:
    """`"windows"`, `"last keys"`, which are windows of one token and those before, or `"blocks"`."""
    if settings["block_partition"] != "window":
        return "blocks"
    return "last keys" if settings["window_length"] == 1 else "windows"


def at_as_many_keys(study: Study, name: str, kind: str) -> Comparison | None:
    """
    Perplexity at dial 1 as a multiple of that of windows, or of the last n keys, between the two lengths at which they
    show fewer keys and more; `None` where there are no two such runs.
    """
    keys = mean_figure(study.runs[name], "visible keys")
    lengths = {other: mean_figure(study.runs[other], "visible keys") for other in alike(study, name, kind)}
    below = [other for other in lengths if lengths[other] <= keys]
    above = [other for other in lengths if lengths[other] > keys]
    if not below or not above:
        return None
    low, high = max(below, key=lengths.__getitem__), min(above, key=lengths.__getitem__)
    weight = (keys - lengths[low]) / (lengths[high] - lengths[low])
    of_low, of_high = (losses_of(study.runs[other], "dial 1") for other in (low, high))
    return quotient(losses_of(study.runs[name], "dial 1"), of_low + weight * (of_high - of_low), study.runs[name])


def alike(study: Study, name: str, kind: str) -> list[str]:
    """The windows with as many previous blocks as a run has, or the last n keys; trained alike."""
    own = study.settings[name]
    of_blocks = ("block_partition", "window_length", "delimiter_token_ids")
    if kind == "last keys":
        of_blocks += ("num_previous_blocks",)
    found = []
    for other, settings in study.settings.items():
        is_alike = all(settings[key] == value for key, value in own.items() if key not in of_blocks)
        if other in study.runs and kind_of(settings) == kind and is_alike:
            found.append(other)
    return found


def within_reach(study: Study, name: str) -> float | None:
    """
    Tokens that a prediction can reach through the local layers alone, on average: its local set, and again the blocks
    before for each further layer. `None` where the same blocks without those before were not measured.
    """
    settings, keys = study.settings[name], mean_figure(study.runs[name], "visible keys")
    if settings["num_previous_blocks"] == 0:
        return keys
    if kind_of(settings) == "last keys":
        alone = 1.0
    elif kind_of(settings) == "windows":
        alone = (settings["window_length"] + 1) / 2
    else:
        alone_name = name.replace(f"-previous{settings['num_previous_blocks']}", "")
        if alone_name not in study.runs:
            return None
        alone = mean_figure(study.runs[alone_name], "visible keys")
    run = study.any_run()
    num_local = run["num_layers"] - run["num_layers"] // 2
    return alone + num_local * (keys - alone)


def blocks_table(study: Study, names: Sequence[str]) -> str:
    """A line for each kind of blocks."""

    def ratio(kind: str):
        def cell(line: Line) -> str:
            if kind_of(study.settings[line.name]) != "blocks":
                return "-"
            found = at_as_many_keys(study, line.name, kind)
            return "-" if found is None else str(found)

        return cell

    def lift(line: Line) -> str:
        lifts = [run["controls"].get("block_lift") for run in line.runs]
        return "-" if None in lifts or kind_of(study.settings[line.name]) == "last keys" else with_interval(lifts, 1)

    def reach(line: Line) -> str:
        value = within_reach(study, line.name)
        return "-" if value is None else f"{value:.0f}"

    columns = {
        "blocks": lambda line: line.name.removeprefix("upper_half-hold-"),
        "visible keys": COLUMNS["visible keys"],
        "reach of the local layers": reach,
        "dial 1 / reference": COLUMNS["dial 1 / reference"],
        "/ windows at as many keys": ratio("windows"),
        "/ last keys at as many": ratio("last keys"),
        "self only / reference": COLUMNS["self only / reference"],
        "psi, own - another text's": lambda line: str(own_minus(study, line.name, "wrong")),
        "lift at given ends": lift,
    }
    return table_of([Line(study, name, study.runs[name]) for name in names], columns)


def runs_of_kind(study: Study, kind: str) -> list[str]:
    found = [name for name in study.runs if kind_of(study.settings[name]) == kind]
    return [name for name in found if study.settings[name]["locality_schedule"] != BASELINE]
