"""The mixin on TRL's own trainers: losses are those written out, whatever the batch looks like."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, nll_loss
from transformers import PreTrainedTokenizerFast, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure
from localist_hf.trainers import (
    LocalityArguments,
    LocalityLossMixin,
    locality_loss,
)


pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer, GRPOTrainer, RLOOTrainer, SFTConfig, SFTTrainer


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
        defaults = {
            "target_fidelity": TARGET,
            "locality_weight": WEIGHT,
            "max_steps": 1,
            "max_grad_norm": 0,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        args = config_class(output_dir=str(tmp_path), **{**defaults, **settings})
        dataset = Dataset.from_dict(rows)
        kwargs = {} if ref_model is None else {"ref_model": ref_model}
        return trainer_class(
            model=make_model(locality_schedule="linear") if model is None else model, args=args, train_dataset=dataset,
            processing_class=tokenizer, peft_config=peft_config, **kwargs,
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
    """The locality loss of each sequence, by docs/method.md#locality-loss."""
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


@pytest.mark.parametrize("split", [(6, 1), (2, 3)])
@pytest.mark.parametrize("lora", [False, True])
def test_sft_on_completions_is_taught_where_its_own_loss_counts(
    make_trainer, make_model, texts, split, lora: bool
) -> None:
    """By a copy that TRL's head does not lead back to the student."""
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    rows = {"prompt": [words(text[:4]) for text in texts], "completion": [" " + words(text[4:]) for text in texts]}
    torch.manual_seed(3)
    trainer = make_trainer(
        LocalSFTTrainer, rows, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
        locality_weight=0, training_dials=[0, 1], distillation_weight=0.7, peft_config=adapter if lora else None,
        train_sampling_strategy="sequential", shuffle_dataset=False, max_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    _, log = train(trainer)
    assert log["distillation_loss"] > 0.01
    teacher = make_model(locality_schedule="linear")
    probe = {"input_ids": texts[0][None], "attention_mask": torch.ones(1, len(texts[0]), dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(
            trainer._teacher.logits(trainer.model, probe), teacher(**probe).logits, msg="the teacher has moved"
        )
    if lora:
        return
    model = make_model(locality_schedule="linear")
    num_labels = sum(len(ended(text)) - 4 for text in texts)
    taught = 0.0
    for at, text in enumerate(map(ended, texts)):
        logits = model(text[None], locality_dial=float(at % 2)).logits[0, 3:-1].log_softmax(-1)
        with torch.no_grad():
            target = teacher(text[None]).logits[0, 3:-1].log_softmax(-1)
        divergence = kl_div(logits, target, reduction="sum", log_target=True) / num_labels
        (0.3 * nll_loss(logits, text[4:], reduction="sum") / num_labels + 0.7 * divergence).backward()
        taught += divergence.item()
    assert log["distillation_loss"] == pytest.approx(taught, rel=1e-4)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}, {}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_sft_is_taught_in_half_precision_and_with_dropout(
    make_trainer, make_model, texts, dropout: float, settings: dict
) -> None:
    """As under TRL's defaults, and with GPT-2's own dropout."""
    trainer = make_trainer(
        LocalSFTTrainer, {"text": list(map(words, texts))}, locality_weight=0, training_dials=[0],
        distillation_weight=0.9, model=make_model(resid_pdrop=dropout, embd_pdrop=dropout), **settings,
    )  # fmt: skip
    _, log = train(trainer)
    # Nothing has moved yet: what there is comes of dropout.
    assert (log["distillation_loss"] < 1e-6) == (dropout == 0)


def test_packed_texts_are_taught_as_if_alone_and_evaluated_at_dial_1(make_trainer, make_model, texts) -> None:
    rows = {"text": list(map(words, texts))}
    trainer = make_trainer(
        LocalSFTTrainer, rows, packing=True, max_length=48, locality_weight=0, training_dials=[1],
        distillation_weight=1.0,
    )  # fmt: skip
    evaluation = Dataset.from_dict({"text": list(map(words, texts))})
    found = trainer.evaluate(evaluation)
    metrics = measure(
        trainer.model, Dataset.from_dict({"input_ids": [ended(text).tolist() for text in texts]}),
    ).metrics  # fmt: skip
    assert found["eval_perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-4)
    _, log = train(trainer)
    model, taught, loss = make_model(locality_schedule="linear"), 0.0, 0.0
    num_labels = sum(map(len, texts))
    with torch.no_grad():
        for text in map(ended, texts):
            logits, target = (
                model(text[None], locality_dial=dial).logits[0, :-1].log_softmax(-1) for dial in (1.0, 0.0)
            )
            taught += kl_div(logits, target, reduction="sum", log_target=True).item() / num_labels
            loss += nll_loss(logits, text[1:], reduction="sum").item() / num_labels
    assert log["distillation_loss"] == pytest.approx(taught, rel=1e-4)
    assert found["eval_loss_at_dial_1"] == pytest.approx(loss, rel=1e-4)
    assert found["eval_perplexity_at_dial_1"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_preferences_are_neither_dealt_over_dials_nor_taught(make_trainer, make_model, texts) -> None:
    rows = {name: [words(text[:9]) for text in texts] for name in ("prompt", "chosen", "rejected")}
    settings = {"locality_weight": 0, "ref_model": make_model(locality_schedule="linear")}
    with pytest.raises(ValueError, match=r"`training_dials` is \[0, 1\], but the batches have no 'labels'"):
        make_trainer(LocalDPOTrainer, rows, training_dials=[0, 1], **settings).train()
    with pytest.raises(ValueError, match="are of the positions of 'labels', which the batches of LocalDPOTrainer"):
        make_trainer(LocalDPOTrainer, rows, distillation_weight=0.5, **settings).train()
    make_trainer(LocalDPOTrainer, rows, training_dials=[1], **settings).train()


def test_what_rows_say_of_blocks_is_not_left_out_in_silence(make_trainer, texts) -> None:
    rows = {"text": list(map(words, texts)), "pointer_blocks": [[-1]] * len(texts)}
    trainer = make_trainer(LocalSFTTrainer, rows)
    with pytest.raises(ValueError, match="`train_dataset` has 'pointer_blocks', which LocalSFTTrainer leaves out"):
        trainer.train()


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


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 48}])
def test_sft_evaluates_as_measure_does(make_trainer, texts, settings: dict) -> None:
    trainer = make_trainer(LocalSFTTrainer, {"text": list(map(words, texts))}, **settings)
    expected = measure(
        trainer.model, Dataset.from_dict({"input_ids": [ended(text).tolist() for text in texts]})
    ).metrics
    metrics = trainer.evaluate(Dataset.from_dict({"text": list(map(words, texts))}))
    del expected["loss"], expected["entropy"]  # TRL's own
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def preferences(texts) -> dict[str, list[str]]:
    """Four prompts with a better and a worse completion each, of different lengths."""
    parts = [(text[:3], text[3:], other[3:]) for text, other in zip(texts[2:], texts[:4], strict=True)]
    return {
        "prompt": [words(prompt) for prompt, _, _ in parts],
        "chosen": [" " + words(chosen) for _, chosen, _ in parts],
        "rejected": [" " + words(rejected) for _, _, rejected in parts],
    }


def pairs_of(rows: dict[str, list[str]]) -> list[list[torch.Tensor]]:
    columns = zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True)
    return [
        [ended(torch.tensor(list(map(int, (prompt + completion).split())))) for completion in completions]
        for prompt, *completions in columns
    ]


def log_probability(logits: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Of a completion, whose prompt has three tokens."""
    return -cross_entropy(logits[0, 2:-1], sequence[3:], reduction="sum")


def preferences_by_hand(model, reference, pairs: list[list[torch.Tensor]]) -> tuple[float, float]:
    """Gradients of DPO's loss (beta 0.1) and of the locality loss, one pair after the other."""
    sums = [0.0, 0.0]
    for pair in pairs:
        margins, local = [], 0.0
        for sequence in pair:
            outputs = model(sequence[None], output_fidelity=True)
            with torch.no_grad():
                known = log_probability(reference(sequence[None]).logits, sequence)
            margins.append(log_probability(outputs.logits, sequence) - known)
            local = local + locality(model, outputs).sum() / (2 * len(pairs))
        task_loss = -logsigmoid(0.1 * (margins[0] - margins[1])) / len(pairs)
        (task_loss + WEIGHT * local).backward()
        sums = [sums[0] + task_loss.item(), sums[1] + local.item()]
    return tuple(sums)


@pytest.mark.parametrize("split", [(4, 1), (1, 4), (2, 2)])
def test_dpo_trains_the_locality_of_both_completions(make_trainer, make_model, gpt2_twin, preferences, split) -> None:
    """The reference is transformers' own model, which knows of no locality."""
    size, steps = split
    reference = gpt2_twin(make_model(seed=1))
    trainer = make_trainer(
        LocalDPOTrainer, preferences, ref_model=reference, per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
    )  # fmt: skip
    found, log = train(trainer)
    model = make_model(locality_schedule="linear")
    task_loss, local = preferences_by_hand(model, gpt2_twin(make_model(seed=1)), pairs_of(preferences))
    assert local > 0
    assert_same(found, gradients(model))
    assert log["task_loss"] == pytest.approx(task_loss, rel=1e-4)
    assert log["locality_loss"] == pytest.approx(local, rel=1e-4)
    assert log["loss"] == pytest.approx(task_loss + WEIGHT * local, rel=1e-4)
    assert "lm_loss" not in log


def test_dpo_measures_the_policy_only(make_trainer, make_model, preferences) -> None:
    """With an adapter, the reference is the same model without it."""
    asked = []
    model = make_model(locality_schedule="linear")
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append((torch.is_grad_enabled(), kwargs.get("output_fidelity"))),
        with_kwargs=True,
    )
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_trainer(LocalDPOTrainer, preferences, model, peft_config=adapter, learning_rate=1e-2)
    found, log = train(trainer)
    assert isinstance(trainer.model, PeftModel)
    assert asked == [(True, (1, 2, 3)), (False, None)]
    assert all("lora" in name for name in found)
    assert max(gradient.abs().max() for gradient in found.values()) > 0
    assert log["task_loss"] == pytest.approx(math.log(2), rel=1e-5)  # policy and reference are still one
    asked.clear()
    metrics = trainer.evaluate(Dataset.from_dict(preferences))
    assert asked == [(False, True), (False, None)]
    # Its own loss, and no perplexity, of which the rejected completions would be a part.
    assert metrics["eval_loss"] < math.log(2)
    assert "eval_perplexity" not in metrics
    sequences = [sequence.tolist() for pair in pairs_of(preferences) for sequence in pair]
    expected = measure(trainer.model, Dataset.from_dict({"input_ids": sequences})).metrics
    for name in ("fidelity", "context_fidelity", "entropy_layer_2", "visible_keys_layer_0"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize(
    ("trainer_class", "objective"),
    [(LocalSFTTrainer, "context"), (LocalDPOTrainer, "context"), (LocalSFTTrainer, "contrast")],
)
def test_trains_under_trls_defaults(
    make_trainer, make_model, texts, preferences, trainer_class: type, objective: str
) -> None:
    """Half precision and checkpoints of activations."""
    rows = {"text": list(map(words, texts))} if trainer_class is LocalSFTTrainer else preferences
    settings = {"bf16": None, "gradient_checkpointing": True, "ref_model": None}
    if trainer_class is LocalDPOTrainer:
        settings["ref_model"] = make_model(seed=1)
    settings |= {"max_steps": 8, "learning_rate": 3e-3, "locality_weight": 20.0, "locality_objective": objective}
    trainer = make_trainer(trainer_class, rows, **settings)
    assert trainer.args.bf16
    trainer.train()
    series = [entry["context_fidelity_layer_3"] for entry in trainer.state.log_history if "loss" in entry]
    assert series[-1] > series[0] + 0.05


def test_without_weight_trl_trains_as_ever(make_trainer, make_model, texts) -> None:
    rows, settings = {"text": list(map(words, texts))}, {"locality_weight": 0.0, "packing": True, "max_length": 48}
    found, log = train(make_trainer(LocalSFTTrainer, rows, **settings))
    plain = SFTTrainer(
        model=make_model(), args=(trainer := make_trainer(LocalSFTTrainer, rows, **settings)).args,
        train_dataset=Dataset.from_dict(rows), processing_class=trainer.processing_class,
    )  # fmt: skip
    expected, _ = train(plain)
    assert_same(found, expected)
    assert "locality_loss" not in log


def test_arguments_without_those_of_locality_are_refused(make_trainer, make_model, tokenizer, texts, tmp_path) -> None:
    dataset = Dataset.from_dict({"text": list(map(words, texts))})
    for args in (SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), None):
        with pytest.raises(
            ValueError, match=f"`args` is a {type(args).__name__}; .* LocalityArguments among its bases"
        ):
            LocalSFTTrainer(make_model(), args, train_dataset=dataset, processing_class=tokenizer)


def test_a_model_without_locality_is_refused(make_trainer, make_model, gpt2_twin, texts) -> None:
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel"):
        make_trainer(LocalSFTTrainer, {"text": list(map(words, texts))}, gpt2_twin(make_model()))


def test_bad_values_are_refused_in_every_trainers_arguments(tmp_path) -> None:
    for config in (LocalSFTConfig, LocalDPOConfig):
        with pytest.raises(ValueError, match=r"`target_fidelity` is 0; it must lie in \(0, 1\]"):
            config(output_dir=str(tmp_path), target_fidelity=0, use_cpu=True, bf16=False)
        with pytest.raises(ValueError, match=r"`locality_weight` is -1; it must be a finite number"):
            config(output_dir=str(tmp_path), locality_weight=-1, use_cpu=True, bf16=False)
        args = config(output_dir=str(tmp_path), metric_for_best_model="perplexity", use_cpu=True, bf16=False)
        assert args.greater_is_better is False


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_trainers_that_write_their_texts_are_refused_at_once(trainer_class: type) -> None:
    online = type("Local", (LocalityLossMixin, trainer_class), {})
    with pytest.raises(
        ValueError, match=r"Local writes the texts that it trains on by itself, .* batches hold prompts"
    ):
        online("no such model", "no such reward")
