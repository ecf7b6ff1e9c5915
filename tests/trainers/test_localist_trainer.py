"""LocalistTrainer: the loss, its gradients however the batch is cut up, logs, evaluation, resuming."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from architectures import localised, text
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure
from localist_hf.evaluation.check_model import num_positions
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments, LocalityLossMixin, locality_loss
from localist_hf.trainers.moved_blocks import moved_blocks


LENGTH = 48


def random_dataset(rows: int, vocabulary: int = 97, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(7, vocabulary, (rows, LENGTH), generator=generator).tolist()})


@pytest.fixture
def make_trainer(make_model: Callable, tmp_path: Path) -> Callable[..., LocalistTrainer]:
    def make(
        model=None, rows: int = 8, folder: str = "run", dataset=None, collator=None, **arguments
    ) -> LocalistTrainer:
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "locality_weight": 3.0,
        }
        return LocalistTrainer(
            model=make_model(locality_schedule="linear") if model is None else model,
            args=LocalistTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **arguments}),
            train_dataset=random_dataset(rows) if dataset is None else dataset,
            eval_dataset=random_dataset(6, seed=1),
            data_collator=collator,
        )

    return make


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if not self.gradients:
            self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def first_gradients(trainer: LocalistTrainer) -> dict[str, torch.Tensor]:
    keeper = KeepGradients()
    trainer.add_callback(keeper)
    trainer.train()
    return keeper.gradients


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def weights(trainer: LocalistTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def objectives(outputs, objective: str = "context") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is asked of each layer, and the positions that count, by docs/method.md#locality-loss."""
    if objective == "fidelity":
        return outputs.fidelity, outputs.fidelity_mask
    pairs = zip(outputs.block_share, outputs.outside_share, strict=True)
    return [block / (block + outside + 1e-3) for block, outside in pairs], outputs.context_mask


@pytest.mark.parametrize("objective", ["context", "fidelity"])
def test_gradient_is_that_of_the_loss_written_out(make_trainer, make_model, objective: str) -> None:
    settings = {"locality_objective": objective, "target_fidelity": 0.7, "locality_exponent": 2}
    trainer = make_trainer(max_steps=1, rows=2, max_grad_norm=0, **settings)
    model = make_model(locality_schedule="linear")
    input_ids = torch.tensor(random_dataset(2)["input_ids"])
    outputs = model(input_ids, labels=input_ids, output_fidelity=True)
    lambdas = model.config.locality_lambdas
    locality = sum(
        weight * locality_loss(share, mask, 0.7, 2).mean() / len(lambdas)
        for weight, share, mask in zip(lambdas, *objectives(outputs, objective), strict=True)
    )
    (outputs.loss + 3.0 * locality).backward()
    assert locality > 0
    assert_same(first_gradients(trainer), {name: parameter.grad for name, parameter in model.named_parameters()})


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of different lengths: the first row of every four keeps 20 tokens, the second 5, fewer than any block."""
    input_ids = torch.tensor([feature["input_ids"] for feature in features])
    mask = torch.ones_like(input_ids)
    for row, feature in enumerate(features):
        mask[row, feature["keep"] :] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


@pytest.fixture(params=["context", "contrast", "choice"])
def objective_on_fixed_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An objective; where it compares blocks with moved ones, these are moved alike in all batches."""
    monkeypatch.setattr(
        "localist_hf.trainers.locality_loss_mixin.moved_blocks",
        lambda starts, documents, _: moved_blocks(starts, documents, 0.4),
    )
    return request.param


def test_accumulation_steps_give_the_gradients_of_one_batch(make_trainer, objective_on_fixed_blocks: str) -> None:
    """Rows of different lengths, one of them without counted positions, so that a mean of means would differ."""
    dataset = random_dataset(8).add_column("keep", [20, 5, LENGTH, 30, LENGTH, LENGTH, 9, 40])
    settings = {"dataset": dataset, "collator": pad, "max_steps": 1, "max_grad_norm": 0, "remove_unused_columns": False}
    settings["locality_objective"] = objective_on_fixed_blocks
    whole = first_gradients(make_trainer(per_device_train_batch_size=8, **settings))
    parts = first_gradients(make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings))
    assert_same(parts, whole)


def test_an_incomplete_last_accumulation_is_a_mean_too(make_trainer) -> None:
    """Six rows by batches of 4: the second batch holds two rows and must not weigh as much as the first."""
    settings = {"rows": 6, "max_steps": 1, "max_grad_norm": 0}
    whole = first_gradients(make_trainer(per_device_train_batch_size=6, **settings))
    parts = first_gradients(make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings))
    assert_same(parts, whole)


@pytest.mark.parametrize("average_tokens", [True, False])
def test_without_token_averaging_the_term_is_still_a_mean(make_trainer, average_tokens: bool) -> None:
    settings = {"max_steps": 1, "max_grad_norm": 0, "average_tokens_across_devices": average_tokens}
    whole = first_gradients(make_trainer(per_device_train_batch_size=8, **settings))
    parts = first_gradients(make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings))
    assert_same(parts, whole)


@pytest.mark.parametrize("objective", ["context", "contrast", "choice"])
def test_gradient_checkpointing_changes_nothing(make_trainer, objective: str) -> None:
    settings = {"max_steps": 1, "max_grad_norm": 0, "locality_objective": objective}
    plain = first_gradients(make_trainer(**settings))
    checkpointed = first_gradients(make_trainer(gradient_checkpointing=True, **settings))
    assert_same(checkpointed, plain)


def test_zero_weight_is_plain_fine_tuning(make_trainer, make_model) -> None:
    def trained(schedule: str, weight: float) -> dict[str, torch.Tensor]:
        trainer = make_trainer(make_model(locality_schedule=schedule), locality_weight=weight)
        trainer.train()
        return weights(trainer)

    plain = trained("distributed", 3.0)
    for name, tensor in trained("linear", 0.0).items():
        assert torch.equal(tensor, plain[name]), name
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in trained("linear", 3.0).items())


# Where a single layer is local, what it is handed is the same on any blocks, under the dial too.
@pytest.mark.parametrize(
    "schedule",
    [{"locality_schedule": "linear"}, {"locality_schedule": [0.0, 0.0, 0.0, 0.8], "locality_dial": 0.5}],
    ids=["dial 0", "dial 0.5"],
)
def test_contrast_is_that_of_the_loss_written_out(make_trainer, make_model, schedule: dict) -> None:
    """psi, and its distance from psi on the same blocks moved along the text."""
    settings = {"locality_objective": "contrast", "target_fidelity": 0.7, "locality_exponent": 2}
    trainer = make_trainer(make_model(**schedule), max_steps=1, rows=2, max_grad_norm=0, **settings)
    shares = []

    def keep(starts: torch.Tensor, documents: torch.Tensor, share: float) -> torch.Tensor:
        shares.append(share)
        return moved_blocks(starts, documents, share)

    with patch("localist_hf.trainers.locality_loss_mixin.moved_blocks", keep):
        found = first_gradients(trainer)
    model = make_model(**schedule)
    input_ids = torch.tensor(random_dataset(2)["input_ids"])
    outputs = model(input_ids, labels=input_ids, output_fidelity=True)
    starts = moved_blocks(outputs.block_starts[-1], torch.zeros_like(input_ids), *shares)
    assert not torch.equal(starts, outputs.block_starts[-1])
    moved = model(input_ids, block_starts=starts, output_fidelity=True)
    lambdas = model.config.locality_lambdas
    terms = zip(lambdas, *objectives(outputs), objectives(moved)[0], moved.fidelity_mask, strict=True)
    locality = sum(
        weight
        * (locality_loss(psi, mask, 0.7, 2) + 2.0 * locality_loss(psi - other, mask & both, 0.5, 2)).mean()
        / len(lambdas)
        for weight, psi, mask, other, both in terms
    )
    (outputs.loss + 3.0 * locality).backward()
    assert_same(found, {name: parameter.grad for name, parameter in model.named_parameters()})


def with_pointers(rows: int) -> Dataset:
    """Texts of which the tokens from the 20th on are to look at the second block of eight tokens."""
    dataset = random_dataset(rows)
    length = len(dataset[0]["input_ids"])
    starts = [place // 8 * 8 for place in range(length)]
    pointers = [1 if place >= 20 else -1 for place in range(length)]
    return dataset.add_column("block_starts", [starts] * rows).add_column("pointer_blocks", [pointers] * rows)


@pytest.mark.parametrize("objective", ["context", "fidelity"])
def test_the_loss_of_pointers_is_that_written_out_and_is_learned(make_trainer, make_model, objective: str) -> None:
    settings = {"locality_objective": objective, "target_fidelity": 0.9, "locality_exponent": 2}
    dataset = with_pointers(2)
    trainer = make_trainer(max_steps=1, dataset=dataset, max_grad_norm=0, **settings)
    model = make_model(locality_schedule="linear")
    inputs = {name: torch.tensor(dataset[name]) for name in ("input_ids", "block_starts", "pointer_blocks")}
    outputs = model(**inputs, labels=inputs["input_ids"], output_fidelity=True)
    assert not outputs.fidelity_mask[-1][:, :20].any()
    assert outputs.fidelity_mask[-1][:, 20:].all()
    lambdas, locality = model.config.locality_lambdas, 0.0
    for weight, share, mask in zip(lambdas, *objectives(outputs, objective), strict=True):
        locality = locality + weight * locality_loss(share, mask, 0.9, 2).mean() / len(lambdas)
    (outputs.loss + 3.0 * locality).backward()
    assert_same(first_gradients(trainer), {name: parameter.grad for name, parameter in model.named_parameters()})
    if objective == "context":
        before = measure(model, dataset).metrics["context_fidelity_layer_3"]
        trainer = make_trainer(
            model, dataset=dataset, max_steps=40, learning_rate=3e-3, folder="long",
            distillation_weight=0.5, **settings | {"locality_weight": 20.0},
        )  # fmt: skip
        trainer.train()
        report = measure(model, dataset)
        assert report.metrics["context_fidelity_layer_3"] > before + 0.3
        evaluated = trainer.evaluate(dataset)
        assert evaluated["eval_context_fidelity_layer_3"] == pytest.approx(
            report.metrics["context_fidelity_layer_3"], abs=1e-6
        )
        assert "top_block_share" not in report.metrics


@pytest.mark.parametrize("objective", ["contrast", "choice"])
def test_objectives_of_blocks_refuse_pointers(make_trainer, objective: str) -> None:
    trainer = make_trainer(dataset=with_pointers(4), locality_objective=objective)
    with pytest.raises(ValueError, match=f"`locality_objective` is '{objective}', and the batches have 'pointer_bl"):
        trainer.train()


@pytest.mark.parametrize("dial", [0.0, 0.5])
def test_choice_is_that_of_the_loss_written_out(make_trainer, make_model, dial: float) -> None:
    """The entropy of the attention to other words over blocks, above that of as many as are asked for."""
    schedule = {"locality_schedule": "linear", "locality_dial": dial}
    settings = {"locality_objective": "choice", "target_blocks": 1.5, "locality_exponent": 2}
    trainer = make_trainer(make_model(**schedule), max_steps=1, rows=2, max_grad_norm=0, **settings)
    found = first_gradients(trainer)
    model = make_model(**schedule)
    input_ids = torch.tensor(random_dataset(2)["input_ids"])
    outputs = model(input_ids, labels=input_ids, output_fidelity=True, output_block_shares=True)
    lambdas, locality = model.config.locality_lambdas, 0.0
    for weight, shares, mask in zip(lambdas, outputs.block_shares, outputs.fidelity_mask, strict=True):
        q = (shares / shares.sum(-1, keepdim=True).clamp(min=1e-6)).clamp(min=1e-12)
        excess = (-(q * q.log()).sum(-1) - math.log(1.5)).clamp(min=0).square()
        excess = (excess * shares.sum(-1).detach()).mean(1)
        locality = locality + weight / len(lambdas) * ((excess * mask).sum(1) / mask.sum(1)).mean()
    (outputs.loss + 3.0 * locality).backward()
    assert locality > 0.01
    assert_same(found, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize(
    ("dial", "min_fidelity", "is_saved", "bf16"),
    [
        (0.0, 0.0, False, True),
        (0.5, 0.0, True, False),
        (1.0, 0.0, False, True),
        (0.0, 0.6, False, False),
        (0.3, 0.9, True, True),
    ],
)
def test_blocks_that_are_not_moved_make_no_contrast(
    make_trainer, dial: float, min_fidelity: float, is_saved: bool, bf16: bool
) -> None:
    """Under any dial, of the configuration or set for a while, and in the precision of the model's own attention."""
    differences = []

    def keep(fidelity: torch.Tensor, mask: torch.Tensor, target: float, *args) -> torch.Tensor:
        if target == 0.5:
            assert mask.any()
            differences.append((fidelity.detach() * mask[:, None]).abs().max().item())
        return locality_loss(fidelity, mask, target, *args)

    held = {"locality_dial": dial, "min_fidelity": min_fidelity}
    model = localised("llama", block_partition="window", window_length=7, **(held if is_saved else {}))
    args = make_trainer(max_steps=1, locality_objective="contrast", bf16=bf16).args
    trainer = LocalistTrainer(model, args, train_dataset=Dataset.from_dict({"input_ids": text()[0].tolist()}))
    module = "localist_hf.trainers.locality_loss_mixin"
    with (
        nullcontext() if is_saved else model.set_locality_dial(dial, min_fidelity),
        patch(f"{module}.moved_blocks", lambda starts, *_: starts),
        patch(f"{module}.locality_loss", keep),
    ):
        trainer.train()
    assert differences == [0.0] * 3


def test_contrast_tells_own_blocks_from_moved_ones(make_trainer, make_model) -> None:
    """Where looking near is enough for psi, it is not for the contrast."""
    input_ids = torch.tensor(random_dataset(8)["input_ids"])
    input_ids[torch.rand(input_ids.shape) < 0.15] = 2  # which ends a block
    dataset = Dataset.from_dict({"input_ids": input_ids.tolist()})

    def gap(objective: str) -> float:
        model = make_model(locality_schedule=[0.0, 0.0, 0.0, 1.0], block_partition="delimiter")
        settings = {"max_steps": 40, "learning_rate": 3e-3, "locality_weight": 20.0, "target_fidelity": 0.8}
        make_trainer(model, dataset=dataset, locality_objective=objective, **settings).train()
        with torch.no_grad():
            outputs = model.eval()(input_ids, output_fidelity=[3])
            starts = moved_blocks(outputs.block_starts[0], torch.zeros_like(input_ids), 0.4)
            moved = model(input_ids, block_starts=starts, output_fidelity=[3])
        both = outputs.fidelity_mask[0] & moved.fidelity_mask[0]
        psi = [
            (each.block_share[0].mean(1) * both).sum()
            / ((each.block_share[0] + each.outside_share[0]).mean(1) * both).sum()
            for each in (outputs, moved)
        ]
        return (psi[0] - psi[1]).item()

    assert gap("contrast") > gap("context") + 0.02


@pytest.mark.parametrize("objective", ["context", "fidelity", "choice"])
def test_training_raises_what_it_asks_for(make_trainer, make_model, objective: str) -> None:
    model = make_model(locality_schedule=[0.0, 0.0, 0.0, 1.0])
    trainer = make_trainer(
        model, max_steps=25, learning_rate=3e-3, locality_weight=20.0, logging_steps=1, locality_objective=objective
    )
    trainer.train()
    names = {"context": "context_fidelity", "fidelity": "fidelity", "choice": "top_block_share"}
    name = f"{names[objective]}_layer_3"
    series = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert series[-1] > series[0] + 0.2
    looked_at = [entry.get("blocks_looked_at_layer_3") for entry in trainer.state.log_history if name in entry]
    assert (looked_at[-1] < looked_at[0] - 0.2) if objective == "choice" else looked_at == [None] * len(series)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-3), ("bfloat16", 0.25)])
def test_gradients_of_the_choice_are_right_where_little_goes_to_other_words(
    make_trainer, make_model, precision: str, error: float
) -> None:
    """Such parts are the rounding of others, and what divides by them would be the largest part of all gradients."""
    model = make_model(locality_schedule="localist", n_embd=64, initializer_range=0.1)
    with torch.no_grad():
        for block in model.transformer.h:  # keys are much like queries, and long
            weight = block.attn.c_attn.weight
            weight[:, 64:128] = 0.6 * weight[:, :64] + 0.4 * weight[:, 64:128]
            weight[:, :128] *= 4
    # So much of it that the trainer's own loss is nothing beside it.
    settings = {"max_steps": 1, "rows": 2, "max_grad_norm": 0, "locality_objective": "choice", "target_blocks": 1}
    exact = copy.deepcopy(model).double()
    trainer = make_trainer(model, bf16=precision == "bfloat16", **settings | {"locality_weight": 1e4})
    found = first_gradients(trainer)

    outputs = exact(torch.tensor(random_dataset(2)["input_ids"]), output_fidelity=True, output_block_shares=True)
    loss, others = 0.0, []
    for shares, mask in zip(outputs.block_shares, outputs.fidelity_mask, strict=True):
        total = shares.sum(-1)
        q = (shares / total.clamp(min=1e-30)[..., None]).clamp(min=1e-30)
        excess = (-(q * q.log()).sum(-1) * total.detach()).mean(1)
        loss = loss + ((excess * mask).sum(1) / mask.sum(1)).mean() / 4
        others.append(total.detach())
    (1e4 * loss).backward()
    little = torch.stack(others)
    assert (little < 1e-3).float().mean() > 0.1
    assert (little > 0.1).float().mean() > 0.1
    expected = {name: parameter.grad for name, parameter in exact.named_parameters() if "c_attn" in name}
    differences = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()])
    assert differences.norm() < error * torch.stack([gradient.norm() for gradient in expected.values()]).norm()


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ({}, {"training_dials": [1], "target_blocks": 1}, "what it asks for is so already. At dial 1"),
        ({}, {"target_blocks": 1e9}, "what it asks for is so already"),
        ({"block_partition": "window", "window_length": 64}, {}, "no token sees more than its local set"),
        ({}, {"target_blocks": 1}, None),
    ],
)
def test_what_asks_for_nothing_is_said_with_the_reason(
    make_trainer, make_model, transformers_warnings, model: dict, settings: dict, said: str | None
) -> None:
    trainer = make_trainer(
        make_model(locality_schedule="localist", **model), max_steps=1, locality_objective="choice", **settings
    )
    trainer.train()
    found = transformers_warnings.text
    assert (f"The locality loss is 0: {said}" in found) if said else ("The locality loss is 0" not in found)


def test_attention_that_is_all_on_sinks_is_said_to_be(make_trainer, transformers_warnings) -> None:
    model = localised("gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(300.0)
    dataset = Dataset.from_dict({"input_ids": text()[0].tolist()})
    make_trainer(model, dataset=dataset, max_steps=1, locality_objective="choice", target_blocks=1).train()
    assert "The locality loss is 0: no attention goes to other words" in transformers_warnings.text


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_that_is_all_on_the_own_token_gives_finite_gradients(make_trainer, make_model, precision) -> None:
    model = make_model(locality_schedule="localist")
    with torch.no_grad():
        for block in model.transformer.h:  # keys are the queries, and long: every query sees itself alone
            weight = block.attn.c_attn.weight
            weight[:, 32:64] = weight[:, :32] * 30
    outputs = model(torch.tensor(random_dataset(2)["input_ids"]), output_fidelity=True)
    assert (torch.stack(outputs.self_share) > 0.999).float().mean() > 0.5
    trainer = make_trainer(model, max_steps=1, max_grad_norm=0, bf16=precision == "bfloat16")
    assert all(gradient.isfinite().all() for gradient in first_gradients(trainer).values())


def test_logs_hold_each_quantity_as_a_series(make_trainer) -> None:
    trainer = make_trainer(max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        # The linear schedule leaves layer 0 free, and what is free is not measured in training.
        assert [name for name in entry if name.startswith("fidelity")] == [f"fidelity_layer_{n}" for n in (1, 2, 3)]
        for layer in (1, 2, 3):
            shares = [entry[f"{name}_share_layer_{layer}"] for name in ("self", "sink", "block", "outside")]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert entry[f"fidelity_layer_{layer}"] == pytest.approx(1 - shares[3])
            assert entry[f"context_fidelity_layer_{layer}"] == pytest.approx(shares[2] / (shares[2] + shares[3]))
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 3.0 * entry["locality_loss"], rel=1e-4)


class FailOnce(TrainerCallback):
    """Ends the first run with an exception, after its first step."""

    def __init__(self, error: BaseException) -> None:
        self.errors = [error]

    def on_step_end(self, *args, **kwargs) -> None:
        if self.errors:
            raise self.errors.pop()


def second_training(trainer: LocalistTrainer) -> None:
    trainer.train()
    trainer.train()


def training_after_an_exception(trainer: LocalistTrainer) -> None:
    trainer.add_callback(FailOnce(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate()
    trainer.train()


def retry_with_smaller_batches(trainer: LocalistTrainer) -> None:
    trainer.add_callback(FailOnce(RuntimeError("CUDA out of memory.")))
    trainer.args.auto_find_batch_size = True
    trainer.train()
    assert trainer.state.train_batch_size < 2


def trials_of_a_search(trainer: LocalistTrainer) -> None:
    class Backend:
        def ensure_available(self) -> None:
            pass

        def run(self, trainer: Trainer, n_trials: int, direction: str) -> None:
            for number in range(n_trials):
                trainer.train(trial={"learning_rate": 1e-3 * number})

    backends = {HPSearchBackend.WANDB: Backend}
    with (
        patch.dict("sys.modules", wandb=SimpleNamespace(run=SimpleNamespace(id="trial"))),
        patch.dict("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends),
        patch("transformers.integrations.integration_utils.is_wandb_available", lambda: True),
    ):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=2, backend="wandb")
    assert trainer.args.learning_rate == 1e-3


@pytest.mark.parametrize(
    "train", [second_training, training_after_an_exception, retry_with_smaller_batches, trials_of_a_search]
)
def test_a_run_logs_nothing_of_the_run_before(make_trainer, make_model, train: Callable) -> None:
    """A run of three steps that logs after two leaves the third unlogged."""
    trainer = make_trainer(max_steps=3, logging_steps=2, rows=6)
    if train is trials_of_a_search:
        trainer.model_init = lambda: make_model(locality_schedule="linear")
    train(trainer)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + 3.0 * entry["locality_loss"], rel=1e-4)


def test_tensorboard_gets_the_series(make_trainer, tmp_path: Path, monkeypatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    trainer.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    training = {"train/lm_loss", "train/locality_loss", "train/fidelity_layer_3"}
    assert training | {"eval/perplexity", "eval/entropy_layer_0"} <= set(events.Tags()["scalars"])


def test_warm_up_grows_the_locality_term(make_trainer) -> None:
    trainer = make_trainer(max_steps=4, locality_warmup_steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    shares = [(entry["loss"] - entry["lm_loss"]) / (3.0 * entry["locality_loss"]) for entry in logs]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-3)
    trainer = make_trainer(max_steps=8, locality_warmup_steps=0.25)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    shares = [(entry["loss"] - entry["lm_loss"]) / (3.0 * entry["locality_loss"]) for entry in logs]
    assert shares[:3] == pytest.approx([0.5, 1.0, 1.0], rel=1e-3)


def test_evaluation_reports_what_measure_finds_and_a_loss_without_locality(make_trainer) -> None:
    trainer = make_trainer(per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    expected = measure(trainer.model, random_dataset(6, seed=1)).metrics
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert {f"eval_entropy_layer_{layer}" for layer in range(4)} <= metrics.keys()


def test_predict_works_with_and_without_labels(make_trainer) -> None:
    trainer = make_trainer()
    output = trainer.predict(random_dataset(3), metric_key_prefix="test")
    assert output.predictions.shape == (3, LENGTH, 97)
    assert output.metrics["test_perplexity"] > 1


def test_an_interrupted_run_resumes_to_the_same_weights(make_trainer, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "locality_warmup_steps": 5}
    whole = make_trainer(folder="whole", **settings)
    whole.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 3

    interrupted = make_trainer(folder="resumed", **settings)
    interrupted.add_callback(Interrupt())
    interrupted.train()
    assert interrupted.state.global_step == 3
    resumed = make_trainer(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_checkpoints_carry_the_code_and_load_as_saved(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {"modeling_localist_gpt2.py", "configuration_localist_gpt2.py", "model.safetensors"} <= {
        path.name for path in checkpoint.iterdir()
    }
    loaded = LocalistGPT2LMHeadModel.from_pretrained(checkpoint)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights(trainer)[name]), name


def test_bfloat16_autocast_trains(make_trainer) -> None:
    exact, mixed = make_trainer(max_steps=3), make_trainer(max_steps=3, bf16=True)
    exact.train()
    mixed.train()
    for one, other in zip(exact.state.log_history[:3], mixed.state.log_history[:3], strict=True):
        assert other["locality_loss"] == pytest.approx(one["locality_loss"], rel=0.05)
        assert other["lm_loss"] == pytest.approx(one["lm_loss"], rel=0.05)


@pytest.mark.slow
def test_torch_compile_trains_to_the_same_losses(make_trainer) -> None:
    plain, compiled = make_trainer(max_steps=3), make_trainer(max_steps=3, torch_compile=True)
    plain.train()
    compiled.train()
    for one, other in zip(plain.state.log_history[:3], compiled.state.log_history[:3], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert compiled.evaluate()["eval_fidelity"] == pytest.approx(plain.evaluate()["eval_fidelity"], rel=1e-3)


def test_a_lora_adapter_trains_and_only_it(make_trainer, make_model) -> None:
    base = make_model(locality_schedule=[0.0, 0.0, 0.0, 1.0])
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_trainer(get_peft_model(base, adapter), max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.log_history[0]["fidelity_layer_3"] > 0
    after = dict(trainer.model.named_parameters())
    for name, tensor in before.items():
        wrapped = name.replace("c_attn.", "c_attn.base_layer.")
        assert torch.equal(after[f"base_model.model.{wrapped}"], tensor), name
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in after.items())
    assert "eval_fidelity_layer_3" in trainer.evaluate()


def test_another_model_is_refused(make_trainer) -> None:
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel"):
        make_trainer(plain)


def test_sequences_longer_than_the_model_are_refused(make_trainer, make_model) -> None:
    with pytest.raises(ValueError, match=r"`train_dataset` holds a sequence of 48 tokens; the model has 32 positions"):
        make_trainer(make_model(n_positions=32))


def test_label_smoothing_is_refused(make_trainer) -> None:
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0.1"):
        make_trainer(label_smoothing_factor=0.1)


def test_reentrant_checkpointing_is_refused_rather_than_train_nothing(make_trainer) -> None:
    trainer = make_trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="`use_reentrant` is True"):
        trainer.train()


LENGTHS = (48, 9, 30, 41, 5, 22)


def ragged_dataset(**columns: list) -> Dataset:
    rows = [row[:length] for row, length in zip(random_dataset(6)["input_ids"], LENGTHS, strict=True)]
    return Dataset.from_dict({"input_ids": rows, **columns})


def test_a_padded_sequence_counts_as_it_does_alone(make_trainer, make_model) -> None:
    """The gradient is that of the sequences one by one: the mean over labels, and over sequences of their shortfall."""
    settings = {"max_steps": 1, "max_grad_norm": 0, "dataset": ragged_dataset()}
    padded = first_gradients(make_trainer(per_device_train_batch_size=6, **settings))
    parts = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=6, **settings)
    assert_same(first_gradients(parts), padded)
    model = make_model(locality_schedule="linear")
    for row in settings["dataset"]["input_ids"]:
        input_ids = torch.tensor([row])
        outputs = model(input_ids, labels=input_ids, output_fidelity=True)
        asked = zip(model.config.locality_lambdas, *objectives(outputs), strict=True)
        locality = sum(weight / 4 * locality_loss(share, mask, 0.9, 1) for weight, share, mask in asked)
        (outputs.loss * (len(row) - 1) / (sum(LENGTHS) - 6) + 3.0 * locality.sum() / 6).backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, padded)


def test_a_given_tokenizer_takes_no_token_for_padding(make_trainer, make_model) -> None:
    """Where its end-of-text token pads, as is usual for GPT-2, the ends of texts are labels all the same."""
    vocabulary = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="9", pad_token="9")
    trainer = LocalistTrainer(model=make_model(), args=make_trainer().args, processing_class=tokenizer)
    batch = trainer.data_collator([{"input_ids": [5, 9, 6, 9]}, {"input_ids": [5, 9]}])
    assert batch["labels"].tolist() == [[5, 9, 6, 9], [5, 9, -100, -100]]


def test_sequences_without_what_the_tokenizer_puts_before_a_text_are_warned_of(
    make_trainer, make_model, bos_tokenizer, tokenizer, transformers_warnings
) -> None:
    def warned(train: list, evaluation: list | None, tokenizer: PreTrainedTokenizerFast | None = bos_tokenizer) -> list:
        transformers_warnings.clear()
        datasets = [rows and Dataset.from_dict({"input_ids": rows}) for rows in (train, evaluation)]
        LocalistTrainer(
            model=model, args=args, train_dataset=datasets[0], eval_dataset=datasets[1], processing_class=tokenizer
        )
        return [record.getMessage() for record in transformers_warnings.records]

    model, args = make_model(vocab_size=len(bos_tokenizer)), make_trainer().args
    text = bos_tokenizer("Sentence number 1 says something.")["input_ids"]
    bos = text[:1]
    cut = [text[:4], text[4:8]]
    (message,) = warned(cut, [bos + row for row in cut])
    assert message.startswith(
        "The last sequence of `train_dataset` does not begin with '<bos>', which the tokenizer puts"
    )
    assert len(warned(cut, cut)) == 2
    assert warned([bos + cut[1]], None) == warned(cut, cut, tokenizer) == warned(cut, cut, None) == []


def test_evaluation_of_padded_sequences_is_that_of_each_alone(make_trainer) -> None:
    alone = make_trainer(per_device_eval_batch_size=1).evaluate(ragged_dataset())
    together = make_trainer(per_device_eval_batch_size=4).evaluate(ragged_dataset())
    kinds = ("eval_loss", "eval_perplexity", "eval_fidelity", "eval_entropy")
    for name, value in alone.items():
        if name.startswith(kinds):
            assert together[name] == pytest.approx(value, rel=1e-4), name


def test_evaluation_counts_no_batch_without_labels(make_trainer) -> None:
    rows = random_dataset(4)["input_ids"]
    labels = [rows[0], rows[1], [-100] * LENGTH, [-100] * LENGTH]
    trainer = make_trainer(per_device_eval_batch_size=2)
    metrics = trainer.evaluate(Dataset.from_dict({"input_ids": rows, "labels": labels}))
    expected = trainer.evaluate(Dataset.from_dict({"input_ids": rows[:2]}))
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"])
    assert metrics["eval_perplexity"] == pytest.approx(expected["eval_perplexity"])
    nothing = trainer.evaluate(Dataset.from_dict({"input_ids": rows, "labels": [labels[2]] * 4}))
    assert math.isnan(nothing["eval_perplexity"])
    assert math.isfinite(nothing["eval_fidelity"])


def test_the_best_model_is_that_of_the_least_perplexity(make_trainer) -> None:
    """With a learning rate that ruins the model, the first evaluation is the best."""
    trainer = make_trainer(
        max_steps=3, learning_rate=1.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="perplexity",
    )  # fmt: skip
    trainer.train()
    measured = {entry["step"]: entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_metric == min(measured.values()) < max(measured.values())
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(trainer.state.best_metric)


def test_a_model_that_model_init_makes_counts_with_its_own_schedule(make_trainer, make_model) -> None:
    schedules = iter(["linear", [0.0, 0.0, 0.0, 1.0]])  # at construction, and anew for training
    trainer = LocalistTrainer(
        model_init=lambda: make_model(locality_schedule=next(schedules)), args=make_trainer().args,
        train_dataset=random_dataset(4),
    )  # fmt: skip
    trainer.train()
    (entry, *_) = trainer.state.log_history
    assert [name for name in entry if name.startswith("fidelity")] == ["fidelity_layer_3"]


@pytest.mark.parametrize("wrap", [lambda model: model.transformer, lambda model: GPT2LMHeadModel(model.config), str])
def test_what_cannot_report_its_locality_is_refused_by_its_class(make_trainer, make_model, wrap: Callable) -> None:
    model = wrap(make_model())
    found = f"is a {type(model).__name__}; it must be a localised"
    with pytest.raises(ValueError, match=f"`model` {found}"):
        make_trainer(model)
    with pytest.raises(ValueError, match=rf"`model_init\(\)` {found}"):
        LocalistTrainer(model_init=lambda: model, args=make_trainer().args)


def test_arguments_of_another_class_are_refused(make_model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`args` is a TrainingArguments; it must be a LocalistTrainingArguments"):
        LocalistTrainer(make_model(), TrainingArguments(output_dir=str(tmp_path)))


def test_a_long_sequence_anywhere_is_refused(make_trainer, make_model) -> None:
    model, dataset = make_model(n_positions=40), ragged_dataset()
    with pytest.raises(ValueError, match="`train_dataset` holds a sequence of 48 tokens; the model has 40 positions"):
        make_trainer(model, dataset=dataset.select([1, 2, 0]))
    short = dataset.select([1, 2, 4, 5])
    with pytest.raises(ValueError, match=r"`eval_dataset\['long'\]` holds a sequence of 41 tokens"):
        LocalistTrainer(model, make_trainer().args, eval_dataset={"short": short, "long": dataset.select([1, 3])})
    trainer = LocalistTrainer(model, make_trainer().args, train_dataset=short, eval_dataset=short)
    with pytest.raises(ValueError, match="A batch holds a sequence of 48 tokens; the model has 40 positions"):
        trainer.evaluate(dataset)


def test_packed_texts_have_positions_of_their_own(make_trainer, make_model) -> None:
    """A row may then be longer than the model's positions."""
    columns = {"input_ids": random_dataset(1)["input_ids"], "position_ids": [[*range(20), *range(28)]]}
    args, rows = make_trainer(max_steps=1).args, Dataset.from_dict(columns)
    trainer = LocalistTrainer(make_model(n_positions=30), args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1


def test_packing_changes_no_gradient(make_trainer, make_model, objective_on_fixed_blocks: str) -> None:
    """Every document is a sequence, be it alone in a padded row or one of several in a row, however rows are cut up."""
    texts = ragged_dataset()["input_ids"]
    settings = {"max_steps": 1, "max_grad_norm": 0, "locality_objective": objective_on_fixed_blocks}
    alone = first_gradients(make_trainer(per_device_train_batch_size=6, dataset=ragged_dataset(), **settings))
    # The last row is filled up with documents of one token, which have no label and nothing to localise.
    rows = [[texts[0], texts[1]], [texts[2], texts[5], texts[4]], [texts[3], *[[7]] * 16]]
    columns = {
        "input_ids": [[token for text in row for token in text] for row in rows],
        "position_ids": [[position for text in row for position in range(len(text))] for row in rows],
        "labels": [[token for text in row for token in (-100, *text[1:])] for row in rows],
    }
    packed = Dataset.from_dict(columns)
    for size, steps in ((3, 1), (1, 3), (2, 2)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        assert_same(first_gradients(make_trainer(dataset=packed, **split, **settings)), alone)
    # By themselves documents predict nothing of each other either, nor where TRL's packing tells them apart.
    by_lengths = [[len(text) for text in row] for row in rows]
    unlabelled = packed.remove_columns("labels")
    for dataset in (unlabelled, unlabelled.remove_columns("position_ids").add_column("seq_lengths", by_lengths)):
        trainer = make_trainer(dataset=dataset, per_device_train_batch_size=3, **settings)
        expected = trainer.evaluate(ragged_dataset())["eval_perplexity"]
        assert trainer.evaluate(dataset)["eval_perplexity"] == pytest.approx(expected, rel=1e-4)
        assert_same(first_gradients(trainer), alone)


class OwnLoss(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            model(input_ids=inputs["input_ids"].flip(1))
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class LocalOwnLoss(LocalityLossMixin, OwnLoss):
    pass


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (1, 4)])
def test_the_mixin_adds_to_a_loss_that_knows_nothing_of_it(make_trainer, make_model, size: int, steps: int) -> None:
    """Also where the trainer calls the model for something else first."""
    args = make_trainer(
        max_steps=1, max_grad_norm=0, per_device_train_batch_size=size, gradient_accumulation_steps=steps
    ).args
    trainer = LocalOwnLoss(
        make_model(locality_schedule="linear"), args, train_dataset=random_dataset(4), eval_dataset=random_dataset(4)
    )  # fmt: skip
    found = first_gradients(trainer)
    model = make_model(locality_schedule="linear")
    outputs = model(torch.tensor(random_dataset(4)["input_ids"]), output_fidelity=True)
    asked = zip(model.config.locality_lambdas, *objectives(outputs), strict=True)
    locality = sum(weight / 4 * locality_loss(share, mask, 0.9, 1).mean() for weight, share, mask in asked)
    own = outputs.logits.square().mean()
    (own + 3.0 * locality).backward()
    assert_same(found, {name: parameter.grad for name, parameter in model.named_parameters()})
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["task_loss"] == pytest.approx(own.item(), rel=1e-4)
    assert log["locality_loss"] == pytest.approx(locality.item(), rel=1e-4)


def test_the_mixin_names_what_it_lacks(make_trainer, make_model, tmp_path: Path) -> None:
    args = make_trainer(max_steps=1, remove_unused_columns=False).args
    with pytest.raises(ValueError, match="`args` is a TrainingArguments; its class must have LocalityArguments"):
        LocalOwnLoss(make_model(), TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="`args` is a NoneType"):
        LocalOwnLoss(make_model())
    trainer = LocalOwnLoss(
        make_model(locality_schedule="linear"), args, train_dataset=Dataset.from_dict({"text": ["a", "b"]}),
        data_collator=list,
    )  # fmt: skip
    with pytest.raises(ValueError, match="A batch holds a list; the locality loss needs 'input_ids'"):
        trainer.train()


def test_rotary_models_have_no_last_position(make_model) -> None:
    learned, rotary = make_model(n_positions=32).config, LlamaConfig(max_position_embeddings=32)
    assert num_positions(learned) == 32
    assert num_positions(rotary) is None
