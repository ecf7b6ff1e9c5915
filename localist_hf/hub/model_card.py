"""The model card: text, metadata and picture, from the records of runs and from nothing else."""

import io
import json
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
from ..evaluation import comparison_table, plot_fidelity_over_depth, spread
from .example import PROMPT, shown_layer
from .run_record import PLACEHOLDER_NAMESPACE, RunRecord, load_siblings, repository_id


CARD_FILE = "README.md"
PICTURE_FILE = "fidelity_over_depth.png"
EVAL_RESULTS_FILE = ".eval_results/localist-hf.yaml"

_METRICS = {"perplexity": "Perplexity", "fidelity": "Fidelity", "entropy": "Attention entropy (bits)"}
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
    """The runs in the picture and in the table of layers: this card's own, and the baseline."""
    groups = _groups(records)
    names = dict.fromkeys(filter(None, (_baseline(groups), records[0].name)))
    return {name: groups[name] for name in names}


def _picture(records: Sequence[RunRecord]) -> bytes:
    buffer = io.BytesIO()
    plot_fidelity_over_depth(_metrics(_drawn(records)), buffer, lambdas=records[0].lambdas)
    return buffer.getvalue()


def _context(records: Sequence[RunRecord], repo_id: str, namespace: str, base_model: str | None) -> dict[str, Any]:
    """What the template shows."""
    record, data, config = records[0], records[0].data, records[0].config
    groups = _groups(records)
    baseline = _baseline(groups)
    own = groups[record.name]
    has_siblings = baseline is not None and len(groups) > 1
    # One table row for each name, this one's in bold.
    labels = {record.name: f"**{record.name}**"}
    comparison = base_blocks_comparison = None
    if has_siblings:
        comparison = comparison_table(_metrics(groups), baseline, labels, every_layer=False)
        on_base = {name: [run.metrics_on_base_blocks for run in runs] for name, runs in groups.items()}
        if all(metrics for runs in on_base.values() for metrics in runs):
            base_blocks_comparison = comparison_table(on_base, baseline, labels, every_layer=False)
    layer = shown_layer(config["locality_schedule"], config["n_layer"])
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
        "own_local_set": _local_set(record, "its own block of the text"),
        "local_set": _local_set(record, "its block"),
        "not_local": "the token's block" + (f" and {_sinks(record)}" if _sinks(record) else ""),
        "seen": "their block" + (f" and {_sinks(record)}" if _sinks(record) else ""),
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
        "comparison": comparison,
        "base_blocks_comparison": base_blocks_comparison,
        "blocks_note": _blocks_note(groups),
        "perplexity": spread([run.metrics["perplexity"] for run in own]),
        "fidelity": spread([run.metrics["fidelity"] for run in own]),
        "entropy": spread([run.metrics["entropy"] for run in own]),
        "layer_table": _layer_table(record, _drawn(records)),
        "layers_are_means": any(len(runs) > 1 for runs in _drawn(records).values()),
        "num_layers": config["n_layer"],
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


def _sinks(record: RunRecord) -> str:
    """The tokens that are local everywhere; empty where there are none."""
    number = record.config["num_sink_tokens"]
    return "" if number == 0 else "the first token" if number == 1 else f"the first {number} tokens"


def _local_set(record: RunRecord, block: str) -> str:
    """Where attention is local."""
    return f"inside {block}" + (f" or on {_sinks(record)}" if _sinks(record) else "")


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
    """What lines and bands of the picture are."""
    seeds = {name: ", ".join(map(_seed, runs)) for name, runs in _drawn(records).items() if len(runs) > 1}
    if not seeds:
        return ""
    if len(seeds) == len(_drawn(records)) and len(set(seeds.values())) == 1:
        which = f"Lines are means over the seeds {next(iter(seeds.values()))}"
    else:
        which = "Means over seeds are " + " and ".join(f"the line of {name} ({text})" for name, text in seeds.items())
    return f" {which}; bands go from the least to the greatest."


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
    if record.from_scratch:
        what = f"GPT-2 ({_shape(record)}) trained from random weights on {_text_name(record.data)}"
        if any(record.is_base_of(other) for other in records[1:]):
            what += f", the base of models fine-tuned by {paper}."
        else:
            what += f" under {_variants(record)} of {paper}."
    else:
        rank = record.adapter and record.adapter["rank"]
        what = f"A LoRA adapter of rank {rank} for" if rank else f"GPT-2 ({_shape(record)}), fine-tuned from"
        what += f" {_base(record, base_model)} on {_text_name(record.data)} under {_variants(record)} of {paper}."
    lambdas = f"lambda = {_numbers(record.lambdas)}"
    if not any(record.lambdas):
        how = "Its attention is free in every layer"
        how += "." if record.from_scratch else ": it is there to be compared with."
    elif record.training["locality_weight"] == 0:
        how = f"Training left its attention free; the schedule ({lambdas}) is that of the dial."
    else:
        each = "Each layer was" if record.config["n_layer"] > 1 else "Its only layer was"
        how = (
            f"{each} trained to keep {record.training['target_fidelity']:.0%} of every token's attention "
            f"{_local_set(record, 'the block of the text that the token stands in')}, to the degree that the schedule "
            f"sets ({lambdas}), so that it can be read off where the attention goes."
        )
    layer = shown_layer(record.config["locality_schedule"], record.config["n_layer"])

    def mean(name: str, metric: str) -> float:
        return fmean(run.metrics[metric] for run in groups[name])

    own_block, num_seeds = "the token's own block", len(groups[record.name])
    over = f"In evaluation, on average over {num_seeds} seeds," if num_seeds > 1 else "In evaluation"
    share = (
        f"{over} its perplexity is {mean(record.name, 'perplexity'):.2f}, and "
        f"{mean(record.name, f'fidelity_layer_{layer}'):.1%} of {_layer_name(record)}'s attention stays "
        f"{_local_set(record, own_block)}"
    )
    if baseline is not None and baseline != record.name:
        share += (
            f"; the same training without locality (`{baseline}`) gives {mean(baseline, 'perplexity'):.2f} and "
            f"{mean(baseline, f'fidelity_layer_{layer}'):.1%}"
        )
    return f"{what} {how} {share}."


def _variant(variant: str | None) -> str:
    return f"`{variant}`" if variant else "custom"


def _variants(record: RunRecord) -> str:
    """The locality configurations that a run was trained under, one after another."""
    variants = [
        f"the {_variant(part['variant'])} configuration" if part["training"] else "a configuration that is not recorded"
        for part in record.earlier_parts
    ]
    return ", then ".join(dict.fromkeys([*variants, f"the {_variant(record.variant)} configuration"]))


def _layer_table(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str:
    names = list(reversed(groups))  # this card's own first
    header = ["layer", "lambda"]
    header += [f"{quantity}, {name}" for quantity in ("fidelity", "entropy (bits)") for name in names]
    lines = [header, ["---"] * len(header)]
    for layer, value in enumerate(record.lambdas):
        line = [str(layer), f"{value:.3g}"]
        for quantity in ("fidelity", "entropy"):
            for name in names:
                line.append(f"{fmean(run.metrics[f'{quantity}_layer_{layer}'] for run in groups[name]):.2f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    return (
        f"target fidelity {training['target_fidelity']:g}, weight {training['locality_weight']:g}, exponent "
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
