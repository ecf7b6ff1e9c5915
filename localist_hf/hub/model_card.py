"""The model card: text, metadata and picture, from the records of runs and from nothing else."""

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, StrictUndefined

from ..configuration import BASELINE_VARIANT, VARIANTS
from ..evaluation import plot_shares_over_depth, spread
from .example import PROMPT, shown_layer
from .run_record import PLACEHOLDER_NAMESPACE, RunRecord, load_siblings, repository_id


CARD_FILE = "README.md"
PICTURE_FILE = "shares_over_depth.png"
EVAL_RESULTS_FILE = ".eval_results/localist-hf.yaml"

_METRICS = {
    "perplexity": "Perplexity",
    "context_fidelity": "Context fidelity",
    "fidelity": "Fidelity",
    "entropy": "Attention entropy (bits)",
}
_PARTITIONS = {
    "semantic": "semantic blocks of {min_block_length} to {max_block_length} tokens, which the model finds in its own "
    "value vectors",
    "delimiter": "blocks of {min_block_length} to {max_block_length} tokens that end at given tokens",
    "window": "blocks of {window_length} tokens each, whatever the text says",
}


def card_files(folder: str | Path, repo_id: str | None = None, base_model: str | None = None) -> dict[str, bytes]:
    """
    The card of a run with its picture, and its evaluation results where the data set has a Hub id.

    Args:
        folder (`str` or `Path`):
            The run's folder. Comparable runs in folders beside it are compared with it.
        repo_id (`str`, *optional*):
            The repository that the card is for. Defaults to `org/localist-gpt2-<name>`.
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it.

    Returns:
        `dict[str, bytes]`: path in the repository to content.

    Raises:
        ValueError: where a number is missing, or the run started from the very repository that the card is for.
    """
    records = load_siblings(folder)
    record = records[0]
    repo_id = repo_id or repository_id(record.name)
    files = {
        CARD_FILE: str(model_card(records, repo_id, base_model)).encode(),
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
    for name, content in card_files(folder, repo_id).items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder) / CARD_FILE


def model_card(records: Sequence[RunRecord], repo_id: str, base_model: str | None = None) -> ModelCard:
    """
    The card of a run.

    Args:
        records (`Sequence[RunRecord]`):
            The run's record, then those of the runs that [`load_siblings`] finds beside it.
        repo_id (`str`):
            The repository that the card is for; siblings are linked in the same namespace.
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it.
    """
    record = records[0]
    namespace = repo_id.rpartition("/")[0] or PLACEHOLDER_NAMESPACE
    base_model = base_model or record.base_model
    base = next((other for other in records[1:] if other.is_base_of(record)), None)
    if base_model is None and base is not None:
        base_model = repository_id(base.name, namespace)
    if base_model is not None and base_model.lower() == repo_id.lower():
        raise ValueError(
            f"The run started from {base_model} and cannot be published over it; give it another name (`--name`, or "
            "`hub_model_id` of a trainer)."
        )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(
        resources.files(__package__).joinpath("model_card_template.md").read_text("utf-8")
    )
    text = template.render(_context(records, repo_id, namespace, base_model))
    return ModelCard(f"---\n{_metadata(record, repo_id, base_model).to_yaml()}\n---\n\n{text}")


def _metadata(record: RunRecord, repo_id: str, base_model: str | None) -> ModelCardData:
    data = record.data
    tags = ["localist", "gpt2", "interpretability", "attention", "progressive-localisation", "arxiv:2511.18375"]
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
    notes = f"{part}: {_evaluation_sequences(data)}"
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


def _link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _base(record: RunRecord, base_model: str | None) -> str:
    """What the run started from, with a link where it has a repository."""
    return _link(base_model) if base_model else str(record.base_run)


def _baseline(groups: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """The name of the runs that the others are compared with."""
    return next((name for name, runs in groups.items() if runs[0].variant == BASELINE_VARIANT), None)


def _metrics(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, list[dict[str, float]]]:
    return {name: [run.metrics for run in runs] for name, runs in groups.items()}


def _drawn(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs in the picture, in the table of layers and among the controls: the baseline, and this card's own."""
    groups = _groups(records)
    names = dict.fromkeys(filter(None, (_baseline(groups), records[0].name)))
    return {name: groups[name] for name in names}


def _picture(records: Sequence[RunRecord]) -> bytes:
    buffer = io.BytesIO()
    drawn = _metrics(_drawn(records))
    plot_shares_over_depth(drawn, next(iter(drawn)), buffer)
    return buffer.getvalue()


def _context(records: Sequence[RunRecord], repo_id: str, namespace: str, base_model: str | None) -> dict[str, Any]:
    """What the template shows."""
    record, data, config = records[0], records[0].data, records[0].config
    groups = _groups(records)
    baseline = _baseline(groups)
    own = groups[record.name]
    layer = shown_layer(config["locality_schedule"], config["n_layer"])
    on_base = {name: [run.metrics_on_base_blocks for run in runs] for name, runs in groups.items()}
    has_base_blocks = len(groups) > 1 and all(metrics for runs in on_base.values() for metrics in runs)
    controlled = _controlled(records)
    return {
        "repo_id": repo_id,
        "repo_name": repo_id.rpartition("/")[2],
        "summary": _summary(records, groups, baseline, base_model),
        "has_baseline": baseline is not None,
        "is_baseline": record.variant == BASELINE_VARIANT,
        "from_scratch": record.from_scratch,
        "adapter": record.adapter,
        "base_model": base_model,
        "base_run": record.base_run,
        "localised": any(record.lambdas),
        "fully_local": 1 in record.lambdas,
        "block": _block(record, "the token's own block"),
        "local_set": _local_set(record),
        "sinks": _sinks(record),
        "parked": _parked(record),
        "layer": -1 if layer == config["n_layer"] - 1 else layer,
        "layer_name": _layer_name(record),
        "prompt": _prompt_literal(record.example["prompt"] if record.example else PROMPT),
        "printed": record.example and record.example["printed"],
        "max_new_tokens": min(40, config["n_positions"] // 2),
        "defaults": {name: config[name] for name in ("locality_dial", "min_fidelity") if config[name]},
        "spread_note": _spread_note(records),
        "seeds": [_seed(run) for run in own],
        "seed": _seed(record),
        "others_have_seeds": any(len(runs) > 1 for runs in groups.values()),
        "evaluation": f"{_evaluation_sequences(data)} of {_text_name(data)} ({data['evaluation_split']})",
        "num_rows": len(groups),
        "comparison": _comparison(record, _metrics(groups), baseline, layer),
        "base_blocks_comparison": has_base_blocks and _comparison(record, on_base, baseline, layer),
        "blocks_note": _blocks_note(groups),
        "layer_table": _layer_table(record, _drawn(records)),
        "layers_are_means": any(len(runs) > 1 for runs in _drawn(records).values()),
        "num_layers": config["n_layer"],
        "block_controls": controlled and _block_controls(record, controlled, layer),
        "dial_controls": controlled and _dial_controls(record, controlled),
        "dial_sweep": controlled and any(record.lambdas) and _dial_sweep(record, layer),
        "controls_are_means": any(len(runs) > 1 for runs in controlled.values()),
        "wrong_blocks": record.controls and _wrong_blocks(record, layer),
        "attention_is_used": record.controls and _attention_is_used(record),
        "started_from": _started_from(record, base_model),
        "configuration": _configuration(record),
        "training_data": _training_data(data),
        "earlier_parts": [_earlier_part(record, part) for part in record.earlier_parts],
        "hyperparameters": _hyperparameters(record.training | {"steps": _last_steps(record)}),
        "locality_loss": _locality_loss(record.training),
        "hardware": record.hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "localist_version": record.versions["localist-hf"],
        "family": _family(records, namespace),
    }


# --- where attention goes, in words


def _sinks(record: RunRecord) -> str:
    """The tokens that are local everywhere; empty where there are none."""
    number = record.config["num_sink_tokens"]
    return "" if number == 0 else "the first token" if number == 1 else f"the first {number} tokens"


def _block(record: RunRecord, block: str) -> str:
    """Where other words count as near."""
    number = record.config["num_previous_blocks"]
    return block + ("" if number == 0 else " or the one before it" if number == 1 else f" or the {number} before it")


def _local_set(record: RunRecord) -> str:
    """All that is local to a token, itself being in its block."""
    blocks = ("their block", "their block and the one before it")
    number = record.config["num_previous_blocks"]
    block = blocks[number] if number < 2 else f"their block and the {number} before it"
    return block + (f" and {_sinks(record)}" if _sinks(record) else "")


def _parked(record: RunRecord) -> str:
    """What is no other word."""
    return f"neither the token itself nor {_sinks(record)}" if _sinks(record) else "not the token itself"


def _layer_name(record: RunRecord) -> str:
    """The layer that the card speaks of."""
    num_layers = record.config["n_layer"]
    layer = shown_layer(record.config["locality_schedule"], num_layers)
    if layer < num_layers - 1:
        return f"layer {layer}"
    return "the last layer" if num_layers > 1 else "the only layer"


def _prompt_literal(prompt: str) -> str:
    """A Python literal of several lines."""
    lines = textwrap.wrap(prompt, 100, break_long_words=False, break_on_hyphens=False)
    lines = [f"{line} " for line in lines[:-1]] + lines[-1:]
    return "\n".join(["(", *(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines), ")"])


def _seed(record: RunRecord) -> str:
    """The seed of a run; of several parts each one's."""
    seeds = [part["seed"] for part in record.earlier_parts] + [record.seed]
    return ", then ".join("unknown" if seed is None else str(seed) for seed in dict.fromkeys(seeds))


def _spread_note(records: Sequence[RunRecord]) -> str:
    """What the picture shows means of."""
    seeds = {name: ", ".join(map(_seed, runs)) for name, runs in _drawn(records).items() if len(runs) > 1}
    if not seeds:
        return ""
    if len(seeds) == len(_drawn(records)) and len(set(seeds.values())) == 1:
        return f" Means over the seeds {next(iter(seeds.values()))}."
    return " Means over seeds: " + " and ".join(f"{name} ({text})" for name, text in seeds.items()) + "."


def _blocks_note(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """Whose blocks a table is measured on."""
    partitions = {runs[0].config["block_partition"] for runs in groups.values()}
    if partitions == {"semantic"}:
        return "These are the blocks that each model finds itself"
    if "semantic" in partitions:
        return "Each row has the blocks of its own partition, and semantic ones are those that each model finds itself"
    return "The blocks follow from the text alone, and are no model's own"


def _text_name(data: Mapping[str, Any]) -> str:
    name = data["name"] or data["dataset_id"]
    if name is None:
        return "a text that was not named"
    if data["dataset_id"]:
        link = f"[{name}](https://huggingface.co/datasets/{data['dataset_id']})"
        return f"{link} ({data['dataset_config']})" if data["dataset_config"] else link
    return f"the {name}" if not name.startswith("`") else name


def _evaluation_sequences(data: Mapping[str, Any]) -> str:
    least, greatest = data["evaluation_lengths"]
    length = f"{greatest}" if least == greatest else f"{least} to {greatest}"
    return f"{data['evaluation_sequences']} sequences of {length} tokens"


def _shape(record: RunRecord) -> str:
    config = record.config
    return (
        f"{_counted(config['n_layer'], 'layer')}, width {config['n_embd']}, {_counted(config['n_head'], 'head')}, "
        f"{record.num_parameters / 1e6:.1f} million parameters"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _numbers(lambdas: Sequence[float]) -> str:
    return ", ".join(f"{value:.2g}" for value in lambdas)


def _summary(
    records: Sequence[RunRecord],
    groups: Mapping[str, Sequence[RunRecord]],
    baseline: str | None,
    base_model: str | None,
) -> str:
    """What the model is, how it was trained, and what that gave."""
    record = records[0]
    paper = "progressive localisation ([arXiv:2511.18375](https://arxiv.org/abs/2511.18375))"
    rank = record.adapter and record.adapter["rank"]
    if not record.training["steps"]:
        adapter = f"a LoRA adapter of rank {rank} on " if rank else ""
        weights = "random weights" if record.from_scratch else f"{adapter}the weights of {_base(record, base_model)}"
        what = f"GPT-2 ({_shape(record)}) with {weights}, measured on {_text_name(record.data)} under "
        what += f"{_variants(record)} of {paper}."
    elif record.from_scratch:
        what = f"GPT-2 ({_shape(record)}) trained from random weights on {_text_name(record.data)}"
        if any(record.is_base_of(other) for other in records[1:]):
            what += f", the base of models fine-tuned by {paper}."
        else:
            what += f" under {_variants(record)} of {paper}."
    else:
        what = f"A LoRA adapter of rank {rank} for" if rank else f"GPT-2 ({_shape(record)}), fine-tuned from"
        what += f" {_base(record, base_model)} on {_text_name(record.data)} under {_variants(record)} of {paper}."
    metrics = _metrics(groups)
    layer = shown_layer(record.config["locality_schedule"], record.config["n_layer"])
    own = metrics[record.name]
    over = f"In evaluation, on average over {len(own)} seeds," if len(own) > 1 else "In evaluation"
    result = f"{over} its perplexity is {_mean(own, 'perplexity'):.2f}. {_attention(record, own, layer)}."
    if baseline is not None and baseline != record.name:
        others = metrics[baseline]
        result += f" The same {'training' if record.training['steps'] else 'model'} without locality (`{baseline}`) has"
        result += f" perplexity {_mean(others, 'perplexity'):.2f}"
        psi, share = (_mean(others, f"{name}_layer_{layer}") for name in ("context_fidelity", "context_share"))
        own_psi = _mean(own, f"context_fidelity_layer_{layer}")
        if not math.isnan(psi + own_psi):
            result += f", and of its attention to other words, {share:.1%} of all, {psi:.1%} is there"
        result += "."
    return f"{what} {_training_objective(record)} {result}"


def _mean(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    """Over runs; NaN where one of them has no number."""
    return fmean(run[name] for run in metrics)


def _training_objective(record: RunRecord) -> str:
    """What the training asked of the attention."""
    training, lambdas = record.training, f"lambda = {_numbers(record.lambdas)}"
    who = "The last part of the training" if record.earlier_parts else "Training"
    if not any(record.lambdas):
        return "Its attention is free in every layer" + (
            "." if record.from_scratch else ": it is there to compare with."
        )
    if not training["steps"]:
        return f"It was not trained for it; the schedule ({lambdas}) is that of the dial."
    if training["locality_weight"] == 0:
        return f"{who} left its attention free; the schedule ({lambdas}) is that of the dial."
    asked = f"at least {100 * training['target_fidelity']:g}%"
    block = _block(record, "the block of the text that the token stands in")
    if training["locality_objective"] == "context":
        other = f"other words ({_parked(record)})" if _sinks(record) else "other words"
        what = f"of the attention that a token pays to {other}, {asked} should go to {block}"
    else:
        sinks = f", or to {_sinks(record)}" if _sinks(record) else ""
        what = f"{asked} of a token's attention should go to the token itself or elsewhere to {block}{sinks}"
    degree = "in each layer to the degree of its lambda" if len(record.lambdas) > 1 else "in its only layer"
    return f"{who} asked that {what}, {degree} ({lambdas})."


def _attention(record: RunRecord, metrics: Sequence[Mapping[str, float]], layer: int) -> str:
    """Where a layer's attention goes."""
    psi, share, own, sink = (
        _mean(metrics, f"{name}_layer_{layer}")
        for name in ("context_fidelity", "context_share", "self_share", "sink_share")
    )
    name = _layer_name(record)
    if math.isnan(share):
        return (
            f"There is nothing to say of where {name} looks: no token of the text sees more than {_local_set(record)}"
        )
    sinks = f", {_sinks(record)} {sink:.1%}" if _sinks(record) else ""
    shares = f"in {name} other words get {share:.1%} of a token's attention, the token itself {own:.1%}{sinks}"
    if math.isnan(psi):
        return _capitalised(shares)
    block = _block(record, "the token's own block")
    return f"Of the attention that {name} pays to other words, {psi:.1%} goes to {block}; {shares}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- tables


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def _columns(record: RunRecord) -> dict[str, str]:
    """The shares that tables show, by their metric."""
    columns = {"context_fidelity": "psi", "context_share": "other words", "self_share": "self"}
    return columns | ({"sink_share": "sink"} if _sinks(record) else {})


def _comparison(
    record: RunRecord, results: Mapping[str, Sequence[Mapping[str, float]]], baseline: str | None, layer: int
) -> str:
    """A row for each configuration, this card's own in bold; with the one layer that the card speaks of."""
    columns = _columns(record) | {"fidelity": "phi", "visible_keys": "visible keys"}
    ratio = [f"/ {baseline}"] if baseline is not None and len(results) > 1 else []
    rows = [["configuration", "perplexity", *ratio, *columns.values(), "entropy (bits)"]]
    for name, metrics in results.items():
        row = [f"**{name}**" if name == record.name else name, spread([run["perplexity"] for run in metrics])]
        if ratio:
            row.append(f"{_mean(metrics, 'perplexity') / _mean(results[baseline], 'perplexity'):.3f}")
        for metric in columns:
            values = [run[f"{metric}_layer_{layer}"] for run in metrics]
            if metric == "context_fidelity":
                row.append(spread(values))
            else:
                row.append(spread([fmean(values)], digits=1 if metric == "visible_keys" else 2))
        rows.append([*row, spread([_mean(metrics, "entropy")])])
    return _table(rows)


def _layer_table(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str:
    metrics = _metrics(groups)
    names = list(reversed(metrics))  # this card's own first
    columns = _columns(record) | {"entropy": "entropy (bits)"}
    rows = [["layer", "lambda", *(f"{title}, {name}" for title in columns.values() for name in names)]]
    for layer, value in enumerate(record.lambdas):
        cells = [spread([_mean(metrics[name], f"{metric}_layer_{layer}")]) for metric in columns for name in names]
        rows.append([str(layer), f"{value:.3g}", *cells])
    return _table(rows)


# --- controls


def _controlled(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs whose controls the card shows, its own first; none where they were not measured for it."""
    drawn = _drawn(records)
    if records[0].controls is None:
        return {}
    kept = {name: [run for run in runs if run.controls is not None] for name, runs in reversed(drawn.items())}
    return {name: runs for name, runs in kept.items() if runs}


def _at_layer(record: RunRecord, figures: Mapping[str, Any] | None, name: str, layer: int) -> float:
    """A figure of one layer; NaN where it was not measured or is no number."""
    if figures is None or layer not in record.controls["layers"]:
        return math.nan
    return _or_nan(figures[name][record.controls["layers"].index(layer)])


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _block_controls(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]], layer: int) -> str:
    """psi on the own blocks and on others, with no previous blocks and with some."""
    others = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}
    rows = [
        [
            "configuration",
            "blocks before",
            "visible keys",
            "other words",
            *(f"psi, {title}" for title in others.values()),
        ]
    ]
    for name, runs in groups.items():
        for blocks in zip(*(run.controls["blocks"] for run in runs), strict=True):

            def mean(
                kind: str, figure: str, runs: Sequence[RunRecord] = runs, blocks: Sequence[dict] = blocks
            ) -> float:
                return fmean(
                    _at_layer(run, of_run[kind], figure, layer) for run, of_run in zip(runs, blocks, strict=True)
                )

            row = [f"**{name}**" if name == record.name else name, str(blocks[0]["num_previous_blocks"])]
            row += [spread([mean("own", "visible_keys")], digits=1), spread([mean("own", "context_share")])]
            rows.append(row + [spread([mean(kind, "context_fidelity")]) for kind in others])
    return _table(rows)


#: Perplexities of the controls, by what the card calls them.
_PERPLEXITIES = {
    "dial 1": lambda controls: controls["dials"][-1]["perplexity"],
    "self only": lambda controls: controls["self_only_perplexity"],
    "all local": lambda controls: controls["all_local_perplexity"],
    "all self only": lambda controls: controls["all_local_self_only_perplexity"],
}


def _ratio(controls: Mapping[str, Any], name: str) -> float:
    """A perplexity, as a multiple of that at dial 0."""
    return _or_nan(_PERPLEXITIES[name](controls)) / _or_nan(controls["perplexity"])


def _dial_controls(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """Perplexities under the dial."""
    rows = [["configuration", "dial 0", *_PERPLEXITIES, "divergence (bits)"]]
    for name, runs in groups.items():
        controls = [run.controls for run in runs]
        row = [f"**{name}**" if name == record.name else name]
        row.append(spread([fmean(_or_nan(each["perplexity"]) for each in controls)]))
        for ratio in _PERPLEXITIES:
            is_changed = any(runs[0].lambdas) or ratio.startswith("all")
            row.append(spread([fmean(_ratio(each, ratio) for each in controls) if is_changed else math.nan], digits=3))
        divergence = fmean(_or_nan(each["divergence"]) for each in controls) if any(runs[0].lambdas) else math.nan
        rows.append([*row, spread([divergence], digits=3)])
    return _table(rows)


def _dial_sweep(record: RunRecord, layer: int) -> str:
    """The way from dial 0 to dial 1."""
    dials = record.controls["dials"]
    rows = [["dial", *(f"{dial['dial']:g}" for dial in dials)]]
    rows.append(["perplexity", *(spread([_or_nan(dial["perplexity"])]) for dial in dials)])
    for name, title in (("context_fidelity", "psi"), ("fidelity", "phi")):
        rows.append([title, *(spread([_at_layer(record, dial["locality"], name, layer)]) for dial in dials)])
    return _table(rows)


def _wrong_blocks(record: RunRecord, layer: int) -> str:
    """What psi on the blocks of another text says."""
    if record.config["block_partition"] == "window":
        return (
            "The blocks do not depend on the text, so psi says how near a token looks and nothing about what the text "
            "says."
        )
    number = record.config["num_previous_blocks"]
    blocks = next(blocks for blocks in record.controls["blocks"] if blocks["num_previous_blocks"] == number)
    own, wrong = (f"{_at_layer(record, blocks[kind], 'context_fidelity', layer):.2f}" for kind in ("own", "wrong"))
    if "nan" in (own, wrong):
        return "On the blocks of another text psi is not defined here, so it is not known what the own ones are worth."
    both = f"Laid over this text, the blocks of another one get psi {wrong} where its own get {own}"
    if float(own) > float(wrong):
        return (
            f"{both}: at most the {float(own) - float(wrong):.2f} between them is about where this text's blocks begin."
        )
    return f"{both}: psi says here how near a token looks, and nothing about where this text's blocks begin."


def _attention_is_used(record: RunRecord) -> str:
    """How much the model loses without the attention that leaves its blocks."""
    local, alone = (_ratio(record.controls, name) for name in ("all local", "all self only"))
    if math.isnan(local + alone):
        return ""
    layers = "all layers are" if record.config["n_layer"] > 1 else "the layer is"
    itself = "itself" + (f" and {_sinks(record)}" if _sinks(record) else "")
    return (
        f"With {layers} held wholly inside the blocks the perplexity is {local:.3f} times that at dial 0, and with "
        f"nothing to see for a token but {itself} {alone:.3f} times: where that is little, attention is little used, "
        "and it costs nothing to constrain it."
    )


# --- training


def _variant(variant: str | None) -> str:
    return f"`{variant}`" if variant else "custom"


def _variants(record: RunRecord) -> str:
    """The locality configurations that a run was trained under, one after another."""
    variants = [
        f"the {_variant(part['variant'])} configuration" if part["training"] else "a configuration that is not recorded"
        for part in record.earlier_parts
    ]
    return ", then ".join(dict.fromkeys([*variants, f"the {_variant(record.variant)} configuration"]))


def _started_from(record: RunRecord, base_model: str | None) -> str:
    if record.from_scratch:
        return "random weights"
    adapter = ""
    if record.adapter:
        modules = ", ".join(f"`{name}`" for name in record.adapter["target_modules"])
        adapter = (
            f"; a LoRA adapter of rank {record.adapter['rank']} and alpha {record.adapter['alpha']} on {modules} was "
            f"trained, {record.adapter['parameters']:,} parameters"
        )
    return _base(record, base_model) + adapter


def _configuration(record: RunRecord) -> str:
    blocks = _PARTITIONS[record.config["block_partition"]].format(**record.config)
    verb = "counts" if record.config["num_sink_tokens"] == 1 else "count"
    extra = f"; {_sinks(record)} of a text {verb} as local everywhere" if _sinks(record) else ""
    if number := record.config["num_previous_blocks"]:
        before = "the block" if number == 1 else f"the {number} blocks"
        extra = f"; {before} before a token's own {'counts' if number == 1 else 'count'} as local too{extra}"
    return f"{_variant(record.variant)}, lambda = {_numbers(record.lambdas)}; {blocks}{extra}"


def _training_data(data: Mapping[str, Any]) -> str:
    number = data["training_sequences"]
    amount = "a stream" if number is None else f"{number} sequences"
    measured = f"{_evaluation_sequences(data)} to measure on ({data['evaluation_split']})"
    details = f" {data['details']}" if data["details"] else ""
    return f"{_text_name(data)}: {amount} to train on, {measured}.{details}"


def _earlier_part(record: RunRecord, part: Mapping[str, Any]) -> str:
    """What was trained before the last part, under other settings."""
    if part["training"] is None:
        return f"{_counted(part['steps'], 'step')} whose settings are not recorded"
    fields = [f"`{name}` {value}" for name, value in part["locality"].items() if value != record.config[name]]
    locality = f" ({', '.join(fields)})" if fields else ""
    training = {**part["training"], "steps": part["steps"]}
    return (
        f"{_variant(part['variant'])} configuration{locality}, seed {part['seed']}; {_hyperparameters(training)}, with "
        f"{part['planned_steps']} steps planned; locality loss: {_locality_loss(training)}"
    )


def _last_steps(record: RunRecord) -> int:
    """Number of steps of the last part."""
    return record.training["steps"] - sum(part["steps"] for part in record.earlier_parts)


def _hyperparameters(training: Mapping[str, Any]) -> str:
    betas = ""
    if "adam" in training["optimizer"]:
        betas = f", betas {training['betas'][0]:g} and {training['betas'][1]:g}"
    clipping = f"gradients clipped at {training['max_grad_norm']:g}" if training["max_grad_norm"] else "no clipping"
    return (
        f"{_counted(training['steps'], 'step')} of {_counted(training['batch_size'], 'sequence')}, "
        f"{training['optimizer']} with learning rate {training['learning_rate']:g}{betas}, weight decay "
        f"{training['weight_decay']:g}, {clipping}, schedule {training['schedule']} with "
        f"{_warmup(training['warmup_steps'])}, {training['precision']}"
    )


def _locality_loss(training: Mapping[str, Any]) -> str:
    objective = {"context": "context fidelity (psi)", "fidelity": "fidelity (phi)"}[training["locality_objective"]]
    return (
        f"on {objective}, target {training['target_fidelity']:g}, weight {training['locality_weight']:g}, exponent "
        f"{training['locality_exponent']}, {_warmup(training['locality_warmup_steps'])}"
    )


def _warmup(steps: float) -> str:
    """Below 1 it is a share of all steps."""
    if not steps:
        return "no warm-up"
    return f"warm-up over {steps:.0%} of the steps" if steps < 1 else f"warm-up over {_counted(int(steps), 'step')}"


def _family(records: Sequence[RunRecord], namespace: str) -> list[str]:
    """A line with a link for each other model of the family, the base first."""
    record = records[0]
    others = {other.name: other for other in records[1:] if other.name != record.name}
    lines = []
    for other in sorted(others.values(), key=lambda run: (not run.from_scratch, _order(run))):
        role = "the common base" if other.is_base_of(record) else ""
        role = role or ("free attention, the baseline" if other.variant == BASELINE_VARIANT else "")
        lines.append(f"{_link(repository_id(other.name, namespace))}: {role or f'lambda = {_numbers(other.lambdas)}'}")
    return lines
