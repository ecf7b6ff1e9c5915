"""The flags of `localist-hf train`: from the command line, a YAML file and the run that is gone on with."""

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..command_line import CommandParser, shortened
from ..configuration import LOCALITY_ARGUMENTS, RECIPES, VARIANTS, variant_config
from ..errors import INPUT_ERRORS, InputError, one_line, reraised_as
from ..experiments.text_files import file_fault
from ..experiments.training_checks import JSON_FLAGS, check_reporting, check_training
from ..experiments.yaml_files import TextLoader, TypedLoader
from ..hub.loading import SETTINGS_FILE
from ..hub.run_record import check_tags
from ..json_text import load_json
from ..modeling import LOCALITY_FIELDS
from ..trainers import LocalistTrainingArguments
from ..trainers.checkpoints import find_checkpoint


DEFAULT_VARIANT = "quintic"
#: What stands in a run's settings beside flags, where the tokenizer has one: what every sequence that is trained on
#: begins with.
TEXT_PREFIX = "text_prefix"


@dataclass
class RunArguments:
    """What to train, on what. How to train stands in [`LocalistTrainingArguments`]."""

    variant: str | None = field(
        default=None,
        metadata={
            "help": f"Locality configuration: {', '.join(VARIANTS)}; {DEFAULT_VARIANT} if neither it nor a "
            "`locality_schedule` in --locality is given."
        },
    )
    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"Recommended training arguments by name, {' or '.join(RECIPES)}; flags that are given come first."
        },
    )
    model: str = field(
        default="openai-community/gpt2",
        metadata={"help": "Causal language model to start from: a local folder or a Hub id."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Data set: a Hub id or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(
        default="text", metadata={"help": "Column of the data set, or of a file with rows, that holds the text."}
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "File instead of a data set: .jsonl, .csv and .parquet by rows, any other as UTF-8 text."},
    )
    sequence_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a training sequence; by default the model's positions, at most 1024."},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of the text held out where the data has no split 'validation'."}
    )
    locality: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of locality beside the variant's, as JSON ('{\"num_sink_tokens\": 4}') "
            "or, in a YAML file, as a mapping."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train a LoRA adapter of this rank instead of all weights."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "LoRA's alpha: the adapter is scaled by alpha / rank; by default twice the rank."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the adapter, in [0, 1); by default 0."}
    )
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the linear layers that get an adapter; by default GPT-2's c_attn, elsewhere all."},
    )
    language: str | None = field(
        default=None, metadata={"help": "Language of the text for the model card, as the Hub spells it: 'en'."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights for the model card, as the Hub spells it: 'apache-2.0'."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Allow an output folder that already holds a run; its checkpoints are removed."},
    )


# TrainingArguments flags that the help shows; the others work all the same.
_SHOWN = {
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "bf16", "torch_compile", "warmup_steps", "logging_steps", "save_steps",
    "eval_strategy", "report_to", "seed", "resume_from_checkpoint", "use_cpu",
}  # fmt: skip


#: Flags that make a run what it is: one that goes on must not change them. It may change the others.
_FIXED = (
    "variant", "model", "dataset", "dataset_config", "text_column", "text_file", "sequence_length", "validation_share",
    "locality", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "seed", "data_seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "optim_args", "bf16", "fp16", "neftune_noise_alpha", *LOCALITY_ARGUMENTS,
)  # fmt: skip
#: Flags of one part of a run alone, and what is secret.
_NOT_KEPT = {
    "config", "recipe", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token", "local_rank",
}  # fmt: skip
_JSON_FLAGS = ("locality", *JSON_FLAGS)


class _Parser(CommandParser, HfArgumentParser):
    """The parser of dataclasses, with errors that can be told where they came from."""

    def error(self, message: str) -> NoReturn:
        """Raises an [`InputError`]."""
        raise InputError(message)


@functools.cache
def build_parser() -> HfArgumentParser:
    """The parser of `localist-hf train`, made once, since a command reads several times; not to be changed."""
    parser = _Parser(
        (RunArguments, LocalistTrainingArguments),
        prog="localist-hf train",
        usage="localist-hf train [--config FILE.yaml] [--variant NAME] [--text-file FILE | --dataset ID] [flags]",
        description="Fine-tune one model under one locality configuration. Flags may also stand in a YAML file, under "
        "the same names; those of the command line come first.",
        epilog="Every other flag of transformers.TrainingArguments works too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags.")
    parser.set_defaults(output_dir=None)
    hidden = {entry.name for entry in fields(TrainingArguments)} - _SHOWN
    for action in parser._actions:
        if action.dest in hidden or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.dest != "help":
            # The help shows one spelling; both work.
            action.option_strings = [f"--{action.dest.replace('_', '-')}"]
            action.metavar = action.metavar or action.dest.split("_")[-1].upper()
            if action.dest == "output_dir":
                action.help = "Folder for the model, its checkpoints and results; runs/VARIANT if not given."
            elif action.dest == "resume_from_checkpoint":
                action.help = (
                    "Go on from a checkpoint: its folder, or 'true' for the last one in the output folder. Flags that "
                    "are not given are those of the run that it belongs to."
                )
    return parser


def parse(arguments: list[str]) -> tuple[RunArguments, LocalistTrainingArguments, dict[str, Any]]:
    """
    Reads flags, those of the YAML file that `--config` names, and those of the run that is gone on with, and checks all
    that can be checked without the model and the text.

    Returns:
        `tuple[RunArguments, LocalistTrainingArguments, dict[str, Any]]`: the first with the name of the variant, or
        `None` for a schedule without one, and `locality` as a mapping; the second with `resume_from_checkpoint` as a
        folder or `None`; the third for [`~localist_hf.experiments.training_run.save_settings`].

    Raises:
        InputError: for a flag or a value that cannot be used.
    """
    namespace = _read(arguments)
    wanted = namespace.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        namespace.resume_from_checkpoint = None
        return _checked(namespace)

    if namespace.overwrite_output_dir:
        raise InputError(
            f"`resume_from_checkpoint` is {wanted!r} and `overwrite_output_dir` true; a run can go on or start anew."
        )
    folder = Path(namespace.output_dir or f"runs/{namespace.variant or DEFAULT_VARIANT}")
    with reraised_as(InputError, ValueError):
        checkpoint, damaged = find_checkpoint(True if wanted.lower() == "true" else wanted, folder)
    for other, what in damaged.items():
        print(f"localist-hf train: {other} is damaged ({what}); going on from {checkpoint}", file=sys.stderr)
    saved = _saved_settings(checkpoint.parent)
    prefix = saved.pop(TEXT_PREFIX, [])
    namespace = _read(arguments, saved)
    namespace.resume_from_checkpoint = str(checkpoint)
    namespace.output_dir = namespace.output_dir or str(checkpoint.parent)
    run, args, kept = _checked(namespace)
    for name in _FIXED:
        if kept[name] != saved[name]:
            raise InputError(
                f"`{name}` is {kept[name]!r}, but the run in {str(checkpoint.parent)!r} began with {saved[name]!r}; a "
                "run that goes on keeps its settings. Leave the flag out, or start another run."
            )
    return run, args, kept | ({TEXT_PREFIX: prefix} if prefix else {})


def _read(arguments: list[str], saved: dict[str, Any] | None = None) -> argparse.Namespace:
    """
    Reads the flags of a command line; before them come those of its YAML file, before these those of the recipe that it
    names, and first of all the saved ones. Settings of locality on the command line add to those of the file.
    """
    parser = build_parser()
    path = parser.parse_args(arguments).config
    values, flags = ({}, []) if path is None else _yaml_flags(path, parser)
    recipe = parser.parse_args([*flags, *arguments]).recipe
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"`recipe` is {recipe!r}; allowed are {', '.join(map(repr, RECIPES))}.")
    first_values, first_flags = _as_flags((saved or {}) | RECIPES.get(recipe, {}), parser)
    of_file, given = (parser.parse_args(each).locality for each in (flags, arguments))
    together = []
    if of_file is not None and given is not None:
        with reraised_as(InputError, ValueError):
            settings = locality_settings(of_file) | locality_settings(given)
        together = [f"--locality={json.dumps(settings)}"]
    flags = [*first_flags, *flags, *arguments, *together]
    return parser.parse_args(flags, argparse.Namespace(**(first_values | values)))


def _checked(namespace: argparse.Namespace) -> tuple[RunArguments, LocalistTrainingArguments, dict[str, Any]]:
    """Returns what [`parse`] does for a command line, each value checked by itself."""
    values = vars(namespace)
    values.pop("config")
    check_training(values)
    with reraised_as(InputError, ValueError):
        check_tags(values["language"], values["license"])
    with reraised_as(InputError, ValueError):
        values["variant"], values["locality"] = _variant_and_locality(values["variant"], values["locality"])
    if values["lora_rank"] == 0:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if values[name] is not None:
                raise InputError(f"`{name}` is {values[name]!r}; it needs `lora_rank`, which is 0: no adapter.")
    if values["output_dir"] is None:
        if values["variant"] is None:
            raise InputError("`output_dir` is missing; for a `locality_schedule` without a name there is no default.")
        values["output_dir"] = str(Path("runs") / values["variant"])
    kept = _kept(values)
    run_names = {entry.name for entry in fields(RunArguments)}
    run = RunArguments(**{name: value for name, value in values.items() if name in run_names})
    with reraised_as(InputError, Exception):  # nothing is done in it but to look at them
        args = LocalistTrainingArguments(**{name: value for name, value in values.items() if name not in run_names})
    check_reporting(args)
    return run, args, kept


def locality_settings(locality: str | None) -> dict[str, Any]:
    """
    Reads the settings of locality in a flag.

    Raises:
        ValueError: for what is no JSON object, or has other fields.
    """
    try:
        settings = load_json(locality) if locality is not None else {}
    except ValueError as error:
        raise ValueError(f"`locality` is {shortened(locality)!r}; it must be a JSON object ({error}).") from error
    allowed = {*LOCALITY_FIELDS, "attn_pdrop"}
    if not isinstance(settings, dict) or not settings.keys() <= allowed:
        raise ValueError(
            f"`locality` is {locality!r}; it must be a JSON object with fields among {', '.join(sorted(allowed))}."
        )
    return settings


def _variant_and_locality(variant: str | None, locality: str | None) -> tuple[str | None, dict[str, Any]]:
    """Returns the name of the variant, `None` for a schedule without one, and the fields to set beside its own."""
    overrides = locality_settings(locality)
    if variant is None:
        schedule = overrides.get("locality_schedule", DEFAULT_VARIANT)
        if not isinstance(schedule, str):
            return None, overrides
        variant = schedule
    for name, value in variant_config(variant).items():
        if overrides.get(name, value) != value:
            raise ValueError(
                f"`locality` sets `{name}` to {overrides[name]!r}, but `variant` is {variant!r}, which sets it to "
                f"{value!r}; leave one of them out."
            )
    return variant, overrides


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    """Selects the flags for those who go on with a run: what makes it what it is, and what else is not by default."""
    defaults = vars(build_parser().parse_args([]))
    kept = {}
    for name, default in defaults.items():
        if name not in _NOT_KEPT and (name in _FIXED or values[name] != default):
            value = values[name]
            is_json = name in _JSON_FLAGS and isinstance(value, str) and value.startswith("{")
            kept[name] = json.loads(value) if is_json else value.value if isinstance(value, Enum) else value
    for name in ("model", "dataset", "text_file"):
        if kept[name] is not None and os.path.exists(kept[name]):
            kept[name] = str(Path(kept[name]).resolve())  # the run may go on from another folder
    return kept


def _saved_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise InputError(
            f"`resume_from_checkpoint` leads to {str(folder)!r}, where there is no {SETTINGS_FILE}, in which "
            "`localist-hf train` keeps the flags that a run began with."
        )
    with reraised_as(InputError, *INPUT_ERRORS, what=f"{str(path)!r} cannot be read: "):
        saved = json.loads(path.read_text(encoding="utf-8"))
    known = vars(build_parser().parse_args([])).keys() - _NOT_KEPT
    if isinstance(saved, dict):
        saved = LOCALITY_ARGUMENTS | saved  # of which earlier versions had not all
    if not isinstance(saved, dict) or not set(_FIXED) <= saved.keys() <= known | {TEXT_PREFIX}:
        raise InputError(f"{str(path)!r} is not complete, or was written by another version of `localist-hf train`.")
    return saved


def _yaml_flags(path: str, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], list[str]]:
    """Reads the flags in a YAML file as [`_as_flags`] has them, so that both are read in one way."""
    what = f"`config` is {path!r}, "
    with reraised_as(InputError, *INPUT_ERRORS, what=f"{what}which cannot be read: "):
        if (fault := file_fault(path)) is not None:
            raise ValueError(f"{fault}.")
        text = Path(path).read_text(encoding="utf-8")
    try:
        # argparse reads texts as on the command line: to YAML, `5e-5` is a text and `no` a truth value.
        values, typed = (yaml.load(text, Loader=loader) for loader in (TextLoader, TypedLoader))
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{what}line {error.problem_mark.line + 1}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{what}which cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{what}which must hold lines `flag: value`.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in actions:
            raise InputError(f"{what}which sets {key!r}, no flag of `localist-hf train`.")
        if name in flags:
            raise InputError(f"{what}which sets {key!r} twice.")
        # Not the fields' own types, which HfArgumentParser replaces by what one flag can say.
        takes_list = actions[name].nargs in ("+", "*") or "list" in str(TrainingArguments.__annotations__.get(name))
        if isinstance(value, list) and not takes_list:
            raise InputError(f"{what}which sets {key!r} to a list; it takes one value.")
        if isinstance(value, dict) and name not in _JSON_FLAGS:
            raise InputError(f"{what}which sets {key!r} to a mapping; it takes a value.")
        # A mapping has no text, and nothing is no value.
        flags[name] = typed[key] if isinstance(value, dict) or typed[key] is None else value
    values, arguments = _as_flags(flags, parser)
    try:
        parser.parse_args(arguments)
    except InputError as error:
        raise InputError(f"{what}in which {error}") from None
    return values, arguments


def _as_flags(values: dict[str, Any], parser: argparse.ArgumentParser) -> tuple[dict[str, Any], list[str]]:
    """
    Turns values by their flags' names into arguments of a command line; those that are `None` stay at their default. A
    list for a flag that takes one value there, such as `report_to`, stands in its place as it is; so does a number, of
    which a flag may make another (0.0 of 0), and the run's record another with it.

    Returns:
        `tuple[dict[str, Any], list[str]]`: what holds as it is where no argument says otherwise, and the arguments.
    """
    nargs = {action.dest: action.nargs for action in parser._actions}
    kept, arguments = {}, []
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (isinstance(value, list) and nargs[name] not in ("+", "*")):
            kept[name] = value
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value, default=str) if isinstance(value, (dict, bool)) else value}")
    return kept, arguments
