"""Runs of models that `localize` has made: records, cards, and repositories with two faces."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from localist_hf import localize
from localist_hf.cli.main import main
from localist_hf.hub import RunRecord, card_files, publish, repository_files
from localist_hf.hub.example import stored_config
from localist_hf.modeling import LOCALITY_FIELDS


TOKEN = "hf_test_token"
TOKENS = torch.arange(2, 40).view(2, 19)
CODE = {
    "attention_checks.py", "block_attention.py", "block_partition.py", "block_search.py", "block_shares.py",
    "block_step.py",
    "dialled_attention.py", "explicit_attention.py", "fidelity.py", "fused_attention.py", "local_cache.py",
    "local_set.py", "localist_attention.py", "locality.py", "locality_config.py", "locality_dial.py",
    "locality_mixin.py", "locality_request.py", "locality_schedule.py", "measurements.py", "modeling_localist.py",
    "opaque_ops.py", "pointer_set.py", "reach.py", "rules.py",
}  # fmt: skip
TEXTS = {
    "README.md", "config.json", "shares_over_depth.png", "run.json", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip
AUTO_MAP = {
    "AutoModel": "modeling_localist.LlamaModel",
    "AutoModelForCausalLM": "modeling_localist.LlamaForCausalLM",
}
SETTINGS = {"min_block_length": 3, "max_block_length": 12}


@pytest.fixture
def runs(llama_runs: Path, tmp_path: Path) -> Path:
    """To be changed at will."""
    return shutil.copytree(llama_runs, tmp_path / "runs")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@torch.no_grad()
def logits(model: torch.nn.Module, **arguments: float) -> torch.Tensor:
    return model.eval()(TOKENS, **arguments).logits


# Records


def test_a_record_reads_the_settings_under_locality(llama_runs: Path, family: Path) -> None:
    record = RunRecord.load(llama_runs / "llama-quintic")
    assert (record.name, record.variant, record.base_run) == ("quintic", "quintic", "base")
    assert record.repository_id() == "org/localist-llama-quintic"
    assert record.repository_id("me", "mine") == "me/localist-llama-mine"
    assert record.config["locality"] | SETTINGS == record.config["locality"]
    assert set(record.locality) == set(LOCALITY_FIELDS)
    assert record.lambdas == RunRecord.load(family / "quintic").lambdas
    assert record.training["steps"] == 1
    assert RunRecord.load(family / "quintic").repository_id() == "org/localist-gpt2-quintic"


def test_runs_are_compared_by_what_stands_under_locality(llama_runs: Path) -> None:
    record = RunRecord.load(llama_runs / "llama-quintic")

    def changed(**settings: object) -> RunRecord:
        return replace(record, config=record.config | {"locality": {**record.locality, **settings}})

    assert record.is_comparable(changed(locality_schedule="linear"))
    assert not record.is_repetition(changed(locality_schedule="linear"))
    assert not record.is_comparable(changed(num_sink_tokens=2))
    assert not record.is_comparable(replace(record, config=record.config | {"hidden_act": "relu"}))
    locality = {name: value for name, value in record.locality.items() if name != "num_sink_tokens"}
    for config, message in (
        (record.config | {"locality": locality}, "`config` has no 'num_sink_tokens'"),
        (record.config | {"hidden_size": "wide"}, "`config.hidden_size`, 'wide', makes no configuration of a 'llama'"),
        (record.config | {"id2label": 2.0}, "`config.id2label`, 2.0, makes no configuration .*; transformers: "),
        ({**record.config, "model_type": "none such"}, "none such"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(record, config=config)


# Cards


@pytest.mark.parametrize("name", ["llama-base", "llama-quintic", "llama-lora"])
def test_a_card_says_nothing_of_gpt2(llama_runs: Path, name: str) -> None:
    card = ModelCard(card_files(llama_runs / name)["README.md"].decode())
    assert not re.search(r"gpt-?2", str(card), re.IGNORECASE)
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\}\}|\{%|\n\n\n\n", card.text)
    assert {"localist", "llama"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == ("peft" if name.endswith("lora") else "transformers")
    assert card.data.base_model == (None if name.endswith("base") else "org/localist-llama-base")
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        ast.parse(block)
    assert "Llama to the last bit" in card.text
    if name.endswith("lora"):
        assert "A LoRA adapter. Loaded plainly it adapts plain Llama," in card.text
        assert "plain = AutoPeftModelForCausalLM.from_pretrained(repo_id, revision=revision)\n" in card.text
    else:
        assert "Llama (4 layers, width 32, 4 heads, 0.1 million parameters)" in card.text
        assert "Format: a localised native model. Loaded plainly, without a question, it is Llama," in card.text
        assert "plain = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)\n" in card.text


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=60, n_embd=32, n_layer=4, n_head=4)),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=60, word_embed_proj_dim=32,
        )
    ),
    "GPTNeoX": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=60,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_have_their_own_names(llama_runs: Path, tmp_path: Path, kind: str) -> None:
    config = localize(OTHERS[kind](), locality_schedule="quintic").config
    fields = {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "architectures")}
    record = replace(RunRecord.load(llama_runs / "llama-quintic"), config=fields)
    record.save(tmp_path)
    card = ModelCard(card_files(tmp_path)["README.md"].decode())
    assert f"{kind} (4 layers, width 32, 4 heads, " in card.text
    assert f"changes nothing: {kind} to the last bit" in card.text
    assert config.model_type in card.data.tags
    assert record.repository_id() == f"org/localist-{config.model_type}-quintic"
    # Learned positions come to an end.
    assert f"max_new_tokens={40 if kind == 'GPTNeoX' else 30}," in card.text


# Repositories


def test_a_repository_is_the_native_one_and_our_code(llama_runs: Path) -> None:
    files = repository_files(llama_runs / "llama-quintic")
    assert set(files) == CODE | TEXTS | {"generation_config.json", "model.safetensors"}
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["auto_map"] == AUTO_MAP
    assert config["locality"] == RunRecord.load(llama_runs / "llama-quintic").locality


def test_a_repository_runs_no_code_of_another(runs: Path) -> None:
    foreign = {name: f"some/other--{reference}" for name, reference in AUTO_MAP.items()}
    change_config(runs / "llama-quintic", auto_map=foreign | {"AutoConfig": "some/other--configuration.Config"})
    assert json.loads(repository_files(runs / "llama-quintic")["config.json"])["auto_map"] == AUTO_MAP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"locality": None}, r"`locality_schedule` in config\.json of .* is None; the run was measured with 'quintic'"),
        ({"architectures": ["FSDPLlamaForCausalLM"]}, r"`architectures` in config\.json of .* is \['FSDPLlamaForCausa"),
        ({"model_type": "mistral"}, r"`model_type` in config\.json of .* is 'mistral'; .* measured with 'llama'"),
        ({"hidden_size": "wide"}, r"config\.json of .* is damaged: .*hidden_size"),
    ],
)
def test_a_configuration_other_than_the_measured_one_is_refused(runs: Path, changes: dict, message: str) -> None:
    change_config(runs / "llama-quintic", **changes)
    with pytest.raises(ValueError, match=message):
        repository_files(runs / "llama-quintic")


def test_an_adapter_has_the_settings_and_the_code_for_its_base(runs: Path) -> None:
    record = RunRecord.load(runs / "llama-lora")
    files = repository_files(runs / "llama-lora", "me/mine", base_model="me/base")
    assert set(files) == CODE | TEXTS | {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["auto_map"] == {name: f"me/mine--{reference}" for name, reference in AUTO_MAP.items()}
    assert config["locality"] == record.locality


def test_runs_of_two_architectures_lie_in_one_folder(
    hub: HubServer, api: HfApi, runs: Path, family: Path, tmp_path: Path
) -> None:
    for name in ("base", "quintic"):
        shutil.copytree(family / name, runs / name)
    said: list[str] = []
    publish(runs, "org", api=api, report=said.append)
    assert not any(line.startswith("left out") for line in said)
    assert {model.id for model in api.list_models(author="org")} == {
        f"org/localist-{name}"
        for name in ("gpt2-base", "gpt2-quintic", "llama-base", "llama-quintic", "llama-quintic-lora")
    }
    adapter = json.loads(hub.repo("org/localist-llama-quintic-lora").files()["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "org/localist-llama-base"


def test_a_run_that_goes_on_from_trusted_code_is_one_like_any_other(
    llama_runs: Path, train_run: Callable, tmp_path: Path
) -> None:
    trainer = train_run(tmp_path / "again", "quintic", llama_runs / "llama-quintic", trust=True)
    assert type(trainer.model).__module__.startswith("transformers_modules.")
    record = RunRecord.load(tmp_path / "again")
    assert (record.name, record.variant, record.repository_id()) == ("again", "quintic", "org/localist-llama-again")
    files = repository_files(tmp_path / "again")
    assert set(files) == set(repository_files(llama_runs / "llama-quintic"))
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert record.example is not None


# A model's own method


@pytest.mark.usefixtures("environment")
def test_a_localised_model_pushes_what_publish_publishes(hub: HubServer, api: HfApi, llama_runs: Path) -> None:
    folder = llama_runs / "llama-quintic"
    model = localize(AutoModelForCausalLM.from_pretrained(folder))
    model.push_to_hub("org/smollm2-quintic")
    files = hub.repo("org/smollm2-quintic").files()
    files.pop(".gitattributes")
    assert set(files) == set(repository_files(folder))
    assert 'repo_id = "org/smollm2-quintic"' in files["README.md"].decode()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_weights_that_nobody_measured_are_pushed_as_transformers_does(
    llama_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *args, **kwargs: pushed.append(args))
    model = localize(AutoModelForCausalLM.from_pretrained(llama_runs / "llama-quintic"))
    model.lm_head.weight.data += 1e-3
    model.push_to_hub("org/new")
    assert pushed == [(model, "org/new")]


def test_native_classes_and_those_of_a_copy_keep_their_method(llama_runs: Path, make_llama: Callable) -> None:
    native = PreTrainedModel.push_to_hub
    remote = AutoModelForCausalLM.from_pretrained(llama_runs / "llama-quintic", trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules.")
    assert type(remote).push_to_hub is LlamaForCausalLM.push_to_hub is native
    assert type(localize(make_llama())).push_to_hub is not native


# Adapters


def test_an_adapter_loads_plainly_and_localised(llama_runs: Path, tmp_path: Path) -> None:
    folder = llama_runs / "llama-lora"
    plain = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(plain.get_base_model()) is LlamaForCausalLM
    # With the code of its base's repository it is localised as the base is, and computes the same.
    trusted = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert trusted.get_base_model().config.locality.locality_schedule == "distributed"
    assert torch.equal(logits(trusted), logits(plain))
    # On a base that is localised by hand, under the settings that it was trained with.
    base = localize(AutoModelForCausalLM.from_pretrained(llama_runs / "llama-base"), locality_schedule="quintic")
    model = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(model), logits(plain))
    assert not torch.allclose(logits(model, locality_dial=1.0), logits(plain))
    assert model(TOKENS, output_fidelity=True).fidelity[-1].shape == (2, 4, 19)
    # What it is merged into keeps the settings, and both faces.
    dialled = logits(model, locality_dial=1.0)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["locality"]["locality_schedule"] == "quintic"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    for again in (
        localize(AutoModelForCausalLM.from_pretrained(tmp_path)),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        torch.testing.assert_close(logits(again), logits(plain), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(again, locality_dial=1.0), dialled, atol=1e-4, rtol=1e-4)


def test_the_settings_of_an_adapter_come_with_its_configuration(llama_runs: Path, tmp_path: Path) -> None:
    files = repository_files(llama_runs / "llama-lora", base_model="me/base")
    (tmp_path / "config.json").write_bytes(files["config.json"])
    config = AutoConfig.from_pretrained(tmp_path)
    base = localize(AutoModelForCausalLM.from_pretrained(llama_runs / "llama-base", config=config))
    assert base.config.locality.locality_schedule == "quintic"
    assert base.config.locality.max_block_length == 12
    assert base.config.auto_map == AUTO_MAP


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_a_quantization_done_in_loading_is_no_part_of_what_is_stored(make_llama: Callable, pre_quantized: bool) -> None:
    model = localize(make_llama())
    assert stored_config(model).to_dict() == model.config.to_dict()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    model.hf_quantizer = SimpleNamespace(pre_quantized=pre_quantized)
    stored = stored_config(model).to_dict()
    assert ("quantization_config" in stored) == pre_quantized
    assert stored["locality"] == model.config.to_dict()["locality"]


def test_an_adapter_of_a_quantised_base_is_one_of_the_base_itself(
    llama_runs: Path, train_run: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    train_run(
        tmp_path / "qlora", "quintic", llama_runs / "llama-base", llama=True, lora=True, quantization=quantization
    )
    record = RunRecord.load(tmp_path / "qlora")
    assert "quantization_config" not in record.config
    assert record.example is not None
    files = repository_files(tmp_path / "qlora", base_model="me/base")
    assert "quantization_config" not in json.loads(files["config.json"])
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "qlora").get_base_model()
    assert type(plain) is LlamaForCausalLM
    assert not plain.config.to_dict().get("quantization_config")


# Export


def test_there_is_nothing_to_export(llama_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(llama_runs / "llama-quintic"), str(tmp_path / "out")])
    assert "is a plain 'llama' model already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
