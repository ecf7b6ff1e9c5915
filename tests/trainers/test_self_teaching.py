"""Training at dials, under a teacher, within a budget: losses are those written out, however a batch is cut up."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.configuration import RECIPES
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments
from localist_hf.trainers.distillation import kl_divergence_sum
from localist_hf.trainers.locality_loss import next_weight
from localist_hf.trainers.run_history import training_parts


LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False)
LENGTHS = (60, 13, 41, 5, 22, 60, 48, 9)


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }


@pytest.fixture(scope="module")
def rows(make_text) -> list[torch.Tensor]:
    return [row[:length] for row, length in zip(make_text(8, 60), LENGTHS, strict=True)]


@pytest.fixture
def make_trainer(make_model, rows, tmp_path: Path) -> Callable[..., LocalistTrainer]:
    def make(model=None, teacher=None, callbacks=None, lora=None, **arguments) -> LocalistTrainer:
        model = make_model(locality_schedule="linear") if model is None else model
        if lora is not None:
            torch.manual_seed(1)
            model = get_peft_model(model, lora)
        defaults = {
            "per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0, "learning_rate": 1e-2,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
            "dataloader_pin_memory": False, "locality_weight": 0, "train_sampling_strategy": "sequential",
        }  # fmt: skip
        args = LocalistTrainingArguments(output_dir=str(tmp_path / "run"), **{**defaults, **arguments})
        dataset = Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})
        return LocalistTrainer(
            model=model, args=args, train_dataset=dataset, eval_dataset=dataset, callbacks=callbacks, teacher=teacher
        )

    return make


def step(trainer: LocalistTrainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients and the log of the first step."""
    keeper = KeepGradients()
    trainer.add_callback(keeper)
    trainer.train()
    return keeper.gradients, next(entry for entry in trainer.state.log_history if "loss" in entry)


def by_hand(model, teacher, rows, dials, alpha: float) -> tuple[float, float]:
    """Gradients of both losses, one text after the other, each at its dial; gives the losses."""
    num_labels = sum(len(row) - 1 for row in rows)
    sums = [0.0, 0.0]
    for at, row in enumerate(rows):
        logits = model(row[None], locality_dial=float(dials[at % len(dials)])).logits[0, :-1]
        with torch.no_grad():
            target = teacher(row[None], locality_dial=0.0).logits[0, :-1].log_softmax(-1)
        own = F.cross_entropy(logits, row[1:], reduction="sum") / num_labels
        taught = F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True) / num_labels
        ((1 - alpha) * own + alpha * taught).backward()
        sums = [sums[0] + own.item(), sums[1] + taught.item()]
    return sums[0], sums[1]


def assert_same(actual: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    expected = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dials", [[1], [0, 1], [0, 0.5, 1]])
@pytest.mark.parametrize("split", [(8, 1), (1, 8), (2, 4)])
def test_rows_are_dealt_over_dials_and_taught_however_a_batch_is_cut(
    make_trainer, make_model, rows, dials, split
) -> None:
    trainer = make_trainer(
        training_dials=dials, distillation_weight=0.7, per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
    )  # fmt: skip
    found, log = step(trainer)
    model = make_model(locality_schedule="linear")
    own, taught = by_hand(model, copy.deepcopy(model), rows, dials, 0.7)
    assert taught > 0.01
    assert_same(found, model)
    assert log["lm_loss"] == pytest.approx(own, rel=1e-5)
    assert log["distillation_loss"] == pytest.approx(taught, rel=1e-5)
    assert log["loss"] == pytest.approx(0.3 * own + 0.7 * taught, rel=1e-5)


def test_batches_of_one_row_take_turns_from_step_to_step(make_trainer, make_model, rows) -> None:
    """Without accumulation too: otherwise all would be at the first dial."""
    dials = []
    model = make_model(locality_schedule="linear")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: dials.append(kwargs["locality_dial"]), with_kwargs=True
    )
    make_trainer(model, training_dials=[0, 1], per_device_train_batch_size=1, max_steps=4).train()
    assert [each.tolist() for each in dials] == [[0], [1], [0], [1]]


def test_batches_that_memory_made_smaller_take_turns_too(make_trainer, monkeypatch) -> None:
    dials, training_step = [], LocalistTrainer.training_step

    def step_of_one_row(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(LocalistTrainer, "training_step", step_of_one_row)
    trainer = make_trainer(
        training_dials=[0, 1], per_device_train_batch_size=2, auto_find_batch_size=True, max_steps=4
    )  # fmt: skip
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: dials.extend(inputs["locality_dial"].tolist()), with_kwargs=True
    )
    trainer.train()
    assert dials == [0, 1, 0, 1]


def test_a_step_without_labels_leaves_the_weights_as_they_are(make_trainer, make_model, rows) -> None:
    """As the trainer alone does, whose loss then is no number."""
    trainer = make_trainer(distillation_weight=0.9, training_dials=[1], weight_decay=0.0)
    trainer.train_dataset = Dataset.from_dict({"input_ids": [rows[0].tolist()], "labels": [[-100] * len(rows[0])]})
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_adapter_is_taught_by_its_base(make_trainer, make_model, rows) -> None:
    trainer = make_trainer(lora=LORA, training_dials=[1], distillation_weight=0.9)
    assert trainer._teacher.model is None  # no copy
    found, log = step(trainer)
    student = make_model(locality_schedule="linear")
    torch.manual_seed(1)
    student = get_peft_model(student, LORA)
    own, taught = by_hand(student, make_model(locality_schedule="linear"), rows, [1], 0.9)
    assert_same(found, student)
    assert log["distillation_loss"] == pytest.approx(taught, rel=1e-5)
    assert log["lm_loss"] == pytest.approx(own, rel=1e-5)


def test_learned_tokens_before_a_text_have_no_teacher(make_trainer, rows) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    found, log = step(make_trainer(lora=prompt, distillation_weight=1.0))
    assert log["distillation_loss"] > 0
    assert all(gradient.any() for gradient in found.values())


def test_what_is_frozen_stays_so_and_dropout_is_no_matter_of_the_teacher(make_trainer, make_model, rows) -> None:
    """PEFT would switch on every weight of an adapter after it was off; `train` every dropout."""
    model = get_peft_model(make_model(locality_schedule="linear", resid_pdrop=0.5), LORA)
    frozen = [each for name, each in model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    trainer = make_trainer(model, distillation_weight=0.9)
    ids = rows[0][None]
    model.train()
    first, second = (trainer._teacher.logits(model, {"input_ids": ids}) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert not any(parameter.requires_grad for parameter in frozen)


def test_the_copy_is_of_the_starting_weights_and_does_not_move(make_trainer, make_model, rows) -> None:
    trainer = make_trainer(distillation_weight=0.9, max_steps=3)
    trainer.train()
    start = make_model(locality_schedule="linear").state_dict()
    for name, tensor in trainer._teacher.model.state_dict().items():
        assert torch.equal(tensor, start[name])
        moved = trainer.model.state_dict()[name]
        assert not torch.equal(moved, tensor) or not tensor.is_floating_point()
    first = trainer.state.log_history[0]
    assert first["distillation_loss"] == pytest.approx(0, abs=1e-6)  # at dial 0, from which nothing was trained


def test_a_teacher_of_the_users_own(make_trainer, make_model, rows) -> None:
    torch.manual_seed(5)
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    found, log = step(make_trainer(teacher=plain, distillation_weight=1.0))
    model = make_model(locality_schedule="linear")

    class WithoutDial(torch.nn.Module):
        def forward(self, ids, locality_dial):
            return plain(ids)

    _, taught = by_hand(model, WithoutDial(), rows, [0], 1.0)
    assert_same(found, model)
    assert log["distillation_loss"] == pytest.approx(taught, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_teachers_that_cannot_be_are_refused(make_trainer, make_model) -> None:
    with pytest.raises(ValueError, match="`teacher` predicts 50 tokens and `model` 97; both must have the same"):
        make_trainer(teacher=make_model(vocab_size=50), distillation_weight=0.5)
    with pytest.raises(ValueError, match="`teacher` is given, but `distillation_weight` is 0 and"):
        make_trainer(teacher=make_model())
    model = make_model()
    with pytest.raises(ValueError, match=r"`teacher` has 'transformer.wte.weight' in common with `model`, which is"):
        make_trainer(model, teacher=model, distillation_weight=0.5)
    with pytest.raises(ValueError, match="`teacher` is a GPT2Model; it must be a causal language model"):
        make_trainer(teacher=GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1)), distillation_weight=0.5)
    moved = dataclasses.replace(LORA, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="an adapter with `init_lora_weights` 'pissa', for which PEFT takes a part"):
        make_trainer(lora=moved, distillation_weight=0.5)
    model = get_peft_model(make_model(), LORA)
    model.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`model` trains '.*ln_f.weight' of its base beside the adapter"):
        make_trainer(model, distillation_weight=0.5)


def test_dials_in_a_tuple_are_those_that_a_checkpoint_gives_back(make_trainer, tmp_path: Path) -> None:
    settings = {"training_dials": (0, 1), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings).train()
    trainer = make_trainer(**settings)
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    assert [part["steps"] for part in training_parts(trainer)] == [2]


def test_a_run_does_not_go_on_under_another_teacher(make_trainer, make_model, tmp_path: Path) -> None:
    settings = {"distillation_weight": 0.5, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    make_trainer(**settings).train(resume_from_checkpoint=checkpoint)
    moved = LocalistGPT2LMHeadModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="of a run whose teacher had other weights than the one there is now"):
        make_trainer(moved, **settings).train(resume_from_checkpoint=checkpoint)
    make_trainer(moved, make_model(locality_schedule="linear"), **settings).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_dials": []}, r"`training_dials` is \[\]; it must be a list of numbers in \[0, 1\], or None"),
        ({"training_dials": 1}, r"`training_dials` is 1; it must be a list"),
        ({"training_dials": [0, 2]}, r"`training_dials` is \[0, 2\]; it must be a list"),
        ({"training_dials": [0, math.nan]}, r"`training_dials` is \[0, nan\]; it must be a list"),
        ({"training_dials": "01"}, "`training_dials` is '01'; it must be a list"),
        ({"training_dials": [1, 1.0]}, r"`training_dials` is \[1, 1.0\]; no dial may be there twice"),
        ({"distillation_weight": 1.5}, r"`distillation_weight` is 1.5; it must lie in \[0, 1\]"),
        ({"distillation_weight": None}, "`distillation_weight` is None"),
        ({"max_loss_increase": 0.0}, "`max_loss_increase` is 0.0; it must be a finite number above 0, or None"),
        ({"max_loss_increase": math.inf}, "`max_loss_increase` is inf"),
        ({"max_loss_increase": 0.1, "locality_weight": 0}, "`max_loss_increase` is 0.1 and `locality_weight` 0"),
    ],
)
def test_wrong_values_are_refused_by_name(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LocalistTrainingArguments(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_arguments(name: str, tmp_path: Path) -> None:
    args = LocalistTrainingArguments(output_dir=str(tmp_path), **RECIPES[name])
    assert all(getattr(args, key) == value for key, value in RECIPES[name].items())


def test_an_evaluation_measures_at_the_dials_of_the_training_too(make_trainer, make_model, rows) -> None:
    trainer = make_trainer(training_dials=[0, 1])
    metrics = trainer.evaluate()
    model = make_model(locality_schedule="linear")
    for dial, suffix in ((0.0, ""), (1.0, "_at_dial_1")):
        own, _ = by_hand(model, model, rows, [dial], 0.0)
        assert metrics[f"eval_loss{suffix}"] == pytest.approx(own, rel=1e-5)
        assert metrics[f"eval_perplexity{suffix}"] == pytest.approx(math.exp(own), rel=1e-5)
    assert "eval_loss_at_dial_0" not in metrics  # which is where it is measured anyway


def test_the_weight_grows_within_the_budget_and_shrinks_beyond(make_trainer) -> None:
    logs = {}
    for budget in (1e-6, 10.0):
        trainer = make_trainer(max_loss_increase=budget, locality_weight=5.0, max_steps=6, learning_rate=1e-3)
        trainer.train()
        logs[budget] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("distillation_loss" in entry for each in logs.values() for entry in each)
    assert [entry["locality_weight"] for entry in logs[10.0]] == pytest.approx(
        [math.exp(0.05 * (at + 1)) for at in range(6)], rel=1e-2
    )
    shrinking = [entry["locality_weight"] for entry in logs[1e-6]]
    assert shrinking[-1] < shrinking[1] < 1.1
    first = logs[10.0][0]
    assert first["loss"] == pytest.approx(
        first["lm_loss"] + first["locality_loss"] * first["locality_weight"], rel=1e-4
    )


@given(
    weight=st.floats(1e-3, 1e3), divergence=st.floats(0, 1e6), budget=st.floats(1e-6, 1e3)
)  # fmt: skip
def test_the_weight_moves_towards_the_budget_in_small_steps(weight, divergence, budget) -> None:
    moved = next_weight(weight, divergence, budget)
    assert 1e-3 <= moved <= 1e3
    assert math.exp(-0.0501) * weight <= moved <= math.exp(0.0501) * weight
    assert moved <= weight if divergence > budget else moved >= weight


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 700), st.integers(2, 9)), seed=st.integers(0, 99))
def test_the_divergence_and_its_gradient_are_torchs(shape, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    is_counted = torch.rand(shape[:2], generator=generator) < 0.7
    expected = F.kl_div(
        logits[is_counted].log_softmax(-1), teacher[is_counted].log_softmax(-1), reduction="sum", log_target=True
    )
    (gradient,) = torch.autograd.grad(3 * expected, logits)
    found = kl_divergence_sum(logits, teacher.clone(), is_counted)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_close(torch.autograd.grad(3 * found, logits)[0], gradient, atol=1e-5, rtol=1e-4)


def test_in_half_precision_the_divergence_is_taken_in_float32() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 1, 40, 500).bfloat16()
    wide = [each.float() for each in (logits, teacher)]
    logits.requires_grad_(True)
    found = kl_divergence_sum(logits, teacher, torch.ones(1, 40, dtype=torch.bool))
    expected = F.kl_div(wide[0].log_softmax(-1), wide[1].log_softmax(-1), reduction="sum", log_target=True)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(found, logits)[0].dtype == torch.bfloat16


def test_in_bfloat16_a_copy_predicts_as_the_model_does(make_trainer) -> None:
    _, log = step(make_trainer(distillation_weight=0.5, bf16=True))
    assert log["distillation_loss"] == pytest.approx(0, abs=1e-7)  # at dial 0, before anything is learned


def test_a_held_model_of_any_architecture(make_trainer, rows) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = localize(LlamaForCausalLM(config), locality_schedule="upper_half", num_sink_tokens=1)
    reference = copy.deepcopy(model)
    found, _ = step(make_trainer(model, **RECIPES["both"]))
    by_hand(reference, copy.deepcopy(reference), rows, [0, 1], 0.9)
    assert_same(found, reference)


def test_without_local_layers_there_is_a_teacher_and_no_dial(make_trainer, make_model, transformers_warnings) -> None:
    model = make_model(locality_schedule="distributed")
    _, log = step(make_trainer(model, **RECIPES["hold"]))
    assert log["distillation_loss"] == pytest.approx(0, abs=1e-6)
    assert "which change nothing" not in transformers_warnings.text
    assert isinstance(model, LocalistGPT2LMHeadModel)
