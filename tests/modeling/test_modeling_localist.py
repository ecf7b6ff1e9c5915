"""`localize` and `delocalize`: what they change and what they refuse, and what a localised model goes through."""

import copy
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers
from accelerate import dispatch_model
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    BltConfig,
    CLIPVisionConfig,
    DiffLlamaConfig,
    DogeConfig,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GitConfig,
    GraniteMoeConfig,
    HrmTextConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2VLTextConfig,
    Qwen3NextConfig,
    RobertaConfig,
    T5Config,
    xLSTMConfig,
)

import localist_hf.modeling
from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, delocalize, localize
from localist_hf.modeling import modeling_localist
from localist_hf.modeling.locality_mixin import LocalistMixin
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION
from localist_hf.modeling.measurements import MEASUREMENTS, SHARES


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
TINY_BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SETTINGS = {"locality_schedule": "linear", "min_block_length": 3, "max_block_length": 12, "num_sink_tokens": 1}


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3, **fields})).eval()


def made(name: str, config: type, **fields) -> PreTrainedModel:
    return getattr(transformers, name)(config(**fields)).eval()


@pytest.fixture
def model() -> PreTrainedModel:
    return localize(llama(), **SETTINGS)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 50), generator=torch.manual_seed(1))


def measured(model: PreTrainedModel, *args, **kwargs):
    return model(*args, output_fidelity=True, output_entropy=True, **kwargs)


def check_same(one, other, atol: float = 0.0) -> None:
    for name in MEASUREMENTS:
        if (expected := getattr(other, name)) is not None:
            assert_close(getattr(one, name), expected, atol=atol, rtol=0)
    assert_close(one.logits, other.logits, atol=atol, rtol=0)


# --- localize and delocalize


def test_localize_changes_the_model_in_place() -> None:
    native = llama()
    weights = {name: parameter.data_ptr() for name, parameter in native.named_parameters()}
    model = localize(native, **SETTINGS)
    assert model is native
    assert isinstance(model, LocalistMixin)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model.model, LocalistMixin)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == weights
    assert {name: getattr(model.config.locality, name) for name in SETTINGS} == SETTINGS
    assert model.config.locality.locality_lambdas == [0, 1 / 3, 2 / 3, 1]
    assert model.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]
    assert model.config.architectures in (None, ["LlamaForCausalLM"])
    assert model.config.auto_map == {
        "AutoModel": "modeling_localist.LlamaModel",
        "AutoModelForCausalLM": "modeling_localist.LlamaForCausalLM",
    }


def test_a_model_without_a_head_can_be_localised(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = localize(LlamaModel(LlamaConfig(**TINY)).eval(), **SETTINGS)
    outputs = model(ids, output_fidelity=[3])
    assert outputs.last_hidden_state.shape == (2, 50, 32)
    assert outputs.fidelity[0].shape == (2, 4, 50)
    assert type(delocalize(model)) is LlamaModel


def test_what_is_not_said_again_stays_as_it_was(model: PreTrainedModel) -> None:
    localize(model, num_previous_blocks=1)
    assert model.config.locality.num_previous_blocks == 1
    assert {name: getattr(model.config.locality, name) for name in SETTINGS} == SETTINGS
    localize(delocalize(model))
    assert model.config.locality.locality_schedule == "quintic"
    assert model.config.locality.num_sink_tokens == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_delocalize_gives_back_the_attention(attention: str) -> None:
    native = llama(attn_implementation=attention)
    before = native.config.to_dict()
    model = localize(native, **SETTINGS)
    assert model.config._attn_implementation == LOCALIST_ATTENTION[attention]
    localize(model)
    assert model.config._attn_implementation == LOCALIST_ATTENTION[attention]
    delocalize(model)
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == before
    assert type(model) is LlamaForCausalLM
    assert type(model.model) is LlamaModel


def test_delocalize_keeps_what_others_have_put_into_the_auto_map() -> None:
    native = llama()
    native.config.auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    model = delocalize(localize(native, **SETTINGS))
    assert model.config.auto_map == {"AutoTokenizer": ["tokenization_x.X", None]}


@torch.no_grad()
def test_both_faces_of_what_is_saved(model: PreTrainedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(plain(ids).logits, model(ids).logits)
    again = localize(plain)
    assert type(again) is type(model)
    assert again.config.locality.to_dict() == model.config.locality.to_dict()
    check_same(measured(again, ids), measured(model, ids))
    # The class that `auto_map` names, of this copy of the code.
    direct = modeling_localist.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(direct) is type(model)
    check_same(measured(direct, ids), measured(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_models_of_their_own(model: PreTrainedModel, ids: torch.Tensor, clone: Callable) -> None:
    other = clone(model)
    assert type(other) is type(model)
    check_same(measured(other, ids), measured(model, ids))
    other.config.locality.locality_dial = 1.0
    assert not torch.equal(other(ids).logits, model(ids).logits)
    assert type(delocalize(other)) is LlamaForCausalLM
    assert isinstance(model, LocalistMixin)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda outputs: pickle.loads(pickle.dumps(outputs))])
def test_outputs_can_be_copied_and_pickled(model: PreTrainedModel, ids: torch.Tensor, clone: Callable) -> None:
    for part in (model, model.model):
        for request in ({"output_fidelity": [1, 3], "locality_dial": 0.5}, {}):
            outputs = part(ids, **request, use_cache=False)
            other = clone(outputs)
            assert type(other) is type(outputs)
            assert list(other) == list(outputs)
            assert_close(other.to_tuple(), outputs.to_tuple(), atol=0, rtol=0)
    assert clone(model(ids, locality_dial=1.0)).past_key_values.get_seq_length() == 50


def test_models_that_return_the_same_return_one_class(model: PreTrainedModel) -> None:
    """Torch knows output classes by name where it saves what it has exported."""
    other = modeling_localist.MistralForCausalLM
    assert other.output_class is type(model).output_class
    assert other.output_class is not type(model.model).output_class


@pytest.fixture
def another_copy() -> ModuleType:
    """The modeling folder, loaded once more under another name, as from a repository."""
    name = "another_copy_of_modeling"
    folder = Path(localist_hf.modeling.__file__).parent
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    yield package
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


@torch.no_grad()
def test_models_of_another_copy_of_the_code(
    another_copy: ModuleType, model: PreTrainedModel, ids: torch.Tensor
) -> None:
    expected = measured(model, ids)
    theirs = another_copy.localize(llama(), **SETTINGS)
    assert not isinstance(theirs, LocalistMixin)
    check_same(pickle.loads(pickle.dumps(measured(theirs, ids))), expected)
    # Ours takes it over, with its settings, and theirs gives it back.
    ours = localize(theirs)
    assert isinstance(ours, LocalistMixin)
    assert isinstance(ours.model, LocalistMixin)
    check_same(measured(ours, ids), expected)
    assert torch.equal(ours(ids, locality_dial=1.0).logits, model(ids, locality_dial=1.0).logits)
    for give_back in (another_copy.delocalize, delocalize):
        before = llama()
        back = give_back(another_copy.localize(before, **SETTINGS) if give_back is delocalize else ours)
        assert type(back) is LlamaForCausalLM
        assert back.config._attn_implementation == "sdpa"
        assert back.config.to_dict() == llama().config.to_dict()


# --- what a localised model goes through


@torch.no_grad()
def test_embeddings_in_place_of_tokens(model: PreTrainedModel, ids: torch.Tensor) -> None:
    embeddings = model.get_input_embeddings()(ids)
    check_same(measured(model, inputs_embeds=embeddings), measured(model, ids))


@torch.no_grad()
def test_under_autocast_it_measures_what_it_measures_in_float32(model: PreTrainedModel, ids: torch.Tensor) -> None:
    expected = measured(model, ids)
    request = {"block_starts": expected.block_starts[3]}
    expected = measured(model, ids, **request)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = measured(model, ids, **request)
        dialled = measured(model, ids, locality_dial=0.5, **request)
    for name in (*SHARES, "fidelity"):
        for one, other in zip(getattr(outputs, name), getattr(expected, name), strict=True):
            assert one.dtype == torch.float32
            assert (one - other).abs().mean() < 0.01
    exact = measured(model, ids, locality_dial=0.5, **request)
    assert (dialled.logits - exact.logits).abs().mean() < 0.1
    for parts in zip(*(getattr(dialled, name) for name in SHARES), strict=True):
        assert_close(sum(parts), torch.ones(2, 4, 50), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ids: torch.Tensor, dtype: torch.dtype) -> None:
    model = localize(llama().to(dtype), **SETTINGS)
    exact = localize(llama().to(dtype).float(), **SETTINGS)
    starts = measured(exact, ids).block_starts[3]
    outputs, expected = measured(model, ids, block_starts=starts), measured(exact, ids, block_starts=starts)
    assert outputs.logits.dtype == dtype
    for name in (*SHARES, "fidelity"):
        for one, other in zip(getattr(outputs, name), getattr(expected, name), strict=True):
            assert one.dtype == torch.float32
            assert (one - other).abs().mean() < 0.01
    assert torch.equal(model(ids).logits, delocalize(model)(ids).logits)


def test_gradient_checkpointing_changes_no_gradient(model: PreTrainedModel, ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        outputs = model.train()(ids, labels=ids, output_fidelity=True)
        (outputs.loss + sum(share.mean() for share in outputs.block_share)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


@torch.no_grad()
def test_hooks_of_several_devices_stay(ids: torch.Tensor) -> None:
    expected = measured(localize(llama(), **SETTINGS), ids)
    native = llama()
    parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    dispatched = dispatch_model(native, {**parts, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    hook = dispatched._hf_hook
    model = localize(dispatched, **SETTINGS)
    assert model._hf_hook is hook
    check_same(measured(model, ids), expected)
    assert not torch.equal(model(ids, locality_dial=1.0).logits, model(ids).logits)
    delocalize(model)
    assert model._hf_hook is hook
    assert torch.equal(model(ids).logits, llama()(ids).logits)
    assert type(model(ids)) is type(llama()(ids))


@torch.no_grad()
def test_compiled_it_is_the_same_under_the_dial(ids: torch.Tensor) -> None:
    torch.compiler.reset()
    model = localize(llama(num_hidden_layers=2), **SETTINGS)
    compiled = torch.compile(model, backend="aot_eager")
    request = {"locality_dial": 0.5, "output_fidelity": [1], "use_cache": False}
    check_same(compiled(ids, **request), model(ids, **request), atol=1e-5)


@torch.no_grad()
def test_the_cache_of_a_filled_prompt_goes_on_at_another_dial(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """As a server does it: what was cached at dial 0 is read at any dial."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], past_key_values=cache)
    step = measured(model, ids[:, 30:], past_key_values=cache)
    whole = measured(model, ids, use_cache=False)
    for name in (*SHARES, "fidelity"):
        for one, other in zip(getattr(step, name), getattr(whole, name), strict=True):
            assert_close(one, other[..., 30:], atol=1e-5, rtol=0)


# --- refusals


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_no_cache_by_either_name_is_none(model: PreTrainedModel, ids: torch.Tensor, name: str) -> None:
    expected = model(ids, locality_dial=1.0).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(ids, locality_dial=1.0, **{name: None}).logits, expected)


@torch.no_grad()
def test_a_cache_that_is_reset_has_the_sliding_windows_that_it_had(ids: torch.Tensor) -> None:
    model = localize(
        made("MistralForCausalLM", MistralConfig, **TINY, sliding_window=24, initializer_range=0.3),
        **{**SETTINGS, "locality_schedule": [1.0, 0.0, 0.5, 1.0]},
    )
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, locality_dial=1.0)
    cache.reset()
    pieces = [model(ids[:, at], past_key_values=cache, locality_dial=1.0) for at in (slice(30), slice(30, 50))]
    expected = model(ids, locality_dial=1.0, use_cache=False).logits
    assert_close(torch.cat([piece.logits for piece in pieces], dim=1), expected, atol=1e-5, rtol=0)


class OwnLlama(LlamaForCausalLM):
    """A user's subclass."""


def flash_llama() -> LlamaForCausalLM:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    return model


_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
_NO_SOFTMAX = r"not all of its layers are causal softmax attention with keys and values of their own \(LinearAtt"
_TWO_LAYERS = {**TINY, "num_hidden_layers": 2}
_GEMMA3N = {
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "t5": (
        lambda: made(
            "T5ForConditionalGeneration",
            T5Config,
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
        ),
        "T5ForConditionalGeneration cannot be localised: it is an encoder and a decoder",
    ),
    "bart": (
        lambda: made("BartForConditionalGeneration", BartConfig, **TINY_BART),
        "BartForConditionalGeneration cannot be localised: it is an encoder and a decoder",
    ),
    "bart_decoder": (
        lambda: made("BartForCausalLM", BartConfig, **TINY_BART),
        "BartForCausalLM cannot be localised: its layers are in a BartDecoderWrapper, which is none",
    ),
    "bert": (
        lambda: made("BertLMHeadModel", BertConfig, **TINY_BERT),
        "BertLMHeadModel cannot be localised: its tokens see those after them too",
    ),
    "bloom": (
        lambda: made("BloomForCausalLM", BloomConfig, vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
        "BloomForCausalLM cannot be localised: its layers do not attend through transformers' attention interface",
    ),
    "git": (  # whose vision encoder does
        lambda: made("GitForCausalLM", GitConfig, **TINY_BERT, vision_config=TINY_VISION),
        "GitForCausalLM cannot be localised: its layers do not attend through transformers' attention interface",
    ),
    "xlstm": (
        lambda: made("xLSTMForCausalLM", xLSTMConfig, vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=2),
        "xLSTMForCausalLM cannot be localised: its layers do not attend through transformers' attention interface",
    ),
    "hrm": (  # which goes through its layers several times
        lambda: made("HrmTextForCausalLM", HrmTextConfig, **_TWO_LAYERS, head_dim=8),
        "HrmTextForCausalLM cannot be localised: its configuration counts 16 layers, of which 2 have attention of th",
    ),
    "blt": (
        lambda: made(
            "BltForCausalLM",
            BltConfig,
            vocab_size=64,
            patcher_config=TINY_BERT,
            encoder_config={**TINY_BERT, "hidden_size_global": 16},
            decoder_config={**TINY_BERT, "hidden_size_global": 16},
            global_config=TINY_BERT,
            encoder_hash_byte_group_vocab=16,
            encoder_hash_byte_group_size=[3],
        ),
        "BltForCausalLM cannot be localised: its configuration has no `num_hidden_layers`, as those of causal",
    ),
    "part_of_several": (
        lambda: made(
            "Qwen2VLTextModel",
            Qwen2VLTextConfig,
            **TINY_BERT,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        ),
        "Qwen2VLTextModel cannot be localised: `AutoModelForCausalLM` has no model for a Qwen2VLTextConfig, by",
    ),
    "mamba": (
        lambda: made("MambaForCausalLM", MambaConfig, vocab_size=64, hidden_size=16, num_hidden_layers=1),
        f"MambaForCausalLM cannot be localised: {_NO_SOFTMAX}",
    ),
    "jamba": (
        lambda: made(
            "JambaForCausalLM",
            JambaConfig,
            **TINY,
            **_EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
        ),
        f"JambaForCausalLM cannot be localised: {_NO_SOFTMAX}",
    ),
    "qwen3_next": (
        lambda: made(
            "Qwen3NextForCausalLM",
            Qwen3NextConfig,
            **_TWO_LAYERS,
            **_LINEAR,
            **_EXPERTS,
            layer_types=["linear_attention", "full_attention"],
            head_dim=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        f"Qwen3NextForCausalLM cannot be localised: {_NO_SOFTMAX}",
    ),
    "lfm2": (
        lambda: made("Lfm2ForCausalLM", Lfm2Config, **_TWO_LAYERS, layer_types=["conv", "full_attention"]),
        f"Lfm2ForCausalLM cannot be localised: {_NO_SOFTMAX}",
    ),
    "llama4": (
        lambda: made(
            "Llama4ForCausalLM",
            Llama4TextConfig,
            **TINY,
            intermediate_size_mlp=48,
            head_dim=8,
            num_local_experts=2,
            attention_chunk_size=32,
        ),
        r"Llama4ForCausalLM cannot be localised: not all of its layers .* \(chunked_attention\)",
    ),
    "gemma3n_that_shares_keys": (
        lambda: made("Gemma3nForCausalLM", Gemma3nTextConfig, **{**TINY, **_GEMMA3N}, num_kv_shared_layers=2),
        r"Gemma3nForCausalLM cannot be localised: not all of its layers are .* of their own \(num_kv_sha",
    ),
    "gemma3n": (
        lambda: made("Gemma3nForCausalLM", Gemma3nTextConfig, **{**TINY, **_GEMMA3N}, num_kv_shared_layers=0),
        "`block_partition` is 'semantic'; Gemma3nForCausalLM normalises its values.*'delimiter' and 'window'",
    ),
    "classifier": (
        lambda: made("LlamaForSequenceClassification", LlamaConfig, **TINY),
        r"LlamaForSequenceClassification cannot be localised: .* can be \(LlamaModel and LlamaForCausalLM\)",
    ),
    "vision": (
        lambda: made(
            "LlavaForConditionalGeneration",
            LlavaConfig,
            text_config=LlamaConfig(**_TWO_LAYERS),
            vision_config=CLIPVisionConfig(**TINY_VISION),
        ),
        "LlavaForConditionalGeneration cannot be localised: it is a model of several parts; localise its",
    ),
    "subclass": (
        lambda: OwnLlama(LlamaConfig(**TINY)),
        "OwnLlama cannot be localised: its class is none of transformers'",
    ),
    "localist_gpt2": (
        lambda: LocalistGPT2LMHeadModel(
            LocalistGPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1)
        ),
        "LocalistGPT2LMHeadModel cannot be localised: it is local already",
    ),
    "adapter": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        "`model` is a PeftModelForCausalLM; it must be a causal language model of transformers. An adapter",
    ),
    "compiled": (
        lambda: torch.compile(llama(), backend="eager"),
        "`model` is a OptimizedModule; it must be a causal language model of transformers",
    ),
    "flash": (
        flash_llama,
        "`model` uses the attention implementation 'flash_attention_2'; allowed are 'sdpa', 'eager'. Load it with",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_localised_is_refused_by_name_and_left_as_it_is(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    classes = [type(module) for module in model.modules()]
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        localize(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sinks": 1, "dial": 0.5}, "`dial`, `num_sinks`: no such setting; allowed are locality_schedule, block_"),
        ({"locality_dial": 1.5}, r"`locality_dial` is 1.5; it must lie in \[0, 1\]"),
        ({"locality_schedule": [0.0, 1.0]}, "locality_schedule"),
        ({"locality_schedule": "steep"}, "steep"),
        ({"semantic_layer": 4}, r"`semantic_layer` is 4; it must lie in \[0, 3\] for a model of 4 layers"),
        ({"block_partition": "delimiter"}, "`delimiter_token_ids` is None"),
        ({"block_partition": "delimiter", "delimiter_token_ids": [64]}, "`delimiter_token_ids` holds 64; .* 0 to 63"),
        ({"num_previous_blocks": -1}, "`num_previous_blocks` is -1; it must be at least 0"),
        ({"num_sink_tokens": "one"}, "num_sink_tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    model = llama()
    config = model.config.to_dict()
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        localize(model, **settings)
    assert type(model) is LlamaForCausalLM
    assert model.config.to_dict() == config
    local = localize(model, **SETTINGS)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        localize(local, **settings)
    assert {name: getattr(local.config.locality, name) for name in SETTINGS} == SETTINGS


def test_only_what_localize_has_made_can_be_undone() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM that `localize` has not made; there is nothing to undo"):
        delocalize(llama())


def test_layers_that_drop_keyword_arguments_are_refused_when_asked(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> None:
    model = localize(llama(), **SETTINGS)
    layer = type(model.model.layers[0])
    native_forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, *args, locality=None, **kwargs: native_forward(self, *args, **kwargs)
    )
    for request in ({"output_fidelity": [1, 3]}, {"locality_dial": 0.5}):
        with pytest.raises(ValueError, match=r"does not hand its keyword arguments on to the attention of the layers"):
            model(ids, **request)
    assert torch.equal(model(ids).logits, llama()(ids).logits)


def test_a_bias_of_the_scores_is_refused_when_asked(ids: torch.Tensor) -> None:
    model = localize(made("DogeForCausalLM", DogeConfig, **TINY), **SETTINGS)
    for request in ({"output_fidelity": True}, {"locality_dial": 0.5}):
        with pytest.raises(ValueError, match="DogeAttention adds a bias to its scores; its locality can be neither"):
            model(ids, **request)


def test_a_layer_that_sees_more_than_its_configuration_says_is_refused(
    model: PreTrainedModel, ids: torch.Tensor
) -> None:
    model.config.locality.sliding_windows = [None, 20, None, None]
    with pytest.raises(ValueError, match="LlamaAttention does not see the earlier tokens, or those of its sliding"):
        model(ids, output_fidelity=True)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="LlamaAttention does not see the earlier tokens, or those of its sliding"):
        model(ids, attention_mask=mask, output_fidelity=True)
    model(ids[:, :20], output_fidelity=True)  # no more than the window


@torch.no_grad()
def test_normalised_values_leave_windows(ids: torch.Tensor) -> None:
    model = made(
        "Gemma4ForCausalLM",
        Gemma4TextConfig,
        **TINY,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    with pytest.raises(ValueError, match="Gemma4ForCausalLM normalises its values"):
        localize(model)
    expected = model(ids).logits
    localize(model, block_partition="window", window_length=8)
    outputs = model(ids, output_fidelity=True)
    for parts in zip(*(getattr(outputs, name) for name in SHARES), strict=True):
        assert_close(sum(parts), torch.ones(2, 4, 50), atol=1e-5, rtol=0)
    assert torch.equal(model(ids).logits, expected)


# --- what is shared, and what is assumed


def test_models_of_one_configuration_are_localised_apart() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, initializer_range=0.3)
    one, other, twin = (LlamaForCausalLM(config).eval() for _ in range(3))
    before = config.to_dict()
    localize(one, **SETTINGS, block_partition="window")
    localize(other, locality_schedule="localist", block_partition="window", window_length=5)
    assert one.config.locality.locality_schedule == "linear" and one.config.locality.window_length != 5
    assert config.to_dict() == twin.config.to_dict() == before
    assert not twin.config._attn_implementation.startswith("localist")
    ids = torch.randint(3, 64, (1, 30))
    free = other(ids).logits
    with one.set_locality_dial(1.0):
        assert torch.equal(other(ids).logits, free)
        assert not torch.equal(one(ids).logits, one(ids, locality_dial=0.0).logits)
    delocalize(one)
    assert other.config.locality.window_length == 5 and "auto_map" not in one.config.to_dict()
    assert {id(module.config) for module in one.modules() if hasattr(module, "config")} == {id(one.config)}


def test_a_class_of_ours_leaves_the_configuration_that_it_is_made_of_as_it_was() -> None:
    config = LlamaConfig(**TINY)
    before = config.to_dict()
    cls = modeling_localist.localist_class(LlamaForCausalLM)
    one, other = cls(config, **SETTINGS), cls(config, locality_schedule="localist")
    assert config.to_dict() == before
    assert one.config.locality.locality_schedule == "linear"
    assert other.config.locality.locality_schedule == "localist"


def test_a_layer_that_attends_twice_is_refused() -> None:
    """DiffLlama does, where a layer's locality is of one."""
    model = localize(made("DiffLlamaForCausalLM", DiffLlamaConfig, **TINY), **SETTINGS)
    ids = torch.randint(3, 64, (1, 30))
    model(ids)
    for request in ({"locality_dial": 1.0}, {"output_fidelity": True}):
        with pytest.raises(ValueError, match=r"DiffLlamaAttention attends more than once in layer 0"):
            model(ids, **request)


@pytest.mark.parametrize("request_", [{"locality_dial": 0.5}, {"output_fidelity": True}])
def test_a_forward_that_takes_use_cache_among_further_arguments(request_) -> None:
    """As GraniteMoe's does."""
    model = localize(made("GraniteMoeForCausalLM", GraniteMoeConfig, **TINY, num_local_experts=2), **SETTINGS)
    ids = torch.randint(3, 64, (1, 30))
    with torch.no_grad():
        whole = model(ids, use_cache=False, **request_)
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache, **request_)
        step = model(ids[:, 20:], past_key_values=cache, **request_)
    assert_close(step.logits, whole.logits[:, 20:], atol=1e-5, rtol=0)


def test_soft_capping_that_the_attention_does_not_do_is_not_measured() -> None:
    """Before 5.23 transformers let Gemma 2 run without, on `sdpa`."""
    model = localize(llama(), **SETTINGS)

    def capped(module, args, kwargs):
        return args, kwargs | {"softcap": 4.0}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(capped, with_kwargs=True)
    ids = torch.randint(3, 64, (1, 30))
    with pytest.raises(ValueError, match=r"`softcap` reaches the attention of layer 0 \(LlamaAttention\), and `sdpa`"):
        model(ids, output_fidelity=True)
    with pytest.raises(ValueError, match=r"`s_aux` reaches the attention of layer 0 \(LlamaAttention\), and `sdpa`"):
        localize(llama(), **SETTINGS)(ids, s_aux=torch.zeros(4), output_fidelity=True)


@pytest.mark.parametrize("saved", [[1], 0.5, "quintic", False])
def test_saved_settings_that_are_none_are_refused_by_name(saved: object) -> None:
    model = llama()
    model.config.locality = saved
    with pytest.raises(ValueError, match=r"`locality` is .*; it must map names of settings to values\."):
        localize(model)


def test_settings_are_the_model_s_own() -> None:
    schedule, delimiters = [0.0, 0.0, 0.5, 1.0], [3, 4, 5]
    one, other = (
        localize(llama(), locality_schedule=schedule, block_partition="delimiter", delimiter_token_ids=delimiters)
        for _ in range(2)
    )
    ids = torch.randint(3, 64, (1, 30))
    expected = one(ids, locality_dial=0.9).logits
    schedule[:], delimiters[:] = [1.0] * 4, [9]
    other.config.locality.locality_schedule[0] = 1.0
    assert torch.equal(one(ids, locality_dial=0.9).logits, expected)


@torch.no_grad()
def test_positions_that_begin_elsewhere_are_left_to_the_model() -> None:
    """Roberta's begin after the padding token's id, and it looks for padding itself."""
    fields = {**TINY, "initializer_range": 0.3, "is_decoder": True}
    model = localize(made("RobertaForCausalLM", RobertaConfig, **fields), **SETTINGS)
    ids = torch.randint(3, 64, (2, 30))
    mask = torch.ones_like(ids)
    ids[0, :9] = mask[0, :9] = 0
    outputs = model(ids, attention_mask=mask, output_fidelity=True)
    free = model(ids, attention_mask=mask)
    assert_close(outputs.logits[mask.bool()], free.logits[mask.bool()], atol=1e-5, rtol=0)
    alone = model(ids[:1, 9:], output_fidelity=True)
    assert_close(outputs.logits[:1, 9:], alone.logits, atol=1e-5, rtol=0)


def test_a_configuration_that_is_not_causal_is_refused() -> None:
    model = llama(is_causal=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be localised: by its configuration \(`is_causal`\)"):
        localize(model)
    assert type(model) is LlamaForCausalLM


def test_a_sliding_window_of_which_the_configuration_does_not_tell_is_refused() -> None:
    """A text shorter than that window shows nothing of it in its masks."""
    model = localize(llama(), **SETTINGS)

    def window(module, args, kwargs):
        return args, kwargs | {"sliding_window": 40}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(window, with_kwargs=True)
    with pytest.raises(ValueError, match="a sliding window of 40 keys in layer 0, of which the configuration"):
        model(torch.randint(3, 64, (1, 30)), output_fidelity=True)
