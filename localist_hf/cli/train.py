"""`localist-hf train`: fine-tune one model under one locality configuration."""

import copy
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from ..configuration import RECIPES, variant_config, variant_name
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation import layer_table, text_prefix
from ..evaluation.block_controls import Losses
from ..evaluation.measure import evaluation_batches
from ..experiments.data import check_source, check_token_ids, load_text, train_and_validation
from ..experiments.folders import RUN_FILES, TRAINING_FILES, check_own, claim, lock_folder
from ..experiments.training_checks import check_metric, check_optimizer, check_rank, check_schedule
from ..experiments.training_run import run_training, start_anew
from ..hub import RunRecord, check_card
from ..hub.formats import how_to_load
from ..hub.loading import (
    check_name,
    checked_sequence_length,
    in_native_dtype,
    load_config,
    load_model,
    load_tokenizer,
    without_weights,
)
from ..modeling.locality_dial import DIAL_FIELDS
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from ..trainers.checkpoints import checkpoint_damage, is_own_checkpoint, list_checkpoints
from .arguments import TEXT_PREFIX, RunArguments, parse


#: What PEFT calls all linear layers but the head.
ALL_LINEAR = "all-linear"


def prepare_trainer(run: RunArguments, args: LocalistTrainingArguments) -> LocalistTrainer:
    """
    Makes the trainer: checks what is left to check, the cheap things first, then loads text and model.

    Raises:
        ValueError, OSError, ImportError, huggingface_hub.errors.StrictDataclassError: for input that
            cannot be used; the message names the argument, the value and what is allowed.
    """
    check_source(run.dataset, run.dataset_config, run.text_file, run.text_column)
    check_name(run.model)
    check_output_dir(run, args)
    check_schedule(args)
    config = config_of(run)
    check_metric(args, config.locality)
    sequence_length = checked_sequence_length(run.sequence_length, config)
    skeleton = without_weights(run.model, config)
    check_optimizer(args, skeleton)
    adapter = lora_config(skeleton, run) if run.lora_rank else None

    tokenizer = load_tokenizer(run.model)
    splits = load_text(run.dataset, run.dataset_config, run.text_file, run.text_column)
    set_seed(args.seed)  # for the weights that are new, an adapter's
    # Small steps are lost in weights of half precision; an adapter has its own, in float32.
    model = load_model(run.model, config, dtype="auto" if run.lora_rank else torch.float32)
    if adapter is not None:
        model = get_peft_model(in_native_dtype(model), adapter)
        if os.path.isdir(run.model):  # as it is named when the run goes on, from wherever that is
            model.peft_config["default"].base_model_name_or_path = str(Path(run.model).resolve())
    train, validation = train_and_validation(splits, tokenizer, sequence_length, run.validation_share)
    for part in (train, validation):
        check_token_ids(part, config, tokenizer)
    return LocalistTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer
    )


def config_of(run: RunArguments) -> PreTrainedConfig:
    """Loads the model's configuration under the variant."""
    config = load_config(run.model, ({} if run.variant is None else variant_config(run.variant)) | run.locality)
    found = variant_name(config.locality)
    if run.variant is not None and found != run.variant:
        raise ValueError(
            f"`variant` is {run.variant!r}, but with the other fields that `locality` or the model sets "
            f"(`block_partition` is {config.locality.block_partition!r}) it would be {found!r}."
        )
    return config


def lora_config(model: PreTrainedModel, run: RunArguments) -> LoraConfig:
    """Makes the LoRA adapter that the flags describe, of a model whose weights are of no account."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (Conv1D, nn.Linear))}
    head = model.get_output_embeddings()  # whose weights are often those of the embedding
    allowed = {name.rpartition(".")[2] for name, module in linear.items() if module is not head}
    targets = run.lora_targets or (["c_attn"] if "c_attn" in allowed else [ALL_LINEAR])
    if targets != [ALL_LINEAR] and not set(targets) <= allowed:
        raise ValueError(
            f"`lora_targets` is {targets}; allowed are {', '.join(sorted(allowed))}, or {ALL_LINEAR} alone."
        )
    adapter = LoraConfig(
        r=run.lora_rank,
        lora_alpha=2 * run.lora_rank if run.lora_alpha is None else run.lora_alpha,
        lora_dropout=run.lora_dropout or 0.0,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        check_rank("lora_rank", get_peft_model(model, copy.deepcopy(adapter)), run.lora_rank)
    return adapter


def check_output_dir(run: RunArguments, args: LocalistTrainingArguments) -> None:
    """Refuses an output folder that already holds a run, unless it is to be resumed or overwritten."""
    folder = Path(args.output_dir)
    names = ("config.json", "adapter_config.json", "trainer_state.json")
    checkpoints = list_checkpoints(folder)
    others = [path for path in checkpoints if not is_own_checkpoint(path)]
    others += [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and not path.is_dir()
    ]
    if others and not run.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, where {others[0].name} is no checkpoint of localist-hf; move it "
            "away, or choose another folder."
        )
    # Of half a checkpoint nothing can be gone on with.
    holds_run = any((folder / name).exists() for name in names) or any(
        checkpoint_damage(path) is None for path in checkpoints
    )
    if holds_run and not run.overwrite_output_dir and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which already holds a run. Choose another folder, or pass "
            "`--resume_from_checkpoint true` to go on with it or `--overwrite_output_dir` to start anew."
        )
    if args.process_index == 0:  # which holds the folder for all
        is_new = args.resume_from_checkpoint is None
        otherwise = ", or pass `--overwrite_output_dir`, which says what it replaces" if is_new else ""
        check_own(folder, "run", (*TRAINING_FILES, *RUN_FILES), run.overwrite_output_dir, otherwise)
        if not run.overwrite_output_dir:
            check_card(folder)
    model = Path(run.model).resolve()
    if run.overwrite_output_dir and folder.resolve() in (model, *model.parents):
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which holds `model` {run.model!r}; a run cannot overwrite what it "
            "starts from. Choose another folder."
        )


def keep_prefix(prefix: list[int], args: LocalistTrainingArguments, kept: dict[str, Any]) -> None:
    """
    Adds what every sequence begins with to the settings that are kept of a run, where that is something.

    Raises:
        ValueError: for a run to be resumed that began on other sequences, as older versions cut them.
    """
    found = kept.get(TEXT_PREFIX, [])
    if args.resume_from_checkpoint is not None and found != prefix:
        raise ValueError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}, of a run that began on other sequences: "
            f"each begins with the tokens {prefix} now, which the tokenizer puts before a text, and began with {found} "
            "then (older versions left them out). Start another run."
        )
    if prefix:
        kept[TEXT_PREFIX] = prefix


def card_of(run: RunArguments) -> dict[str, Any]:
    """Returns what the model card says about the text."""
    if run.text_file is not None:
        data = {"dataset": f"`{Path(run.text_file).name}`"}
    elif Path(run.dataset).exists():
        data = {"dataset": f"`{Path(run.dataset).name}`"}
    else:
        data = {"dataset": run.dataset, "dataset_tags": run.dataset, "dataset_args": run.dataset_config}
    return data | {"evaluation_split": "validation", "language": run.language, "license": run.license}


def free_loss(trainer: LocalistTrainer) -> float:
    """The mean loss of the evaluation's labels at dial 0, in nats."""
    model, losses = trainer.model, Losses()
    batches = evaluation_batches(model, trainer.eval_dataset, trainer.args.per_device_eval_batch_size, None)
    # In the precision of the training, before it too.
    with torch.no_grad(), trainer.accelerator.autocast(), torch.random.fork_rng(devices=[]):  # of which a loader takes
        for inputs, labels in batches:
            losses.add(model(**inputs, use_cache=False, locality_dial=0.0, min_fidelity=0.0), labels)
    return losses.sums.sum().item() / losses.num_labels


def warn_of_damage(before: float, after: float, args: LocalistTrainingArguments) -> None:
    """Says so where a model predicts held-out text worse at dial 0 than it did before the training."""
    if not after > before:
        return
    remedies = [f"a lower `--learning-rate` (it is {args.learning_rate:g})"]
    if args.distillation_weight == 0:
        remedies.append("`--distillation-weight 0.9`, which keeps the model to its own predictions")
    if args.training_dials is not None and 0 not in args.training_dials:
        remedies.append("`--recipe both`, if it is to be used at dial 0: this one was trained at another")
    print(
        f"\nAt dial 0 the training has done damage: perplexity {math.exp(before):.2f} on held-out text before, "
        f"{math.exp(after):.2f} after. Try {'; or '.join(remedies)}."
    )


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(arguments: list[str]) -> None:
    """Runs `localist-hf train` with these arguments."""
    run, args, kept = parse(arguments)
    folder = Path(args.output_dir)
    # Of several processes of one training, the first holds the folder for all.
    with lock_folder(folder) if args.process_index == 0 else nullcontext():
        with reraised_as(InputError, *INPUT_ERRORS):
            trainer = prepare_trainer(run, args)
            keep_prefix(text_prefix(trainer.processing_class), args, kept)
        if args.should_save:
            if run.overwrite_output_dir:
                start_anew(folder)
            claim(folder, "run", TRAINING_FILES)
        if run.recipe is not None and args.process_index == 0:
            flags = (f"--{name.replace('_', '-')} {_as_text(getattr(args, name))}" for name in RECIPES[run.recipe])
            print(f"`recipe` {run.recipe!r} stands for: {' '.join(flags)}", flush=True)
        before = free_loss(trainer) if args.process_index == 0 else math.nan
        metrics = run_training(trainer, kept, **card_of(run))
    locality = trainer.model.config.locality
    is_free = not any(getattr(locality, name) for name in DIAL_FIELDS)
    after = metrics["loss"] if is_free else free_loss(trainer)  # in every process, which may hold a part of the model
    if args.process_index > 0:
        return
    under = "".join(f", {name} {value:g}" for name in DIAL_FIELDS if (value := getattr(locality, name)))
    of_dials = {name.removeprefix("perplexity_at_"): metrics[name] for name in metrics if "perplexity_at_" in name}
    others = "".join(f", {value:.2f} at {name.replace('_', ' ')}" for name, value in of_dials.items())
    print(
        f"\n{run.variant or 'own schedule'}{under}: perplexity {metrics['perplexity']:.2f} on held-out text{others}\n"
    )
    print(layer_table(metrics, locality.locality_lambdas))
    warn_of_damage(before, after, args)
    print(f"\nSaved to {args.output_dir}\n{how_to_load(RunRecord.load(folder))}")
