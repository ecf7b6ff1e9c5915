"""
Makes `docs/results.md`, its pictures and the answer in the README from the committed records, and from nothing else.

    python study/results.py          # or: make results
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from statistics_of_runs import (
    Comparison,
    Run,
    Study,
    labels,
    losses,
    perplexity_quotient,
    share_difference,
    shares,
    with_ends,
)

from localist_hf.configuration import PAPER_VARIANTS
from localist_hf.evaluation import holm, markdown_table, mean_interval, plot_frontier, plot_over_dial, with_interval
from localist_hf.evaluation.tables import p_value_cell
from localist_hf.hub import write_card


ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
RESULTS = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
#: Between these lines of the README stands the answer.
MARKERS = ("<!-- results -->", "<!-- /results -->")
BASELINE = "distributed"
KINDS = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}


class Model(NamedTuple):
    """
    One of the models that the questions are asked of; there may be things that we aim at with it, and longer trainings
    that come nearer.
    """

    name: str
    title: str
    study: Study
    about: str
    has_aims: bool
    longer: Study | None


class Primary(NamedTuple):
    """
    A comparison that was named beforehand: what it is of, what the paper would have, and what was found; its p-value is
    for what is neither, `neutral`.
    """

    question: str
    unit: str
    found: Comparison
    is_expected: Callable[[float], bool]
    neutral: float
    undecided: str = "no difference shown"


# --- figures of one run


def ratio(run: Run, name: str) -> float:
    """A perplexity, as a multiple of that at dial 0."""
    return run["controls"][name] / run["controls"]["perplexity"]


def previous(run: Run) -> int:
    """How many blocks before a token's own are local in a run."""
    found = re.search(r"-previous(\d+)", run["name"])
    return int(found[1]) if found else 0


def is_held(name: str) -> bool:
    """Whether a configuration was trained at dial 1, where nothing outside the blocks is seen."""
    return name.endswith("-dial1")


def own_setting(run: Run) -> dict[str, Any]:
    """The last layer on own and other blocks, as many before being local as the run has."""
    return next(each for each in run["controls"]["blocks"] if each["num_previous_blocks"] == previous(run))


def psi(run: Run, kind: str) -> float:
    """Context fidelity of the last layer on blocks of a kind."""
    return own_setting(run)[kind]["context_fidelity"]


def psi_on_base_blocks(run: Run) -> float:
    """On the semantic blocks that the untrained base finds, which training cannot move."""
    return run["last_layer_on_base_blocks"]["context_fidelity"]


def is_semantic(name: str) -> bool:
    """Whether a configuration's blocks are found in the model's values, so that training moves them."""
    return not name.startswith("window") and "-delimiter" not in name


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


def cost(
    study: Study,
    name: str,
    baseline: str = BASELINE,
    setting: str = "dial 0",
    baseline_setting: str = "dial 0",
    expected: float = 1.0,
) -> Comparison:
    """Perplexity as a multiple of another run's, each in a setting of the controls; p is for the `expected` one."""
    runs, others = study.runs[name], study.runs[baseline]
    return perplexity_quotient(losses(runs, setting), losses(others, baseline_setting), labels(runs), expected)


def retention(study: Study, name: str, other: str | None = None) -> Comparison:
    """Perplexity at dial 1 / at dial 0; as a multiple of another run's."""
    if other is None:
        return cost(study, name, name, "dial 1")
    runs, others = study.runs[name], study.runs[other]
    first, second = (losses(each, "dial 1") - losses(each, "dial 0") for each in (runs, others))
    return perplexity_quotient(first, second, labels(runs))


def own_minus(study: Study, name: str, kind: str, number: int = 0) -> Comparison:
    """psi of the last layer on own blocks, less that on blocks of another kind."""
    runs = study.runs[name]
    return share_difference(shares(runs, f"own {number}"), shares(runs, f"{kind} {number}"))


def primaries(study: Study) -> list[Primary]:
    """The comparisons that were named before anything was measured."""
    found = [
        Primary(
            "quintic against distributed (claim: within 5 %)",
            "perplexity, ratio",
            cost(study, "quintic", expected=1.05),
            lambda value: value <= 1.05,
            1.05,
            "not decided",
        ),
        Primary(
            "own against another text's blocks (quintic, no block before)",
            "psi of the last layer, difference",
            own_minus(study, "quintic", "wrong"),
            lambda value: value > 0,
            0.0,
        ),
    ]
    for kind in ("windows", "recency"):
        found.append(
            Primary(
                f"semantic blocks against {KINDS[kind]} at as many visible keys (quintic)",
                "perplexity at dial 1, ratio",
                cost(study, "quintic", "quintic", "own", kind),
                lambda value: value < 1,
                1.0,
            )
        )
    if "reverse_quintic" not in study.runs:
        return found
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
        return each.undecided
    return "as claimed" if each.is_expected(interval.mean) else "not as claimed"


# --- tables


def primary_table(study: Study) -> str:
    comparisons = primaries(study)
    corrected = holm([each.found.p_value for each in comparisons])
    rows = [["comparison", "figure", "estimate [95 % interval]", "Hedges' g", "p (Holm)", "verdict"]]
    for each, p_value in zip(comparisons, corrected, strict=True):
        size = with_interval([each.found.effect_size], 1)
        rows.append(
            [
                each.question,
                each.unit,
                with_ends(each.found.estimate),
                size,
                p_value_cell(p_value),
                verdict(each, p_value),
            ]
        )
    return markdown_table(rows)


def cost_cells(study: Study, name: str) -> list[str]:
    """Perplexity, and its ratio to the baseline's with the interval."""
    cells = [mean_cell(study.runs[name], lambda run: run["controls"]["perplexity"])]
    return [*cells, "1" if name == BASELINE else with_ends(cost(study, name).estimate)]


def retention_cell(study: Study, name: str) -> str:
    return "-" if name == BASELINE else with_ends(retention(study, name).estimate)


def mean_cell(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 2) -> str:
    return with_interval([value(run) for run in runs], digits)


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
                with_interval([sizes[name]], 1) if name in sizes else "-",
                p_value_cell(corrected[name]) if name in corrected else "-",
                mean_cell(runs, lambda run: psi(run, "own")),
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
    shown, against = [], []
    for (before, after), step, p_value in zip(
        pairwise(claimed), steps, holm([step.p_value for step in steps]), strict=True
    ):
        if p_value < 0.05 and step.estimate.low > 1:
            shown.append(f"{before} < {after}")
        elif p_value < 0.05 and step.estimate.high < 1:
            against.append(f"{after} < {before}")
    text = f"From least to most perplexity: {', '.join(found)}. "
    text += (
        "The order of the means is the paper's. " if found == claimed else "The order of the means is not the paper's. "
    )
    text += f"Of its {len(steps)} steps {len(shown)} are shown (interval and corrected p): {', '.join(shown) or 'none'}"
    return text + (f"; and against it: {', '.join(against)}." if against else "; none is shown the other way round.")


def partitions(study: Study, names: Sequence[str]) -> str:
    """Question 2: own and other blocks."""
    rows = [["trained on", "/ distributed", "visible keys", "psi, the base's semantic blocks"]]
    rows[0] += [f"psi, {title}" for title in KINDS.values()] + [f"dial 1, {title}" for title in KINDS.values()]
    for name in names:
        untrained = study.untrained[settings_like(study, name)] | {"name": name}
        on_base = mean_cell(study.runs[name], psi_on_base_blocks, 3)
        trainings = (
            (name, cost_cells(study, name)[1], on_base, study.runs[name]),
            ("- untrained", "-", "as own" if is_semantic(name) else "-", [untrained]),
        )
        for title, price, on_base, runs in trainings:
            cells = [title, price, mean_cell(runs, lambda run: own_setting(run)["own"]["visible_keys"], 1), on_base]
            cells += [mean_cell(runs, lambda run, kind=kind: psi(run, kind), 3) for kind in KINDS]
            cells += [mean_cell(runs, lambda run, kind=kind: retention_on(run, kind), 3) for kind in KINDS]
            rows.append(cells)
    return markdown_table(rows)


def settings_like(study: Study, name: str) -> str:
    """The untrained run of the same settings; those that differ in their training alone are the same without it."""
    return max(filter(name.startswith, study.untrained), key=len)


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
        cells += [mean_cell(runs, lambda run, kind=kind: psi(run, kind)) for kind in ("own", "wrong")]
        cells += [mean_cell(runs, lambda run: run["last_layer"]["fidelity"]), retention_cell(study, name)]
        rows.append(cells)
    return markdown_table(rows)


def held_attention(study: Study, names: Sequence[str]) -> str:
    """Question 9: exact locality, by the loss and by training at dial 1."""
    rows = [["configuration", "dial 0 / distributed", "dial 1 / distributed", "self only / distributed"]]
    rows[0] += ["visible keys", "psi at dial 0"]
    for name in names:
        runs = study.runs[name]
        keys = mean_cell(runs, lambda run: own_setting(run)["own"]["visible_keys"], 1)
        settings = ("dial 0", "dial 1", "self only")
        costs = [with_ends(cost(study, name, setting=setting).estimate) for setting in settings]
        rows.append([name, *costs, keys, mean_cell(runs, lambda run: psi(run, "own"))])
    return markdown_table(rows)


def dial_1(study: Study) -> str:
    """Question 6: retention and faithfulness, trained and untrained."""
    rows = [["configuration", "retention", "self only", "KL (bits)", "untrained: retention", "untrained: KL (bits)"]]
    for name in sorted(study.runs, key=_order):
        if name == BASELINE:
            continue
        runs = study.runs[name]
        cells = [name, retention_cell(study, name), mean_cell(runs, lambda run: ratio(run, "self_only_perplexity"), 3)]
        cells.append(mean_cell(runs, lambda run: run["controls"]["divergence"], 3))
        controls = study.untrained[settings_like(study, name)]["controls"]
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


# --- what we aim at


def aims(study: Study) -> str:
    """How near a model comes to what we aim at, each aim with the configurations that are asked."""
    rows = [["aim", "configuration", "measured", ""]]
    are_met: dict[str, bool] = {}

    def row(aim: str, name: str, value: str, is_met: bool) -> None:
        rows.append([aim, name, value, "met" if is_met else "missed"])
        are_met[name] = are_met.get(name, True) and is_met

    others = mean_of(study.runs[BASELINE], "context_share")
    for name in ("quintic", "quintic-contrast", "quintic-delimiter"):
        if name not in study.runs:
            continue
        runs = study.runs[name]
        own = fmean(psi_on_base_blocks(run) if is_semantic(name) else psi(run, "own") for run in runs)
        row(
            "psi of the last layer, on blocks that training does not move: at least 0.85",
            name,
            f"{own:.3f}",
            own >= 0.85,
        )
        gap = own_minus(study, name, "wrong").estimate
        row("own above another text's blocks: at least 0.1", name, with_ends(gap), gap.mean >= 0.1)
        share = mean_of(runs, "context_share")
        relative = share / others
        row(
            "attention to other words: at least 0.8 of distributed's",
            name,
            f"{relative:.2f} ({share:.3f} against {others:.3f})",
            relative >= 0.8,
        )
    for name in ("quintic-previous1", "quintic-previous1-weight0-dial1"):
        if name not in study.runs:
            continue
        runs = study.runs[name]
        price, kept = cost(study, name).estimate, retention(study, name).estimate
        keys = fmean(own_setting(run)["own"]["visible_keys"] for run in runs)
        row("perplexity: at most 1.02 times distributed's", name, with_ends(price), price.mean <= 1.02)
        row("retention: at most 1.01", name, with_ends(kept), kept.mean <= 1.01)
        row("visible keys: at most 48", name, f"{keys:.1f}", keys <= 48)
    all_met = ", ".join(name for name, is_met in are_met.items() if is_met)
    return f"{markdown_table(rows)}\n\nAll of its aims are met by: {all_met or 'none'}."


def mean_of(runs: Sequence[Run], figure: str) -> float:
    """The mean over seeds of a figure of the last layer."""
    return fmean(run["last_layer"][figure] for run in runs)


def longer_training(study: Study) -> list[str]:
    """The section on trainings that the aims are set for."""
    names = sorted(study.runs, key=_order)
    free = [name for name in names if not is_held(name)]
    held = [name for name in names if is_held(name)]
    steps, seeds = study.any_run()["training"]["steps"], ", ".join(map(str, study.seeds))
    return [
        f"### After {steps} steps",
        f"The same data and settings, {steps} steps; seed {seeds} alone, so that intervals are over documents only. "
        "*quintic-contrast* is also asked to tell its own blocks from moved ones, *quintic-delimiter* has the ends of "
        "sentences and lines as the ends of its blocks, and *weight0-dial1* is trained at dial 1, without the locality "
        "loss.",
        aims(study),
        "Asked for psi alone, a model learns to look near, and near words lie in most blocks of that size, another "
        "text's too. Asked for the distance as well, it tells its own blocks from others, and pays for it; perplexity "
        "at dial 1 is no better on them for that. What costs next to nothing is to be trained at dial 1.",
        where_attention_goes(study, free),
        partitions(study, free[1:]),
        held_attention(study, [*free[1:], *held]),
    ]


# --- the page


def questions(model: Model) -> list[str]:
    """The questions on one model, as far as it has runs for them; each with a verdict that its numbers give."""
    study = model.study
    has = study.runs.keys()
    others = [name for name in study.runs if name != BASELINE]
    parts = []

    def part(question: str, *texts: str) -> None:
        parts.append("\n\n".join([f"#### {question}", *texts]))

    if {*PAPER_VARIANTS} <= has:
        part("1. Is perplexity ordered as the paper says?", schedules(study), order(study))
    names = ("quintic", "quintic-contrast", "quintic-previous1", "window", "quintic-delimiter")
    names = [name for name in names if name in has]
    part(
        "2. Semantic blocks against wrong blocks, windows, the last tokens, delimiters",
        "Psi of the last layer at dial 0, and perplexity at dial 1 as a multiple of that at dial 0, on these blocks. "
        "Windows and last tokens show as many keys as the own blocks. *Untrained* is the base under the same settings. "
        "Semantic blocks are found in the model's own values, so training moves them: psi on the base's blocks is what "
        "it does not owe to that.",
        partitions(study, names),
        blocks_verdict(study, names),
    )
    names = [name for name in (BASELINE, "quintic", "quintic-fidelity", "quintic-contrast") if name in has]
    if "quintic-fidelity" in names:
        part(
            "3. Psi against phi: where does the attention of the last layer go?",
            where_attention_goes(study, names),
            objective_verdict(study),
        )
    names = [name for name in ("quintic-target0.3", "quintic-target0.5", "quintic-target0.7", "quintic") if name in has]
    if len(names) > 1:
        part(
            "4. What do lower targets cost?",
            where_attention_goes(study, [BASELINE, *names]),
            targets_verdict(study, names),
        )
    names = [name for name in ("quintic", "quintic-sinks1", "quintic-sinks4", "quintic-previous1") if name in has]
    if len(names) > 1:
        part("5. Sinks and previous blocks", where_attention_goes(study, names))
    sections = [
        "Retention is perplexity at dial 1 / at dial 0, KL that of the predictions at dial 0 from those at dial 1; "
        "*self only* is the perplexity at dial 1 with blocks of one token / at dial 0. *Untrained* is the base under "
        "the same settings.",
        dial_1(study),
    ]
    if len(study.runs[others[0]][0]["controls"]["dials"]) > 2:
        swept = [name for name in (*PAPER_VARIANTS[1:], "quintic-previous1", "reverse_quintic") if name in has]
        sections += [
            "Over the dial, perplexity as a multiple of that at dial 0, and psi of the last layer:",
            dial_sweep(study, swept),
            best_dial(study, swept),
        ]
    part("6. Dial 1, and the way there", *sections)
    if "reverse_quintic" in has:
        part("7. The reverse schedule", reverse_verdict(study))
    names = [name for name in (BASELINE, "quintic", "linear", "localist", "quintic-previous1") if name in has]
    part(
        "8. What the models write at dial 1",
        "Sampled from the whole distribution (temperature 1). *distinct-2*: distinct pairs of tokens of a text / all "
        "of its pairs. *repetition-4*: stretches of four tokens that stand in it before. The loss is that of the base "
        "at dial 0.",
        generation(study, names),
        generation_verdict(study),
    )
    pairs = [(name, f"{name}-weight0-dial1") for name in ("quintic", "quintic-previous1", "window")]
    pairs = [pair for pair in pairs if has >= {*pair}]
    if pairs:
        part(
            "9. Exact locality: by the loss, or by training at dial 1?",
            "At dial 1 the last layer sees its blocks and nothing else: psi is 1, whatever was trained. "
            "*weight0-dial1* is trained so, without the locality loss, the same steps. *Self only* is the control: "
            "dial 1 with blocks of one token. What it costs beyond dial 1 is what the attention inside the blocks is "
            "worth; where that is little, a model has learned to do without its late attention.",
            held_attention(study, [name for pair in pairs for name in pair]),
            held_verdict(study, pairs),
        )
    return parts


def held_verdict(study: Study, pairs: Sequence[tuple[str, str]]) -> str:
    texts = []
    for by_loss, held in pairs:
        at_1, at_0 = (cost(study, held, by_loss, "dial 1", setting).estimate for setting in ("dial 1", "dial 0"))
        texts.append(f"{by_loss} {with_ends(at_1)} and {with_ends(at_0)}")
    return (
        "Perplexity at dial 1, trained there, as a multiple of that trained with the loss, at dial 1 and at dial 0: "
        f"{'; '.join(texts)}."
    )


def _against(found: Comparison, neutral: float, below: str, above: str, neither: str) -> str:
    interval = found.estimate
    return above if interval.low > neutral else below if interval.high < neutral else neither


def blocks_verdict(study: Study, names: Sequence[str]) -> str:
    text = "Psi on own blocks less that"
    for kind in ("wrong", "windows"):
        found = [own_minus(study, name, kind, previous(study.runs[name][0])).estimate for name in names]
        gaps = [f"{name} {with_ends(gap)}" for name, gap in zip(names, found, strict=True)]
        text += f"{';' if kind != 'wrong' else ''} on {KINDS[kind]}: {', '.join(gaps)}"
    text += "."
    for kind in ("wrong", "windows", "recency"):
        found = cost(study, "quintic", "quintic", "own", kind)
        says = _against(found, 1, "better", "worse", "not demonstrably different")
        text += f" At dial 1 quintic is {says} on its own blocks than on {KINDS[kind]} ({with_ends(found.estimate)})."
    for name in ("window", "quintic-delimiter"):
        if name in study.runs:
            found = cost(study, "quintic", name)
            says = _against(found, 1, "less", "more", "no demonstrably other")
            text += (
                f" Trained on semantic blocks it has {says} perplexity than as {name} ({with_ends(found.estimate)})."
            )
    return text


def objective_verdict(study: Study) -> str:
    context, fidelity = (study.runs[name] for name in ("quintic", "quintic-fidelity"))
    parked = [
        fmean(run["last_layer"]["self_share"] + run["last_layer"]["sink_share"] for run in runs)
        for runs in (context, fidelity)
    ]
    more = "more" if parked[1] > parked[0] else "less"
    found = cost(study, "quintic", "quintic-fidelity")
    says = _against(found, 1, "less", "more", "no demonstrably other")
    return (
        f"Asked for phi, the last layer pays {parked[1]:.2f} of its attention to the token itself and to sinks, {more} "
        f"than asked for psi ({parked[0]:.2f}); psi has {says} perplexity ({with_ends(found.estimate)})."
        f"{contrast_verdict(study)}"
    )


def contrast_verdict(study: Study) -> str:
    if "quintic-contrast" not in study.runs:
        return ""
    price = cost(study, "quintic-contrast", "quintic")
    says = _against(price, 1, "less", "more", "no demonstrably other")
    gaps = [
        f"{own_minus(study, 'quintic-contrast', kind).estimate.mean:.3f} above that on {KINDS[kind]} "
        f"(asked for psi: {own_minus(study, 'quintic', kind).estimate.mean:.3f})"
        for kind in ("wrong", "windows")
    ]
    return (
        f" Asked to tell its own blocks from moved ones (*contrast*), it has a psi that is {' and '.join(gaps)}, at "
        f"{says} perplexity than asked for psi ({with_ends(price.estimate)})."
    )


def targets_verdict(study: Study, names: Sequence[str]) -> str:
    costs = [cost(study, name) for name in names]
    text = ", ".join(f"{_target(name)}: {with_ends(each.estimate)}" for name, each in zip(names, costs, strict=True))
    step = cost(study, names[-1], names[0])
    says = _against(step, 1, "costs less than", "costs more than", "is not shown to cost other than")
    return (
        f"Perplexity against distributed by target: {text}. A target of {_target(names[-1])} {says} one of "
        f"{_target(names[0])} ({with_ends(step.estimate)})."
    )


def _target(name: str) -> str:
    return name.partition("-target")[2] or "0.9"


def reverse_verdict(study: Study) -> str:
    price, kept = cost(study, "reverse_quintic", "quintic"), retention(study, "reverse_quintic", "quintic")
    first = _against(price, 1, "less", "more", "no demonstrably other")
    second = _against(kept, 1, "loses less", "loses more", "loses no demonstrably other share")
    own = with_ends(cost(study, "reverse_quintic").estimate)
    return (
        f"Early layers local and late ones free: perplexity {own} times that of distributed, {first} than quintic "
        f"({with_ends(price.estimate)} times); at dial 1 it {second} than quintic ({with_ends(kept.estimate)} times "
        "its retention). Psi of its last layer says nothing, since that layer is free."
    )


def generation_verdict(study: Study) -> str:
    texts = []
    for name in ("quintic", "quintic-previous1", "localist"):
        if name not in study.runs:
            continue
        runs = study.runs[name]
        found = mean_interval([generated_loss(run, "dial 1") - generated_loss(run, "dial 0") for run in runs])
        repeated = mean_interval(
            [generated(run, "dial 1", "repetition_4") - generated(run, "dial 0", "repetition_4") for run in runs]
        )
        texts.append(f"{name}: loss {with_ends(found)}, repetition {with_ends(repeated)}")
    return f"Dial 1 minus dial 0, over seeds: {'; '.join(texts)}."


def about(study: Study) -> str:
    """What the numbers were measured on."""
    run = study.any_run()
    data, training = run["data"], run["training"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    adapter = run["adapter"]
    how = f"a LoRA adapter of rank {adapter['rank']}" if adapter else "all weights"
    return (
        f"{run['num_parameters'] / 1e6:.1f} million parameters, {how}; {training['steps']} steps of "
        f"{training['batch_size']} sequences of {data['evaluation_lengths'][1]} tokens, learning rate "
        f"{training['learning_rate']:g}; {len(study.runs)} configurations, seeds "
        f"{', '.join(map(str, study.seeds))}. Text: {data['name']}. {data['details']} Measured on "
        f"{data['evaluation_sequences']} sequences that no model has seen. {run['hardware']}; {versions}."
    )


INTRODUCTION = """\
# Results

<!-- Made by `python study/results.py` (`make results`) from `study/records`; do not edit. -->

What progressive localisation costs and gives, on models whose attention matters, with the controls that would
expose a cheap number. Every number stands in `study/records`, and is written here by `make results`; `make study`
trains and measures everything anew (hours on two cores).

**How to read it.** *Perplexity ratios*, retentions and differences of psi come with 95 % intervals in brackets, for
other seeds and other documents (sequences of the held-out text, taken as independent) together: Student's t of a
two-way layout in which both are random, with Satterthwaite's degrees of freedom. Differences are paired: the same
seeds, batches and documents.
p-values are of the same layout, corrected by Holm for the number of comparisons of their table; where the claim is
*within 5 %* they test for a ratio of 1.05, elsewhere for no difference. Hedges' g is the mean difference in standard
deviations over seeds, and ± half of the 95 % interval over seeds by Student's t: both on this text alone. *psi* is
context fidelity, *phi* fidelity, *other words* the share of the attention that goes to other words at all
([definitions](method.md#fidelity)).

**Primary comparisons** were named before anything was measured: quintic against distributed (perplexity), own against
another text's blocks (psi, no previous blocks), semantic blocks against windows and the last tokens at as many
visible keys (perplexity at dial 1), and quintic against its reverse (perplexity, retention). All else is exploration:
its p-values are corrected within a table only, and the next study should test what it suggests.
"""


def render(models: Sequence[Model]) -> str:
    """The whole page."""
    parts = [INTRODUCTION.rstrip()]
    for model in models:
        parts += [
            f"## {model.title}",
            about(model.study),
            model.about,
            "### Primary comparisons",
            primary_table(model.study),
            f"![Perplexity against context fidelity](frontier_{model.name}.png)",
            f"![Perplexity over the dial](perplexity_over_dial_{model.name}.png)",
            "### The questions",
            *questions(model),
        ]
        if model.has_aims:
            parts += ["### What we aim at", "Set beforehand; met or missed by the estimate.", aims(model.study)]
        if model.longer is not None:
            parts += longer_training(model.longer)
    return "\n\n".join(parts) + "\n"


def answer(models: Sequence[Model]) -> str:
    """What the README says: the primary comparisons, a column for each model."""
    columns = [primaries(model.study) for model in models]
    corrected = [holm([each.found.p_value for each in column]) for column in columns]
    heads = [f"{model.title} ({len(model.study.seeds)} seeds)" for model in models]
    rows = [["comparison", "figure", *heads]]
    for index, each in enumerate(max(columns, key=len)):
        found = [
            f"{with_ends(column[index].found.estimate)}, {verdict(column[index], p_values[index])}"
            if index < len(column)
            else "not asked"
            for column, p_values in zip(columns, corrected, strict=True)
        ]
        rows.append([each.question, each.unit, *found])
    return "\n\n".join([markdown_table(rows), *(in_short(model) for model in models)])


def in_short(model: Model) -> str:
    """What the loss gives and costs on one model, and what training at dial 1 does."""
    study = model.study
    free, by_loss = (fmean(psi(run, "own") for run in study.runs[name]) for name in (BASELINE, "quintic"))
    text = (
        f"**{model.title}**: trained with the loss under the quintic schedule, the last layer keeps {by_loss:.0%} of "
        f"its attention to other words inside their block, where free training leaves {free:.0%}, at "
        f"{with_ends(cost(study, 'quintic').estimate)} times the perplexity; held there wholly, at dial 1, "
        f"{with_ends(cost(study, 'quintic', setting='dial 1').estimate)} times."
    )
    parts = []
    for name, local in (("quintic", "to its block"), ("quintic-previous1", "to its block and the one before")):
        if (held := f"{name}-weight0-dial1") in study.runs:
            price, control = cost(study, held, setting="dial 1"), cost(study, held, setting="self only")
            parts.append(
                f"{local} at {with_ends(price.estimate)} times (with blocks of one token, the control: "
                f"{with_ends(control.estimate)})"
            )
    if parts:
        text += f" Trained at dial 1 instead, without the loss, it is held wholly {', and '.join(parts)}."
    if model.longer is not None and (name := "quintic-contrast") in model.longer.runs:
        longer = model.longer
        text += (
            f" After {longer.any_run()['training']['steps']} steps (one seed), with the objective `contrast`, it keeps "
            f"{fmean(psi(run, 'own') for run in longer.runs[name]):.0%} inside, "
            f"{with_ends(own_minus(longer, name, 'wrong').estimate)} more than in another text's blocks, at "
            f"{with_ends(cost(longer, name).estimate)} times the perplexity of free training."
        )
    return text


def load_models() -> list[Model]:
    models = []
    for name, title, text in (
        (
            "small",
            "The base of this package",
            "The base was trained on Python's sources and reference, the same kind of text. It uses its attention: see "
            "[its card](../localist_hf/base/README.md).",
        ),
        (
            "smollm2",
            "SmolLM2-135M-Instruct",
            "Only the upper half of the layers has an adapter, so that nothing can be asked of a reverse schedule: it "
            "would leave the early layers as they are. The text is WikiText-2's, its validation split to train on and "
            "its test split to measure on.",
        ),
        (
            "book",
            "The base of this package, on a book",
            "The book is the King James Bible, six of its 66 books held out whole (`study/book_text.py`). The base has "
            "read Python and its reference: to it such text is new.",
        ),
    ):
        path = RECORDS / f"{name}.jsonl"
        if path.is_file():
            longer = RECORDS / f"{name}_long.jsonl"
            longer = Study(longer) if longer.is_file() else None
            models.append(Model(name, title, Study(path), text, has_aims=name == "smollm2", longer=longer))
    return models


def between_markers(text: str, new: str) -> str:
    """A text with what stands between the markers replaced."""
    before, rest = text.split(MARKERS[0])
    return f"{before}{MARKERS[0]}\n{new}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def pages() -> dict[Path, str]:
    """Every text that holds numbers of the study, by its file."""
    models = load_models()
    readme = README.read_text(encoding="utf-8")
    return {RESULTS: render(models), README: between_markers(readme, answer(models))}


def _order(name: str) -> tuple[int, str]:
    """The paper's configurations in their order, then the others."""
    return PAPER_VARIANTS.index(name) if name in PAPER_VARIANTS else len(PAPER_VARIANTS), name


def draw(model: Model) -> None:
    """The pictures of one model."""
    study = model.study
    # The last layer of the reverse schedule is free: its psi says nothing.
    shown = {name: study.runs[name] for name in sorted(study.runs, key=_order) if name != "reverse_quintic"}
    metrics = {
        name: [
            {
                "perplexity": run["controls"]["dials"][-1 if is_held(name) else 0]["perplexity"],
                "fidelity_layer_0": run["last_layer"]["fidelity"],
                "context_fidelity_layer_0": run["last_layer"]["context_fidelity"],
            }
            for run in runs
        ]
        for name, runs in shown.items()
    }
    plot_frontier(
        metrics, BASELINE, RESULTS.parent / f"frontier_{model.name}.png", title=f"{model.title}: cost and gain"
    )
    dials = {name: [run["controls"]["dials"] for run in study.runs[name]] for name in PAPER_VARIANTS if name in shown}
    for name in ("reverse_quintic", "quintic-previous1", *filter(is_held, study.runs)):
        if name in study.runs:
            dials[name] = [run["controls"]["dials"] for run in study.runs[name]]
    plot_over_dial(dials, RESULTS.parent / f"perplexity_over_dial_{model.name}.png")


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for model in load_models():
        draw(model)
    for card in sorted((ROOT / "model_cards").glob("*/README.md")):
        write_card(card.parent)


if __name__ == "__main__":
    main()
