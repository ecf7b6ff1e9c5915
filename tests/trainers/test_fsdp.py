"""FSDP2 as `accelerate launch` sets it up, in two processes on the CPU: what one process does, sharded."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.distributed.fsdp import FSDPModule
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments, LocalityArguments, LocalityLossMixin


pytestmark = pytest.mark.slow

LAUNCH = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "GPT2Block",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "num_processes": 2,
    "num_machines": 1,
    "mixed_precision": "no",
    "dynamo_backend": "no",
}


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if not self.gradients:
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                self.gradients[name] = (gradient.full_tensor() if isinstance(model, FSDPModule) else gradient).clone()


def shard_on_the_cpu() -> None:
    """Accelerate takes FSDP for granted on GPUs, and on the CPU none without a word; torch shards on both."""
    initialise = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def arguments(folder: Path, processes: int) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "save_steps": 1,
        "max_grad_norm": 0,
        "learning_rate": 1e-3,
        "locality_weight": 3.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def run(folder: Path, processes: int) -> None:
    """Trains, evaluates and saves the model in the folder; once more from a checkpoint; and with TRL."""
    rows = Dataset.from_dict({"input_ids": torch.load(folder / "data.pt")})
    results, settings = {}, arguments(folder / f"run-{processes}", processes)
    for name, resume in (("trained", None), ("resumed", str(folder / f"run-{processes}" / "checkpoint-1"))):
        keeper = KeepGradients()
        trainer = LocalistTrainer(
            model=LocalistGPT2LMHeadModel.from_pretrained(folder / "model"), train_dataset=rows, callbacks=[keeper],
            args=LocalistTrainingArguments(**settings),
        )  # fmt: skip
        trainer.train(resume)
        assert isinstance(trainer.model, FSDPModule) == (processes == 2)
        results[name] = keeper.gradients
    results["evaluation"] = trainer.evaluate(rows.select(range(5)))
    results["weights"] = trainer.accelerator.get_state_dict(trainer.model)
    trainer.save_model(str(folder / f"saved-{processes}"))
    results["supervised"] = supervised(folder, processes, rows)
    taught = {"training_dials": [0, 1], "distillation_weight": 0.7, "save_strategy": "no", "max_steps": 2}
    results["supervised and taught"] = supervised(folder, processes, rows, **taught)
    keeper = KeepGradients()
    LocalistTrainer(
        model=LocalistGPT2LMHeadModel.from_pretrained(folder / "model"), train_dataset=rows, callbacks=[keeper],
        args=LocalistTrainingArguments(**settings | taught),
    ).train()  # fmt: skip
    results["taught"] = keeper.gradients
    if trainer.is_world_process_zero():
        torch.save(results, folder / f"{processes}.pt")


def supervised(folder: Path, processes: int, rows: Dataset, **others) -> dict[str, torch.Tensor]:
    """The gradients of SFT, whose own head stands beside a sharded model."""
    from trl import SFTConfig, SFTTrainer

    @dataclass
    class LocalConfig(LocalityArguments, SFTConfig):
        pass

    class LocalTrainer(LocalityLossMixin, SFTTrainer):
        pass

    vocabulary = Tokenizer(models.WordLevel({str(token): token for token in range(97)}, unk_token="0"))
    keeper = KeepGradients()
    settings = (
        arguments(folder / f"supervised-{processes}", processes) | {"save_strategy": "no", "max_steps": 1} | others
    )
    trainer = LocalTrainer(
        model=LocalistGPT2LMHeadModel.from_pretrained(folder / "model"), train_dataset=rows, callbacks=[keeper],
        args=LocalConfig(**settings, bf16=False, gradient_checkpointing=False),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="1", pad_token="1"),
    )  # fmt: skip
    trainer.train()
    return keeper.gradients


@pytest.fixture(scope="module")
def results(make_model, make_text, tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder, and what one process found, and what two."""
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("sharded")
    make_model(locality_schedule="linear").save_pretrained(folder / "model")
    lengths = (60, 13, 41, 5, 22, 59, 48, 9)
    torch.save([row[:n].tolist() for row, n in zip(make_text(8, 60), lengths, strict=True)], folder / "data.pt")
    run(folder, 1)
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--use_fsdp",
        *(f"--{name}={value}" for name, value in LAUNCH.items()),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *launch, __file__, folder], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "1.pt"), torch.load(folder / "2.pt")


@pytest.mark.parametrize("kind", ["trained", "resumed", "supervised", "taught", "supervised and taught"])
def test_shards_give_the_gradients_of_the_whole(results, kind: str) -> None:
    _, one, two = results
    for name, gradient in one[kind].items():
        assert_close(two[kind][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_shards_measure_what_the_whole_does(results) -> None:
    _, one, two = results
    names = [name for name in one["evaluation"] if not name.endswith(("runtime", "per_second"))]
    assert "eval_context_fidelity_layer_3" in names
    for name in names:
        assert two["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=1e-4), name


def test_what_is_saved_is_the_model_with_its_own_code(results) -> None:
    """FSDP2 gives the model a class of its own, defined in torch."""
    folder, _, found = results
    one, two = (folder / f"saved-{processes}" for processes in (1, 2))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert (two / "config.json").read_text() == (one / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(two, trust_remote_code=True)
    assert_close(loaded.state_dict(), dict(found["weights"]), atol=0, rtol=0)


if __name__ == "__main__":
    shard_on_the_cpu()
    run(Path(sys.argv[1]), 2)
