"""The sentences of a model card: each true of every record that there can be."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.tables import with_interval
from .card_tables import mean_over_runs, metrics_of_runs
from .example import shown_layer
from .run_record import RunRecord


_PARTITIONS = {
    "semantic": "semantic blocks of {min_block_length} to {max_block_length} tokens, which the model finds in its own "
    "value vectors",
    "delimiter": "blocks of {min_block_length} to {max_block_length} tokens that end at given tokens",
    "window": "blocks of {length} each, whatever the text says",
}


def summary(
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
        what = f"{_shape(record)} with {weights}, measured on {text_name(record.data)} under "
        what += f"{_variants(record)} of {paper}."
    elif record.from_scratch:
        what = f"{_shape(record)} trained from random weights on {text_name(record.data)}"
        if any(record.is_base_of(other) for other in records[1:]):
            what += f", the base of models fine-tuned by {paper}."
        else:
            what += f" under {_variants(record)} of {paper}."
    else:
        what = f"A LoRA adapter of rank {rank} for" if rank else f"{_shape(record)}, fine-tuned from"
        what += f" {_base(record, base_model)} on {text_name(record.data)} under {_variants(record)} of {paper}."
    metrics = metrics_of_runs(groups)
    layer = shown_layer(record.lambdas)
    own = metrics[record.name]
    over = f"In evaluation, on average over {len(own)} seeds," if len(own) > 1 else "In evaluation"
    half = " (± half of the 95 % interval)" if len(own) > 1 else ""
    result = f"{over} its perplexity is {_perplexity(own)}{half}. {_attention(record, own, layer)}."
    if baseline is not None and baseline != record.name:
        others = metrics[baseline]
        psi, share = (mean_over_runs(others, f"{name}_layer_{layer}") for name in ("context_fidelity", "context_share"))
        same = "The same training" if record.training["steps"] else "The same model"
        result += f" {same} without locality (`{baseline}`) gives perplexity {_perplexity(others)}"
        if not math.isnan(psi):
            block = block_phrase(record, "the token's own block")
            result += (
                f", and there {psi:.1%} of the attention to other words, which get {share:.1%} of all, goes to {block}"
            )
        result += "."
    return f"{what} {_training_objective(record)} {result}"


def _perplexity(runs: Sequence[Mapping[str, float]]) -> str:
    return with_interval([metrics["perplexity"] for metrics in runs])


def seeds_note(groups: Mapping[str, Sequence[RunRecord]], own: Sequence[RunRecord]) -> str:
    """How many runs the rows of the tables are of, and what stands behind their means."""
    numbers_of_runs = {len(runs) for runs in groups.values()}
    means = "means, of perplexity and psi ± half of the 95 % interval by Student's t"
    if len(own) > 1:
        seeds = ", ".join(map(seed_phrase, own))
        note = f"{len(own)} runs with the seeds {seeds}: {means}"
        note += "; a row without ± is of one run" if 1 in numbers_of_runs else ""
    else:
        note = f"One run (seed {seed_phrase(own[0])}), so there is no interval to show"
        note += f"; rows with ± are of several seeds: {means}" if max(numbers_of_runs) > 1 else ""
    if 2 in numbers_of_runs:
        note += ". From two seeds it is very wide, 12.7 standard errors to either side"
    return f"{note}."


def differences_note(baseline: str | None, number: int, are_of_documents: bool) -> str:
    """What stands in the table of differences, and how many comparisons its p-values are corrected for."""
    others = "and other sequences of such text" if are_of_documents else "on this text, and say nothing of other text"
    corrected = f"corrected by Holm for the {number} comparisons of this table" if number > 1 else "one comparison"
    return (
        f"What each costs in perplexity, against `{baseline}` from the same seeds on the same text: the ratio of "
        "perplexities (the exponential of the mean paired difference of the losses) with its 95 % interval by "
        "Student's t; that difference in standard deviations of the seeds' differences (*Hedges' g*); and the p-value "
        f"of the paired t-test ({corrected}). Interval and p-value are for other seeds {others}. A dash stands where "
        "two seeds do not tell."
    )


def _training_objective(record: RunRecord) -> str:
    """What the training asked of the attention."""
    training, lambdas = record.training, f"lambda = {numbers(record.lambdas)}"
    who = "The last part of the training" if record.earlier_parts else "Training"
    if not any(record.lambdas):
        return "Its attention is free in every layer" + ("." if record.from_scratch else ", to be compared with.")
    if not training["steps"]:
        return f"It was not trained for it; the schedule ({lambdas}) is that of the dial."
    held = " and ".join(f"`{name}` at {value:g}" for name, value in record.dial.items())
    if training["locality_weight"] == 0:
        if held:
            return f"{who} held its attention with {held} ({lambdas}), and asked for nothing beyond that."
        return f"{who} left its attention free; the schedule ({lambdas}) is that of the dial."
    if training["locality_objective"] != "fidelity":
        other = f"other words ({no_other_words(record)})" if sinks_phrase(record) else "other words"
        what = f"the attention that a token pays to {other} to go to "
        what += block_phrase(record, "the block of the text that the token stands in")
    else:
        sinks = f" or {sinks_phrase(record)}" if sinks_phrase(record) else ""
        what = f"a token's attention to go to {block_phrase(record, 'the block of the text that it stands in')}{sinks}"
        what += ", itself included"
    if training["locality_objective"] == "contrast":
        what += ", and for less of it where these blocks are moved along the text"
    degree = "in each layer to the degree of its lambda" if len(record.lambdas) > 1 else "in its only layer"
    under = f", with {held} all the while" if held else ""
    return f"{who} asked for at least {100 * training['target_fidelity']:g}% of {what}, {degree} ({lambdas}){under}."


def _attention(record: RunRecord, metrics: Sequence[Mapping[str, float]], layer: int) -> str:
    """Where a layer's attention goes."""
    psi, share, own, sink = (
        mean_over_runs(metrics, f"{name}_layer_{layer}")
        for name in ("context_fidelity", "context_share", "self_share", "sink_share")
    )
    name = layer_phrase(record)
    if math.isnan(share):
        return f"Nothing can be said of where {name} looks, since no token sees more than {local_set_phrase(record)}"
    sinks = f", {sinks_phrase(record)} {sink:.1%}" if sinks_phrase(record) else ""
    shares = f"of all {name}'s attention other words get {share:.1%}, the token itself {own:.1%}{sinks}"
    if math.isnan(psi):
        return shares[0].upper() + shares[1:]
    block = block_phrase(record, "the token's own block")
    return f"Of the attention that {name} pays to other words, {psi:.1%} goes to {block}; {shares}"


def block_phrase(record: RunRecord, block: str) -> str:
    """Where other words count as near."""
    number = record.locality["num_previous_blocks"]
    return block + ("" if number == 0 else " or the one before it" if number == 1 else f" or the {number} before it")


def local_set_phrase(record: RunRecord) -> str:
    """All that is local to a token, itself being in its block."""
    number = record.locality["num_previous_blocks"]
    before = ["the one before it" if number == 1 else f"the {number} before it"] if number else []
    parts = ["their block", *before, *([sinks_phrase(record)] if sinks_phrase(record) else [])]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def no_other_words(record: RunRecord) -> str:
    """What is no other word."""
    return f"neither the token itself nor {sinks_phrase(record)}" if sinks_phrase(record) else "not the token itself"


def sinks_phrase(record: RunRecord) -> str:
    """The tokens that are local everywhere; empty where there are none."""
    number = record.locality["num_sink_tokens"]
    return "" if number == 0 else "the first token" if number == 1 else f"the first {number} tokens"


def layer_phrase(record: RunRecord) -> str:
    """The layer that the card speaks of."""
    layer = shown_layer(record.lambdas)
    if layer < record.num_layers - 1:
        return f"layer {layer}"
    return "the last layer" if record.num_layers > 1 else "the only layer"


def blocks_note(groups: Mapping[str, Sequence[RunRecord]]) -> str:
    """Whose blocks a table is measured on."""
    partitions = {runs[0].locality["block_partition"] for runs in groups.values()}
    if partitions == {"semantic"}:
        return "These are the blocks that each model finds itself"
    if "semantic" in partitions:
        return "Each row has the blocks of its own partition, and semantic ones are those that each model finds itself"
    return "The blocks follow from the text alone, and are no model's own"


def _base(record: RunRecord, base_model: str | None) -> str:
    """What the run started from, with a link where it has a repository."""
    return link(base_model) if base_model else str(record.base_run)


def link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _shape(record: RunRecord) -> str:
    config = record.model_config
    return (
        f"{kind(record)} ({_counted(config.num_hidden_layers, 'layer')}, width {config.hidden_size}, "
        f"{_counted(config.num_attention_heads, 'head')}, {record.num_parameters / 1e6:.1f} million parameters)"
    )


def kind(record: RunRecord) -> str:
    """What a model is called by its architecture."""
    is_gpt2 = record.config["model_type"] in ("localist-gpt2", "gpt2")
    return "GPT-2" if is_gpt2 else record.architecture.removesuffix("ForCausalLM")


def seed_phrase(record: RunRecord) -> str:
    """The seed of a run; of several parts each one's."""
    seeds = [part["seed"] for part in record.earlier_parts] + [record.seed]
    return ", then ".join("unknown" if seed is None else str(seed) for seed in dict.fromkeys(seeds))


def _variant(variant: str | None) -> str:
    return f"`{variant}`" if variant else "custom"


def _variants(record: RunRecord) -> str:
    """The locality configurations that a run was trained under, one after another."""
    variants = [
        f"the {_variant(part['variant'])} configuration" if part["training"] else "a configuration that is not recorded"
        for part in record.earlier_parts
    ]
    return ", then ".join(dict.fromkeys([*variants, f"the {_variant(record.variant)} configuration"]))


def text_name(data: Mapping[str, Any]) -> str:
    name = data["name"] or data["dataset_id"]
    if name is None:
        return "a text that was not named"
    if data["dataset_id"]:
        linked = f"[{name}](https://huggingface.co/datasets/{data['dataset_id']})"
        return f"{linked} ({data['dataset_config']})" if data["dataset_config"] else linked
    return f"the {name}" if not name.startswith("`") else name


def evaluation_sequences(data: Mapping[str, Any]) -> str:
    least, greatest = data["evaluation_lengths"]
    length = f"{greatest}" if least == greatest else f"{least} to {greatest}"
    begin = f" (`{data['text_prefix']}` first)" if data.get("has_text_prefix") else ""
    return f"{data['evaluation_sequences']} sequences of {length} tokens{begin}"


def started_from(record: RunRecord, base_model: str | None) -> str:
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


def configuration(record: RunRecord) -> str:
    length = _counted(record.locality["window_length"], "token")
    blocks = _PARTITIONS[record.locality["block_partition"]].format(**record.locality, length=length)
    verb = "counts" if record.locality["num_sink_tokens"] == 1 else "count"
    extra = f"; {sinks_phrase(record)} of a text {verb} as local everywhere" if sinks_phrase(record) else ""
    if number := record.locality["num_previous_blocks"]:
        before = "the block" if number == 1 else f"the {number} blocks"
        extra = f"; {before} before a token's own {'counts' if number == 1 else 'count'} as local too{extra}"
    return f"{_variant(record.variant)}, lambda = {numbers(record.lambdas)}; {blocks}{extra}"


def training_data(data: Mapping[str, Any]) -> str:
    number = data["training_sequences"]
    amount = "a stream" if number is None else f"{number} sequences"
    measured = f"{evaluation_sequences(data)} to measure on ({data['evaluation_split']})"
    details = f" {data['details']}" if data["details"] else ""
    return f"{text_name(data)}: {amount} to train on, {measured}.{details}"


def earlier_part(record: RunRecord, part: Mapping[str, Any]) -> str:
    """What was trained before the last part, under other settings."""
    if part["training"] is None:
        return f"{_counted(part['steps'], 'step')} whose settings are not recorded"
    fields = [f"`{name}` {value}" for name, value in part["locality"].items() if value != record.locality[name]]
    locality = f" ({', '.join(fields)})" if fields else ""
    training = {**part["training"], "steps": part["steps"]}
    return (
        f"{_variant(part['variant'])} configuration{locality}, seed {part['seed']}; {hyperparameters(training)}, with "
        f"{part['planned_steps']} steps planned; locality loss: {locality_loss(training)}"
    )


def last_steps(record: RunRecord) -> int:
    """Number of steps of the last part."""
    return record.training["steps"] - sum(part["steps"] for part in record.earlier_parts)


def hyperparameters(training: Mapping[str, Any]) -> str:
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


def locality_loss(training: Mapping[str, Any]) -> str:
    objective = {
        "context": "context fidelity (psi)",
        "contrast": "context fidelity (psi) and its distance from that on moved blocks",
        "fidelity": "fidelity (phi)",
    }[training["locality_objective"]]
    return (
        f"on {objective}, target {training['target_fidelity']:g}, weight {training['locality_weight']:g}, exponent "
        f"{training['locality_exponent']}, {_warmup(training['locality_warmup_steps'])}"
    )


def _warmup(steps: float) -> str:
    """Below 1 it is a share of all steps."""
    if not steps:
        return "no warm-up"
    return f"warm-up over {steps:.0%} of the steps" if steps < 1 else f"warm-up over {_counted(int(steps), 'step')}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def numbers(lambdas: Sequence[float]) -> str:
    return ", ".join(f"{value:.2g}" for value in lambdas)


def prompt_literal(prompt: str) -> str:
    """A Python literal of several lines."""
    lines = textwrap.wrap(prompt, 100, break_long_words=False, break_on_hyphens=False)
    lines = [f"{line} " for line in lines[:-1]] + lines[-1:]
    return "\n".join(["(", *(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines), ")"])
