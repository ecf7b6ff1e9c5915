"""One run, from its first step to its model, record and card in an output folder."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import RunError, is_disk_full, one_line, reraised_as
from ..hub import CARD_FILE, RECORD_FILE, PublishError, RunRecord, check_record, own_text_in, write_card
from ..hub.loading import SETTINGS_FILE
from ..hub.weights import weight_hashes
from ..trainers import LocalistTrainer
from ..trainers.checkpoints import checkpoint_damage, is_own_checkpoint, list_checkpoints, remove_checkpoint
from ..whole_file import write_whole
from .folders import RESULT_FILES, RUN_FILES, TRAINING_FILES, check_own, claim, found_files, replacing


def save_settings(settings: dict[str, Any], folder: Path) -> None:
    """Writes the flags of a run to its folder, for those who go on with it."""
    write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def start_anew(folder: Path) -> None:
    """
    Says what a run that overwrites a folder replaces there, removes the checkpoints, and has the rest go when the new
    model is in place.
    """
    replaced = [*found_files(folder, (*TRAINING_FILES, *RUN_FILES)), *(path.name for path in list_checkpoints(folder))]
    if replaced:
        print(f"`overwrite_output_dir` replaces in {folder}: {', '.join(sorted(replaced))}", flush=True)
    found = check_own(folder, "run", RUN_FILES, replaces=True)
    leaving = [name for name in found if (folder / name).is_file() or (folder / name).is_symlink()]
    for check, name in ((own_text_in, CARD_FILE), (check_record, RECORD_FILE)):
        try:
            check(folder)
        except ValueError:
            leaving.append(name)
    claim(folder, "run", TRAINING_FILES, leaving)
    for checkpoint in list_checkpoints(folder):
        remove_checkpoint(checkpoint)


def finished_record(trainer: LocalistTrainer, **card: Any) -> RunRecord | None:
    """
    Finds the record in a trainer's output folder, where that holds the end of what the trainer is to go on with: its
    checkpoint has all steps behind it, and the weights are saved and measured. `None` where anything is left to do, be
    it to publish the model or to write another licence into its card.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if args.resume_from_checkpoint is None or args.push_to_hub:
        return None
    checkpoint = Path(args.resume_from_checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    try:
        record = RunRecord.find(folder)
    except ValueError:
        return None
    if record is None or state.global_step < max_steps:
        return None
    if any(getattr(record, name) != card.get(name) for name in ("language", "license")):
        return None
    if args.load_best_model_at_end and state.best_global_step:
        checkpoint = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
    return record if record.weights == weight_hashes(folder) == weight_hashes(checkpoint) else None


def run_training(trainer: LocalistTrainer, settings: dict[str, Any] | None = None, **card: Any) -> dict[str, float]:
    """
    Trains, evaluates, and saves model, tokenizer, metrics, log and model card to the trainer's output folder. What is
    there from before stays until the new model is written; nothing is left half-written where that fails. Of a run that
    is finished nothing changes.

    Args:
        trainer ([`LocalistTrainer`]):
            The trainer; with `resume_from_checkpoint` as a folder in its arguments, it goes on from there.
        settings (`dict[str, Any]`, *optional*):
            The flags of the run, for [`save_settings`].
        card:
            What [`LocalistTrainer.create_model_card`] takes.

    Returns:
        `dict[str, float]`: the metrics of [`LocalityMeter.compute`], without a prefix.

    Raises:
        RunError: where the disk is full, the training diverges or the Hub does not take the model.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if (record := finished_record(trainer, **card)) is not None:
        if args.should_save:
            card_file, record_file = folder / CARD_FILE, folder / RECORD_FILE
            if not card_file.exists() or card_file.stat().st_mtime_ns < record_file.stat().st_mtime_ns:
                write_card(folder)  # which is written after the record
            print(f"The run in {args.output_dir!r} is finished: nothing is left to train or to measure.")
        return record.metrics
    if settings is not None and args.should_save:
        save_settings(settings, folder)
    if args.push_to_hub:
        with reraised_as(RunError, ValueError, PublishError):
            trainer.check_push()
    before = list_checkpoints(folder)
    try:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        with replacing(folder, args.should_save) as saving:
            trainer.save_model(str(saving), _internal_call=True)  # without the push: its card needs the evaluation
        if args.should_save:
            with reraised_as(RunError, ValueError):
                check_own(folder, "run", RESULT_FILES)
            claim(folder, "run", RESULT_FILES)
        trainer.save_state()
        if args.should_save:
            (folder / "all_results.json").unlink(missing_ok=True)  # to which metrics are added, and perhaps half of it
        trainer.save_metrics("train", result.metrics)
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if not math.isfinite(metrics["eval_perplexity"]) or any(map(math.isinf, metrics.values())):
            raise RunError(
                f"the training diverged: loss {metrics['eval_loss']} on held-out text, with a `learning_rate` of "
                f"{args.learning_rate}. There is no model card and no record for such a model."
            )
        with reraised_as(RunError, ValueError, PublishError):
            if args.push_to_hub:
                trainer.push_to_hub(**card)  # which makes the card too
            else:
                trainer.create_model_card(**card)
    except BaseException as error:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()  # so that the last line is the message's
        if args.should_save:
            for checkpoint in set(list_checkpoints(folder)).difference(before):
                if is_own_checkpoint(checkpoint) and checkpoint_damage(checkpoint) is not None:
                    remove_checkpoint(checkpoint)
        if is_disk_full(error):
            left = list_checkpoints(folder)
            hint = f" {left[0]} is complete: make room, and pass `--resume_from_checkpoint true`." if left else ""
            raise RunError(
                f"`output_dir` is {args.output_dir!r}, on whose disk no space is left ({one_line(error)}).{hint}"
            ) from error
        raise
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}
