"""What led to a trainer's weights: where they started, and what was done to them over every interruption."""

from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..configuration import LOCALITY_ARGUMENTS, variant_name
from ..hub.weights import find_base
from ..modeling import LOCALITY_FIELDS


class RunHistory(TrainerCallback, ExportableState):
    """
    A [`~transformers.TrainerCallback`] that remembers what led to a trainer's weights. Every checkpoint keeps it, so
    that a run that goes on from one knows what was done before; so does training that is called a second time.

    Args:
        started_from (`str`, *optional*, defaults to `""`):
            Where the model was loaded from: a folder or a Hub id; empty for random weights.

    Example:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[RunHistory(model.name_or_path)])
    ```
    """

    def __init__(self, started_from: str = "") -> None:
        self.restart(started_from)

    def restart(self, started_from: str) -> None:
        """Forgets what was done: the trainer has another model, loaded from there."""
        self.started_from = started_from
        #: `base_model`, `base_run` and `base_weights` of [`RunRecord`]; found when training begins, since it may
        #: overwrite that folder.
        self.base: dict[str, Any] | None = None
        #: See [`training_parts`].
        self.parts: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        attributes = {"base": self.base, "parts": [dict(part) for part in self.parts]}
        return {"args": {"started_from": self.started_from}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes up what the checkpoint tells; the same settings go on with the same part."""
        name = type(self).__name__
        if (saved := state.stateful_callbacks.get(name)) is not None:
            self.base, self.parts = saved["attributes"]["base"], saved["attributes"]["parts"]
        elif state.global_step:  # from a checkpoint of a trainer that kept no history
            unknown = dict.fromkeys(("planned_steps", "seed", "variant", "locality", "training"))
            self.parts = [unknown | {"steps": state.global_step}]
        self.parts = [part for part in self.parts if part["steps"]]  # and not a run that failed before its first
        if self.base is None and state.is_world_process_zero:
            self.base = find_base(self.started_from)
        part = _settings(args, state, model) | {"steps": self.parts[-1]["steps"] if self.parts else 0}
        if self.parts and part == self.parts[-1]:
            self.parts[-1] = part  # in the order of a run that was not stopped; a checkpoint's is the alphabet's
        else:
            self.parts.append(part | {"steps": 0})
        state.stateful_callbacks[name] = self.state()  # transformers saves it only where there is something already

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the step."""
        self.parts[-1]["steps"] += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves out the steps after the best weights, where those have been loaded."""
        surplus = state.global_step - state.best_global_step if has_best_weights(args, state) else 0
        while surplus and self.parts:
            left_out = min(surplus, self.parts[-1]["steps"])
            self.parts[-1]["steps"] -= left_out
            surplus -= left_out
            if not self.parts[-1]["steps"]:
                self.parts.pop()


def find_history(trainer: transformers.Trainer) -> RunHistory:
    """
    The history among a trainer's callbacks.

    Raises:
        ValueError: where there is none.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunHistory):
            return callback
    raise ValueError("`trainer` has no `RunHistory` among its callbacks, which tells what its weights started from.")


def training_parts(trainer: transformers.Trainer) -> list[dict[str, Any]]:
    """
    The parts of the training that led to a trainer's present weights, the last one last. Each is a stretch of `steps`
    under the same settings: `planned_steps` (what the schedule of the learning rate reckoned with), `seed`, `variant`,
    `locality` (fields of the configuration) and `training` (hyper-parameters). All but `steps` are `None` where a
    checkpoint of another trainer does not tell.
    """
    parts = [dict(part) for part in find_history(trainer).parts if part["steps"]]
    return parts or [_settings(trainer.args, trainer.state, trainer.model) | {"steps": 0}]


def has_best_weights(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a training that has ended loaded the weights of an earlier step, as `load_best_model_at_end` asks for."""
    return (
        args.load_best_model_at_end
        and state.best_model_checkpoint is not None
        and state.best_global_step not in (None, state.global_step)
    )


def _settings(args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, Any]:
    locality = model.config.locality
    # The one that was found to fit the memory stands in the state alone, which others have from their checkpoint.
    batch_size = (args.auto_find_batch_size and state.train_batch_size) or args.train_batch_size
    return {
        "planned_steps": state.max_steps,
        "seed": args.seed,
        "variant": variant_name(locality),
        "locality": {name: getattr(locality, name) for name in LOCALITY_FIELDS},
        "training": {
            "batch_size": batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning_rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.warmup_steps,
            "weight_decay": args.weight_decay,
            "betas": [args.adam_beta1, args.adam_beta2],
            "max_grad_norm": args.max_grad_norm,
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        }
        | {name: getattr(args, name) for name in LOCALITY_ARGUMENTS},
    }
