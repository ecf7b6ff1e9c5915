"""The model card: text, metadata and picture, from the records of runs and from nothing else."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from ..configuration import BASELINE_VARIANT, VARIANTS
from ..evaluation import plot_shares_over_depth
from ..evaluation.check_model import num_positions
from ..evaluation.differences import are_of_documents, perplexity_differences
from ..whole_file import write_whole
from .card_controls import costs, wrong_blocks
from .card_phrases import (
    counted,
    evaluation_sequences,
    kind,
    layer_phrase,
    link,
    local_set_phrase,
    numbers,
    prompt_literal,
    seed_phrase,
    sinks_phrase,
    text_name,
    variants_phrase,
)
from .card_tables import (
    comparison,
    figures,
    is_held,
    mean_over_runs,
    measures_blocks,
    metrics_by_seed,
    metrics_of_runs,
    perplexities_at_ends,
)
from .example import PROMPT, SHOWN_LETTERS, shortened_blocks, shown_layer
from .own_text import own_text, with_own_text
from .record_file import check_record
from .run_record import PLACEHOLDER_NAMESPACE, RunRecord
from .siblings import load_siblings


#: The card's file in a run's folder and in a repository.
CARD_FILE = "README.md"
#: The card's picture.
PICTURE_FILE = "shares_over_depth.png"
#: What the Hub reads of the card as results of an evaluation.
EVAL_RESULTS_FILE = ".eval_results/localist-hf.yaml"

_METRICS = {
    "perplexity": "Perplexity",
    "context_fidelity": "Context fidelity",
    "fidelity": "Fidelity",
    "entropy": "Attention entropy (bits)",
}


def card_files(
    folder: str | Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    space: str | None = None,
    records: Sequence[RunRecord] | None = None,
) -> dict[str, bytes]:
    """
    The card of a run with its picture, and its evaluation results where the data set has a Hub id. What people wrote
    into their part of the card that is in the folder stays.

    Args:
        folder (`str` or `Path`):
            The run's folder. Comparable runs in folders beside it are compared with it.
        repo_id (`str`, *optional*):
            The repository that the card is for. Defaults to [`RunRecord.repository_id`].
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it.
        space (`str`, *optional*):
            Hub id of the Space on which the model can be read.
        records (`Sequence[RunRecord]`, *optional*):
            What [`load_siblings`] gives for the folder, where that has been read already.

    Returns:
        `dict[str, bytes]`: path in the repository to content.

    Raises:
        ValueError: where a number is missing, the run started from the very repository that the card is for, or the
            card in the folder is not as [`write_card`] left it.
    """
    own, records = own_text_in(folder), records or load_siblings(folder)
    record = records[0]
    repo_id = repo_id or record.repository_id()
    files = {
        CARD_FILE: with_own_text(str(model_card(records, repo_id, base_model, space)), own).encode(),
        PICTURE_FILE: _picture(records),
    }
    if record.data["dataset_id"]:
        entries = eval_result_entries_to_yaml(_eval_result_entries(record))
        files[EVAL_RESULTS_FILE] = yaml.safe_dump(entries, sort_keys=False).encode()
    return files


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """
    Writes the files of [`card_files`] to the run's folder.

    Returns:
        `Path`: the card.
    """
    files = card_files(folder, repo_id)
    for name in sorted(files, key=CARD_FILE.__eq__):  # the card last: where it stands, all that it shows does
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, files[name])
    return Path(folder) / CARD_FILE


def own_text_in(folder: str | Path) -> str:
    """
    What people wrote into their part of the card in a run's folder; nothing where there is no card.

    Raises:
        ValueError: where it is not as [`write_card`] left it.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return ""
    return own_text(path.read_text(encoding="utf-8", errors="replace"), repr(str(path)))


def check_card(folder: str | Path) -> None:
    """
    Checks that card and record can be written to a run's folder.

    Raises:
        ValueError: where either is there and not ours, or was edited, but for the part of a card that is kept.
    """
    own_text_in(folder)
    check_record(folder)


def model_card(
    records: Sequence[RunRecord], repo_id: str, base_model: str | None = None, space: str | None = None
) -> ModelCard:
    """
    The card of a run.

    Args:
        records (`Sequence[RunRecord]`):
            The run's record, then those of the runs that [`load_siblings`] finds beside it.
        repo_id (`str`):
            The repository that the card is for; siblings are linked in the same namespace.
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it.
        space (`str`, *optional*):
            Hub id of the Space on which the model can be read.
    """
    record = records[0]
    namespace = repo_id.rpartition("/")[0] or PLACEHOLDER_NAMESPACE
    base_model = base_model or record.base_model
    base = next((other for other in records[1:] if other.is_base_of(record)), None)
    if base_model is None and base is not None:
        base_model = base.repository_id(namespace)
    if base_model is not None and base_model.lower() == repo_id.lower():
        raise ValueError(
            f"The run started from {base_model} and cannot be published over it; give it another name (`--name`, or "
            "`hub_model_id` of a trainer)."
        )
    text = _template().render(_context(records, repo_id, namespace, base_model) | {"space": space})
    return ModelCard(f"---\n{_metadata(record, repo_id, base_model).to_yaml()}\n---\n\n{text}")


@cache
def _template() -> Template:
    """Compiled once, which takes longer than filling it in."""
    return environment().get_template("model_card_template.md")


def environment() -> Environment:
    """What cards are made in: its templates are the files beside this one."""
    made = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
    )
    made.filters |= {"counted": counted, "form": format, "link": link, "numbers": numbers, "one_line": _one_line}
    made.tests["nan"] = math.isnan
    return made


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _metadata(record: RunRecord, repo_id: str, base_model: str | None) -> ModelCardData:
    data = record.data
    architecture = record.config["model_type"].removeprefix("localist-")
    tags = ["localist", architecture, "interpretability", "attention", "progressive-localisation", "arxiv:2511.18375"]
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Language modeling",
            dataset_type=data["dataset_id"] or "text",
            dataset_name=data["name"] or data["dataset_id"] or "unnamed text",
            dataset_config=data["dataset_config"],
            dataset_split=data["evaluation_split"],
            metric_type=metric,
            metric_name=name,
            metric_value=round(record.metrics[metric], 4),
        )
        for metric, name in _METRICS.items()
        if math.isfinite(record.metrics[metric])
    ]
    return ModelCardData(
        license=record.license,
        language=record.language,
        library_name="peft" if record.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + (["lora"] if record.adapter else []) + ([record.variant] if record.variant else []),
        base_model=base_model,
        datasets=data["dataset_id"] and [data["dataset_id"]],
        model_name=repo_id,
        eval_results=results,
    )


def _eval_result_entries(record: RunRecord) -> list[EvalResultEntry]:
    data = record.data
    part = " ".join(filter(None, (data["dataset_config"], data["evaluation_split"])))
    notes = f"{part}: {evaluation_sequences(data)}"
    return [
        EvalResultEntry(
            dataset_id=data["dataset_id"], task_id=metric, value=round(record.metrics[metric], 4), notes=notes
        )
        for metric in _METRICS
        if math.isfinite(record.metrics[metric])
    ]


def _groups(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """
    The comparable runs by what the card calls them, in the order of the variants: together those that differ in the
    seed only, by seed. Of two groups of one name the other one's settings are added to it.
    """
    own = records[0]
    groups = [[own]]
    for run in sorted(filter(own.is_comparable, records[1:]), key=_order):
        group = next((group for group in groups if group[0].is_repetition(run)), None)
        if group is None:
            groups.append([run])
        elif run.seed not in [other.seed for other in group]:
            group.append(run)
    names = [group[0].name for group in groups]
    labelled = []
    for name, group in zip(names, groups, strict=True):
        differences = [f"{key} {value}" for key, value in group[0].settings.items() if value != own.settings.get(key)]
        label = name if group[0] is own or names.count(name) == 1 else f"{name} ({', '.join(differences)})"
        labelled.append((label, sorted(group, key=lambda run: run.seed)))
    return dict(sorted(labelled, key=lambda entry: _order(entry[1][0])))


def _order(run: RunRecord) -> tuple[int, str, int]:
    """The variants in their order, then what has no name; each by seed."""
    order = list(VARIANTS)
    return order.index(run.variant) if run.variant else len(order), run.name, run.seed


def _baseline(groups: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """The name of the runs that the others are compared with."""
    return next((name for name, runs in groups.items() if runs[0].variant == BASELINE_VARIANT), None)


def _drawn(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs in the picture, in the table of layers and among the controls: the baseline, and this card's own."""
    groups = _groups(records)
    names = dict.fromkeys(filter(None, (_baseline(groups), records[0].name)))
    return {name: groups[name] for name in names}


def _picture(records: Sequence[RunRecord]) -> bytes:
    buffer = io.BytesIO()
    drawn = metrics_of_runs(_drawn(records))
    plot_shares_over_depth(drawn, next(iter(drawn)), buffer)
    return buffer.getvalue()


def _context(records: Sequence[RunRecord], repo_id: str, namespace: str, base_model: str | None) -> dict[str, Any]:
    """What the template shows."""
    record, data, locality = records[0], records[0].data, records[0].locality
    groups = _groups(records)
    baseline = _baseline(groups)
    own, drawn = groups[record.name], _drawn(records)
    metrics = metrics_of_runs(groups)
    layer = shown_layer(record.lambdas)
    positions = num_positions(record.model_config)
    # Where the card's own run was not measured for it, the card says nothing of controls.
    controlled = record.controls and [run for run in groups[record.name] if run.controls is not None]
    by_seed = metrics_by_seed(groups)
    return {
        "record": record,
        "config": record.model_config,
        "locality": locality,
        "training": record.training,
        "data": data,
        "repo_id": repo_id,
        "repo_name": repo_id.rpartition("/")[2],
        "is_native": record.is_native,
        "kind": kind(record),
        "trust": "" if record.is_native else ", trust_remote_code=True",
        "text": text_name(data),
        "sequences": evaluation_sequences(data),
        "variants": variants_phrase(record),
        "lambdas": numbers(record.lambdas),
        "is_base": any(record.is_base_of(other) for other in records[1:]),
        "base": link(base_model) if base_model else str(record.base_run),
        "own": figures(metrics[record.name], layer),
        "others": baseline not in (None, record.name) and figures(metrics[baseline], layer),
        "baseline": baseline,
        "has_baseline": baseline is not None,
        "is_baseline": record.variant == BASELINE_VARIANT,
        "from_scratch": record.from_scratch,
        "adapter": record.adapter,
        "base_model": base_model,
        "base_revision": record.adapter and base_model == record.base_model and record.adapter.get("base_revision"),
        "base_run": record.base_run,
        "localised": any(record.lambdas),
        "local_set": local_set_phrase(record),
        "sinks": sinks_phrase(record),
        "layer": -1 if layer == record.num_layers - 1 else layer,
        "layer_name": layer_phrase(record),
        "prompt": prompt_literal(record.example["prompt"] if record.example else PROMPT),
        "printed": record.example and shortened_blocks(record.example["printed"]),
        "num_shown": SHOWN_LETTERS,
        "missing_prefix": data.get("has_text_prefix") is False and data["text_prefix"],
        "max_new_tokens": 40 if positions is None else min(40, positions // 2),
        "defaults": record.dial,
        "perplexities": [
            f"{value:.2f} at dial {dial}"
            for dial, value in perplexities_at_ends(record).items()
            if not math.isnan(value)
        ],
        "drawn_are_means": any(len(runs) > 1 for runs in drawn.values()),
        "num_seeds": len(own),
        "seeds": ", ".join(map(seed_phrase, own)),
        "seed": seed_phrase(record),
        "numbers_of_runs": {len(runs) for runs in groups.values()},
        "num_rows": len(groups),
        "has_gaps": any(
            math.isnan(value) for runs in groups.values() for run in runs for value in run.metrics.values()
        ),
        "comparison": comparison(record, groups, baseline, layer),
        "measures_blocks": measures_blocks(groups, layer),
        "at_dial_1": is_held(record)
        and not math.isnan(at_1 := fmean(perplexities_at_ends(run)[1] for run in own))
        and {"own": at_1, "others": baseline is not None and mean_over_runs(metrics[baseline], "perplexity")},
        "has_intervals": baseline is not None and bool(perplexity_differences(by_seed, baseline)),
        "are_of_documents": are_of_documents(by_seed),
        "partitions": list({runs[0].locality["block_partition"] for runs in groups.values()}),
        "num_layers": record.num_layers,
        "wrong_blocks": controlled and wrong_blocks(controlled, layer),
        "costs": controlled and costs(controlled),
        "out_of_reach": record.controls.get("share_out_of_reach") if controlled else None,
        "last_steps": record.training["steps"] - sum(part["steps"] for part in record.earlier_parts),
        "hardware": record.hardware,
        "localist_version": record.versions["localist-hf"],
        "namespace": namespace,
        "family": _family(records),
    }


def _family(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The other models of the family, but for the base, which the card names anyway; of one name the last."""
    others = {other.name: other for other in records[1:] if other.name != records[0].name}
    return sorted((other for other in others.values() if not other.is_base_of(records[0])), key=_order)
