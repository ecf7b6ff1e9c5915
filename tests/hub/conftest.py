"""A family of finished tiny runs, and a Hub to publish them to."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.configuration import PAPER_VARIANTS, variant_config
from localist_hf.hub import write_card
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


TOKEN, OTHER_TOKEN = "hf_test_token", "hf_other_test_token"
CARD = {"dataset": "book of sentences", "evaluation_split": "held-out", "language": "en", "license": "apache-2.0"}


@pytest.fixture(scope="session")
def make_llama(tokenizer: PreTrainedTokenizerFast) -> Callable[[], LlamaForCausalLM]:
    """A tiny random Llama with grouped queries, of transformers alone."""

    def make() -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=300, initializer_range=0.3, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return make


@pytest.fixture(scope="session")
def make_local_model(
    make_config: Callable, make_llama: Callable, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., PreTrainedModel]:
    """A localist model of random weights, or of those of the run in `base`."""

    def make(variant: str, base: Path | None = None, llama: bool = False, **loading: Any) -> PreTrainedModel:
        settings = variant_config(variant)
        if llama:
            native = make_llama() if base is None else AutoModelForCausalLM.from_pretrained(base, **loading)
            return localize(native, min_block_length=3, max_block_length=12, **settings)
        if base is None:
            return LocalistGPT2LMHeadModel(make_config(vocab_size=len(tokenizer), **settings))
        return LocalistGPT2LMHeadModel.from_pretrained(base, **settings)

    return make


@pytest.fixture(scope="session")
def make_trainer(make_local_model: Callable, tokenizer: PreTrainedTokenizerFast) -> Callable[..., LocalistTrainer]:
    """A trainer of one step, from random weights or from the run in `base`."""

    def make(
        folder: Path,
        variant: str,
        base: Path | None = None,
        lora: bool = False,
        llama: bool = False,
        trust: bool = False,
        quantization: Any = None,
        **args,
    ) -> LocalistTrainer:
        if trust:  # the base under its own settings, by the code beside it
            model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
        else:
            model = make_local_model(variant, base, llama, quantization_config=quantization)
        if lora:
            targets = ["q_proj", "v_proj"] if llama else ["c_attn"]
            config = LoraConfig(
                r=2, target_modules=targets, fan_in_fan_out=not llama, task_type="CAUSAL_LM", init_lora_weights=False
            )
            model = get_peft_model(model, config)
        text = tokenizer("Sentence number 12 says something more of the words. " * 40)["input_ids"]
        sequences = Dataset.from_dict({"input_ids": [text[start : start + 40] for start in range(0, 240, 40)]})
        settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        return LocalistTrainer(
            model=model,
            args=LocalistTrainingArguments(output_dir=str(folder), **(settings | args)),
            train_dataset=sequences.select(range(4)),
            eval_dataset=sequences.select(range(4, 6)),
            processing_class=AutoTokenizer.from_pretrained(base) if base else tokenizer,
        )

    return make


@pytest.fixture(scope="session")
def train_run(make_trainer: Callable[..., LocalistTrainer]) -> Callable[..., LocalistTrainer]:
    """Trains, evaluates, saves and writes the card."""

    def train(folder: Path, variant: str, base: Path | None = None, name: str | None = None, **args) -> LocalistTrainer:
        trainer = make_trainer(folder, variant, base, **args)
        trainer.train()
        trainer.save_model()
        trainer.evaluate()
        trainer.create_model_card(model_name=name, **CARD)
        return trainer

    return train


@pytest.fixture(scope="session")
def family(train_run: Callable[..., LocalistTrainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the seven variants of it, one of them from two seeds, and an adapter. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("runs") / "family"
    train_run(folder / "base", "distributed", name="base", locality_weight=0.0)
    for variant in PAPER_VARIANTS:
        train_run(folder / variant, variant, folder / "base")
    train_run(folder / "quintic-seed1", "quintic", folder / "base", seed=1)
    train_run(folder / "quintic-lora", "quintic", folder / "base", lora=True)
    for path in folder.iterdir():
        write_card(path)  # now that the siblings are there
    return folder


@pytest.fixture(scope="session")
def llama_runs(train_run: Callable[..., LocalistTrainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a variant of it and an adapter, all localised Llamas. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("llama-runs") / "runs"
    train_run(folder / "llama-base", "distributed", name="base", llama=True, locality_weight=0.0)
    train_run(folder / "llama-quintic", "quintic", folder / "llama-base", llama=True)
    train_run(folder / "llama-lora", "quintic", folder / "llama-base", llama=True, lora=True)
    for path in folder.iterdir():
        write_card(path)
    return folder


@pytest.fixture
def runs(family: Path, tmp_path: Path) -> Path:
    """A few runs of the family, to be changed at will."""
    for name in ("base", "distributed", "quintic", "quintic-lora"):
        shutil.copytree(family / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def plain_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep Xet, any token of this machine and progress bars out of the in-process client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the test hub is on this machine
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(users={TOKEN: {"name": "alice", "orgs": ["org"]}, OTHER_TOKEN: {"name": "bob"}}) as server:
        yield server


@pytest.fixture
def api(hub: HubServer, plain_client: None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def environment(hub: HubServer, plain_client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `HF_ENDPOINT` and `HF_TOKEN` say to a process that starts with them."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the endpoint that it was first made with
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client's five retries, which take 1 + 2 + 4 + 8 + 8 seconds, follow at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
