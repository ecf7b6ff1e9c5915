"""What the sentences of a model card call things; the sentences themselves are `card_sentences.jinja`."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .example import shown_layer
from .run_record import RunRecord


def kind(record: RunRecord) -> str:
    """What a model is called by its architecture."""
    is_gpt2 = record.config["model_type"] in ("localist-gpt2", "gpt2")
    return "GPT-2" if is_gpt2 else record.architecture.removesuffix("ForCausalLM")


def sinks_phrase(record: RunRecord) -> str:
    """The tokens that are local everywhere; empty where there are none."""
    number = record.locality["num_sink_tokens"]
    return "" if number == 0 else "the first token" if number == 1 else f"the first {number} tokens"


def local_set_phrase(record: RunRecord) -> str:
    """All that is local to a token, itself being in its block."""
    number = record.locality["num_previous_blocks"]
    before = ["the one before it" if number == 1 else f"the {number} before it"] if number else []
    parts = ["their block", *before, *([sinks_phrase(record)] if sinks_phrase(record) else [])]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def layer_phrase(record: RunRecord) -> str:
    """The layer that the card speaks of."""
    layer = shown_layer(record.lambdas)
    if layer < record.num_layers - 1:
        return f"layer {layer}"
    return "the last layer" if record.num_layers > 1 else "the only layer"


def seed_phrase(record: RunRecord) -> str:
    """The seed of a run; of several parts each one's."""
    seeds = [part["seed"] for part in record.earlier_parts] + [record.seed]
    return ", then ".join("unknown" if seed is None else str(seed) for seed in dict.fromkeys(seeds))


def variants_phrase(record: RunRecord) -> str:
    """The locality configurations that a run was trained under, one after another."""
    variants = [
        f"the {_named(part['variant'])} configuration" if part["training"] else "a configuration that is not recorded"
        for part in record.earlier_parts
    ]
    return ", then ".join(dict.fromkeys([*variants, f"the {_named(record.variant)} configuration"]))


def _named(variant: str | None) -> str:
    return f"`{variant}`" if variant else "custom"


def text_name(data: Mapping[str, Any]) -> str:
    """What a text is called, with a link where it is on the Hub."""
    name = data["name"] or data["dataset_id"]
    if name is None:
        return "a text that was not named"
    if data["dataset_id"]:
        linked = f"[{name}](https://huggingface.co/datasets/{data['dataset_id']})"
        return f"{linked} ({data['dataset_config']})" if data["dataset_config"] else linked
    return f"the {name}" if not name.startswith("`") else name


def evaluation_sequences(data: Mapping[str, Any]) -> str:
    """How much was measured on, and how it begins."""
    least, greatest = data["evaluation_lengths"]
    length = f"{greatest}" if least == greatest else f"{least} to {greatest}"
    begin = f" (`{data['text_prefix']}` first)" if data.get("has_text_prefix") else ""
    return f"{data['evaluation_sequences']} sequences of {length} tokens{begin}"


def numbers(lambdas: Sequence[float]) -> str:
    """Localities of layers, two digits of each."""
    return ", ".join(f"{value:.2g}" for value in lambdas)


def counted(number: int, noun: str) -> str:
    """A number of things: `"1 step"`, `"2 steps"`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def link(repo_id: str) -> str:
    """A link to a repository, by its id."""
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def prompt_literal(prompt: str) -> str:
    """A Python literal of several lines."""
    lines = textwrap.wrap(prompt, 100, break_long_words=False, break_on_hyphens=False)
    lines = [f"{line} " for line in lines[:-1]] + lines[-1:]
    return "\n".join(["(", *(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines), ")"])
