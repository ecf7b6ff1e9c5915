"""What training arguments must be, as far as that is known without the weights and the text."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption, SaveStrategy
from transformers.utils import is_torch_xla_available

from ..command_line import check_numbers
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation.locality_meter import QUANTITIES, metric_names
from ..json_text import load_json
from ..modeling import LocalityFields
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from .text_files import file_fault


#: More processes than any machine has a use for; each takes seconds and hundreds of megabytes.
MOST_PROCESSES = 1024
#: More sequences than any device takes at once; a list is made of as many before they are there.
_MOST_SEQUENCES = 2**16
#: Flags that transformers does not check, or not before the training, by what is allowed.
_POSITIVE = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_AT_LEAST_ONE = (
    "gradient_accumulation_steps",
    "eval_accumulation_steps", "save_total_limit", "lora_alpha", "ddp_timeout", "ddp_bucket_cap_mb",
    "torch_empty_cache_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha",
    "eval_delay", "lora_rank",
)  # fmt: skip
_BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout")
_SEEDS = ("seed", "data_seed")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(_POSITIVE, (lambda value: value > 0, "greater than 0")),
    **dict.fromkeys(_AT_LEAST_ONE, (lambda value: value >= 1, "at least 1")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda value: value >= 0, "at least 0")),
    **dict.fromkeys(_BATCH_SIZES, (lambda value: 1 <= value <= _MOST_SEQUENCES, f"in 1 to {_MOST_SEQUENCES}")),
    **dict.fromkeys(_BELOW_ONE, (lambda value: 0 <= value < 1, "at least 0 and below 1")),
    **dict.fromkeys(_SEEDS, (lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")),
    "validation_share": (lambda value: 0 < value < 1, "between 0 and 1"),
    "max_steps": (lambda value: value >= 1 or value == -1, "at least 1, or -1 to go by `num_train_epochs`"),
    "dataloader_num_workers": (lambda value: 0 <= value <= MOST_PROCESSES, f"in 0 to {MOST_PROCESSES}"),
    # Of each worker; they are counted one by one before anything else is done.
    "dataloader_prefetch_factor": (lambda value: 1 <= value <= 1024, "in 1 to 1024"),
    "label_smoothing_factor": (lambda value: value == 0, "0, because the perplexity is that of the labels as they are"),
    "local_rank": (lambda value: value >= -1, "at least -1"),
}
#: Flags that take a JSON object; and of these those that take the name of a file with one instead.
JSON_FLAGS = tuple(TrainingArguments._VALID_DICT_FIELDS)
_FILE_FLAGS = ("accelerator_config", "fsdp_config", "deepspeed")
#: What `torch.utils.checkpoint.checkpoint` takes that JSON can say and localist attention bears, and `Trainer` beside.
_CHECKPOINTING: dict[str, Any] = {
    "use_reentrant": Literal[False], "determinism_check": Literal["default", "none"], "every_n_layers": int,
    **dict.fromkeys(("preserve_rng_state", "debug", "early_stop", "offload"), bool),
}  # fmt: skip
#: What `TrainingArguments` reads of `fsdp_config`, also with "fsdp_" before it.
_FSDP: dict[str, Any] = {
    **dict.fromkeys(("version", "min_num_params"), int),
    **dict.fromkeys(("auto_wrap_policy", "state_dict_type", "backward_prefetch"), str),
    **dict.fromkeys(
        ("activation_checkpointing", "cpu_offload", "cpu_ram_efficient_loading", "forward_prefetch", "use_orig_params",
         "sync_module_states", "limit_all_gathers", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"),
        bool,
    ),
    "reshard_after_forward": bool | str, "transformer_layer_cls_to_wrap": str | list[str], "xla_fsdp_settings": dict,
}  # fmt: skip
#: Steps of a schedule that is tried out where the number is not known yet.
_TRIED_STEPS = 1000


def check_reporting(args: TrainingArguments) -> None:
    """
    Raises:
        InputError: for a place to report to that is not there.
    """
    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in installed:
            allowed = ", ".join(map(repr, [*installed, "all", "none"]))
            raise InputError(f"`report_to` is {name!r}, which is not installed or not known; allowed are {allowed}.")


def check_types(name: str, given: Mapping[str, Any], dataclass: type) -> None:
    """
    Raises:
        InputError: where a value is of no type that its field allows, of which dataclasses themselves take no notice.
    """
    _check_hints(name, given, get_type_hints(dataclass))


def _check_hints(name: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for key in given.keys() & hints.keys():
        value, hint = given[key], hints[key]
        checked, kinds = value, (hint, *get_args(hint))  # a float may be a whole number
        if type(value) is int and float in kinds:
            checked = float(value)
        elif isinstance(value, list) and list[float] in kinds:
            checked = [float(each) if type(each) is int else each for each in value]
        with reraised_as(InputError, TypeError, ValueError, what=f"`{name}` sets {key!r} to {value!r}: "):
            type_validator(key, checked, hint)


def check_training(values: dict[str, Any]) -> None:
    """
    Raises:
        InputError: for one of these training arguments, each of its type, that cannot be used.
    """
    if values.get("use_liger_kernel"):
        raise InputError("`use_liger_kernel` is true; it would replace the `forward` by which locality is measured.")
    backends = [backend.value.lower() for backend in DynamoBackend]
    if (backend := values.get("torch_compile_backend")) is not None and backend.lower() not in backends:
        raise InputError(f"`torch_compile_backend` is {backend!r}; allowed are {', '.join(backends)}.")
    mode = values.get("torch_compile_mode")
    if mode is not None or (backend is not None and backend.lower() != "no"):
        what = f"`torch_compile_backend` is {backend!r} and `torch_compile_mode` {mode!r}, which cannot be used: "
        with reraised_as(InputError, Exception, what=what):  # it would be compiled at the first call
            torch.compile(nn.Identity(), backend=(backend or "inductor").lower(), mode=mode)
    if "tpu_metrics_debug" in (values.get("debug") or ()) and not is_torch_xla_available():
        raise InputError("`debug` is 'tpu_metrics_debug', for which the package `torch_xla` is missing.")
    if (names := values.get("label_names")) not in (None, ["labels"]):
        raise InputError(f"`label_names` is {names}; it must be 'labels', by which runs are measured.")
    with reraised_as(InputError, ValueError):
        check_numbers(values)
    for name in _RANGES.keys() & values.keys():
        is_allowed, allowed = _RANGES[name]
        if values[name] is not None and not is_allowed(values[name]):
            raise InputError(f"`{name}` is {values[name]}; it must be {allowed}.")
    for name, hint in get_type_hints(TrainingArguments).items():
        for kind in get_args(hint):
            choices = [each.value for each in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
            if choices and name in values and values[name] not in choices:
                raise InputError(f"`{name}` is {values[name]!r}; allowed are {', '.join(choices)}.")
    if values.get("dataloader_persistent_workers") and not values.get("dataloader_num_workers"):
        raise InputError("`dataloader_persistent_workers` is true; it needs `dataloader_num_workers` of at least 1.")
    fsdp = values.get("fsdp")
    if isinstance(fsdp, str) and (unknown := sorted({*fsdp.split()} - {each.value for each in FSDPOption})):
        allowed = ", ".join(each.value for each in FSDPOption)
        raise InputError(f"`fsdp` is {fsdp!r}, which has {unknown[0]!r}; allowed are {allowed}.")
    for pair in (given := values.get("optim_args") or "=").split(","):
        if pair.count("=") != 1:
            raise InputError(f"`optim_args` is {given!r}; it must be NAME=VALUE, or several with commas between.")
    if (repository := values.get("hub_model_id")) is not None:
        with reraised_as(
            InputError, ValueError, what=f"`hub_model_id` is {repository!r}; it must be NAMESPACE/NAME or NAME: "
        ):
            validate_repo_id(repository)
    if values.get("deepspeed") is not None and find_spec("deepspeed") is None:
        raise InputError(f"`deepspeed` is {values['deepspeed']!r}, for which the package `deepspeed` is missing.")
    for name in JSON_FLAGS:
        if (value := values.get(name)) is not None:
            _check_settings(name, _read_settings(name, value))
    if not fsdp and (given := values.get("fsdp_config")) is not None:
        raise InputError(f"`fsdp_config` is {given!r}; it needs `fsdp`, which is not given.")


def _read_settings(name: str, value: Any) -> dict[str, Any]:
    """Reads what a flag with a JSON object holds."""
    allowed = "a JSON object, or a file with one" if name in _FILE_FLAGS else "a JSON object"
    what = f"`{name}` is {value!r}; it must be {allowed}"
    settings = value
    if isinstance(value, str):
        is_file = name in _FILE_FLAGS and not value.startswith("{")
        with reraised_as(InputError, *INPUT_ERRORS, what=f"{what}: "):
            if is_file and (fault := file_fault(value)) is not None:
                raise ValueError(f"{fault}.")
            settings = load_json(Path(value).read_text(encoding="utf-8") if is_file else value)
    if not isinstance(settings, dict):
        raise InputError(f"{what}.")
    return settings


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    """Refuses what a flag's JSON object must not hold."""
    _check_finite(name, settings)
    # As transformers reads them.
    words = {"true": True, "false": False}
    settings = {
        key: words.get(value.lower(), value) if isinstance(value, str) else value for key, value in settings.items()
    }
    if name == "accelerator_config":
        _check_fields(name, settings, get_type_hints(AcceleratorConfig))
        accumulation = settings.get("gradient_accumulation_kwargs") or {}
        _check_fields(
            f"{name}['gradient_accumulation_kwargs']", accumulation, get_type_hints(GradientAccumulationPlugin)
        )
        _check_at_least_one(name, accumulation, "num_steps")
    elif name == "fsdp_config":
        given = {key.removeprefix("fsdp_"): value for key, value in settings.items()}
        _check_fields(name, given, _FSDP)
        if given.get("version", 2) == 2 and not isinstance(shard := given.get("reshard_after_forward", True), bool):
            raise InputError(
                f"`{name}` sets 'reshard_after_forward' to {shard!r}; with 'version' 2 it is true or false."
            )
    elif name.endswith("checkpointing_kwargs"):
        _check_fields(name, settings, _CHECKPOINTING)
        _check_at_least_one(name, settings, "every_n_layers")
        if settings.keys() - {"every_n_layers", "offload"} and "use_reentrant" not in settings:
            raise InputError(f"`{name}` lacks 'use_reentrant'; it must be false.")  # which is not torch's default
        if settings.get("offload") and not torch.accelerator.is_available():
            raise InputError(f"`{name}` sets 'offload' to True; there is no GPU to keep anything away from.")


def _check_fields(name: str, settings: Any, hints: Mapping[str, Any]) -> None:
    if unknown := sorted(settings.keys() - hints.keys()):
        raise InputError(f"`{name}` has {unknown[0]!r}; allowed are {', '.join(map(repr, hints))}.")
    _check_hints(name, settings, hints)


def _check_at_least_one(name: str, settings: Mapping[str, Any], key: str) -> None:
    if settings.get(key, 1) < 1:
        raise InputError(f"`{name}` sets {key!r} to {settings[key]}; it must be at least 1.")


def _check_finite(name: str, value: Any) -> None:
    """Refuses numbers that JSON can write and no setting can be."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(name, each)
    if isinstance(value, int | float) and not abs(value) < 2**63:
        raise InputError(f"`{name}` holds {value}; numbers in it must be finite and below 2**63.")


def check_metric(args: LocalistTrainingArguments, locality: LocalityFields) -> None:
    """Refuses a metric to choose the best model by that no evaluation of such a model gives."""
    metric, num_layers = args.metric_for_best_model, locality.num_hidden_layers
    dials = [dial for dial in args.training_dials or () if any(locality.locality_lambdas)]
    at_dials = [
        f"{name}_at_dial_{dial:g}"
        for dial in dials
        if dial != locality.locality_dial
        for name in ("loss", "perplexity")
    ]
    if metric is None and args.save_strategy == SaveStrategy.BEST:
        raise ValueError("`save_strategy` is 'best'; it needs `metric_for_best_model`, such as 'loss'.")
    if metric is not None and metric.removeprefix("eval_") not in (*metric_names(num_layers), *at_dials):
        quantities = ", ".join(map(repr, ("loss", "perplexity", *at_dials, *QUANTITIES)))
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}; allowed are {quantities}, and all but losses and perplexities of "
            f"a layer, as 'context_fidelity_layer_N' with N from 0 to {num_layers - 1}."
        )


def check_schedule(args: TrainingArguments) -> None:
    """Refuses a learning rate schedule that lacks what it needs, or gives what is no learning rate."""
    name, kwargs = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    steps = args.max_steps if args.max_steps > 0 else _TRIED_STEPS
    what = f"`lr_scheduler_type` is {name!r}, `learning_rate` {args.learning_rate} and `lr_scheduler_kwargs` {kwargs}: "
    with reraised_as(InputError, Exception, what=what):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        scheduler = get_scheduler(
            name, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=kwargs
        )
        if isinstance(scheduler, LambdaLR):
            rates = [args.learning_rate * scheduler.lr_lambdas[0](steps * part // 8) for part in range(9)]
        else:
            rates = []
            for _ in range(20):  # what it does after steps without a better loss
                optimizer.step()
                scheduler.step(1.0)
                rates.append(optimizer.param_groups[0]["lr"])
        for rate in rates:
            # Where the number of steps is not known, it need not fit that of a decay.
            if not math.isfinite(rate) or (rate < 0 and args.max_steps > 0):
                raise ValueError(f"it gives a learning rate of {rate}.")


def check_adapter(given: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: for arguments of [`~peft.LoraConfig`], each of its type, that no adapter can have.
    """
    for name, flag in (("r", "lora_alpha"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        is_allowed, allowed = _RANGES[flag]
        if name in given and not is_allowed(given[name]):
            raise InputError(f"`lora` sets {name!r} to {given[name]}; it must be {allowed}.")


def check_rank(name: str, model: PeftModel, rank: int) -> None:
    """Refuses an adapter of a higher rank than any of the weights that it is for. No weight is looked at."""
    weights = [layer.get_base_layer().weight for layer in model.modules() if isinstance(layer, LoraLayer)]
    if rank > (full := max(min(weight.shape) for weight in weights)):
        raise ValueError(
            f"`{name}` is {rank}; it must be at most {full}, the rank of the largest weight that gets an adapter: a "
            "higher one changes nothing but the memory that it takes."
        )


def check_optimizer(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Refuses an optimizer that is not installed, or that cannot use `optim_args`. No weight is looked at."""
    given = "" if args.optim_args is None else f" and `optim_args` {args.optim_args!r}"

    def found(optim_args: str | None) -> tuple[type, dict[str, Any]]:
        others = copy.copy(args)
        others.optim_args = optim_args
        return LocalistTrainer.get_optimizer_cls_and_kwargs(others, model)

    with reraised_as(InputError, Exception, what=f"`optim` is {args.optim.value!r}{given}, which cannot be used: "):
        kind, kwargs = found(args.optim_args)
        if kwargs.keys() <= inspect.signature(kind).parameters.keys():
            kind([nn.Parameter(torch.zeros(1))], **kwargs)
        plain = found(None) if given else None
    for pair in args.optim_args.replace(" ", "").split(",") if given else ():
        name = pair.partition("=")[0]
        try:
            is_used = found(f"{name}=no-such-value") != plain
        except Exception:  # it was read
            is_used = True
        if not is_used:
            raise InputError(f"`optim_args` is {args.optim_args!r}; `optim` {args.optim.value!r} takes no {name!r}.")
