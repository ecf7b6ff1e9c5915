"""The record of what a trainer has trained and measured."""

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..configuration import variant_name
from ..evaluation import text_prefix
from ..evaluation.locality_meter import metric_names
from ..evaluation.text_prefix import have_prefix
from ..hub.adapters import brings_embeddings
from ..hub.example import attention_example, stored_config
from ..hub.run_record import RunRecord, check_tags, repository_id, without
from ..hub.weights import find_base, weight_hashes
from ..version import __version__
from .run_history import find_history, has_best_weights, training_parts


def record_of_trainer(
    trainer: transformers.Trainer,
    name: str | None = None,
    dataset: str | None = None,
    dataset_details: str = "",
    dataset_id: str | None = None,
    dataset_config: str | None = None,
    evaluation_split: str = "evaluation",
    base_model: str | None = None,
    language: str | None = None,
    license: str | None = None,
) -> RunRecord:
    """
    The record of a trainer that has trained, evaluated and saved its model.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, with a [`RunHistory`] among its callbacks.
        name (`str`, *optional*):
            Name of the run. Defaults to that of the variant, with `-lora` for an adapter, or else of the folder;
            never to that of the run that it started from.
        dataset (`str`, *optional*), dataset_details (`str`, *optional*):
            Name of the text, and a sentence on how it was used.
        dataset_id (`str`, *optional*), dataset_config (`str`, *optional*):
            Hub id and configuration of the data set, where it has one.
        evaluation_split (`str`, *optional*, defaults to `"evaluation"`):
            Name of the part that was measured on.
        base_model (`str`, *optional*):
            Hub id of the base. Defaults to where the model was loaded from.
        language (`str`, *optional*), license (`str`, *optional*):
            As on the Hub.

    Raises:
        ValueError: for a language or a licence of another form; without an evaluation of the trainer's present
            weights, or without saved weights; for a `name` that no repository can have or that is the base's.
    """
    check_tags(language, license)
    model, args = trainer.model, trainer.args
    folder = Path(args.output_dir)
    config = stored_config(model.get_base_model()) if isinstance(model, PeftModel) else model.config
    adapter, num_parameters = None, model.num_parameters()
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
        num_parameters = total - trained
        lora = model.active_peft_config
        targets = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
        adapter = {
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "target_modules": targets,
            "parameters": trained,
        }
    history = find_history(trainer)
    base = history.base or find_base(history.started_from)
    if base_model is not None:
        try:
            validate_repo_id(base_model)
        except ValueError as error:
            raise ValueError(f"`base_model` is {base_model!r}, which is no Hub id: {error}") from error
        base = {"base_model": base_model, "base_run": None, "base_weights": None}
    variant = variant_name(config.locality)
    metrics = last_evaluation(trainer)
    if metrics is None:
        raise ValueError(
            f"The weights of step {trainer.state.global_step} have not been evaluated, so there is no number for "
            "the card; call `trainer.evaluate()` on them first."
        )
    weights = weight_hashes(folder)
    if not weights:
        raise ValueError(f"`output_dir` {args.output_dir!r} holds no weights; call `save_model()` first.")
    if adapter is not None and brings_embeddings(folder, config.get_text_config().vocab_size):
        adapter["embeddings"] = True
    # Of what was loaded from the Hub, transformers notes it.
    if adapter is not None and base["base_model"] == history.started_from:
        revision = getattr(model.get_base_model().config, "_commit_hash", None) or lora.revision
        adapter |= {} if revision is None else {"base_revision": revision}
    wanted = f"{variant}-lora" if variant and adapter else variant
    *earlier_parts, last_part = training_parts(trainer)
    return RunRecord(
        name=_free_name(wanted, folder, base, config) if name is None else _checked_name(name, base, config),
        variant=variant,
        seed=last_part["seed"],
        **base,
        adapter=adapter,
        # Where it was loaded from is a path of this machine, and the rest depends on who saves it.
        config=without(config.to_dict(), ("_name_or_path", "auto_map", "architectures", "transformers_version")),
        num_parameters=num_parameters,
        data={
            "name": dataset,
            "details": dataset_details,
            "dataset_id": dataset_id,
            "dataset_config": dataset_config,
            "evaluation_split": evaluation_split,
            "training_sequences": _length(trainer.train_dataset),
            "evaluation_sequences": _length(trainer.eval_dataset),
            "evaluation_lengths": _lengths(trainer.eval_dataset),
        }
        | _text_prefix(trainer),
        training={"steps": last_part["steps"] + sum(part["steps"] for part in earlier_parts)}
        | last_part["training"]
        | ({"has_other_teacher": True} if getattr(trainer, "_given_teacher", None) is not None else {}),
        earlier_parts=earlier_parts,
        metrics=metrics,
        metrics_on_base_blocks=None,
        versions={
            "Python": platform.python_version(),
            "localist-hf": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }
        | ({"peft": peft.__version__} if adapter else {}),
        hardware=_hardware(args.device, args.world_size),
        weights=weights,
        license=license,
        language=language,
        example=attention_example(model, trainer.processing_class, folder),
        controls=None,
    )


def last_evaluation(trainer: transformers.Trainer) -> dict[str, float] | None:
    """What the evaluation of the trainer's present weights measured; `None` where there was none."""
    measured = metric_names(trainer.model.config.locality.num_hidden_layers)
    for entry in reversed(trainer.state.log_history):
        if "train_runtime" in entry and has_best_weights(trainer.args, trainer.state):
            return None  # what was measured before the best weights were loaded was measured on others
        if "eval_perplexity" in entry and entry["step"] == trainer.state.global_step:
            metrics = {name.removeprefix("eval_"): value for name, value in entry.items()}
            return {name: value for name, value in metrics.items() if name in measured or "_at_dial_" in name}
    return None


def _parents(base: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """Names of runs that a base may have."""
    prefix = repository_id(config.model_type, "").rpartition("/")[2]
    hub_name = (base["base_model"] or "").rpartition("/")[2].removeprefix(prefix)
    return [name for name in (base["base_run"], hub_name) if name]


def _checked_name(name: str, base: Mapping[str, Any], config: PreTrainedConfig) -> str:
    if name in _parents(base, config):
        raise ValueError(f"`name` is {name!r}, the name of the model that the run started from; it must be another.")
    try:
        validate_repo_id(repository_id(config.model_type, name))
    except ValueError as error:
        raise ValueError(f"`name` is {name!r}, which no repository can be called: {error}") from error
    return name


def _free_name(variant: str | None, folder: Path, base: Mapping[str, Any], config: PreTrainedConfig) -> str:
    """The variant's name, or else the folder's; another where the base (or what that started from) is called so."""
    parents = _parents(base, config)
    # As a repository may be called, whatever the folder's name.
    folder_name = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)).strip("-.")[:80]
    names = [name for name in (variant, folder_name) if name] + [f"{parent}-2" for parent in parents] + ["run"]
    return next(
        name for name in names if not any(parent == name or parent.startswith(f"{name}-") for parent in parents)
    )


def _length(dataset: Any) -> int | None:
    """Number of sequences; `None` for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def _lengths(dataset: Any) -> list[int]:
    """Tokens of the shortest and of the longest sequence."""
    try:
        lengths = [len(row["input_ids"]) for row in dataset]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "`eval_dataset` must be a data set with a column `input_ids`, for the card to say what was measured on."
        ) from error
    return [min(lengths), max(lengths)]


def _text_prefix(trainer: transformers.Trainer) -> dict[str, Any]:
    """What [`RunRecord`]'s `data` says of how texts begin; nothing where the tokenizer puts nothing before them."""
    tokenizer = trainer.processing_class
    if not (isinstance(tokenizer, PreTrainedTokenizerBase) and (prefix := text_prefix(tokenizer))):
        return {}
    return {"text_prefix": tokenizer.decode(prefix), "has_text_prefix": have_prefix(trainer.eval_dataset, prefix)}


def _hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    processes = f"{world_size} processes, " if world_size > 1 else ""
    return f"{processes}{device.type.upper()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
