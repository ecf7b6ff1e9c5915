"""Any causal language model by its name; what is refused is in `tests/cli/test_bad_input.py`."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.cli.arguments import parse
from localist_hf.cli.train import prepare_trainer
from localist_hf.hub import loading
from localist_hf.hub.loading import checked_sequence_length, load, load_config, load_model, load_tokenizer
from localist_hf.modeling.locality_mixin import LocalistMixin
from localist_hf.page import Passage, read
from localist_hf.trainers import LocalistTrainer


@pytest.fixture
def save(tmp_path: Path, tokenizer) -> Callable[..., str]:
    """Saves a model with the tokenizer and gives the folder's name."""

    def to(model: PreTrainedModel, name: str = "model") -> str:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return to


def llama(vocab_size: int, **fields) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=vocab_size, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.update(fields)
    return LlamaForCausalLM(config)


def trainer(model: str, tmp_path: Path, *flags: str) -> LocalistTrainer:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Sentence number {number} says something. " for number in range(99)), encoding="utf-8")
    run, args, _ = parse([
        "--model", model, "--text-file", str(book), "--output-dir", str(tmp_path / "run"), "--max_steps", "1",
        "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", *flags,
    ])  # fmt: skip
    return prepare_trainer(run, args)


def test_a_model_of_another_kind_is_localised(save, tokenizer, tmp_path: Path) -> None:
    native = llama(len(tokenizer))
    name = save(native)
    config = load_config(name, {"num_sink_tokens": 1})
    model = load_model(name, config)
    assert isinstance(model, LocalistMixin)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.locality.num_sink_tokens == 1
    for key, value in native.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)

    # What it was saved with holds until something else is said.
    again = save(localize(model, locality_schedule="linear"), "again")
    settings = load_config(again, {"num_previous_blocks": 1}).locality
    assert (settings.locality_schedule, settings.num_sink_tokens, settings.num_previous_blocks) == ("linear", 1, 1)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"


def test_a_plain_gpt2_becomes_localist_gpt2_and_a_localised_one_stays_what_it_is(save, tokenizer) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer)))
    name = save(gpt2)
    assert type(load_model(name, load_config(name, {}))) is LocalistGPT2LMHeadModel
    name = save(localize(gpt2, num_sink_tokens=3), "localised")
    model = load_model(name, load_config(name, {}))
    assert not isinstance(model, LocalistGPT2LMHeadModel)
    assert isinstance(model, LocalistMixin)
    assert (model.config.model_type, model.config.locality.num_sink_tokens) == ("gpt2", 3)


def test_code_of_a_repository_is_not_run(save, tokenizer, tmp_path: Path) -> None:
    name = save(localize(llama(len(tokenizer))))
    for path in (tmp_path / "model").glob("*.py"):
        path.write_text("raise RuntimeError('it ran')")
    load_model(name, load_config(name, {}))
    load_tokenizer(name)


def test_sequences_are_as_long_as_the_model_allows() -> None:
    rotary = LlamaConfig(max_position_embeddings=64)
    learned = GPT2Config(n_positions=2048)
    assert checked_sequence_length(None, rotary) == 64
    assert checked_sequence_length(16_384, rotary) == 16_384  # no position is the last one
    assert checked_sequence_length(None, learned) == 1024
    assert checked_sequence_length(2048, learned) == 2048
    assert checked_sequence_length(None, BloomConfig()) == 1024
    with pytest.raises(ValueError, match="`sequence_length` is 2049; the model allows 2 to 2048 positions"):
        checked_sequence_length(2049, learned)


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_what_is_not_trained_is_of_the_dtype_that_the_machine_is_fast_in(
    save, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "_is_native", lambda dtype: is_native)
    name = save(llama(len(tokenizer)).bfloat16())
    assert {weight.dtype for weight in trainer(name, tmp_path).model.parameters()} == {torch.float32}
    adapted = trainer(name, tmp_path, "--lora-rank", "2").model
    dtypes = {weight.requires_grad: weight.dtype for weight in adapted.parameters()}
    assert dtypes == {True: torch.float32, False: dtype}
    assert load(name, {})[0].dtype == dtype
    adapted.save_pretrained(tmp_path / "adapter")
    assert {weight.dtype for weight in load(str(tmp_path / "adapter"), {})[0].get_base_model().parameters()} <= {
        torch.float32,
        dtype,
    }


def test_half_precision_is_native_where_onednn_or_an_accelerator_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)  # noqa: B023
        assert loading._is_native(torch.float32)
        assert loading._is_native(torch.bfloat16) == (is_supported or torch.accelerator.is_available())
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loading._is_native(torch.float16)


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "2"), ("--lora-rank", "2", "--lora-targets", "q_proj")])
def test_training_any_model(save, tokenizer, tmp_path: Path, flags) -> None:
    name = save(llama(len(tokenizer)))
    training = trainer(name, tmp_path, "--variant", "linear", "--sequence-length", "80", *flags)
    training.train()
    training.save_model()
    metrics = training.evaluate()
    assert 0 < metrics["eval_context_fidelity_layer_1"] < 1
    adapted = {name.split(".")[-4] for name, _ in training.model.named_parameters() if "lora_A" in name}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == (set() if not flags else {"q_proj"} if "--lora-targets" in flags else every)
    if not flags:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert type(plain) is LlamaForCausalLM
        assert plain.config.locality["locality_schedule"] == "linear"


def test_training_opt_whose_decoder_is_a_part_of_its_transformer(save, tokenizer, tmp_path: Path) -> None:
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=16, ffn_dim=24, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    training = trainer(save(OPTForCausalLM(config)), tmp_path)
    assert 0 < training.evaluate()["eval_context_fidelity"] < 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_what_a_checkpoint_says_of_its_calls_counts_for_nothing(save, tokenizer, tmp_path: Path, kind: str) -> None:
    size = len(tokenizer)
    gpt2 = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=size, bos_token_id=0, eos_token_id=0)
    name = save(llama(size) if kind == "llama" else GPT2LMHeadModel(gpt2))
    path, ids = Path(name) / "config.json", torch.arange(40)[None]
    saved, expected = json.loads(path.read_text()), None
    attention = {"attn_implementation": "eager", "_attn_implementation": "eager"}
    outputs = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    for said in ({}, {"return_dict": False}, attention, outputs):
        path.write_text(json.dumps(saved | said))
        model = load_model(name, load_config(name, {})).eval()
        found = model(ids, output_fidelity=True)
        expected = found if expected is None else expected
        assert torch.equal(found.logits, expected.logits), said
        assert torch.equal(found.outside_share[1], expected.outside_share[1]), said
        assert found.hidden_states is None
    model.save_pretrained(tmp_path / "again")


# --- adapters


@pytest.fixture(scope="module")
def adapters(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, PeftModel]]:
    """Saves an adapter, of a base with added tokens where `added` is more than 0, with a tokenizer that has them."""

    def make(added: int, is_tied: bool = True, has_tokenizer: bool = True, **settings) -> tuple[str, PeftModel]:
        folder = tmp_path_factory.mktemp("adapters")
        llama(len(tokenizer), tie_word_embeddings=is_tied).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        own = AutoTokenizer.from_pretrained(folder / "base")
        own.add_tokens([f"<new-{number}>" for number in range(added)])
        if added:
            base.resize_token_embeddings(len(own), pad_to_multiple_of=8)
            torch.nn.init.normal_(base.get_input_embeddings().weight)
            torch.nn.init.normal_(base.get_output_embeddings().weight)
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
        adapted = get_peft_model(base, config).eval()
        adapted.save_pretrained(folder / "adapter")
        if has_tokenizer:
            own.save_pretrained(folder / "adapter")
        return str(folder / "adapter"), adapted

    return make


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", float("nan"), "`lora_alpha` of its adapter_config.json is nan; it must be finite"),
        ("alpha_pattern", {"q_proj": float("inf")}, "`alpha_pattern` of its adapter_config.json"),
        ("base_model_name_or_path", [1], r"does not name the base: `base_model_name_or_path` is \[1\]"),
        ("base_model_name_or_path", None, "does not name the base"),
    ],
)
def test_an_adapter_that_makes_no_numbers_or_has_no_base_is_refused(adapters, field, value, message: str) -> None:
    name, _ = adapters(0)
    path = Path(name) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        load(name, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama", "hidden_size": 8, "hidden_size": 16}', "the key 'hidden_size' stands there twice"),
        ("null", "its config.json holds no JSON object"),
        ('["llama"]', "its config.json holds no JSON object"),
        ("[" * 100000, "it is nested too deeply"),
    ],
)
def test_a_configuration_that_transformers_would_misread_is_refused(save, text: str, message: str) -> None:
    name = save(llama(32))
    (Path(name) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^`model` is .*{message}"):
        load_config(name, {})


def test_the_tokenizer_beside_an_adapter_is_read(adapters, tokenizer) -> None:
    name, _ = adapters(0, has_tokenizer=False)
    text = "something<new> more"
    assert load(name, {})[1](text)["input_ids"] == tokenizer(text)["input_ids"]
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<new>"])
    own.save_pretrained(name)
    assert load(name, {})[1](text)["input_ids"] == own(text)["input_ids"] != tokenizer(text)["input_ids"]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_an_adapter_of_a_base_with_added_tokens_is_loaded_with_them(adapters, is_tied: bool, settings) -> None:
    name, adapted = adapters(3, is_tied, **settings)
    if "embed_tokens" in settings.get("target_modules", ()) and not is_tied:  # PEFT does not save the new head then
        with pytest.raises(ValueError, match="cannot be loaded: it holds embeddings of 312 tokens and no head"):
            load(name, {})
        return
    model, tokenizer = load(name, {})
    ids = torch.tensor([tokenizer("some<new-1> words<new-2> here")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, adapted(ids).logits)
    assert model.config.vocab_size == 312 > len(tokenizer)
    assert read(model, Passage.of(tokenizer, "some<new-1>")).passage.input_ids.max() >= len(tokenizer) - 3


def test_an_adapter_that_lacks_weights_is_refused_by_their_names(adapters) -> None:
    name, _ = adapters(0)
    path = Path(name) / "adapter_model.safetensors"
    weights = load_file(path)
    lacking = [key for key in weights if "lora_B" in key]
    save_file({key: weight for key, weight in weights.items() if key not in lacking}, path)
    with pytest.raises(ValueError, match=re.escape(f"whose adapter lacks the weights {min(lacking)} and 1 more.")):
        load(name, {})
