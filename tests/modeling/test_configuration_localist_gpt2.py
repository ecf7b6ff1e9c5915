import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, LlamaConfig

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model, localize
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION


AUTO_MAP = {
    "AutoConfig": "configuration_localist_gpt2.LocalistGPT2Config",
    "AutoModel": "modeling_localist_gpt2.LocalistGPT2Model",
    "AutoModelForCausalLM": "modeling_localist_gpt2.LocalistGPT2LMHeadModel",
}


def test_defaults_are_those_of_the_method():
    config = LocalistGPT2Config()
    assert config.locality_lambdas == pytest.approx([(layer / 11) ** 5 for layer in range(12)])
    assert (config.block_partition, config.semantic_layer) == ("semantic", None)
    assert (config.semantic_threshold, config.num_previous_blocks) == (1.25, 0)
    assert (config.min_block_length, config.max_block_length) == (8, 64)
    assert (config.num_sink_tokens, config.attn_pdrop) == (0, 0.0)


# Each bad value, and what its message must say: the argument, the value, what is allowed.
BAD_VALUES = [
    ({"locality_schedule": "sextic"}, ["locality_schedule", "'sextic'", "'distributed'", "'quintic'", "'localist'"]),
    ({"locality_schedule": [0.5] * 3}, ["locality_schedule", "3 numbers", "4 layers"]),
    ({"locality_schedule": [0.0, 0.5, 1.0, 1.5]}, ["locality_schedule", "1.5", "[0, 1]"]),
    ({"locality_schedule": [0.0, 0.5, 1.0, math.nan]}, ["locality_schedule", "nan", "[0, 1]"]),
    ({"locality_schedule": 1.0}, ["locality_schedule", "1.0", "str"]),
    ({"block_partition": "sentence"}, ["block_partition", "'sentence'", "'semantic'", "'delimiter'", "'window'"]),
    ({"min_block_length": 0}, ["min_block_length", "0", "at least 1"]),
    ({"min_block_length": 2.5}, ["min_block_length", "2.5", "int"]),
    ({"max_block_length": 0, "min_block_length": 0}, ["block_length", "0", "at least 1"]),
    ({"min_block_length": 9, "max_block_length": 8}, ["min_block_length", "9", "max_block_length", "8"]),
    ({"num_previous_blocks": -1}, ["num_previous_blocks", "-1", "at least 0"]),
    ({"semantic_threshold": -0.1}, ["semantic_threshold", "-0.1", "at least 0"]),
    ({"semantic_threshold": math.nan}, ["semantic_threshold", "nan"]),
    ({"semantic_layer": 4}, ["semantic_layer", "4", "[0, 3]"]),
    ({"semantic_layer": -1}, ["semantic_layer", "-1", "[0, 3]"]),
    ({"window_length": 0}, ["window_length", "0", "at least 1"]),
    ({"num_sink_tokens": -1}, ["num_sink_tokens", "-1", "at least 0"]),
    ({"block_partition": "delimiter"}, ["delimiter_token_ids", "None", "token id"]),
    ({"block_partition": "delimiter", "delimiter_token_ids": []}, ["delimiter_token_ids", "[]", "token id"]),
    ({"delimiter_token_ids": ["."]}, ["delimiter_token_ids", ".", "int"]),
]


@pytest.mark.parametrize(("overrides", "said"), BAD_VALUES, ids=lambda value: str(value)[:50])
def test_a_bad_value_is_refused_with_its_name_value_and_what_is_allowed(overrides: dict, said: list[str]):
    with pytest.raises(StrictDataclassError) as error:
        LocalistGPT2Config(n_layer=4, **overrides)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_the_extremes_of_each_range_are_allowed():
    config = LocalistGPT2Config(
        n_layer=2,
        locality_schedule=[0, 1.0],
        min_block_length=1,
        max_block_length=1,
        semantic_layer=1,
        num_previous_blocks=0,
        semantic_threshold=0,
        window_length=1,
        num_sink_tokens=0,
    )
    assert config.locality_lambdas == [0.0, 1.0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    LocalistGPT2Config(n_layer=3, locality_schedule=[0.0, 0.5, 1.0], semantic_layer=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_layers", ["n_layer", "num_hidden_layers"])
def test_overrides_on_loading_are_checked_together(saved: Path, num_layers: str):
    overrides = {num_layers: 2, "locality_schedule": [0.0, 1.0], "semantic_layer": 1}
    config = LocalistGPT2Config.from_pretrained(saved, **overrides)
    assert (config.n_layer, config.locality_lambdas, config.semantic_layer) == (2, [0.0, 1.0], 1)
    config = LocalistGPT2Config.from_dict(json.loads((saved / "config.json").read_text()), **overrides)
    assert (config.n_layer, config.locality_lambdas) == (2, [0.0, 1.0])


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_layer": 2},
        {"num_hidden_layers": 2},
        {"locality_schedule": [1.0]},
        {"min_block_length": 65},
        {"semantic_layer": 3},
    ],
    ids=str,
)
def test_overrides_on_loading_that_do_not_fit_the_rest_are_refused(saved: Path, overrides: dict):
    with pytest.raises(StrictDataclassError):
        LocalistGPT2Config.from_pretrained(saved, **overrides)


def test_loading_returns_the_arguments_it_does_not_know(saved: Path):
    config, unused = LocalistGPT2Config.from_pretrained(saved, window_length=5, nonsense=1, return_unused_kwargs=True)
    assert config.window_length == 5
    assert unused == {"nonsense": 1}


def test_a_value_set_afterwards_is_checked_on_saving(tmp_path: Path):
    config = LocalistGPT2Config()
    config.min_block_length = 100
    with pytest.raises(StrictDataclassError, match="min_block_length"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("other", [LlamaConfig(num_hidden_layers=2), GPTNeoConfig()], ids=lambda c: c.model_type)
def test_the_checkpoint_of_another_architecture_is_refused(other, tmp_path: Path):
    other.save_pretrained(tmp_path)
    for load in (LocalistGPT2Config, LocalistGPT2Model, LocalistGPT2LMHeadModel):
        with pytest.raises(ValueError, match=rf"`model_type` is '{other.model_type}'.*'gpt2'.*'localist-gpt2'"):
            load.from_pretrained(tmp_path)


def test_every_field_survives_saving_and_loading(tmp_path: Path):
    fields = {
        "n_layer": 3,
        "locality_schedule": [0.0, 0.25, 1.0],
        "block_partition": "delimiter",
        "min_block_length": 2,
        "max_block_length": 9,
        "semantic_layer": 0,
        "num_previous_blocks": 2,
        "semantic_threshold": 0.5,
        "delimiter_token_ids": [13, 198],
        "window_length": 11,
        "num_sink_tokens": 3,
        "attn_pdrop": 0.2,
    }
    config = LocalistGPT2Config(**fields)
    config.save_pretrained(tmp_path)
    loaded = LocalistGPT2Config.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("saves", ["config", "base model", "language model"])
def test_the_auto_map_is_complete_whichever_class_saves(saves: str, make_model, tmp_path: Path):
    model = make_model(n_layer=1)
    {"config": model.config, "base model": model.transformer, "language model": model}[saves].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_saving_twice_keeps_the_auto_map(saved: Path, tmp_path: Path):
    LocalistGPT2Config.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_gpt2_configuration_loads_without_attention_dropout_and_says_so(tmp_path: Path, transformers_warnings):
    GPT2Config(n_layer=2, attn_pdrop=0.3, resid_pdrop=0.2).save_pretrained(tmp_path)
    config = LocalistGPT2Config.from_pretrained(tmp_path)
    assert (config.attn_pdrop, config.resid_pdrop, config.n_layer) == (0.0, 0.2, 2)
    assert config.model_type == "localist-gpt2"
    assert any("`attn_pdrop`" in message and "0.3" in message for message in transformers_warnings.messages)


def test_the_default_dropout_of_gpt2_counts_too_where_its_file_has_none(tmp_path: Path, transformers_warnings):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    assert LocalistGPT2Config.from_pretrained(tmp_path).attn_pdrop == 0.0
    assert any("`attn_pdrop`" in message for message in transformers_warnings.messages)


def test_an_explicit_attention_dropout_is_kept_without_a_warning(tmp_path: Path, transformers_warnings):
    GPT2Config(n_layer=2).save_pretrained(tmp_path)
    assert LocalistGPT2Config.from_pretrained(tmp_path, attn_pdrop=0.1).attn_pdrop == 0.1
    assert not any("attn_pdrop" in message for message in transformers_warnings.messages)


def test_a_gpt2_configuration_without_dropout_gives_no_warning(tmp_path: Path, transformers_warnings):
    GPT2Config(n_layer=2, attn_pdrop=0.0).save_pretrained(tmp_path)
    LocalistGPT2Config.from_pretrained(tmp_path)
    assert not any("attn_pdrop" in message for message in transformers_warnings.messages)


def test_the_attention_of_choice_is_kept_and_localist_is_the_default():
    for choice, used in ((None, LOCALIST_ATTENTION["sdpa"]), ("eager", "eager"), ("sdpa", "sdpa")):
        config = LocalistGPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9, attn_implementation=choice)
        for model_class in (LocalistGPT2Model, LocalistGPT2LMHeadModel):
            assert model_class(config).config._attn_implementation == used


def test_a_gpt2_that_localize_has_made_local_is_read_with_its_settings(tmp_path: Path):
    model = localize(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=9)), num_sink_tokens=2)
    model.save_pretrained(tmp_path)
    config = LocalistGPT2Config.from_pretrained(tmp_path, locality_schedule="cubic")
    assert (config.num_sink_tokens, config.locality_schedule, config.locality) == (2, "cubic", config)
    assert set(config.to_dict()["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    loaded = LocalistGPT2LMHeadModel.from_pretrained(tmp_path)
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_checkpoint_of_0_1_loads_with_another_partition():
    config = LocalistGPT2Config.from_dict({"semantic_window": 16, "n_layer": 2}, block_partition="window")
    assert config.block_partition == "window"
