"""LocalistTrainer with an adapter: only the adapter trains, is saved, and goes on from a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")


@pytest.fixture
def base(make_model, tmp_path: Path) -> Path:
    """The folder of a model to adapt."""
    make_model(locality_schedule="linear").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_trainer(base: Path, make_text, tmp_path: Path) -> Callable[..., LocalistTrainer]:
    def make(config=LORA, **arguments) -> LocalistTrainer:
        torch.manual_seed(0)
        model = get_peft_model(LocalistGPT2LMHeadModel.from_pretrained(base), config)
        args = LocalistTrainingArguments(
            per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
            **{"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_steps": 2, **arguments},
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": make_text(4, 40).tolist()})
        return LocalistTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)

    return make


def adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora" in name}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == 2


def test_an_interrupted_adapter_goes_on_to_the_same_weights(make_trainer, tmp_path: Path) -> None:
    whole = make_trainer(output_dir=str(tmp_path / "whole"))
    whole.train()
    interrupted = make_trainer()
    interrupted.add_callback(Interrupt())
    interrupted.train()
    assert interrupted.state.global_step == 2
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_close(adapter(resumed.model), adapter(whole.model), atol=0, rtol=0)
    assert resumed.state.log_history[-2]["locality_loss"] == whole.state.log_history[-2]["locality_loss"]


def test_a_half_written_adapter_is_passed_over(make_trainer, tmp_path: Path, transformers_warnings) -> None:
    make_trainer().train()
    weights = tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is no whole checkpoint and is passed over: adapter_model.safetensors" in (
        transformers_warnings.text
    )
    assert trainer.state.global_step == 4


def test_a_saved_adapter_loads_on_its_base_and_measures_the_same(make_trainer, base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(save_strategy="no")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    for loaded in (
        PeftModel.from_pretrained(LocalistGPT2LMHeadModel.from_pretrained(base), tmp_path / "run"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run"),
    ):
        assert_close(adapter(loaded), adapter(trainer.model), atol=0, rtol=0)
        args = LocalistTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
        found = LocalistTrainer(model=loaded, args=args, eval_dataset=trainer.eval_dataset).evaluate()
        for name in ("eval_perplexity", "eval_context_fidelity", "eval_entropy_layer_2"):
            assert found[name] == pytest.approx(metrics[name], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_locality_reaches_the_adapter(make_trainer, settings: dict) -> None:
    """Its gradient is not that of the language modeling loss alone."""

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    found = []
    for weight in (0.0, 5.0):
        keeper = KeepGradients()
        trainer = make_trainer(max_steps=1, save_strategy="no", locality_weight=weight, **settings)
        trainer.add_callback(keeper)
        trainer.train()
        assert keeper.gradients
        assert all("lora" in name for name in keeper.gradients)
        found.append(keeper.gradients)
    differences = [(found[1][name] - gradient).abs().max() for name, gradient in found[0].items() if "lora_B" in name]
    assert min(differences) > 1e-5


def test_a_learned_prompt_trains_and_its_tokens_are_no_labels(make_trainer) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="`locality_objective` is 'contrast', which a learned prompt"):
        make_trainer(prompt, save_strategy="no", locality_objective="contrast").train()
    trainer = make_trainer(prompt, save_strategy="no")
    trainer.train()
    assert trainer.state.log_history[0]["locality_loss"] > 0
    metrics = trainer.evaluate()
    input_ids = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids).logits[:, 3:-1]
    expected = cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
