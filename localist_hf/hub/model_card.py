"""The model card: text, metadata and picture, from the records of runs and from nothing else."""

import io
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
from .run_record import RunRecord, load_siblings


#: Stands for the namespace where it is not known yet.
PLACEHOLDER_NAMESPACE = "org"
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


def repository_id(run: str, namespace: str = PLACEHOLDER_NAMESPACE) -> str:
    """The repository of the run of this name."""
    return f"{namespace}/localist-gpt2-{run}"


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
        ValueError: where a number is missing.
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
    if base_model is None and any(other.name == record.base_run for other in records[1:]):
        base_model = repository_id(record.base_run, namespace)
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
    """The comparable runs by name, in the order of the variants, each name's by seed."""
    comparable = [other for other in records if other.is_comparable(records[0])]
    comparable.sort(key=_order)
    groups: dict[str, list[RunRecord]] = {}
    for run in comparable:
        groups.setdefault(run.name, []).append(run)
    return groups


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


def _picture(records: Sequence[RunRecord]) -> bytes:
    groups = _groups(records)
    names = dict.fromkeys(filter(None, (_baseline(groups), records[0].name)))
    metrics = _metrics(groups)
    buffer = io.BytesIO()
    plot_fidelity_over_depth({name: metrics[name] for name in names}, buffer, lambdas=records[0].lambdas)
    return buffer.getvalue()


def _context(records: Sequence[RunRecord], repo_id: str, namespace: str, base_model: str | None) -> dict[str, Any]:
    """What the template shows."""
    record, data = records[0], records[0].data
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
    return {
        "repo_id": repo_id,
        "repo_name": repo_id.rpartition("/")[2],
        "summary": _summary(record, groups, baseline, base_model),
        "has_baseline": baseline is not None,
        "is_baseline": record.variant == BASELINE_VARIANT,
        "is_base": record.from_scratch,
        "adapter": record.adapter,
        "base_model": base_model,
        "base_run": record.base_run,
        "localised": any(record.lambdas),
        "seeds": [run.seed for run in own],
        "seed": record.seed,
        "evaluation": f"{_evaluation_sequences(data)} of {_text_name(data)} ({data['evaluation_split']})",
        "comparison": comparison,
        "base_blocks_comparison": base_blocks_comparison,
        "perplexity": spread([run.metrics["perplexity"] for run in own]),
        "fidelity": spread([run.metrics["fidelity"] for run in own]),
        "entropy": spread([run.metrics["entropy"] for run in own]),
        "layer_table": _layer_table(record, groups, baseline),
        "started_from": _started_from(record, base_model),
        "configuration": _configuration(record),
        "training_data": _training_data(data),
        "training": record.training,
        "hyperparameters": _hyperparameters(record),
        "hardware": record.hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "localist_version": record.versions["localist-hf"],
        "family": _family(records, namespace),
    }


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
        f"{config['n_layer']} layers, width {config['n_embd']}, {config['n_head']} heads, "
        f"{record.num_parameters / 1e6:.1f} million parameters"
    )


def _summary(
    record: RunRecord, groups: Mapping[str, Sequence[RunRecord]], baseline: str | None, base_model: str | None
) -> str:
    """What the model is, in three sentences."""
    paper = "progressive localisation ([arXiv:2511.18375](https://arxiv.org/abs/2511.18375))"
    fidelity, perplexity = f"fidelity_layer_{record.config['n_layer'] - 1}", "perplexity"

    def mean(name: str, metric: str) -> float:
        return fmean(run.metrics[metric] for run in groups[name])

    if record.from_scratch:
        what = f"GPT-2 ({_shape(record)}) trained from random weights on {_text_name(record.data)}, "
        what += f"the base of models fine-tuned by {paper}."
    else:
        rank = record.adapter and record.adapter["rank"]
        what = f"A LoRA adapter of rank {rank} for" if rank else f"GPT-2 ({_shape(record)}), fine-tuned from"
        what += f" {_base(record, base_model)} on {_text_name(record.data)}"
        what += f" under the {_variant(record)} configuration of {paper}."
    if any(record.lambdas):
        how = (
            "Its attention is held inside blocks of the text to a degree that the layer's place in the schedule sets "
            f"(lambda = {', '.join(f'{value:.2f}' for value in record.lambdas)}), so that where the late layers look "
            "can be read off."
        )
    else:
        how = "Its attention is free in every layer: it is there to be compared with."
    share = (
        f"On held-out text its perplexity is {mean(record.name, perplexity):.2f}, and "
        f"{mean(record.name, fidelity):.0%} of the last layer's attention stays inside the token's own block"
    )
    if baseline is not None and baseline != record.name:
        share += (
            f"; the same fine-tuning without locality (`{baseline}`) gives {mean(baseline, perplexity):.2f} and "
            f"{mean(baseline, fidelity):.0%}"
        )
    return f"{what} {how} {share}."


def _variant(record: RunRecord) -> str:
    return f"`{record.variant}`" if record.variant else "custom"


def _layer_table(record: RunRecord, groups: Mapping[str, Sequence[RunRecord]], baseline: str | None) -> str:
    names = list(dict.fromkeys(filter(None, (record.name, baseline))))
    header = ["layer", "lambda"]
    header += [f"{quantity}, {name}" for quantity in ("fidelity", "entropy (bits)") for name in names]
    lines = [header, ["---"] * len(header)]
    for layer, value in enumerate(record.lambdas):
        line = [str(layer), f"{value:.3f}"]
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
    lambdas = ", ".join(f"{value:.3f}" for value in record.lambdas)
    blocks = _PARTITIONS[record.config["block_partition"]].format(**record.config)
    sinks = record.config["num_sink_tokens"]
    extra = f"; the first {sinks} tokens count as local everywhere" if sinks else ""
    return f"{_variant(record)}, lambda = {lambdas}; {blocks}{extra}"


def _training_data(data: Mapping[str, Any]) -> str:
    number = data["training_sequences"]
    amount = "a stream" if number is None else f"{number} sequences"
    held_out = f"{_evaluation_sequences(data)} held out ({data['evaluation_split']})"
    details = f" {data['details']}" if data["details"] else ""
    return f"{_text_name(data)}: {amount} to train on, {held_out}.{details}"


def _hyperparameters(record: RunRecord) -> str:
    training = record.training
    return (
        f"{training['steps']} steps of {training['batch_size']} sequences, {training['optimizer']} with learning rate "
        f"{training['learning_rate']:g}, betas {training['betas'][0]:g} and {training['betas'][1]:g}, weight decay "
        f"{training['weight_decay']:g}, gradients clipped at {training['max_grad_norm']:g}, schedule "
        f"{training['schedule']} with warm-up {training['warmup_steps']:g}, {training['precision']}"
    )


def _family(records: Sequence[RunRecord], namespace: str) -> list[str]:
    """A line with a link for each other model of the family, the base first."""
    record = records[0]
    others = {other.name: other for other in records[1:] if other.name != record.name}
    lines = []
    for other in sorted(others.values(), key=lambda run: (not run.from_scratch, _order(run))):
        role = "the common base" if other.name == record.base_run else ""
        role = role or ("free attention, the baseline" if other.variant == BASELINE_VARIANT else "")
        lambdas = "lambda = " + ", ".join(f"{value:.2f}" for value in other.lambdas)
        lines.append(f"{_link(repository_id(other.name, namespace))}: {role or lambdas}")
    return lines
