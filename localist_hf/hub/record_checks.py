"""What a record must hold to be one: values of the types that cards and tables are made of, refused by their place."""

import ast
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from ..configuration import LOCALITY_ARGUMENTS
from ..evaluation.control_results import ControlResults, LocalityFigures
from ..evaluation.generation import GenerationFigures
from ..evaluation.locality_meter import QUANTITIES


_NUMBER = int | float
#: What the card reads of the fields that are dictionaries.
KEYS: dict[str, dict[str, Any]] = {
    "config": {"model_type": str},
    "data": {
        "name": str | None, "details": str | None, "dataset_id": str | None, "dataset_config": str | None,
        "evaluation_split": str | None, "training_sequences": int | None, "evaluation_sequences": int | None,
        "evaluation_lengths": tuple[int, int],
    },
    "training": {
        "steps": int, "batch_size": int, "optimizer": str, "learning_rate": _NUMBER, "schedule": str,
        "warmup_steps": _NUMBER, "weight_decay": _NUMBER, "betas": list[_NUMBER], "max_grad_norm": _NUMBER | None,
        "precision": str, **dict.fromkeys(LOCALITY_ARGUMENTS, Any),
    },
    "adapter": {"rank": int, "alpha": _NUMBER, "target_modules": Any, "parameters": int},
    "versions": {"localist-hf": str},
    "example": {"prompt": str, "printed": str},
    "controls": {
        **dict.fromkeys(("layers", "blocks", "dials", "divergence", "self_only_perplexity"), Any),
        **dict.fromkeys(("perplexity", "cost_at_dial_1"), _NUMBER | None),
        **dict.fromkeys(("all_local_perplexity", "all_local_self_only_perplexity"), Any),
    },
}  # fmt: skip
#: What each entry of `earlier_parts` holds.
EARLIER_PART = {
    "steps": int, "planned_steps": int | None, "seed": int | None, "variant": str | None, "locality": dict | None,
    "training": dict | None
}  # fmt: skip
# Shares are sums that were rounded.
_ROUNDING = 1e-3
# What is always a number, of all that is measured.
_ALWAYS = ("fidelity", "entropy")
# What records of earlier versions may lack.
_LATER = ("window_lengths", "recency_lengths", "num_counted")


def check_type(place: str, value: Any, kind: Any) -> None:
    """
    Checks a value, and those in it. Of a number that is not finite JSON has `None`.

    Args:
        place (`str`):
            Where it stands, for the message.
        value (`Any`):
            The value.
        kind (`Any`):
            The type that it must be of, as annotations have it; a dataclass is of a dictionary with its fields.

    Raises:
        ValueError: which names the place.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if kind is Any or (value is None and {NoneType, float} & set(kinds)):
        return
    for each in kinds:
        if is_dataclass(each) and isinstance(value, dict):
            check_fields(place, value, each)
            return
        origin, inside = get_origin(each) or each, get_args(each)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            if origin is tuple and len(value) != len(inside):
                break
            for number, entry in enumerate(value):
                check_type(f"{place}[{number}]", entry, inside[number] if origin is tuple else (inside or (Any,))[0])
            return
        if origin is dict and isinstance(value, dict):
            for key, entry in value.items():
                check_type(f"{place}.{key}", entry, inside[1] if inside else Any)
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (origin is float and is_number) or (origin is int and is_number and isinstance(value, int)):
            if isinstance(value, int) and value.bit_length() > 63:
                raise ValueError(f"`{place}` is {value!r}, which is too large.")
            if not math.isfinite(value):
                raise ValueError(f"`{place}` is {value!r}; it must be finite.")
            return
        if origin in (str, bool) and isinstance(value, origin):
            return
    said = " or ".join("None" if each is NoneType else getattr(each, "__name__", str(each)) for each in kinds)
    raise ValueError(f"`{place}` is {value!r}; it must be of type {said if len(kinds) > 1 else kind}.")


def check_fields(place: str, values: Mapping[str, Any], kind: type) -> None:
    """
    Checks the values of a dataclass's fields; those that have defaults may be missing.

    Raises:
        ValueError: as [`check_type`], and for what is missing.
    """
    for field in fields(kind):
        if field.name in values:
            check_type(f"{place}.{field.name}", values[field.name], field.type)
        elif kind is not ControlResults and field.name not in _LATER:  # of which KEYS says what is needed
            raise ValueError(f"`{place}` has no {field.name!r}.")


def check_keys(place: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """
    Checks the entries of a dictionary.

    Raises:
        ValueError: as [`check_type`], and for what is missing.
    """
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"`{place}` has no {name!r}.")
        check_type(f"{place}.{name}", values[name], kind)


def check_metrics(field: str, metrics: Mapping[str, float], num_layers: int) -> None:
    """
    Checks that an evaluation has all of its numbers.

    Raises:
        ValueError: which names the number.
    """
    for part in ("", *(f"_layer_{layer}" for layer in range(num_layers))):
        needed = [f"{name}{part}" for name in _ALWAYS] + ([] if part else ["loss", "perplexity"])
        psi, *counted = [f"{name}{part}" for name in QUANTITIES if name not in _ALWAYS]
        values = {name: metrics.get(name) for name in (*needed, *counted, psi)}
        undefined = {name for name, value in values.items() if value != value}  # NaN
        if not undefined.issuperset(counted):
            needed += counted
            if psi not in undefined or values[f"context_share{part}"] != 0:
                needed.append(psi)
        for name in needed:
            value = values[name]
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"`{field}` must hold a finite number {name!r}; it is {value}.")
            is_part = name.removesuffix(part).endswith(("fidelity", "_share"))
            if value < -_ROUNDING or (is_part and value > 1 + _ROUNDING):
                allowed = "in [0, 1]" if is_part else "at least 0"
                raise ValueError(f"`{field}` holds {name!r} of {value}; it must be {allowed}.")
    check_type(field, {name: None if value != value else value for name, value in metrics.items()}, dict[str, float])


def check_printed(printed: str) -> None:
    """
    Checks what the code on the card printed: for each block five shares and its text in quotes.

    Raises:
        ValueError: where it is something else.
    """
    for line in printed.splitlines():
        try:
            *shares, text = line.split(" ", 5)
            is_block = len(shares) == 5 and isinstance(ast.literal_eval(text), str)
        except (ValueError, SyntaxError):
            is_block = False
        if not is_block:
            raise ValueError(f"`example.printed` has the line {line!r}; it must be five numbers and a text in quotes.")


def check_controls(controls: Mapping[str, Any], num_layers: int, number: int) -> None:
    """
    Checks what [`ControlResults.to_dict`] gave, of a model with so many layers and previous blocks.

    Raises:
        ValueError: which names the place.
    """
    check_fields("controls", controls, ControlResults)
    for name, figures in (controls.get("generation") or {}).items():
        check_type(f"controls.generation.{name}", figures, GenerationFigures)
    layers = controls["layers"]
    if (last := num_layers - 1) not in layers:
        raise ValueError(f"`controls` are of the layers {layers}; the last, {last}, must be among them.")
    if number not in [blocks["num_previous_blocks"] for blocks in controls["blocks"]]:
        raise ValueError(f"`controls` must hold the blocks with {number} before them, as the configuration has it.")
    if not controls["dials"]:
        raise ValueError("`controls.dials` is empty; it must hold one entry at least.")
    figures = [dial["locality"] for dial in controls["dials"]]
    for blocks in controls["blocks"]:
        figures += [blocks["own"], blocks["wrong"], *filter(None, (blocks["windows"], blocks["recency"]))]
    for field in fields(LocalityFigures):
        if any(len(figure[field.name]) != len(layers) for figure in figures):
            raise ValueError(f"`controls` must hold {field.name!r} of each of the layers {layers}.")
