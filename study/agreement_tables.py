"""Does attention say what a prediction rests on? What `agreement.py` and `recall.py` have found, as tables."""

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from records_of_runs import BASELINE, GRIDS, RECORDS, Study
from statistics_of_runs import Comparison, cost

from localist_hf.evaluation.statistics import mean_interval, paired_difference
from localist_hf.evaluation.tables import table_of, with_ends


FIGURES = GRIDS / "figures"
RECALL = FIGURES / "recall.jsonl"
#: What was aimed at, set beforehand.
_LEAST_BEYOND, _LEAST_PSI, _LEAST_TOP, _MOST_COST, _LEAST_RECALL = 0.35, 0.6, 0.65, 1.05, 0.05
#: Guesses that stand in the table of one seed.
_GUESSES = (
    "last layer", "all layers", "localised layers, by value length", "rollout", "gradient x input",
    "integrated gradients", "nearness", "random", "erasure",
)  # fmt: skip


class Reading(NamedTuple):
    """A run at one dial."""

    name: str
    dial: float

    def __str__(self) -> str:
        return self.name + (", dial 1, in sight" if self.dial else "")


class Agreements:
    """The study: its runs, and what was found of each, `found[name][seed]` by dial and method."""

    def __init__(self, study: Study) -> None:
        self.study = study
        lines = map(json.loads, (FIGURES / f"{study.name}.jsonl").read_text(encoding="utf-8").splitlines())
        self.found: dict[str, dict[int, dict[tuple[float, str], dict[str, Any]]]] = {}
        for line in lines:
            by_way = {(each["dial"], each["method"]): each for each in line["found"]}
            self.found.setdefault(line["name"], {})[line["seed"]] = by_way

    @cached_property
    def free(self) -> str:
        return next(name for name in self.study.runs if self.study.settings[name]["locality_schedule"] == BASELINE)

    @cached_property
    def seeds(self) -> list[int]:
        return [seed for seed in self.study.seeds if all(seed in self.found[name] for name in self.study.runs)]

    @cached_property
    def readings(self) -> list[Reading]:
        """At dial 0, those of the free training first, and at dial 1 where that was measured."""
        names = [self.free, *(name for name in self.study.runs if name != self.free)]
        dials = {name: sorted({dial for dial, _ in self.found[name][self.seeds[0]]}) for name in names}
        return [Reading(name, dial) for name in names for dial in dials[name]]

    def values(self, reading: Reading, method: str, figure: str, guess: str, seeds: Sequence[int]) -> np.ndarray | None:
        """`(num_seeds, num_documents)`, of the documents of which all are numbers; `None` where there are none."""
        rows = self.rows(reading, method, figure, guess, seeds)
        kept = None if rows is None else rows[:, ~np.isnan(rows).any(0)]
        return None if kept is None or not kept.size else kept

    def rows(self, reading: Reading, method: str, figure: str, guess: str, seeds: Sequence[int]) -> np.ndarray | None:
        """The same of all documents, NaN where there is no number; `None` where it was not measured."""
        cells = [self.found[reading.name][seed].get((reading.dial, method)) for seed in seeds]
        if any(cell is None or guess not in cell[figure] for cell in cells):
            return None
        return np.array([cell[figure][guess] for cell in cells], dtype=float)  # None is NaN

    def mean(self, reading: Reading, method: str, figure: str, guess: str) -> float:
        values = self.values(reading, method, figure, guess, self.seeds)
        return math.nan if values is None else float(values.mean())


def studied(name: str) -> Agreements | None:
    """The study of this name, where there are its records and figures."""
    paths = RECORDS / f"{name}.jsonl", FIGURES / f"{name}.jsonl"
    return Agreements(Study(paths[0])) if all(path.is_file() for path in paths) else None


def section(agreements: Agreements) -> list[str]:
    """The section of results on it."""
    study, seeds = agreements.study, ", ".join(map(str, agreements.seeds))
    training = study.any_run()["training"]

    def figure(method: str, name: str, guess: str) -> Callable[[Reading], str]:
        def cell(reading: Reading) -> str:
            values = agreements.values(reading, method, name, guess, agreements.seeds)
            return "-" if values is None else with_ends(mean_interval(values), 2)

        return cell

    def price(reading: Reading) -> str:
        is_reference = reading == Reading(study.reference, 0)
        return "1" if is_reference else str(cost(study, reading.name, setting=f"dial {reading.dial:g}"))

    columns = {
        "configuration": str,
        "/ reference": price,
        "last layer": figure("erasure", "spearman", "last layer"),
        "last layer, beyond nearness": figure("erasure", "beyond_nearness", "last layer"),
        "the same, knock-out": figure("knock_out", "beyond_nearness", "last layer"),
        "all layers, beyond nearness": figure("erasure", "beyond_nearness", "all layers"),
        "the same, by knock-out": figure("knock_out", "beyond_nearness", "all layers"),
        "nearness": figure("erasure", "spearman", "nearness"),
        "last layer, top 1": figure("erasure", "top_1", "last layer"),
        "nearness, top 1": figure("erasure", "top_1", "nearness"),
    }
    return [
        f"### Does attention say what a prediction rests on? {training['steps']} steps, seed"
        f"{'s' if len(agreements.seeds) > 1 else ''} {seeds}",
        "Spearman's correlation of the attention of a layer, mean over its heads, with the "
        "[influence](method.md#influence) of the tokens before on a prediction, by erasure and by knock-out; *beyond "
        "nearness*, with the rank of the distance taken out of both ([definition](method.md#agreement)); and how often "
        "the token with the most influence is the guess's first. At dial 1 over the tokens in sight alone: on others "
        "both agree by construction. Texts of 128 tokens, held out; intervals over seeds and texts.",
        table_of(agreements.readings, columns),
        *_verdict(agreements),
        *_of_one_seed(agreements),
    ]


def _verdict(agreements: Agreements) -> list[str]:
    study, free = agreements.study, Reading(agreements.free, 0.0)
    columns: dict[str, Callable[[Reading], str]] = {"configuration": str}
    for title, method, guess in (
        ("last layer, beyond nearness, erasure", "erasure", "last layer"),
        ("last layer, knock-out", "knock_out", "last layer"),
        ("all layers, erasure", "erasure", "all layers"),
    ):
        columns[title] = lambda reading, method=method, guess=guess: str(
            _against(agreements, reading, free, method, guess)
        )
    readings = [reading for reading in agreements.readings if reading != free and not reading.dial]
    measured = {
        reading: agreements.mean(reading, "erasure", "beyond_nearness", "last layer")
        for reading in agreements.readings
        if reading.name != agreements.free
        and _is_concentrated(study, reading)
        and cost(study, reading.name, setting=f"dial {reading.dial:g}").estimate.mean <= _MOST_COST
    }
    aim = (
        f"*Aimed at, set beforehand*: at least {_LEAST_BEYOND} beyond nearness in the last layer (erasure) of a model "
        f"with psi of {_LEAST_PSI} or a top block's share of {_LEAST_TOP} on the base's blocks (at dial 1: that is "
        f"held to its own), at no more than {_MOST_COST} times the reference. "
    )
    if measured:
        best = max(measured, key=measured.__getitem__)
        verdict = "met" if measured[best] >= _LEAST_BEYOND else "missed"
        aim += f"The best of such models, *{best}*, has {measured[best]:.2f}: {verdict}."
    else:
        aim += "No model of this study is such a one: missed."
    return [
        "Less that of free training, at dial 0, paired over seeds and texts, beyond nearness:",
        table_of(readings, columns),
        aim,
        _in_words(agreements, readings, free),
    ]


def _in_words(agreements: Agreements, readings: Sequence[Reading], free: Reading) -> str:
    """The verdict, whichever way it goes."""
    last = [_against(agreements, reading, free, "erasure", "last layer").estimate for reading in readings]
    more, less = sum(each.low > 0 for each in last), sum(each.high < 0 for each in last)
    of_all = [agreements.mean(each, "erasure", "beyond_nearness", "all layers") for each in [free, *readings]]
    seed = agreements.seeds[:1]
    gradients = [
        float(agreements.values(free, "erasure", "beyond_nearness", guess, seed).mean())
        for guess in ("gradient x input", "integrated gradients")
    ]
    said = (
        f"*In words*: of {len(readings)} localised models the last layer's attention says more beyond nearness than "
        f"free training's in {more}, and less in {less}. "
    )
    if not more:
        said += "Held in blocks, or made up of few, attention explains no more than it did; what locality gives is "
        said += "that a reader knows what it cannot rest on, where every layer is held ([reach](method.md#reach)). "
    return said + (
        f"The mean of all layers says more than the last one in every model ({min(of_all):.2f} to {max(of_all):.2f}), "
        f"and more than gradients do (free training, seed {seed[0]}: {gradients[0]:.2f} times the input, "
        f"{gradients[1]:.2f} integrated)."
        if min(of_all)
        > max(
            *gradients,
            *(agreements.mean(each, "erasure", "beyond_nearness", "last layer") for each in [free, *readings]),
        )
        else f"The mean of all layers has {min(of_all):.2f} to {max(of_all):.2f}."
    )


def _against(agreements: Agreements, reading: Reading, free: Reading, method: str, guess: str) -> Comparison:
    pair = [agreements.rows(each, method, "beyond_nearness", guess, agreements.seeds) for each in (reading, free)]
    is_in_both = ~np.isnan(pair).any((0, 1))  # the same texts
    found = paired_difference(*(rows[:, is_in_both] for rows in pair))
    return Comparison(found.difference, found.effect_size, found.p_value)


def _is_concentrated(study: Study, reading: Reading) -> bool:
    """
    Whether its last layer is held in blocks of the base, or has made up its mind among them; at dial 1, where these are
    not measured, whether it was held to its own.
    """
    if reading.dial:
        return study.settings[reading.name]["training_dials"] == [1]
    figures = [run["last_layer_on_base_blocks"] for run in study.runs[reading.name]]
    psi, top = (np.mean([each[key] for each in figures]) for key in ("context_fidelity", "top_block_share"))
    return bool(psi >= _LEAST_PSI or top >= _LEAST_TOP)


def _of_one_seed(agreements: Agreements) -> list[str]:
    """Faithfulness, and gradients beside attention."""
    seed = agreements.seeds[:1]
    readings = [each for each in agreements.readings if not each.dial]
    tables = []
    for title, method, figure in (
        ("Comprehensiveness", "taken away", "comprehensiveness"),
        ("Sufficiency", "taken away", "sufficiency"),
        ("Beyond nearness, erasure", "erasure", "beyond_nearness"),
    ):

        def cell(guess: str, method: str = method, figure: str = figure) -> Callable[[Reading], str]:
            def of(reading: Reading) -> str:
                values = agreements.values(reading, method, figure, guess, seed)
                return "-" if values is None else f"{values.mean():.2f}"

            return of

        columns: dict[str, Callable[[Reading], str]] = {title: str} | {guess: cell(guess) for guess in _GUESSES}
        tables.append(table_of(readings, columns))
    return [
        f"Of seed {seed[0]}: [faithfulness](method.md#faithfulness), of the worst order 0 and of the best 1, and "
        "gradients (by Captum) beside attention. *erasure* is the order by the influence of one stretch alone, on the "
        "very draws that it is judged by.",
        *tables,
    ]


def recall_section() -> list[str]:
    """The section on names that come again; none where it was not measured."""
    if not RECALL.is_file():
        return []
    lines = [json.loads(line) for line in RECALL.read_text(encoding="utf-8").splitlines()]
    free = {line["texts"]: line for line in lines if line["name"] == "distributed-taught0.9"}
    guesses = [guess for guess in lines[0]["hits"] if guess != "it is the name's"]

    def share(guess: str) -> Callable[[dict[str, Any]], str]:
        return lambda line: f"{np.mean(line['hits'][guess]):.2f}" if guess in line["hits"] else "-"

    def less_free(line: dict[str, Any]) -> str:
        if line is free[line["texts"]] or line["name"] not in localised:
            return "-"
        values = (np.array(each["hits"]["last layer"])[None] for each in (line, free[line["texts"]]))
        return with_ends(paired_difference(*values).difference, 2)

    localised = {line["name"] for line in lines} - {"the model as it is", "distributed-taught0.9"}
    compared = [line for line in lines if line["name"] in localised]
    best = max(
        compared,
        key=lambda line: np.mean(line["hits"]["last layer"]) - np.mean(free[line["texts"]]["hits"]["last layer"]),
    )
    above = np.mean(best["hits"]["last layer"]) - np.mean(free[best["texts"]]["hits"]["last layer"])
    columns = {
        "configuration": lambda line: line["name"] + (", dial 1" if line["dial"] else ""),
        "the name stands": lambda line: line["texts"],
        **{guess: share(guess) for guess in guesses},
        "last layer, less free training": less_free,
        "it is the name's": share("it is the name's"),
    }
    number = {name: len(line["hits"]["nearness"]) for name, line in free.items()}
    return [
        "### Names that come again: is what is recalled where attention is?",
        "A name of three words stands in one sentence of a text, and its first two at the end (`study/recall.py`; "
        f"texts that the model as it is gets right: {', '.join(f'{count} {name}' for name, count in number.items())}). "
        "How often is the sentence with the most influence (erasure), of those before the own one, the one that each "
        "guess has first? *In the last two*: of the two sentences before, all that two previous blocks show. The last "
        "column says how often that sentence is the one with the name. Attention to the sink is left out; intervals "
        "over texts.",
        table_of(lines, columns),
        f"*Aimed at, set beforehand*: of the best localised model {_LEAST_RECALL} more than of free training. "
        f"*{columns['configuration'](best)}* ({best['texts']}), the best of {len(compared)}, has {less_free(best)}: "
        f"{'met' if above >= _LEAST_RECALL else 'missed'}.",
    ]
