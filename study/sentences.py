"""What the numbers of a study say, in sentences."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from records_of_runs import BASELINE, KINDS, Study, dials_of, generated, mean_figure
from statistics_of_runs import cost, cost_at_dial_1, own_minus
from tables_of_runs import dial_sweep

from localist_hf.evaluation.statistics import holm, mean_interval
from localist_hf.evaluation.tables import with_ends


#: The order that the paper claims, from least to most perplexity.
CLAIMED_ORDER = (BASELINE, "quintic", "quartic", "cubic", "quadratic", "linear", "localist")


def order(study: Study, names: Sequence[str]) -> str:
    """Whether perplexity is ordered as the paper says."""
    means = {name: mean_figure(study.runs[name], "perplexity") for name in CLAIMED_ORDER}
    found = sorted(means, key=means.__getitem__)
    steps = [(before, after, cost(study, after, before)) for before, after in pairwise(CLAIMED_ORDER)]
    shown, against = [], []
    for (before, after, step), p_value in zip(steps, holm([step.p_value for *_, step in steps]), strict=True):
        if p_value < 0.05 and step.estimate.low > 1:
            shown.append(f"{before} < {after}")
        elif p_value < 0.05 and step.estimate.high < 1:
            against.append(f"{after} < {before}")
    return (
        f"From least to most perplexity: {', '.join(found)}. The order of the means is "
        f"{'' if found == [*CLAIMED_ORDER] else 'not '}the paper's. Of its {len(steps)} steps {len(shown)} are shown "
        f"(interval and corrected p): {', '.join(shown) or 'none'}"
        + (f"; and against it: {', '.join(against)}." if against else "; none is shown the other way round.")
    )


def blocks(study: Study, names: Sequence[str]) -> str:
    """Own blocks against others: psi on them, perplexity at dial 1, and what training on them costs."""
    gaps = [
        f"on {KINDS[kind]}: {', '.join(f'{name} {own_minus(study, name, kind)}' for name in names)}"
        for kind in ("wrong", "windows")
    ]
    text = f"Psi on own blocks less that {'; '.join(gaps)}."
    for kind in ("wrong", "windows", "recency"):
        found = cost(study, "quintic", "quintic", "own", kind)
        better = found.says("better", "worse", "not demonstrably different")
        text += f" At dial 1 quintic is {better} on its own blocks than on {KINDS[kind]} ({found})."
    for name in names:
        if study.settings[name]["block_partition"] != "semantic":
            price = cost(study, "quintic", name)
            text += (
                f" Trained on semantic blocks it has {price.says('less', 'more')} perplexity than as {name} ({price})."
            )
    return text


def objectives(study: Study, names: Sequence[str]) -> str:
    """psi against phi, and the contrast where there is one."""
    by_psi, by_phi = (
        mean_figure(study.runs[name], "self") + mean_figure(study.runs[name], "sink")
        for name in ("quintic", "quintic-fidelity")
    )
    price = cost(study, "quintic", "quintic-fidelity")
    text = (
        f"Asked for phi, the last layer pays {by_phi:.2f} of its attention to the token itself and to sinks, "
        f"{'more' if by_phi > by_psi else 'less'} than asked for psi ({by_psi:.2f}); psi has "
        f"{price.says('less', 'more')} perplexity ({price})."
    )
    if (contrast := "quintic-contrast") not in names:
        return text
    price = cost(study, contrast, "quintic")
    gaps = [
        f"{own_minus(study, contrast, kind).estimate.mean:.3f} above that on {KINDS[kind]} (asked for psi: "
        f"{own_minus(study, 'quintic', kind).estimate.mean:.3f})"
        for kind in ("wrong", "windows")
    ]
    return (
        f"{text} Asked to tell its own blocks from moved ones (*contrast*), it has a psi that is {' and '.join(gaps)}, "
        f"at {price.says('less', 'more')} perplexity than asked for psi ({price})."
    )


def targets(study: Study, names: Sequence[str]) -> str:
    """What each target costs, and the greatest against the least."""
    values = {name: f"{study.settings[name]['target_fidelity']:g}" for name in names}
    least, *_, greatest = names
    step = cost(study, greatest, least)
    costs = step.says("costs less than", "costs more than", "is not shown to cost other than")
    return (
        "Perplexity / reference by target: "
        f"{', '.join(f'{value}: {cost(study, name)}' for name, value in values.items())}. A target of "
        f"{values[greatest]} {costs} one of {values[least]} ({step})."
    )


def over_the_dial(study: Study, names: Sequence[str]) -> str:
    """The sweep, where there is one, and at which dial perplexity is least."""
    dials = dials_of(study.runs[names[0]])
    if len(dials) < 3:
        return ""
    least = []
    for name in names:
        of_runs = [[each["perplexity"] for each in run["controls"]["dials"]] for run in study.runs[name]]
        means = [fmean(at_dial) for at_dial in zip(*of_runs, strict=True)]
        least.append(f"{name} {dials[means.index(min(means))]:g}")
    return (
        "Over the dial, perplexity as a multiple of that at dial 0, and psi of the last layer:\n\n"
        f"{dial_sweep(study, names)}\n\nPerplexity is least at dial: {', '.join(least)}."
    )


def reverse(study: Study, names: Sequence[str]) -> str:
    """The quintic schedule upside down against it."""
    price, kept = (compare(study, "reverse_quintic", "quintic") for compare in (cost, cost_at_dial_1))
    return (
        f"Early layers local and late ones free: perplexity {cost(study, 'reverse_quintic')} times that of "
        f"the reference, {price.says('less', 'more')} than quintic ({price} times); at dial 1 it loses "
        f"{kept.says('less', 'more', 'no demonstrably other share')} than quintic ({kept} times its cost at dial 1). "
        "Psi of its last layer says nothing, since that layer is free."
    )


def written(study: Study, names: Sequence[str]) -> str:
    """What dial 1 changes in what is written."""

    def change(name: str, figure: str) -> str:
        at_1, at_0 = ([generated(run, dial, figure) for run in study.runs[name]] for dial in ("dial 1", "dial 0"))
        return with_ends(mean_interval([one - other for one, other in zip(at_1, at_0, strict=True)]))

    texts = [f"{name}: loss {change(name, 'loss')}, repetition {change(name, 'repetition_4')}" for name in names]
    return f"Dial 1 minus dial 0, over seeds: {'; '.join(texts)}."


def held(study: Study, names: Sequence[str]) -> str:
    """Trained at dial 1 against trained with the loss."""
    texts = [
        f"{name} {cost(study, at_1, name, 'dial 1', 'dial 1')} and {cost(study, at_1, name, 'dial 1', 'dial 0')}"
        for name, at_1 in study.held_pairs
    ]
    return (
        "Perplexity at dial 1, trained there, as a multiple of that trained with the loss, at dial 1 and at dial 0: "
        f"{'; '.join(texts)}."
    )
