"""Export to plain GPT-2: the same model to the last bit, for code that has never heard of this project."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.hub import export
from localist_hf.hub.export import export_gpt2
from localist_hf.hub.loading import SETTINGS_FILE
from localist_hf.modeling import LOCALITY_FIELDS


@pytest.fixture
def make_run(make_model: Callable, tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """A run folder as training leaves it; fields of the configuration can be overridden."""

    def make(dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **overrides) -> Path:
        model = make_model(vocab_size=len(tokenizer), **overrides).to(dtype)
        model.generation_config.update(do_sample=True, top_k=7)
        model.save_pretrained(tmp_path / "run", max_shard_size=max_shard_size)
        tokenizer.save_pretrained(tmp_path / "run")
        return tmp_path / "run"

    return make


def make_adapter(base: nn.Module, folder: Path) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def load(folder: Path) -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model: nn.Module, length: int = 40) -> torch.Tensor:
    tokens = torch.arange(2 * length).view(2, length) * 31 % 97
    model = copy.deepcopy(model)  # to fresh memory, whose alignment can change the last bit
    with torch.no_grad():
        return model(tokens).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16},
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
        {"n_positions": 5},
        {"max_shard_size": "20KB", "dtype": torch.float16},
    ],
    ids=["float32", "bfloat16", "untied", "short", "sharded"],
)
def test_weights_and_logits_are_those_of_the_source(make_run, tmp_path: Path, settings: dict) -> None:
    run = make_run(**settings)
    assert (run / "model.safetensors.index.json").exists() == ("max_shard_size" in settings)
    export_gpt2(run, tmp_path / "out")
    source, exported = LocalistGPT2LMHeadModel.from_pretrained(run, dtype="auto"), load(tmp_path / "out")
    assert type(exported) is GPT2LMHeadModel
    assert exported.dtype == settings.get("dtype", torch.float32)
    expected = source.state_dict()
    assert exported.state_dict().keys() == expected.keys()
    for name, weight in exported.state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
    length = min(40, source.config.n_positions)
    assert torch.equal(logits(exported, length), logits(source, length))
    is_tied = settings.get("tie_word_embeddings", True)
    assert (exported.lm_head.weight is exported.transformer.wte.weight) == is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not is_tied)


def test_the_folder_holds_gpt2_and_nothing_else(make_run, tmp_path: Path) -> None:
    run = make_run(n_inner=48, activation_function="gelu")
    export_gpt2(run, tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert names(out) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert names(tmp_path / "deep") == {"out"}
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (out, run))
    added = set(LOCALITY_FIELDS)
    assert config == {name: value for name, value in source.items() if name not in added | {"auto_map"}} | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
    }
    assert (out / "generation_config.json").read_bytes() == (run / "generation_config.json").read_bytes()
    for path in out.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert b"name_or_path" not in content
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert not tokenizer_config.keys() & {"is_local", "local_files_only"}
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 knows
    # The rights of any new folder, not those of a temporary one, which shuts other users out.
    assert out.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_generation_and_tokens_are_the_same(make_run, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    export_gpt2(run, out)
    generated = []
    for model, folder in ((LocalistGPT2LMHeadModel.from_pretrained(run), run), (load(out), out)):
        inputs = AutoTokenizer.from_pretrained(folder)("something says more of the words", return_tensors="pt")
        torch.manual_seed(0)
        greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        generated.append((inputs, greedy, model.generate(**inputs, max_new_tokens=20, do_sample=True)))
    (inputs, greedy, sampled), (other_inputs, other_greedy, other_sampled) = generated
    assert inputs.keys() == other_inputs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"], other_inputs["input_ids"])
    assert torch.equal(greedy, other_greedy)
    assert torch.equal(sampled, other_sampled)


def test_how_the_weights_lie_in_their_file_does_not_matter(make_run, tmp_path: Path) -> None:
    run = make_run(n_positions=1)  # one token: products of a vector, whose last bit can hang on the alignment
    weights = load_file(run / "model.safetensors")
    for length in (8, 16):
        save_file(weights, run / "model.safetensors", metadata={"format": "pt", "note": "x" * length})
        export_gpt2(run, tmp_path / str(length))


def test_a_repository_of_the_hub_is_a_source_too(make_run, tmp_path: Path, monkeypatch) -> None:
    def cache(folder: Path, name: str) -> None:
        repository = tmp_path / "cache" / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = make_run()
    cache(run, "run")
    adapted = make_adapter(LocalistGPT2LMHeadModel.from_pretrained("org/run"), tmp_path / "adapter")
    cache(tmp_path / "adapter", "adapter")
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "adapter")
    export_gpt2("org/adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(adapted), rtol=1e-5, atol=1e-4)
    export_gpt2("org/run", tmp_path / "out")
    with adapted.disable_adapter():
        assert torch.equal(logits(load(tmp_path / "out")), logits(adapted))
    assert "tokenizer.json" in names(tmp_path / "merged") & names(tmp_path / "out")


def test_a_source_without_a_tokenizer_gives_an_export_without_one(make_model, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "run")
    export_gpt2(tmp_path / "run", tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("base_type", ["localist", "gpt2", "localised gpt2"])
def test_an_adapter_is_merged(make_run, tmp_path: Path, base_type: str) -> None:
    base = make_run()
    if base_type != "localist":
        export_gpt2(base, tmp_path / "gpt2")
        base = tmp_path / "gpt2"
    if base_type == "localised gpt2":
        localize(load(base), locality_dial=0.5).save_pretrained(base)
    model = LocalistGPT2LMHeadModel.from_pretrained(base, locality_dial=0.0)
    plain = logits(model)
    expected = logits(make_adapter(model, tmp_path / "adapter"))
    assert (expected - plain).abs().max() > 0.1  # the adapter does something
    export_gpt2(tmp_path / "adapter", tmp_path / "out")
    exported = load(tmp_path / "out")
    assert type(exported) is GPT2LMHeadModel
    torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert "tokenizer.json" in names(tmp_path / "out")  # the base's
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    "said", [{"return_dict": False}, {"output_attentions": True}, {"attn_implementation": "eager"}]
)
def test_what_a_run_says_of_its_calls_counts_for_nothing(make_run, tmp_path: Path, said: dict) -> None:
    run = make_run()
    config = json.loads((run / "config.json").read_text())
    expected = logits(LocalistGPT2LMHeadModel.from_pretrained(run))
    (run / "config.json").write_text(json.dumps(config | said))
    export_gpt2(run, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), expected)


def test_an_adapter_of_a_base_with_added_tokens_is_merged_with_them(make_run, tokenizer, tmp_path: Path) -> None:
    base = LocalistGPT2LMHeadModel.from_pretrained(make_run())
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<new>"])
    base.resize_token_embeddings(len(own))
    expected = logits(make_adapter(base, tmp_path / "adapter"))
    own.save_pretrained(tmp_path / "adapter")
    export_gpt2(tmp_path / "adapter", tmp_path / "out")
    exported = load(tmp_path / "out")
    assert exported.config.vocab_size == len(own) == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (logits(exported) - expected).abs().max() < 1e-3


def test_an_adapter_of_a_bf16_base_is_merged_in_float32_and_rounded_once(make_run, tmp_path: Path) -> None:
    make_adapter(LocalistGPT2LMHeadModel.from_pretrained(make_run(dtype=torch.bfloat16)), tmp_path / "adapter")
    export_gpt2(tmp_path / "adapter", tmp_path / "out")
    base = LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "run", dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().bfloat16().state_dict()
    exported = load(tmp_path / "out").state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in exported.values())
    assert all(torch.equal(weight, expected[name]) for name, weight in exported.items())


@pytest.mark.parametrize("field", ["locality_dial", "min_fidelity"])
def test_a_dial_that_is_set_is_warned_of(make_run, tmp_path: Path, transformers_warnings, field: str) -> None:
    run = make_run(**{field: 0.75})
    export_gpt2(run, tmp_path / "out")
    assert f"`{field}` of {run} is 0.75; plain GPT-2 has no dial" in transformers_warnings.text
    source, exported = LocalistGPT2LMHeadModel.from_pretrained(run), load(tmp_path / "out")
    assert not torch.allclose(logits(source), logits(exported), atol=1e-2)
    source.config.locality_dial = source.config.min_fidelity = 0.0
    assert torch.equal(logits(source), logits(exported))


def test_without_a_dial_there_is_no_warning(make_run, tmp_path: Path, transformers_warnings) -> None:
    export_gpt2(make_run(), tmp_path / "out")
    assert "dial" not in transformers_warnings.text


def test_an_occupied_folder_is_refused_before_anything_else(make_run, tmp_path: Path) -> None:
    run = make_run()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for source in (run, "no/such/source"):
        with pytest.raises(ValueError, match=r"`folder` is '.*run', which is occupied; it must be new or empty"):
            export_gpt2(source, run)
    with pytest.raises(ValueError, match=r"`folder` is .*which is occupied"):
        export_gpt2(run, run / "config.json")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert names(tmp_path) == {"run"}


def plain_gpt2(run: Path, folder: Path) -> None:
    export_gpt2(run, folder)


def localised_gpt2(run: Path, folder: Path) -> None:
    localize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))).save_pretrained(folder)


def llama(run: Path, folder: Path) -> None:
    LlamaConfig().save_pretrained(folder)


def adapter_of_llama(run: Path, folder: Path) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(run)
    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(run), adapter).save_pretrained(folder)


def prefix_adapter(run: Path, folder: Path) -> None:
    adapter = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(LocalistGPT2LMHeadModel.from_pretrained(run), adapter).save_pretrained(folder)


def adapter_without_its_base(run: Path, folder: Path) -> None:
    make_adapter(LocalistGPT2LMHeadModel.from_pretrained(run), folder)
    run.rename(run.with_name("moved"))


def missing_weight(run: Path, folder: Path) -> None:
    weights = load_file(run / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    run.rename(folder)


def cut_off_weights(run: Path, folder: Path) -> None:
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    run.rename(folder)


def nothing(run: Path, folder: Path) -> None:
    pass


def unfinished(run: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / SETTINGS_FILE).write_text("{}")


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (plain_gpt2, r"`source` is '.*bad', whose `model_type` is 'gpt2'; it must be 'localist-gpt2'"),
        (localised_gpt2, r"`source` is '.*bad', which is a plain 'gpt2' model already"),
        (llama, "whose `model_type` is 'llama'; it must be 'localist-gpt2'"),
        (adapter_of_llama, "`source's base` is '.*run', whose `model_type` is 'llama'; it must be .* or 'gpt2'"),
        (prefix_adapter, r"`source` is '.*bad', an adapter of type 'PREFIX_TUNING'; it must be .* 'LORA'"),
        (adapter_without_its_base, "`source's base` is '.*run'; there is no such folder"),
        (missing_weight, r"which cannot be loaded: its weights lack transformer\.h\.1\.mlp\.c_fc\.bias"),
        (cut_off_weights, "`source` is '.*bad', which cannot be loaded: .*incomplete"),
        (nothing, "`source` is '.*bad'; there is no such folder"),
        (unfinished, "`source` is '.*bad'; there is no config.json in this folder. Its run is not finished"),
    ],
)
def test_a_bad_source_is_refused_and_leaves_nothing(
    make_run, tmp_path: Path, make_source: Callable, message: str
) -> None:
    make_source(make_run(), tmp_path / "bad")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_gpt2(tmp_path / "bad", tmp_path / "deep" / "out")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"which cannot be read: '.*config\.json' is damaged: Expecting"),
        ("config.json", "[]", r"which cannot be read: '.*config\.json' is damaged: it holds no JSON object"),
        ("config.json", {"n_head": "x"}, "whose configuration cannot be used so: .*n_head.*'x'"),
        ("config.json", {"n_embd": 64}, r"which cannot be loaded: .* has the shape \(\d+,\); by its"),
        ("generation_config.json", "{", r"which cannot be read: '.*generation_config\.json' is damaged"),
        ("tokenizer.json", "{", r"which cannot be read: '.*tokenizer\.json' is damaged"),
        ("tokenizer_config.json", "\xff", r"which cannot be read: '.*tokenizer_config\.json' is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    make_run, tmp_path: Path, name: str, content: str | dict, message: str
) -> None:
    run = make_run()
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / name).read_text()) | content)
    (run / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"`source` is '.*run', {message}"):
        export_gpt2(run, tmp_path / "out")
    assert names(tmp_path) == {"run"}


def broken_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def no_type(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')


def no_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def no_adapter_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def cut_off_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)


def change_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights, min(weights))
    save_file(weights, folder / "adapter_model.safetensors")


def another_shape(folder: Path) -> None:
    change_adapter(folder, lambda weights, name: weights.update({name: torch.zeros(3, 3)}))


def one_weight_less(folder: Path) -> None:
    change_adapter(folder, lambda weights, name: weights.pop(name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_json, r"which cannot be read: '.*adapter_config\.json' is damaged"),
        (no_type, "an adapter of type None; it must be of type 'LORA'"),
        (no_base, r"which cannot be read: its adapter_config\.json does not name the base"),
        (no_adapter_weights, "whose adapter cannot be loaded"),
        (cut_off_adapter, "whose adapter cannot be loaded: .*header"),
        (another_shape, r"whose adapter cannot be loaded: .*size mismatch for .*h\.0\.attn\.c_attn\.lora_A"),
        (one_weight_less, r"whose adapter lacks the weights .*h\.0\.attn\.c_attn\.lora_A\.weight"),
    ],
)
def test_a_damaged_adapter_is_named(make_run, tmp_path: Path, damage: Callable, message: str) -> None:
    make_adapter(LocalistGPT2LMHeadModel.from_pretrained(make_run()), tmp_path / "lora")
    damage(tmp_path / "lora")
    with pytest.raises(ValueError, match=f"`source` is '.*lora', {message}"):
        export_gpt2(tmp_path / "lora", tmp_path / "out")
    assert names(tmp_path) == {"run", "lora"}


def test_a_folder_inside_a_file_is_refused(make_run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"`folder` is '.*file/out'; '.*file' is a file"):
        export_gpt2(make_run(), tmp_path / "file" / "out")


def test_an_export_that_differs_is_refused_and_leaves_nothing(make_run, tmp_path: Path, monkeypatch) -> None:
    run, plain_gpt2 = make_run(), export._plain_gpt2

    def almost(model: LocalistGPT2LMHeadModel) -> GPT2LMHeadModel:
        gpt2 = plain_gpt2(copy.deepcopy(model))
        with torch.no_grad():
            gpt2.transformer.h[1].mlp.c_fc.bias[0] += 1e-4
        return gpt2

    monkeypatch.setattr(export, "_plain_gpt2", almost)
    with pytest.raises(RuntimeError, match="The logits of the exported model differ from the source's by up to"):
        export_gpt2(run, tmp_path / "deep" / "out")
    assert names(tmp_path) == {"run"}


def test_an_adapter_that_is_merged_wrongly_is_refused(make_run, tmp_path: Path, monkeypatch) -> None:
    make_adapter(LocalistGPT2LMHeadModel.from_pretrained(make_run(dtype=torch.bfloat16)), tmp_path / "adapter")
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    with pytest.raises(RuntimeError, match="The logits of the merged adapter differ"):
        export_gpt2(tmp_path / "adapter", tmp_path / "out")
    assert names(tmp_path) == {"run", "adapter"}


def test_a_failure_while_writing_leaves_nothing(make_run, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    run = make_run()
    monkeypatch.setattr(export, "_save_tokenizer", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="no space left"):
        export_gpt2(run, tmp_path / "out")
    assert names(tmp_path) == {"run", "out"}
    assert names(tmp_path / "out") == set()
