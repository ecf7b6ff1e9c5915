"""Training that goes on from a checkpoint and ends as if it had not been stopped, whatever the trainer."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput
from transformers.utils import logging

from .checkpoints import (
    find_checkpoint,
    is_own_checkpoint,
    list_checkpoints,
    mark_as_own,
    remove_checkpoint,
    remove_leftovers,
)


logger = logging.get_logger(__name__)


class ResumptionMixin:
    """
    Makes a [`~transformers.Trainer`] of any kind, before which it stands among the bases of a class, go on from a
    checkpoint as if it had not been stopped: with the same weights, logs, `train_loss`, order of the data and early
    stopping, bit for bit. One whose checkpoint has all steps behind it, or was stopped by the same early stopping,
    makes no further one, where `Trainer` would.
    """

    #: What a checkpoint of `Trainer` leaves out: sums of losses, the steps at which they began, how the epoch began.
    _of_epoch: tuple[str, ...] = (
        "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_loss_begin", "_epoch_rng"
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None
        self.add_callback(_AtBegin(self._begin_run, self._begin_epoch))
        self.add_callback(_SaveAfterEpoch())

    def _begin_run(self) -> None:
        """Forgets what a run before has left, and takes up what the checkpoint tells."""
        self._loss_begin = self.state.global_step  # the step after which `_total_loss_scalar` counts
        self._epoch_rng: torch.Tensor | None = None  # the random numbers when the epoch began
        if self._resumed_from is not None and (path := self._epoch_file(self._resumed_from)).is_file():
            for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
                setattr(self, name, value.to(self.args.device) if name == "_tr_loss" else value)

    def _begin_epoch(self) -> None:
        """Some samplers ("group_by_length") order an epoch's data by the random numbers there are when it begins."""
        if self._resumed_within_epoch is False:
            self._load_rng_state(self._resumed_from)  # as `Trainer` does next
        elif self._resumed_within_epoch and self._epoch_rng is not None:
            torch.set_rng_state(self._epoch_rng)
        self._resumed_within_epoch = None
        self._epoch_rng = torch.get_rng_state()

    def _epoch_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"epoch_{self.args.process_index}.pt"

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """
        As the trainer's own. A checkpoint that is not there is refused before anything is done; one that a crash has
        left half-written is passed over for the one before it, with a warning.

        Raises:
            ValueError: where there is no checkpoint to go on from.
        """
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            checkpoint, damaged = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            for other, damage in damaged.items():
                logger.warning(f"{other} is no whole checkpoint and is passed over: {damage}.")
            resume_from_checkpoint = str(checkpoint)
        # The trainer's own removal is left nothing to do; see `_rotate`.
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            for checkpoint in list_checkpoints(self._run_dir)[:1]:
                self._rotate(checkpoint, is_end=True)
        finally:
            self.args.save_total_limit = self._save_total_limit
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As the trainer's own; it would make one more step where none is left."""
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._resumed_from, self._run_dir = resume_from_checkpoint, self._get_output_dir(trial)
        # The first epoch's: whether it was begun before; `None` where there is none to go on with.
        self._resumed_within_epoch = None if resume_from_checkpoint is None else begin[1] > 0
        if resume_from_checkpoint is None:
            return begin
        checkpoint, state = Path(resume_from_checkpoint), self.state
        _find_best(state, checkpoint)
        has_stopped = any(_take_up(callback, state) for callback in self.callback_handler.callbacks)
        if state.global_step < max_steps and not has_stopped:
            return begin
        if state.global_step > max_steps:
            logger.warning(
                f"{checkpoint} has {state.global_step} steps behind it, more than the {max_steps} that are asked for: "
                "its weights are kept as they are."
            )
        if any(last.samefile(checkpoint) for last in list_checkpoints(self._run_dir)[:1]):
            self._rotate(checkpoint)  # what its own saving did last
        return num_train_epochs, 0

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        if skip_scheduler and self._resumed_from is not None:
            return {}  # of `eval_on_start`, which the run has done when it started
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if os.path.lexists(folder) and not is_own_checkpoint(folder):
            logger.warning(f"There is no checkpoint of step {self.state.global_step}: {folder} is somebody else's.")
            return
        self.accelerator.wait_for_everyone()  # every process has looked
        if self.args.should_save:
            mark_as_own(folder)
            # Perhaps there is a checkpoint of that step, or half of one. What is written last tells that it is whole,
            # and PEFT would add to its card.
            for name in (TRAINER_STATE_NAME, "README.md"):
                (folder / name).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self._rotate(folder)

    def _rotate(self, last: Path, is_end: bool = False) -> None:
        """
        Removes the oldest checkpoints beside the last one, as `save_total_limit` says and `Trainer` does, but for the
        best one; at the end of a run of which one is kept, all but that. `Trainer` would take every folder whose name
        begins as a checkpoint's does, whoever made it.
        """
        if not self.args.should_save or not self._save_total_limit:
            return
        remove_leftovers(last.parent)
        best = self.state.best_model_checkpoint
        own = [path for path in list_checkpoints(last.parent) if is_own_checkpoint(path)]
        kept = [path for path in own if best is not None and Path(best).exists() and path.samefile(best)]
        if is_end:
            surplus = [path for path in own if path not in kept] if kept and self._save_total_limit == 1 else []
        else:
            kept += [path for path in own if path.samefile(last)]
            others = [path for path in own if path not in kept]
            surplus = others[max(0, self._save_total_limit - len(set(kept))) :]
        for path in reversed(surplus):
            remove_checkpoint(path)

    def _save_rng_state(self, output_dir: str) -> None:
        # Of every process, as the random numbers are.
        super()._save_rng_state(output_dir)
        torch.save({name: getattr(self, name) for name in self._of_epoch}, self._epoch_file(output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what the trainer logs; at the end of a run the mean loss over all of its steps."""
        if "train_runtime" in logs:
            # `Trainer` divides what this call has summed up by the steps that it has made; perhaps there were none.
            if steps := self.state.global_step - self._loss_begin:
                logs["train_loss"] = self._total_loss_scalar / steps
            else:
                del logs["train_loss"]
        super().log(logs, start_time)


class _AtBegin(TrainerCallback):
    """
    Calls a function at the beginning of every run, of a search's trials and of a retry with smaller batches too, and
    another at that of every epoch.
    """

    def __init__(self, begin_run: Callable[[], None], begin_epoch: Callable[[], None]) -> None:
        self._begin_run, self._begin_epoch = begin_run, begin_epoch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin_run()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin_epoch()


class _SaveAfterEpoch(TrainerCallback):
    """
    Puts off a checkpoint of an epoch's last step until the epoch's end has been logged and measured: a run that goes on
    from it would leave that out, and have other random numbers for it.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.epoch.is_integer() or control.should_epoch_stop or control.should_training_stop
        if control.should_save and is_last and IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy):
            control.should_save, self._is_due = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_due:
            control.should_save, self._is_due = True, False


def _find_best(state: TrainerState, checkpoint: Path) -> None:
    """The best checkpoint of a run lies beside the others, wherever the run's folder was when its path was noted."""
    best = checkpoint.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    noted = state.best_model_checkpoint
    if best.is_dir() and not (noted is not None and best.samefile(noted)):
        state.best_model_checkpoint = str(best)


def _take_up(callback: TrainerCallback, state: TrainerState) -> bool:
    """Lets an early stopping count on from a checkpoint that has counted by the same rule; whether it has stopped."""
    saved = state.stateful_callbacks.get(type(callback).__name__)
    is_known = isinstance(callback, EarlyStoppingCallback) and isinstance(saved, dict)
    if not is_known or saved["args"] != callback.state()["args"]:
        return False
    callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
    return callback.early_stopping_patience_counter >= callback.early_stopping_patience
