"""A record says what was trained on what, and refuses to exist without its numbers."""

import copy
import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure_controls
from localist_hf.hub import RunHistory, RunRecord, last_evaluation, record_of_trainer, write_card
from localist_hf.hub.adapters import brings_embeddings
from localist_hf.hub.example import attention_example, blocks_and_shares
from localist_hf.hub.run_history import find_history, weight_hashes
from localist_hf.hub.siblings import load_siblings


def test_a_record_says_what_was_trained_on_what(family: Path) -> None:
    record = RunRecord.load(family / "cubic")
    assert (record.name, record.variant, record.seed) == ("cubic", "cubic", 42)
    assert (record.base_model, record.base_run, record.adapter) == (None, "base", None)
    assert record.base_weights == weight_hashes(family / "base")
    assert record.earlier_parts == []
    assert record.lambdas == [0.0, (1 / 3) ** 3, (2 / 3) ** 3, 1.0]
    assert record.data["training_sequences"] == 4
    assert record.data["evaluation_sequences"] == 2
    assert record.data["evaluation_lengths"] == [40, 40]
    assert record.training["steps"] == 1
    assert record.training["batch_size"] == 8
    assert record.training["target_fidelity"] == 0.9
    weights = load_file(family / "cubic" / "model.safetensors")
    assert record.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert record.metrics["perplexity"] == pytest.approx(math.exp(record.metrics["loss"]))


def test_an_adapter_and_a_base_say_what_they_are(family: Path) -> None:
    adapter = RunRecord.load(family / "quintic-lora")
    assert (adapter.name, adapter.variant, adapter.base_run) == ("quintic-lora", "quintic", "base")
    assert adapter.adapter["rank"] == 2
    assert adapter.adapter["target_modules"] == ["c_attn"]
    weights = load_file(family / "quintic-lora" / "adapter_model.safetensors")
    assert adapter.adapter["parameters"] == sum(tensor.numel() for tensor in weights.values())
    base = RunRecord.load(family / "base")
    assert base.from_scratch
    assert base.num_parameters == adapter.num_parameters
    assert not adapter.from_scratch


def test_a_record_gives_nothing_of_this_machine_away(family: Path) -> None:
    for path in family.glob("*/run.json"):
        text = path.read_text()
        assert str(family.parent) not in text
        assert str(Path.home()) not in text
        assert socket.gethostname() not in text


def test_a_saved_record_is_read_again(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic")
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


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


@pytest.mark.parametrize(
    "metric",
    [
        "perplexity",
        "context_fidelity",
        "context_fidelity_layer_1",
        "context_share",
        "self_share_layer_3",
        "sink_share",
        "block_share_layer_0",
        "outside_share_layer_2",
        "visible_keys_layer_3",
        "fidelity",
        "fidelity_layer_3",
        "entropy",
        "entropy_layer_0",
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_record_without_a_number_cannot_be_made(family: Path, metric: str, value: float | None) -> None:
    record = RunRecord.load(family / "quintic")
    metrics = {name: number for name, number in record.metrics.items() if name != metric}
    if value is not None:
        metrics[metric] = value
    with pytest.raises(ValueError, match=f"`metrics` must hold a finite number '{metric}'"):
        replace(record, metrics=metrics)
    with pytest.raises(ValueError, match=f"`metrics_on_base_blocks` must hold a finite number '{metric}'"):
        replace(record, metrics_on_base_blocks=metrics)


NOWHERE = {"context_share": 0.0, "block_share": 0.0, "outside_share": 0.0, "context_fidelity": math.nan}
NOT_COUNTED = dict.fromkeys(
    ["context_fidelity", "context_share", "self_share", "sink_share", "block_share", "outside_share", "visible_keys"],
    math.nan,
)


@pytest.mark.parametrize("values", [NOWHERE, NOT_COUNTED], ids=["nowhere", "not counted"])
@pytest.mark.parametrize("part", ["", "_layer_2"])
def test_what_is_undefined_is_null_in_the_file(family: Path, tmp_path: Path, values: dict, part: str) -> None:
    record = RunRecord.load(family / "quintic")
    metrics = record.metrics | {f"{name}{part}": value for name, value in values.items()}
    replace(record, metrics=metrics, metrics_on_base_blocks=metrics).save(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert "NaN" not in text
    saved = json.loads(text)
    expected = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    assert saved["metrics"] == saved["metrics_on_base_blocks"] == expected
    loaded = RunRecord.load(tmp_path)
    assert loaded.metrics == loaded.metrics_on_base_blocks == pytest.approx(metrics, nan_ok=True)
    # One number that is missing among others is an error, and so is no psi of what goes to other words.
    for wrong in ({f"self_share{part}": math.nan}, {f"context_fidelity{part}": math.nan}):
        with pytest.raises(ValueError, match=f"`metrics` must hold a finite number '{next(iter(wrong))}'"):
            replace(record, metrics=record.metrics | wrong)


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


def test_controls_are_kept_as_they_were_measured(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic")
    assert record.controls is None
    model = LocalistGPT2LMHeadModel.from_pretrained(family / "quintic")
    texts = Dataset.from_dict({"input_ids": torch.randint(2, 90, (2, 40)).tolist()})
    controls = measure_controls(model, texts)
    measured = record.with_measurements(controls=controls)
    measured.save(tmp_path)
    assert RunRecord.load(tmp_path) == measured
    assert RunRecord.load(tmp_path).controls == json.loads(json.dumps(controls.to_dict()))
    assert replace(measured, controls=None) == record
    # What is measured later leaves them alone.
    assert measured.with_measurements(record.metrics).controls == measured.controls
    assert measured.is_repetition(replace(record, seed=7))
    for change, message in (
        ({"retention": ...}, "`controls` has no 'retention'."),
        ({"layers": [1, 2]}, "`controls` are of the layers [1, 2]; the last, 3, must be among them."),
        ({"layers": [3]}, "`controls` must hold 'visible_keys' of each of the layers [3]."),
        ({"blocks": []}, "`controls` must hold the blocks with 0 before them, as the configuration has it."),
    ):
        values = {name: value for name, value in (measured.controls | change).items() if value is not ...}
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(record, controls=values)


def test_a_record_of_0_1_is_refused_in_one_sentence(family: Path, tmp_path: Path) -> None:
    values = asdict(RunRecord.load(family / "quintic"))
    del values["controls"], values["training"]["locality_objective"]
    values["metrics"] = {
        name: value
        for name, value in values["metrics"].items()
        if name.split("_")[0] in ("loss", "perplexity", "fidelity", "entropy")
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    message = (
        "run.json' is no record of a run: it is of localist-hf 0.1, which measured no attention shares; train the run "
        "again."
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        RunRecord.load(tmp_path)


def test_the_objective_tells_runs_apart(family: Path) -> None:
    record = RunRecord.load(family / "quintic")
    assert record.objective["locality_objective"] == "context"
    other = replace(record, training=record.training | {"locality_objective": "fidelity"})
    assert record.is_comparable(other)
    assert not record.is_repetition(other)


def test_a_folder_without_a_whole_record_is_refused(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished run: there is no run\.json"):
        RunRecord.load(tmp_path)
    values = asdict(RunRecord.load(family / "quintic"))
    del values["hardware"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no record of a run: `hardware` is missing or unknown"):
        RunRecord.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no record of a run"):
        RunRecord.load(tmp_path)


def test_weights_that_were_not_measured_are_told(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family / "quintic", tmp_path / "quintic")
    record = RunRecord.load(folder)
    record.check_weights(folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those that its run\.json was measured on"):
        record.check_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="are not those"):
        record.check_weights(folder)


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


def test_siblings_differ_in_locality_and_seed_only(family: Path, tmp_path: Path, train_run: Callable) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    train_run(folder / "longer", "linear", folder / "base", max_steps=2)
    train_run(folder / "weight", "linear", folder / "base", locality_weight=1.0, name="weight")
    names = [record.name for record in load_siblings(folder / "quintic")]
    assert names[0] == "quintic"
    # The other seed is a sibling too; the locality loss may differ; another number of steps or an adapter may not.
    assert sorted(names) == sorted(
        ["base", "cubic", "distributed", "linear", "localist", "quadratic", "quartic", "quintic", "quintic", "weight"]
    )
    assert {record.name for record in load_siblings(folder / "base")} >= {"base", "quintic", "quintic-lora", "linear"}
    assert [record.name for record in load_siblings(folder / "quintic-lora")] == ["quintic-lora", "base"]


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


def test_a_record_of_others_beside_a_run_or_under_its_base_is_no_obstacle(
    train_run: Callable, family: Path, tmp_path: Path, transformers_warnings: pytest.LogCaptureFixture
) -> None:
    record = asdict(RunRecord.load(family / "cubic"))
    for number, text in enumerate(
        ("{", "[]", '{"name": "x"}', json.dumps(record | {"config": None}), json.dumps(record | {"variant": "sextic"}))
    ):
        (tmp_path / f"other{number}").mkdir()
        (tmp_path / f"other{number}" / "run.json").write_text(text)
    base = shutil.copytree(family / "base", tmp_path / "start")
    (base / "run.json").write_text('["of another program"]')
    train_run(tmp_path / "run", "cubic", base)
    assert (tmp_path / "run" / "README.md").exists()
    assert RunRecord.load(tmp_path / "run").base_run == "start"
    for name in ("other0", "other1", "other2", "other3", "other4", "start"):
        assert f"{name}/run.json' is no record of a run" in transformers_warnings.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "`seed` is '1'; it must be of type"),
        ({"metrics": []}, "`metrics` is"),
        ({"training": {}}, "`training` has no 'steps'"),
        ({"controls": {}}, "`controls` has no 'layers'"),
        ({"data": {"name": "x"}}, "`data` has no 'details'"),
        ({"variant": "sextic"}, "`variant` is 'sextic'; allowed are 'distributed'"),
        ({"earlier_parts": [{}]}, "`earlier_parts` holds one without 'locality'"),
    ],
)
def test_a_record_of_another_form_is_refused(family: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(RunRecord.load(family / "quintic"), **change)


@pytest.mark.parametrize(
    "fields",
    [{"num_sink_tokens": 2}, {"max_block_length": 20}, {"semantic_threshold": 2.0}, {"min_fidelity": 0.5}],
    ids=lambda fields: next(iter(fields)),
)
def test_runs_with_other_blocks_or_sinks_are_not_compared(family: Path, tmp_path: Path, fields: dict) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    record = RunRecord.load(folder / "quintic-seed1")
    replace(record, config=record.config | fields).save(folder / "quintic-seed1")
    assert 1 not in [record.seed for record in load_siblings(folder / "quintic")]
    assert [record.name for record in load_siblings(folder / "quintic-seed1")] == ["quintic", "base"]


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


def test_a_model_of_no_more_positions_than_the_tokenizer_fills_has_no_example(
    make_model: Callable, make_framed_tokenizer: Callable, tmp_path: Path
) -> None:
    tokenizer = make_framed_tokenizer("<bos> $A <eos>")
    (model := make_model(n_positions=3, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    assert attention_example(model, tokenizer, tmp_path) is None


def test_an_adapter_s_example_has_the_tokens_that_were_added_to_its_base(
    make_model: Callable, tokenizer, tmp_path: Path
) -> None:
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    base = LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer) + 7)
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, adapter).eval()
    model.save_pretrained(tmp_path / "adapter")
    example = attention_example(model, tokenizer, tmp_path / "adapter")
    assert example["printed"] == blocks_and_shares(model, tokenizer, example["prompt"])
    # As the card says it.
    assert brings_embeddings(tmp_path / "adapter", len(tokenizer) + 7)
    base = LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "base", config=base.config, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert example["printed"] == blocks_and_shares(loaded, tokenizer, example["prompt"])


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


def test_a_card_says_how_an_adapter_that_brings_embeddings_is_loaded(family: Path, tmp_path: Path) -> None:
    record = RunRecord.load(family / "quintic-lora")
    assert not brings_embeddings(family / "quintic-lora", record.config["vocab_size"])
    assert "embeddings" not in record.adapter
    record.save(tmp_path)
    assert "ignore_mismatched_sizes" not in write_card(tmp_path).read_text()
    replace(record, adapter=record.adapter | {"embeddings": True}).save(tmp_path)
    assert "trust_remote_code=True, ignore_mismatched_sizes=True\n)" in write_card(tmp_path).read_text()


def test_there_is_no_example_where_the_model_lacks_a_token_of_it(make_model, tokenizer, tmp_path: Path) -> None:
    (model := make_model(vocab_size=97)).save_pretrained(tmp_path)  # the tokenizer knows more, as that of Gemma 3
    assert attention_example(model, tokenizer, tmp_path) is None


def test_the_example_does_not_depend_on_what_the_tokenizer_gives_and_how_it_writes(make_model, tokenizer) -> None:
    model, own = make_model(vocab_size=len(tokenizer)), copy.deepcopy(tokenizer)
    own.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # which GPT-2 would add to the tokens
    text = "Some words . do n't"
    assert blocks_and_shares(model, own, text) == blocks_and_shares(model, tokenizer, text)


def test_the_example_is_that_of_the_saved_model(family: Path) -> None:
    example = RunRecord.load(family / "quintic").example
    assert len(example["printed"].splitlines()) > 3
    model = LocalistGPT2LMHeadModel.from_pretrained(family / "quintic")
    tokenizer = AutoTokenizer.from_pretrained(family / "quintic")
    ids = tokenizer(example["prompt"], return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= model.config.n_positions // 2  # the card's code goes on from it
    outputs = model(ids, output_fidelity=True)
    starts = outputs.block_starts[-1][0]
    second = starts == starts.unique()[1]
    own, block, outside = [
        outputs[f"{name}_share"][-1][0].mean(0)[second].mean() for name in ("self", "block", "outside")
    ]
    numbers = f"{own:.2f} 0.00 {block:.2f} {outside:.2f} {block / (block + outside):.2f}"
    assert example["printed"].splitlines()[1] == f"{numbers} {tokenizer.decode(ids[0, second])!r}"
    assert re.match(r"0\.\d\d 0\.00 0\.\d\d 0\.00 1\.00 ", example["printed"])  # nothing else to look at
