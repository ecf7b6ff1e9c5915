"""The mixin on TRL's own trainers: losses are those written out, whatever the batch looks like."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure
from localist_hf.trainers import (
    LocalityArguments,
    LocalityLossMixin,
    locality_loss,
)


pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


END = 1  # of no text
WEIGHT, TARGET = 3.0, 0.8


class LocalSFTTrainer(LocalityLossMixin, SFTTrainer):
    pass


class LocalDPOTrainer(LocalityLossMixin, DPOTrainer):
    pass


@dataclass
class LocalSFTConfig(LocalityArguments, SFTConfig):
    pass


@dataclass
class LocalDPOConfig(LocalityArguments, DPOConfig):
    pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a number, and its token the same number."""
    words = {"<end>" if token == END else str(token): token for token in range(97)}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>", pad_token="<end>")


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path: Path) -> Callable:
    def make(trainer_class: type, rows: dict[str, list[str]], model=None, ref_model=None, peft_config=None, **settings):
        config_class = LocalSFTConfig if issubclass(trainer_class, SFTTrainer) else LocalDPOConfig
        args = config_class(
            output_dir=str(tmp_path), target_fidelity=TARGET, locality_weight=WEIGHT, max_steps=1, max_grad_norm=0,
            logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
            **{"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, **settings},
        )  # fmt: skip
        dataset = Dataset.from_dict(rows)
        kwargs = {} if ref_model is None else {"ref_model": ref_model}
        return trainer_class(
            model=make_model(locality_schedule="linear") if model is None else model, args=args, train_dataset=dataset,
            eval_dataset=dataset, processing_class=tokenizer, peft_config=peft_config, **kwargs,
        )  # fmt: skip

    return make


def train(trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients and the log of the first step."""
    keeper = KeepGradients()
    trainer.add_callback(keeper)
    trainer.train()
    return keeper.gradients, trainer.state.log_history[0]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def words(tokens: torch.Tensor) -> str:
    return " ".join(map(str, tokens.tolist()))


@pytest.fixture(scope="module")
def texts(make_text) -> list[torch.Tensor]:
    """Six texts, one of them without counted positions."""
    lengths = (40, 5, 31, 18, 26, 44)
    return [row[:length] for row, length in zip(make_text(6, 44), lengths, strict=True)]


def locality(model: LocalistGPT2LMHeadModel, outputs) -> torch.Tensor:
    """The locality loss of each sequence, by METHOD.md."""
    pairs = zip(outputs.block_share, outputs.outside_share, outputs.context_mask, strict=True)
    losses = [locality_loss(block / (block + out + 1e-3), mask, TARGET, 1) for block, out, mask in pairs]
    lambdas = model.config.locality_lambdas
    return sum(weight * loss for weight, loss in zip(lambdas, losses, strict=True)) / len(lambdas)


def supervised_by_hand(model, sequences: list[torch.Tensor], num_unlabelled: int = 1) -> tuple[float, float]:
    """Gradients of both losses, one sequence after the other; gives the losses themselves."""
    num_labels = sum(len(sequence) - num_unlabelled for sequence in sequences)
    sums = [0.0, 0.0]
    for sequence in sequences:
        outputs = model(sequence[None], output_fidelity=True)
        at = num_unlabelled - 1
        lm_loss = cross_entropy(outputs.logits[0, at:-1], sequence[at + 1 :], reduction="sum") / num_labels
        local = locality(model, outputs).sum() / len(sequences)
        (lm_loss + WEIGHT * local).backward()
        sums = [sums[0] + lm_loss.item(), sums[1] + local.item()]
    return tuple(sums)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ended(text: torch.Tensor) -> torch.Tensor:
    return torch.cat([text, torch.tensor([END])])


@pytest.mark.parametrize("split", [(6, 1), (2, 3), (4, 2)])
def test_sft_on_completions_counts_the_attention_of_prompts_too(make_trainer, make_model, texts, split) -> None:
    size, steps = split
    rows = {"prompt": [words(text[:4]) for text in texts], "completion": [" " + words(text[4:]) for text in texts]}
    trainer = make_trainer(
        LocalSFTTrainer, rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps
    )  # fmt: skip
    found, log = train(trainer)
    model = make_model(locality_schedule="linear")
    lm_loss, local = supervised_by_hand(model, [ended(text) for text in texts], num_unlabelled=4)
    assert local > 0
    assert_same(found, gradients(model))
    assert log["lm_loss"] == pytest.approx(lm_loss, rel=1e-4)
    assert log["locality_loss"] == pytest.approx(local, rel=1e-4)
    assert log["loss"] == pytest.approx(lm_loss + WEIGHT * local, rel=1e-4)
    assert {"context_fidelity_layer_3", "mean_token_accuracy"} <= log.keys()


@pytest.mark.parametrize("settings", [
    {}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"pad_to_multiple_of": 16},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
])  # fmt: skip
def test_sft_with_packing_is_as_good_as_without(make_trainer, make_model, texts, settings: dict) -> None:
    """Rows of several texts, run together to one by TRL: every text is a sequence, seen and measured alone."""
    trainer = make_trainer(LocalSFTTrainer, {"text": list(map(words, texts))}, packing=True, max_length=48, **settings)
    rows = trainer.train_dataset
    assert len(rows) == 4
    assert max(map(len, rows["seq_lengths"])) > 1
    found, log = train(trainer)
    model = make_model(locality_schedule="linear")
    lm_loss, local = supervised_by_hand(model, [ended(text) for text in texts])
    assert_same(found, gradients(model))
    assert log["lm_loss"] == pytest.approx(lm_loss, rel=1e-4)
    assert log["locality_loss"] == pytest.approx(local, rel=1e-4)


def test_sft_evaluates_as_measure_does(make_trainer, texts) -> None:
    expected = measure(
        (trainer := make_trainer(LocalSFTTrainer, {"text": list(map(words, texts))})).model,
        Dataset.from_dict({"input_ids": [ended(text).tolist() for text in texts]}),
    )
    del expected["loss"], expected["entropy"]  # TRL's own
    for other in (
        trainer,
        make_trainer(LocalSFTTrainer, {"text": list(map(words, texts))}, packing=True, max_length=48),
    ):
        metrics = other.evaluate()
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
