"""Attention that makes up its mind: what the objective `choice` costs and gives, and its controls."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from records_of_runs import BASE, BASELINE, RECORDS, Run, Study
from statistics_of_runs import cost

from localist_hf.evaluation.tables import markdown_table, with_interval


#: The control: trained to choose among the blocks of another text.
ELSEWHERE = RECORDS / "choice_elsewhere.jsonl"
#: How far the top block is (chosen_block.py).
CHOSEN = RECORDS.parent / "figures" / "chosen.jsonl"
#: What was aimed at, set beforehand: at most so much of the reference, and at least such shares.
_MOST_COST, _LEAST_TOP, _LEAST_OTHERS, _LEAST_ABOVE, _MOST_COST_OF_2 = 1.01, 0.65, 0.95, 0.10, 1.03


def elsewhere(study: Study) -> tuple[Study, str] | None:
    """The control of a study and its run, where there are records of it with the same seeds."""
    if not ELSEWHERE.is_file() or (control := Study(ELSEWHERE)).seeds != study.seeds:
        return None
    return control, next(name for name in control.runs if control.settings[name]["locality_schedule"] != BASELINE)


def has_weights(study: Study) -> bool:
    """Whether a study shows how attention concentrates as it is asked to more firmly."""
    return len(_of_weights(study)) > 2


def section(study: Study) -> list[str]:
    """The section of results on it."""
    training, seeds = study.any_run()["training"], ", ".join(map(str, study.seeds))
    head = ["configuration", "/ reference", "blocks looked at", "top block's share", "own block's share", "other words"]
    free = _free(study)
    asked = [name for name in study.runs if study.settings[name]["locality_objective"] == "choice"]
    names = [free, *asked]
    rows = [[name, *_cells(study, name)] for name in names]
    if (control := elsewhere(study)) is not None:
        rows.append([f"{control[1]}, on another text's blocks", *_cells(*control)])
    return [
        f"### Attention that makes up its mind: {training['steps']} steps, seed"
        f"{'s' if len(study.seeds) > 1 else ''} {seeds}",
        f"Learning rate {training['learning_rate']:g}; the objective `choice` "
        "([definition](method.md#block-shares)) under the quintic schedule, taught by the model's own predictions of "
        "before: no more than *target-blocks* to look at, at this weight, or within this budget. Of the last layer, on "
        "the blocks of the base, mean over the attention to other words. *window*: asked to choose among windows; "
        "*another text's blocks*: among the blocks that the next text has (`study/choice_elsewhere.py`).",
        markdown_table([head, *rows]),
        *(_a_place(study, control) if control is not None else []),
        *_recency(study),
        *(_threshold(study) if has_weights(study) else []),
        "What was aimed at, set beforehand:",
        markdown_table([["aim", "configuration", "measured", ""], *_aims(study)]),
    ]


def _threshold(study: Study) -> list[str]:
    weights = _of_weights(study)
    looked = [
        _mean(study, name, "blocks_looked_at") for name in (_free(study), *(weights[each] for each in sorted(weights)))
    ]
    falls = all(after < before for before, after in pairwise(looked))
    tried = ", ".join(f"{each:g}" for each in sorted(weights))
    seen = (
        f"at the weights that were tried ({tried}) the more weight, the fewer blocks, from the least on. Below that "
        "there may be one"
        if falls
        else f"of the weights that were tried ({tried}) not each leaves fewer blocks than the one before"
    )
    return [
        "![Blocks looked at and the top block's share over the weight](choice.png)",
        "*The framework claims that attention concentrates above a threshold of such a penalty.* What is seen: "
        f"{seen}.",
    ]


def _a_place(study: Study, control: tuple[Study, str]) -> list[str]:
    """What training on another text's blocks says of the gain."""
    name = next(each for each in study.runs if study.settings[each]["locality_objective"] == "choice")
    free, gained, elsewhere = (
        _mean(*each, "top_block_share") for each in ((study, _free(study)), (study, name), control)
    )
    part = (elsewhere - free) / (gained - free)
    is_a_place = part > 0.5
    verdict = "*It chooses a place in the text, not blocks*" if is_a_place else "*It chooses blocks, not just a place*"
    so = " The training would teach any partition of that size." if is_a_place else ""
    return [
        f"{verdict}: trained to choose among another text's blocks, which begin anywhere in this one, the top block "
        f"of the base gains {part:.0%} of what it does where training has these blocks ({free:.3f} to {elsewhere:.3f}, "
        f"and to {gained:.3f}).{so}"
    ]


def _recency(study: Study) -> list[str]:
    """How far the chosen block is."""
    lines = [json.loads(line) for line in CHOSEN.read_text(encoding="utf-8").splitlines()] if CHOSEN.is_file() else []
    found = {name: [each["distances"] for each in lines if each["name"] == name] for name in study.runs}
    if not all(len(each) == len(study.seeds) for each in found.values()):
        return []
    rows = [[name, *(f"{fmean(values):.2f}" for values in zip(*each, strict=True))] for name, each in found.items()]
    return [
        "Is the chosen block just the own one? Of the attention to other words, how much belongs to queries whose top "
        "block is (`study/chosen_block.py`):",
        markdown_table([["configuration", "their own", "the one before", "the one before that", "further"], *rows]),
    ]


def _free(study: Study) -> str:
    return next(name for name in study.runs if study.settings[name]["locality_schedule"] == BASELINE)


def _figures(run: Run) -> dict[str, float]:
    return run["last_layer_on_base_blocks"]


def _mean(study: Study, name: str, figure: str) -> float:
    values = [_figures(run)[figure] for run in study.runs[name]]
    return sum(values) / len(values)


def _cells(study: Study, name: str) -> list[str]:
    price = "1" if name == study.reference else str(cost(study, name))
    digits = {"blocks_looked_at": 2, "top_block_share": 3, "context_fidelity": 3, "context_share": 2}
    return [
        price,
        *(
            with_interval([_figures(run)[figure] for run in study.runs[name]], count)
            for figure, count in digits.items()
        ),
    ]


def _of_weights(study: Study) -> dict[float, str]:
    """Runs for one block by their weight, choosing among the model's blocks."""
    return {
        settings["locality_weight"]: name
        for name, settings in study.settings.items()
        if settings["locality_objective"] == "choice"
        and settings["target_blocks"] == 1
        and settings["max_loss_increase"] is None
        and settings["block_partition"] == "semantic"
        and name in study.runs
    }


def _aims(study: Study) -> list[list[str]]:
    free, rows = _free(study), []

    def add(aim: str, name: str, value: float, is_met: bool, shown: str | None = None) -> None:
        rows.append([aim, name, shown or f"{value:.3f}", "met" if is_met else "missed"])

    weights = _of_weights(study)
    within = [name for name in weights.values() if cost(study, name).estimate.mean <= _MOST_COST]
    name = max(within or [*weights.values()], key=lambda each: _mean(study, each, "top_block_share"))
    price = cost(study, name)
    top, others = _mean(study, name, "top_block_share"), _mean(study, name, "context_share")
    add(
        f"perplexity: at most {_MOST_COST} times the reference's",
        name,
        0,
        price.estimate.mean <= _MOST_COST,
        str(price),
    )
    add(f"top block's share: at least {_LEAST_TOP}", name, top, top >= _LEAST_TOP)
    of_base = next(each for each in study.untrained(name)["controls"]["dials"] if each["dial"] == 0)
    for of, least in ((BASE, of_base["context_share"]), (free, _mean(study, free, "context_share"))):
        ratio = others / least
        add(f"other words: at least {_LEAST_OTHERS} of those of {of}", name, ratio, ratio >= _LEAST_OTHERS)
    if (control := elsewhere(study)) is not None and study.settings[name]["locality_weight"] == control[0].settings[
        control[1]
    ]["locality_weight"]:
        above = top - _mean(*control, "top_block_share")
        add(
            f"top block's share: {_LEAST_ABOVE} above that of another text's blocks", name, above, above >= _LEAST_ABOVE
        )
    for name, settings in study.settings.items():
        if settings["locality_objective"] == "choice" and settings["target_blocks"] == 2 and name in study.runs:
            looked, price = _mean(study, name, "blocks_looked_at"), cost(study, name)
            is_met = looked <= 2 and price.estimate.mean <= _MOST_COST_OF_2
            aim = f"2 blocks looked at, at most {_MOST_COST_OF_2} times the reference's"
            add(aim, name, looked, is_met, f"{looked:.2f} at {price}")
    return rows


def draw(study: Study, path: Path) -> None:
    """Concentration over the weight of the penalty."""
    free, weights = _free(study), _of_weights(study)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    values = sorted(weights)
    for axes, key, colour, marker in (
        (left, "top_block_share", "#0072b2", "o"),
        (right, "blocks_looked_at", "#d55e00", "s"),
    ):
        axes.plot(values, [_mean(study, weights[each], key) for each in values], color=colour, marker=marker)
        axes.axhline(_mean(study, free, key), color=colour, linestyle=":")
        axes.tick_params(axis="y", colors=colour)
    left.set(xscale="log", xlabel="weight of the penalty (dotted: without it)", ylim=(0, 1))
    left.set_ylabel("top block's share", color="#0072b2")
    right.set_ylabel("blocks looked at", color="#d55e00")
    right.set_ylim(bottom=0)
    left.set_xticks(values, [f"{each:g}" for each in values])
    left.minorticks_off()
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=110)
