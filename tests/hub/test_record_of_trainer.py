"""What a record says of a trainer: what led to its weights, what was measured, and its name."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerCallback

from localist_hf.hub import RunRecord, write_card
from localist_hf.hub.weights import weight_hashes
from localist_hf.trainers import RunHistory, record_of_trainer
from localist_hf.trainers.record_of_trainer import last_evaluation
from localist_hf.trainers.run_history import find_history


def test_a_variant_is_told_from_the_configuration(make_trainer: Callable, tmp_path: Path) -> None:
    for variant in ("window", "distributed"):
        trainer = make_trainer(tmp_path / variant, variant)
        trainer.train()
        trainer.save_model()
        trainer.evaluate()
        assert record_of_trainer(trainer).variant == variant
    trainer.model.config.locality_schedule = [0.0, 0.5, 0.5, 1.0]
    record = record_of_trainer(trainer)
    assert (record.variant, record.name) == (None, "distributed")  # the name is the folder's


def test_an_evaluation_on_short_texts_makes_a_record(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "quintic")
    trainer.model.config.min_block_length = trainer.model.config.max_block_length = 64  # longer than the texts
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.create_model_card()
    record = RunRecord.load(tmp_path / "run")
    assert math.isnan(record.metrics["context_fidelity_layer_3"])
    assert record.metrics["fidelity_layer_3"] == 1


def test_the_present_weights_must_have_been_evaluated_and_saved(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "quintic")
    trainer.train()
    trainer.evaluate()
    with pytest.raises(ValueError, match=r"holds no weights; call `save_model\(\)` first"):
        trainer.create_model_card()
    trainer.save_model()
    trainer.create_model_card()
    trainer.state.global_step += 1  # as further training would
    with pytest.raises(ValueError, match="The weights of step 2 have not been evaluated"):
        trainer.create_model_card()


def finish(trainer, **train: str) -> RunRecord:
    trainer.train(**train)
    trainer.save_model()
    trainer.evaluate()
    return record_of_trainer(trainer)


def steps_and_settings(record: RunRecord) -> list[tuple[int, str | None, int | None]]:
    parts = [(part["steps"], part["variant"], part["seed"]) for part in record.earlier_parts]
    last = record.training["steps"] - sum(steps for steps, *_ in parts)
    return [*parts, (last, record.variant, record.seed)]


def test_a_resumed_run_says_what_led_to_its_weights(make_trainer: Callable, family: Path, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1}
    finish(make_trainer(tmp_path / "run", "linear", family / "base", max_steps=2, seed=3, **steps))
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    # Interrupted and gone on with, it is one run.
    same = make_trainer(tmp_path / "run", "linear", family / "base", max_steps=2, seed=3, **steps)
    record = finish(same, resume_from_checkpoint=checkpoint)
    assert steps_and_settings(record) == [(2, "linear", 3)]
    # Under another variant and seed, from a model that was loaded from the checkpoint, it is one of two parts.
    other = make_trainer(tmp_path / "run", "quintic", tmp_path / "run" / "checkpoint-1", max_steps=4, seed=5)
    record = finish(other, resume_from_checkpoint=checkpoint)
    assert steps_and_settings(record) == [(1, "linear", 3), (3, "quintic", 5)]
    assert record.training["steps"] == 4
    assert record.earlier_parts[0]["planned_steps"] == 2
    assert (record.base_run, record.base_weights) == ("base", weight_hashes(family / "base"))
    assert not record.is_comparable(RunRecord.load(family / "quintic"))


def test_training_twice_adds_up(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", seed=3)
    assert steps_and_settings(finish(trainer)) == [(1, "linear", 3)]
    assert steps_and_settings(finish(trainer)) == [(2, "linear", 3)]
    trainer.args.learning_rate /= 10
    record = finish(trainer)
    assert steps_and_settings(record) == [(2, "linear", 3), (1, "linear", 3)]
    assert record.earlier_parts[0]["training"]["learning_rate"] == 10 * record.training["learning_rate"]
    assert record.from_scratch


def test_a_new_model_of_model_init_has_a_history_of_its_own(
    make_trainer: Callable, make_local_model: Callable, family: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", seed=3)
    assert finish(trainer).from_scratch
    trainer.model_init = lambda: make_local_model("quintic", family / "base")
    record = finish(trainer)
    assert steps_and_settings(record) == [(1, "quintic", 3)]
    assert record.base_weights == weight_hashes(family / "base")


def test_steps_after_the_best_weights_count_in_no_training_that_follows(make_trainer: Callable, tmp_path: Path) -> None:
    """Nor are any left out where training was interrupted, which loads no best weights."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            if args.seed == 4 and state.global_step == 3:
                raise KeyboardInterrupt

        def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
            metrics["eval_loss"] = abs(state.global_step - 2)  # the least at step 2

    trainer = make_trainer(tmp_path / "run", "linear", max_steps=4, seed=3, **saving, **best)
    trainer.add_callback(Interrupt())
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.args.seed = 4
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.args.seed, trainer.args.load_best_model_at_end = 5, False
    assert steps_and_settings(finish(trainer)) == [(2, "linear", 3), (3, "linear", 4), (4, "linear", 5)]


def test_a_retry_with_smaller_batches_is_the_run_that_there_was(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", auto_find_batch_size=True, per_device_train_batch_size=2)
    compute_loss = trainer.compute_loss

    def only_one_row(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = only_one_row
    trainer.train()
    trainer.compute_loss = compute_loss
    trainer.save_model()
    trainer.evaluate()
    record = record_of_trainer(trainer)
    assert steps_and_settings(record) == [(1, "linear", 42)]
    assert record.training["batch_size"] == 1


def test_what_a_foreign_checkpoint_does_not_tell_is_unknown(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", save_strategy="steps", save_steps=1)
    trainer.remove_callback(RunHistory)
    trainer.train()
    again = make_trainer(tmp_path / "run", "linear", max_steps=3, save_strategy="steps", save_steps=1)
    record = finish(again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert steps_and_settings(record) == [(1, None, None), (2, "linear", 42)]


def test_the_best_weights_are_those_of_their_step(make_trainer: Callable, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", "linear", max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=3.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert last_evaluation(trainer) is None  # what was measured at step 4 was measured on other weights
    trainer.save_model()
    trainer.evaluate()
    record = record_of_trainer(trainer)
    assert record.training["steps"] == trainer.state.best_global_step
    assert record.metrics["loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_variant_trained_from_itself_gets_a_name_of_its_own(
    make_trainer: Callable, train_run: Callable, family: Path, tmp_path: Path
) -> None:
    for source, folder, name in (
        (family / "quintic", "mine", "mine"),
        (family / "quintic", "quintic", "quintic-2"),
        (family / "quintic", "my own: run", "my-own-run"),
    ):
        record = finish(make_trainer(tmp_path / folder, "quintic", source))
        assert (record.name, record.base_run) == (name, "quintic")
    # In its parent's own folder, whose weights are then gone, the parent is not taken for itself.
    folder = shutil.copytree(family / "quintic", tmp_path / "again" / "quintic")
    trainer = train_run(folder, "quintic", folder)
    record = RunRecord.load(folder)
    assert (record.name, record.base_run) == ("quintic-2", "quintic")
    assert record.base_weights == weight_hashes(family / "quintic")
    for name, message in (("quintic", "the name of the model that the run started from"), ("a b", "no repository")):
        with pytest.raises(ValueError, match=f"`name` is '{name}'.*{message}"):
            record_of_trainer(trainer, name=name)
    with pytest.raises(ValueError, match="`base_model` is 'no id!', which is no Hub id"):
        record_of_trainer(trainer, base_model="no id!")


def test_a_model_that_is_evaluated_only_has_no_steps(make_trainer: Callable, family: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", family / "base")
    trainer.save_model()
    trainer.evaluate()
    record = record_of_trainer(trainer)
    assert steps_and_settings(record) == [(0, "linear", 42)]
    assert record.base_run == "base"


def test_it_says_whether_what_was_measured_on_begins_as_texts_do(
    make_trainer: Callable, family: Path, make_framed_tokenizer: Callable, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", "linear", family / "base")
    end = trainer.processing_class.eos_token
    trainer.processing_class = make_framed_tokenizer(f"{end} $A")
    trainer.save_model()
    note = f"The tokenizer begins this text with `{end}`, and not all sequences of the evaluation begin so"
    begun = trainer.eval_dataset.map(lambda row: {"input_ids": [0, *row["input_ids"][1:]]})
    records = []
    for dataset, is_begun in ((trainer.eval_dataset, False), (begun, True)):
        trainer.eval_dataset = dataset
        trainer.evaluate()
        records.append(record_of_trainer(trainer))
        assert (records[-1].data["text_prefix"], records[-1].data["has_text_prefix"]) == (end, is_begun)
        records[-1].save(tmp_path / "run")
        card = write_card(tmp_path / "run").read_text()
        assert f"'{end}T" in records[-1].example["printed"]
        assert (note in card) is not is_begun
        assert (f"2 sequences of 40 tokens (`{end}` first)" in card) is is_begun
    assert not records[0].is_comparable(records[1])
    assert not RunRecord.load(family / "linear").data.keys() & {"text_prefix", "has_text_prefix"}


@pytest.mark.parametrize(("started_from", "revision"), [("org/base", "c" * 40), (None, None)])
def test_an_adapter_knows_the_commit_of_a_base_on_the_hub(
    make_trainer: Callable, family: Path, tmp_path: Path, started_from: str | None, revision: str | None
) -> None:
    trainer = make_trainer(tmp_path / "run", "quintic", family / "base", lora=True)
    if started_from is not None:
        find_history(trainer).restart(started_from)
    trainer.model.get_base_model().config._commit_hash = "c" * 40  # as transformers notes it
    trainer.save_model()
    trainer.evaluate()
    assert record_of_trainer(trainer).adapter.get("base_revision") == revision
