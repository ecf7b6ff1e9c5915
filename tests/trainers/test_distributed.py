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
    # With "batch_rebalance" the processes take different numbers of the same sequences.
    for strategy in ("random", "batch_rebalance"):
        args = LocalistTrainingArguments(
            output_dir=str(folder / f"run-{processes}"), per_device_train_batch_size=8 // processes, max_steps=1,
            per_device_eval_batch_size=2, max_grad_norm=0, use_cpu=True, report_to="none", save_strategy="no",
            locality_weight=3.0, disable_tqdm=True, ddp_backend="gloo" if processes > 1 else None,
            dataloader_pin_memory=False, train_sampling_strategy=strategy,
        )  # fmt: skip
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
        results[strategy] = keeper.gradients
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
@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
def test_two_processes_give_the_gradients_of_one(results: list[dict], strategy: str) -> None:
    one, two = results
    assert one["random"].keys() == two[strategy].keys()
    for name, gradient in one["random"].items():
        assert_close(two[strategy][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["evaluation", "evaluation of a stream"])
def test_two_processes_measure_what_one_does(results: list[dict], kind: str) -> None:
    measured = re.compile("eval_(loss|perplexity|fidelity|entropy)")
    one, two = ({name: value for name, value in result[kind].items() if measured.match(name)} for result in results)
    assert len(one) == 4 + 2 * 4
    assert two == pytest.approx(one, rel=1e-5)


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2)
