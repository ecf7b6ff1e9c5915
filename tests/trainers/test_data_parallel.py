"""
`nn.DataParallel`, which Trainer takes where it sees several GPUs and no launcher: a stand-in on the CPU that cuts
batches up and puts outputs together as torch does. And losses of the user's own.
"""

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.parallel import scatter_gather
from torch.testing import assert_close
from transformers import TrainerCallback

from localist_hf.evaluation import causal_lm_collator
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


class Scatter:
    @staticmethod
    def apply(devices, chunk_sizes, dim, tensor):
        return tensor.chunk(len(devices), dim)


class Gather:
    @staticmethod
    def apply(device, dim, *tensors):
        return torch.cat([tensor[None] if tensor.ndim == 0 else tensor for tensor in tensors], dim)


class TwoDevices(nn.DataParallel):
    """Runs the module on both halves of a batch, one after the other."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *args, **kwargs):
        args, kwargs = scatter_gather.scatter_kwargs(args, kwargs, [0, 1])
        outputs = [self.module(*some, **others) for some, others in zip(args, kwargs, strict=True)]
        return scatter_gather.gather(outputs, "cpu")


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        model = model.module if isinstance(model, nn.DataParallel) else model
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def run(make_model, make_text, monkeypatch, tmp_path) -> Callable:
    """The metrics of an evaluation and the gradients and log of a step of training."""

    def run(devices: int, compute_loss_func: Callable | None = None, collator: Callable | None = None, **arguments):
        args = LocalistTrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=4 // devices, max_steps=1, max_grad_norm=0,
            report_to="none", save_strategy="no", logging_steps=1, locality_weight=3.0, disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, **{"per_device_train_batch_size": 8 // devices, **arguments},
        )  # fmt: skip
        if devices == 2:
            args._n_gpu = 2
            monkeypatch.setattr(scatter_gather, "Scatter", Scatter)
            monkeypatch.setattr(scatter_gather, "Gather", Gather)
            monkeypatch.setattr(nn, "DataParallel", TwoDevices)
        lengths = (60, 13, 41, 5, 22, 60, 48, 9)
        rows = [row[:length].tolist() for row, length in zip(make_text(8, 60), lengths, strict=True)]
        dataset, keeper = Dataset.from_dict({"input_ids": rows}), KeepGradients()
        trainer = LocalistTrainer(
            model=make_model(locality_schedule="linear"), args=args, train_dataset=dataset, callbacks=[keeper],
            eval_dataset=dataset.select(range(5)), compute_loss_func=compute_loss_func, data_collator=collator,
        )  # fmt: skip
        trainer.train()
        (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        trainer.model.load_state_dict(make_model(locality_schedule="linear").state_dict())
        assert isinstance(trainer.model_wrapped, TwoDevices) == (devices == 2)
        return trainer.evaluate(), keeper.gradients, log

    return run


def numbers(entries: dict[str, float]) -> dict[str, float]:
    changing = ("runtime", "per_second", "time")
    return {name: value for name, value in entries.items() if not name.endswith(changing)}


def sum_of_losses(outputs, labels, num_items_in_batch):
    """The language modeling loss, as a function of the user's own."""
    losses = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return losses / num_items_in_batch.flatten()[0]


def test_two_devices_give_what_one_does(run) -> None:
    (one, gradients, log), (two, other_gradients, other_log) = run(1), run(2)
    assert "eval_entropy_layer_3" in one
    assert "fidelity_layer_3" in log
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-5)
    assert numbers(other_log) == pytest.approx(numbers(log), rel=1e-4)
    for name, gradient in gradients.items():
        assert_close(
            other_gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_loss_of_the_users_own_has_the_same_locality_loss_beside_it(run) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    (own, own_gradients, own_log), (ours, gradients, log) = run(1, sum_of_losses, **settings), run(1, **settings)
    assert numbers(own_log) == pytest.approx(numbers(log), rel=1e-4)
    assert_close(own_gradients, gradients, atol=1e-5, rtol=1e-3)
    same = {name: value for name, value in numbers(ours).items() if name != "eval_loss"}
    assert {name: value for name, value in numbers(own).items() if name != "eval_loss"} == pytest.approx(same, rel=1e-5)


def test_a_loss_without_labels_is_not_divided_by_the_steps_of_accumulation(run) -> None:
    """Trainer leaves a loss of the user's own as it is, so that the locality loss must be the part of a mean."""

    def without_labels(features):
        return {name: tensor for name, tensor in causal_lm_collator(features).items() if name != "labels"}

    def nothing(outputs, labels, num_items_in_batch):
        return outputs.logits.sum() * 0

    _, whole, _ = run(1, nothing, without_labels)
    _, parts, _ = run(1, nothing, without_labels, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert max(gradient.abs().max() for gradient in whole.values()) > 0
    assert_close(parts, whole, atol=1e-5, rtol=1e-3)


def test_the_loss_of_an_evaluation_is_the_users_own(run) -> None:
    metrics, _, _ = run(1, lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * 0 + 2.5)
    assert metrics["eval_loss"] == 2.5
    assert metrics["eval_perplexity"] != pytest.approx(2.718**2.5, rel=0.01)
