"""What the controls say on a model card: tables and sentences."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation.statistics import mean_interval
from ..evaluation.tables import markdown_table, with_interval
from .card_sentences import sinks_phrase
from .run_record import RunRecord


#: Perplexities of the controls, by what the card calls them.
_PERPLEXITIES = {
    "dial 1": lambda controls: controls["dials"][-1]["perplexity"],
    "self only": lambda controls: controls["self_only_perplexity"],
    "all local": lambda controls: controls["all_local_perplexity"],
    "all self only": lambda controls: controls["all_local_self_only_perplexity"],
}


def block_controls(groups: Mapping[str, Sequence[RunRecord]], layer: int, emphasised: str | None = None) -> str:
    """
    psi on the own blocks and on others, with no previous blocks and with some; one configuration in bold. Of several
    runs the means, psi with its interval.
    """
    kinds = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}
    titles = ["configuration", "blocks before", "visible keys", "other words"]
    rows = [titles + [f"psi, {title}" for title in kinds.values()]]
    for name, runs in groups.items():
        label = f"**{name}**" if name == emphasised else name
        for setting in range(len(runs[0].controls["blocks"])):
            row = [label, str(runs[0].controls["blocks"][setting]["num_previous_blocks"])]
            cells = [("own", "visible_keys", 1), ("own", "context_share", 2)]
            for kind, figure, digits in cells + [(kind, "context_fidelity", 2) for kind in kinds]:
                values = [_at_layer(run, run.controls["blocks"][setting][kind], figure, layer) for run in runs]
                row.append(with_interval(values if figure == "context_fidelity" else [fmean(values)], digits))
            rows.append(row)
    return markdown_table(rows)


def dial_controls(groups: Mapping[str, Sequence[RunRecord]], emphasised: str | None = None) -> str:
    """Perplexities under the dial, of several runs with intervals; one configuration in bold."""
    rows = [["configuration", "dial 0", *_PERPLEXITIES, "divergence (bits)"]]
    for name, runs in groups.items():
        controls = [run.controls for run in runs]
        row = [f"**{name}**" if name == emphasised else name]
        row.append(with_interval([_or_nan(each["perplexity"]) for each in controls]))
        for ratio in _PERPLEXITIES:
            is_changed = any(runs[0].lambdas) or ratio.startswith("all")
            row.append(with_interval([_ratio(each, ratio) for each in controls] if is_changed else [math.nan], 3))
        divergences = [_or_nan(each["divergence"]) for each in controls] if any(runs[0].lambdas) else [math.nan]
        rows.append([*row, with_interval(divergences, 3)])
    return markdown_table(rows)


def dial_sweep(record: RunRecord, layer: int) -> str:
    """The way from dial 0 to dial 1."""
    dials = record.controls["dials"]
    rows = [["dial", *(f"{dial['dial']:g}" for dial in dials)]]
    rows.append(["perplexity", *(with_interval([_or_nan(dial["perplexity"])]) for dial in dials)])
    for name, title in (("context_fidelity", "psi"), ("fidelity", "phi")):
        rows.append([title, *(with_interval([_at_layer(record, dial["locality"], name, layer)]) for dial in dials)])
    return markdown_table(rows)


def wrong_blocks(runs: Sequence[RunRecord], layer: int) -> str:
    """What psi on the blocks of another text says, of one run or over several seeds."""
    record = runs[0]
    if record.locality["block_partition"] == "window":
        return (
            "The blocks do not depend on the text, so psi says how near a token looks and nothing about what the text "
            "says."
        )
    number = record.locality["num_previous_blocks"]
    of_runs = [
        next(blocks for blocks in run.controls["blocks"] if blocks["num_previous_blocks"] == number) for run in runs
    ]
    owns, wrongs = (
        [_at_layer(run, blocks[kind], "context_fidelity", layer) for run, blocks in zip(runs, of_runs, strict=True)]
        for kind in ("own", "wrong")
    )
    own, wrong = (f"{fmean(values):.2f}" for values in (owns, wrongs))
    if "nan" in (own, wrong):
        return "On the blocks of another text psi is not defined here, so it is not known what the own ones are worth."
    both = f"Laid over this text, the blocks of another one get psi {wrong} where its own get {own}"
    if len(runs) > 1:
        apart = [one - other for one, other in zip(owns, wrongs, strict=True)]
        both += f" (means over {len(runs)} seeds, {with_interval(apart)} apart)"
        if mean_interval(apart).low > 0:
            return f"{both}: at most that is about where this text's blocks begin."
        return f"{both}: not more than seeds differ, so psi is shown here to say how near a token looks, and no more."
    if float(own) > float(wrong):
        return (
            f"{both}: at most the {float(own) - float(wrong):.2f} between them is about where this text's blocks begin."
        )
    return f"{both}: psi says here how near a token looks, and nothing about where this text's blocks begin."


def attention_is_used(runs: Sequence[RunRecord]) -> str:
    """How much the model loses without the attention that leaves its blocks; of several runs the means."""
    record = runs[0]
    local, alone = (fmean(_ratio(run.controls, name) for run in runs) for name in ("all local", "all self only"))
    if math.isnan(local + alone):
        return ""
    layers = "all layers" if record.num_layers > 1 else "its layer"
    itself = "itself" + (f" and {sinks_phrase(record)}" if sinks_phrase(record) else "")
    return (
        f"With {layers} held wholly inside the blocks, none before them, the perplexity is {local:.3f} times that at "
        f"dial 0, and with nothing to see for a token but {itself} {alone:.3f} times: where that is little, attention "
        "is little used, and it costs nothing to constrain it."
    )


def _ratio(controls: Mapping[str, Any], name: str) -> float:
    """A perplexity, as a multiple of that at dial 0."""
    return _or_nan(_PERPLEXITIES[name](controls)) / _or_nan(controls["perplexity"])


def _at_layer(record: RunRecord, figures: Mapping[str, Any] | None, name: str, layer: int) -> float:
    """A figure of one layer; NaN where it was not measured or is no number."""
    if figures is None or layer not in record.controls["layers"]:
        return math.nan
    return _or_nan(figures[name][record.controls["layers"].index(layer)])


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
