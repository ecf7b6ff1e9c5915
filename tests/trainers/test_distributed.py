"""Two processes on CPU: gradients, the locality term included, and evaluation are those of one process."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


SETTINGS = {
    "random": {},
    # The processes take different numbers of the same sequences.
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "both ends of the dial, taught": {"training_dials": [0, 1], "distillation_weight": 0.7},
    "the same, accumulated": {
        "training_dials": [0, 1], "distillation_weight": 0.7, "gradient_accumulation_steps": 2,
    },
    "within a budget": {"max_loss_increase": 0.01, "max_steps": 3, "learning_rate": 1e-3},
}  # fmt: skip


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, dict[str, torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        model = getattr(model, "module", model)
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run(folder: Path, processes: int) -> None:
    """Evaluates the model in the folder on its data, takes a step of training, and writes what came of it there."""
    data = torch.load(folder / "data.pt")
    ragged = Dataset.from_dict({"input_ids": data["ragged"]})
    results = {}
    for name, settings in SETTINGS.items():
        steps = settings.get("gradient_accumulation_steps", 1)
        defaults = {
            "per_device_train_batch_size": 8 // processes // steps, "max_steps": 1, "per_device_eval_batch_size": 2,
            "max_grad_norm": 0, "use_cpu": True, "report_to": "none", "save_strategy": "no", "locality_weight": 3.0,
            "disable_tqdm": True, "ddp_backend": "gloo" if processes > 1 else None, "dataloader_pin_memory": False,
            "logging_steps": 1,
        }  # fmt: skip
        args = LocalistTrainingArguments(output_dir=str(folder / f"run-{processes}"), **(defaults | settings))
        keeper = KeepGradients()
        trainer = LocalistTrainer(
            model=LocalistGPT2LMHeadModel.from_pretrained(folder / "model"), args=args, callbacks=[keeper],
            train_dataset=ragged,
        )  # fmt: skip
        if not results:
            results["evaluation"] = trainer.evaluate(ragged.select(range(5)))  # not divisible by two batches of two
            stream = Dataset.from_dict({"input_ids": data["whole"]}).to_iterable_dataset()
            results["evaluation of a stream"] = trainer.evaluate(stream)
        trainer.train()
        results[name] = keeper.gradients
        results[f"{name}, log"] = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    if trainer.is_world_process_zero():
        torch.save(results, folder / f"{processes}.pt")


@pytest.fixture(scope="module")
def results(make_model: Callable, make_text: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one process found, and what two."""
    folder = tmp_path_factory.mktemp("distributed")
    make_model(locality_schedule="linear").save_pretrained(folder / "model")
    ragged = [
        row[:length].tolist() for row, length in zip(make_text(8, 60), (60, 13, 41, 5, 22, 60, 48, 9), strict=True)
    ]
    torch.save({"ragged": ragged, "whole": make_text(5, 40).tolist()}, folder / "data.pt")
    run(folder, 1)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, folder]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}.pt") for processes in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_the_gradients_of_one(results: list[dict], name: str) -> None:
    one, two = results[0]["random" if name == "batch_rebalance" else name], results[1][name]
    assert one.keys() == two.keys()
    for parameter, gradient in one.items():
        assert_close(two[parameter], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, at=parameter: f"{at}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "batch_rebalance"])
def test_two_processes_log_what_one_does(results: list[dict], name: str) -> None:
    """The weight that a budget has come to too."""
    for one, two in zip(*(result[f"{name}, log"] for result in results), strict=True):
        assert one.keys() == two.keys()
        logged = ("lm_loss", "distillation_loss", "locality_loss", "locality_weight")
        assert [two[key] for key in logged if key in two] == pytest.approx(
            [one[key] for key in logged if key in one], rel=1e-5, abs=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["evaluation", "evaluation of a stream"])
def test_two_processes_measure_what_one_does(results: list[dict], kind: str) -> None:
    measured = re.compile("eval_(loss|perplexity|fidelity|entropy)")
    one, two = ({name: value for name, value in result[kind].items() if measured.match(name)} for result in results)
    assert len(one) == 4 + 2 * 4
    assert two == pytest.approx(one, rel=1e-5)


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2)
