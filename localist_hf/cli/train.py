"""`localist-hf train`: fine-tune one model under one locality configuration."""

import argparse
import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..configuration import VARIANTS, variant_config
from ..evaluation import layer_table
from ..hub import RECORD_FILE
from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from .data import load_text, train_and_validation


@dataclass
class RunArguments:
    """What to train, on what. How to train stands in [`LocalistTrainingArguments`]."""

    variant: str = field(default="quintic", metadata={"help": f"Locality configuration: {', '.join(VARIANTS)}."})
    model: str = field(
        default="openai-community/gpt2",
        metadata={"help": "Checkpoint to start from, GPT-2's or LocalistGPT2's: a local folder or a Hub id."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Data set: a Hub id or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds the text."})
    text_file: str | None = field(default=None, metadata={"help": "UTF-8 text file, instead of a data set."})
    sequence_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a training sequence; by default the model's positions, at most 1024."},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of the text held out where the data has no split 'validation'."}
    )
    locality: str | None = field(
        default=None,
        metadata={
            "help": "Fields of LocalistGPT2Config to set on top of the variant's, as JSON ('{\"num_sink_tokens\": 4}') "
            "or, in a YAML file, as a mapping."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train a LoRA adapter of this rank instead of all weights."})
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


def build_parser() -> HfArgumentParser:
    """The parser of `localist-hf train`."""
    parser = HfArgumentParser(
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
                action.help = "Go on from a checkpoint: its folder, or 'true' for the last one in the output folder."
    return parser


def parse(arguments: list[str]) -> tuple[RunArguments, LocalistTrainingArguments]:
    """
    Reads flags, and those of the YAML file that `--config` names.

    Raises:
        SystemExit: for a flag or a value that cannot be read, with a message on standard error.
    """
    parser = build_parser()
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(arguments)[0].config
    try:
        if path is not None:
            parser.set_defaults(**_read_yaml(path, {action.dest for action in parser._actions}))
        namespace = parser.parse_args(arguments)
        values = vars(namespace)
        values.pop("config")
        values["output_dir"] = values["output_dir"] or str(Path("runs") / str(values["variant"]))
        run_names = {entry.name for entry in fields(RunArguments)}
        run_arguments = RunArguments(**{name: value for name, value in values.items() if name in run_names})
        training = {name: value for name, value in values.items() if name not in run_names}
        return run_arguments, LocalistTrainingArguments(**training)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"localist-hf train: error: {error}\n")


def _read_yaml(path: str, allowed: set[str]) -> dict[str, Any]:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"`config` is {path!r}; the file must hold `flag: value` lines.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(values.keys() - allowed)
    if unknown:
        raise ValueError(f"`config` {path!r} sets {unknown[0]!r}, which is no flag of `localist-hf train`.")
    # argparse converts strings as it does on the command line, where "5e-5" is a number; YAML reads it as text.
    return values


def prepare_trainer(run: RunArguments, args: LocalistTrainingArguments) -> LocalistTrainer:
    """
    Everything up to the first training step: checks all arguments, the cheap ones first, then loads text and model.

    Raises:
        ValueError, OSError, huggingface_hub.errors.StrictDataclassError: for input that cannot be used; the message
            names the argument, the value and what is allowed. Nothing has been written then.
    """
    overrides = variant_config(run.variant) | _locality_overrides(run.locality)
    if not 0 < run.validation_share < 1:
        raise ValueError(f"`validation_share` is {run.validation_share}; it must lie between 0 and 1.")
    if run.lora_rank < 0:
        raise ValueError(f"`lora_rank` is {run.lora_rank}; it must not be negative.")
    check_output_dir(args, run.overwrite_output_dir)
    config = LocalistGPT2Config.from_pretrained(run.model, **overrides)
    positions = config.max_position_embeddings
    sequence_length = min(positions, 1024) if run.sequence_length is None else run.sequence_length
    if not 2 <= sequence_length <= positions:
        raise ValueError(f"`sequence_length` is {sequence_length}; the model allows 2 to {positions} positions.")

    splits = load_text(run.dataset, run.dataset_config, run.text_file, run.text_column)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    train, validation = train_and_validation(splits, tokenizer, sequence_length, run.validation_share)
    model = LocalistGPT2LMHeadModel.from_pretrained(run.model, config=config)
    if run.lora_rank:
        adapter = LoraConfig(
            r=run.lora_rank,
            lora_alpha=2 * run.lora_rank,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapter)
    return LocalistTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer
    )


def _locality_overrides(locality: str | dict | None) -> dict[str, Any]:
    """The fields in `--locality`, which must be among those that LocalistGPT2Config adds to GPT-2's."""
    try:
        overrides = json.loads(locality) if isinstance(locality, str) else locality or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`locality` is {locality!r}; it must be a JSON object ({error}).") from error
    allowed = LocalistGPT2Config.__annotations__.keys()
    if not isinstance(overrides, dict) or not overrides.keys() <= allowed:
        raise ValueError(
            f"`locality` is {locality!r}; it must be a JSON object with fields among {', '.join(allowed)}."
        )
    return overrides


def check_output_dir(args: LocalistTrainingArguments, overwrite: bool) -> None:
    """Refuses an output folder that already holds a run, unless it is to be resumed or overwritten."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {args.output_dir!r}; there is a file of that name.")
    names = ("config.json", "adapter_config.json", "trainer_state.json")
    holds_run = any((folder / name).exists() for name in names) or (
        folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    )
    if holds_run and not overwrite and not args.resume_from_checkpoint:
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which already holds a run. Choose another folder, or pass "
            "`--resume_from_checkpoint true` to go on with it or `--overwrite_output_dir` to start anew."
        )


def run_training(trainer: LocalistTrainer, overwrite: bool = False, **card: Any) -> dict[str, float]:
    """
    Trains, evaluates, and saves model, tokenizer, metrics, log and model card to the trainer's output folder.

    Args:
        trainer ([`LocalistTrainer`]):
            The trainer.
        overwrite (`bool`, *optional*, defaults to `False`):
            Remove the folder's checkpoints first.
        card:
            What [`LocalistTrainer.create_model_card`] takes.

    Returns:
        `dict[str, float]`: the metrics of [`LocalityMeter.compute`], without a prefix.
    """
    args = trainer.args
    resume: str | None = None
    if args.resume_from_checkpoint:
        # "true" stands for the last checkpoint in the output folder; anything else is a checkpoint's path.
        is_flag = str(args.resume_from_checkpoint).lower() == "true"
        resume = get_last_checkpoint(args.output_dir) if is_flag else args.resume_from_checkpoint
    elif overwrite:
        for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    (Path(args.output_dir) / RECORD_FILE).unlink(missing_ok=True)  # of the weights that this run replaces
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # without the push that `save_model` makes: its card needs the evaluation
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(**card)  # which makes the card too
    else:
        trainer.create_model_card(**card)
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def card_of(run: RunArguments) -> dict[str, Any]:
    """What the model card says about the text."""
    if run.text_file is not None:
        data = {"dataset": f"`{Path(run.text_file).name}`"}
    elif Path(run.dataset).exists():
        data = {"dataset": f"`{Path(run.dataset).name}`"}
    else:
        data = {"dataset": run.dataset, "dataset_tags": run.dataset, "dataset_args": run.dataset_config}
    return data | {"evaluation_split": "validation", "language": run.language, "license": run.license}


def main(arguments: list[str]) -> None:
    """Runs `localist-hf train` with these arguments."""
    run, args = parse(arguments)
    try:
        trainer = prepare_trainer(run, args)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"localist-hf train: error: {error}") from error
    metrics = run_training(trainer, run.overwrite_output_dir, **card_of(run))
    print(f"\n{run.variant}: perplexity {metrics['perplexity']:.2f} on held-out text\n")
    print(layer_table(metrics, trainer.model.config.locality_lambdas))
    print(f"\nSaved to {args.output_dir}")
