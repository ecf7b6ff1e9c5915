"""A run that goes on from a checkpoint ends as if it had not been stopped; a finished one makes no further step."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import equal
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments, LocalityArguments, LocalityLossMixin
from localist_hf.trainers.checkpoints import checkpoint_damage
from localist_hf.trainers.run_history import training_parts


@dataclass
class PlainArguments(LocalityArguments, TrainingArguments):
    pass


class PlainTrainer(LocalityLossMixin, Trainer):
    """As a user's own."""


@pytest.fixture(scope="module")
def make_trainer(make_model, make_text) -> Callable[..., Trainer]:
    """A trainer of a tiny model with dropout, five sequences of training text, two in a batch: three steps an epoch."""
    rows = [Dataset.from_dict({"input_ids": make_text(number, 20, seed=number).tolist()}) for number in (5, 3)]
    # The collator makes the labels, which a plain trainer takes from the rows.
    rows = [part.add_column("labels", part["input_ids"]) for part in rows]

    def make(folder: Path, kind: str = "own", callbacks: list | None = None, **arguments) -> Trainer:
        dropout = 0.0 if kind == "without dropout" else 0.1
        model = make_model(n_layer=2, n_embd=16, locality_schedule="linear", attn_pdrop=dropout, resid_pdrop=0.1)
        if kind == "adapter":
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        of_trainer, of_arguments = (
            (PlainTrainer, PlainArguments) if kind == "mixin" else (LocalistTrainer, LocalistTrainingArguments)
        )
        defaults = {
            "output_dir": str(folder), "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2, "max_steps": 4,
            "save_steps": 2, "logging_steps": 3, "locality_objective": "contrast",
        }  # fmt: skip
        args = of_arguments(**(defaults | arguments))
        return of_trainer(model=model, args=args, train_dataset=rows[0], eval_dataset=rows[1], callbacks=callbacks)

    return make


class Killed(BaseException):
    pass


class Saves(TrainerCallback):
    """Notes the steps that are saved, and ends the process after one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.steps = last, []

    def on_save(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.last:
            raise Killed


def outcome(trainer: Trainer, result) -> dict:
    """Everything that two runs must have in common: what is not a matter of time."""
    log = [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]
    checkpoints = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    best = trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name
    state = (trainer.state.global_step, trainer.state.max_steps, trainer.state.num_train_epochs, trainer.state.epoch)
    loss = (result.training_loss, result.metrics["train_loss"], trainer.state.total_flos)
    return {
        "log": log, "checkpoints": checkpoints, "best": best, "state": state, "loss": loss,
        "parts": training_parts(trainer), "seen": trainer.state.num_input_tokens_seen,
    }  # fmt: skip


def assert_same_end(found: tuple[Trainer, object], expected: tuple[Trainer, object]) -> None:
    assert outcome(*found) == outcome(*expected)
    weights = expected[0].model.state_dict()
    for name, tensor in found[0].model.state_dict().items():
        assert equal(tensor, weights[name]), name


SETTINGS = {
    "within an epoch": {"eval_on_start": True},
    "at an epoch's end": {"max_steps": 3, "save_steps": 3},
    "a part of an epoch": {"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 3},
    "accumulated": {"gradient_accumulation_steps": 2, "save_steps": 2, "max_steps": 3},
    "without skipping": {"ignore_data_skip": True, "save_steps": 4},
    "saved by the epoch": {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"},
    "measured by the epoch": {"eval_strategy": "epoch", "save_steps": 3},
    "logged by the epoch": {"logging_strategy": "epoch", "max_steps": 5, "save_steps": 3},
    "the best": {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
        "max_steps": 3, "metric_for_best_model": "perplexity", "greater_is_better": True,  # the first
    },
    "few are kept": {"save_total_limit": 1, "include_num_input_tokens_seen": "non_padding"},
    "in an order by length": {"train_sampling_strategy": "group_by_length", "max_steps": 7, "save_steps": 3},
    "an adapter": {"kind": "adapter", "max_steps": 3},
    "held and taught": {"training_dials": [0, 1], "distillation_weight": 0.9, "kind": "without dropout"},
    "an adapter within a budget": {
        "kind": "adapter", "max_loss_increase": 0.05, "locality_objective": "context", "save_steps": 1,
        "gradient_accumulation_steps": 2,
    },
    "a trainer of one's own": {"kind": "mixin", "max_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_resumed_from_any_checkpoint_ends_as_if_undisturbed(settings, make_trainer, tmp_path: Path) -> None:
    saves = Saves()
    whole = make_trainer(tmp_path / "whole", callbacks=[saves], **settings)
    expected = (whole, whole.train())
    for step in saves.steps:
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            make_trainer(folder, callbacks=[Saves(step)], **settings).train()
        resumed = make_trainer(folder, **settings)
        assert_same_end((resumed, resumed.train(resume_from_checkpoint=True)), expected)
    assert whole.state.best_global_step == (1 if whole.args.load_best_model_at_end else None)
    assert step == whole.state.global_step  # from which there was nothing left


def test_a_higher_number_of_steps_trains_the_difference_and_a_lower_one_nothing(
    make_trainer, tmp_path: Path, transformers_warnings
) -> None:
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            steps.append(state.global_step)

    make_trainer(tmp_path, max_steps=3).train()
    raised = make_trainer(tmp_path, max_steps=5, callbacks=[Counts()])
    raised.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    assert [(part["steps"], part["planned_steps"]) for part in training_parts(raised)] == [(3, 3), (2, 5)]

    steps.clear()
    lowered = make_trainer(tmp_path, max_steps=2, callbacks=[Counts()])
    lowered.train(resume_from_checkpoint=True)
    assert (steps, lowered.state.global_step) == ([], 5)
    assert training_parts(lowered) == training_parts(raised)
    assert "checkpoint-5 has 5 steps behind it, more than the 2 that are asked for" in transformers_warnings.text
    for name, tensor in lowered.model.state_dict().items():
        assert equal(tensor, raised.model.state_dict()[name]), name


def test_early_stopping_counts_on(make_trainer, tmp_path: Path) -> None:
    """A run that grows worse, and stops when it has done so twice."""
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0, "max_steps": 9,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", callbacks=[EarlyStoppingCallback(2)], **settings)
    expected = (whole, whole.train())
    last = whole.state.global_step
    assert last < 9
    for step in (last - 1, last):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            make_trainer(folder, callbacks=[EarlyStoppingCallback(2), Saves(step)], **settings).train()
        resumed = make_trainer(folder, callbacks=[EarlyStoppingCallback(2)], **settings)
        assert_same_end((resumed, resumed.train(resume_from_checkpoint=True)), expected)
    # Another rule begins to count anew.
    other = make_trainer(folder, callbacks=[EarlyStoppingCallback(1)], **settings)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == last + 1


def test_the_best_weights_are_found_where_the_run_is_now(make_trainer, tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "load_best_model_at_end": True,
        "greater_is_better": True,
    }  # fmt: skip
    expected = make_trainer(tmp_path / "run", **settings)
    expected.train()
    assert expected.state.best_global_step == 1
    copied = Path(shutil.copytree(tmp_path / "run", tmp_path / "copied"))
    best = f"checkpoint-{expected.state.best_global_step}"
    for path in (tmp_path / "run" / best).glob("*.safetensors"):
        shutil.copy(tmp_path / "run" / "checkpoint-3" / path.name, path)
    for is_there in (True, False):
        resumed = make_trainer(copied, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.best_model_checkpoint == str(copied / best)
        for name, tensor in resumed.model.state_dict().items():
            assert equal(tensor, expected.model.state_dict()[name]), name
        if is_there:
            shutil.rmtree(tmp_path / "run")


def test_a_checkpoint_that_is_written_again_is_none_until_it_is_whole(
    make_trainer, tmp_path: Path, monkeypatch
) -> None:
    make_trainer(tmp_path, max_steps=3, save_steps=1).train()
    again = make_trainer(tmp_path, max_steps=9, save_steps=1)

    def die(*args) -> None:
        raise Killed

    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", die)
    with pytest.raises(Killed):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    # Its weights were trained under another schedule than its optimizer's state.
    assert checkpoint_damage(tmp_path / "checkpoint-2") == "trainer_state.json, which is written last, is missing"


def test_a_checkpoint_of_before_does_not_tell_the_losses(make_trainer, tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    (tmp_path / "checkpoint-4" / "epoch_0.pt").unlink()
    result = make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "train_loss" not in result.metrics and math.isnan(result.training_loss)
