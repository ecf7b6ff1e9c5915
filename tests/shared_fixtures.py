"""What the tests share: tiny random models and texts made on the spot, and transformers' warnings."""

import functools
import gc
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, modeling
from localist_hf.hub import model_card
from localist_hf.modeling import locality_dial


# What is imported stays: looking through it again and again would take a good part of the tests' time.
gc.freeze()
gc.set_threshold(10_000)
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
if not torch.cuda.is_available():
    # Torch writes down the stack at every seed, for the sake of a GPU that may be found later.
    torch.manual_seed = torch.default_generator.manual_seed

# The same examples in every run, and no database in the working tree.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

TINY = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 300,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Far from GPT-2's 0.02, whose random models attend almost uniformly.
    "initializer_range": 0.3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "min_block_length": 3,
    "max_block_length": 12,
    "delimiter_token_ids": [2, 3, 4, 5, 6],
    "window_length": 7,
}

Settings = float | int | str | list | None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def what_other_files_left_is_not_looked_through() -> None:
    """Accelerate collects garbage after every training: beside all that torch compiled before, a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_dial_outlives_its_test() -> Iterator[None]:
    """One that is set from now on holds for the thread, and a compiled graph then looks for it."""
    yield
    locality_dial._SETTINGS.set(())


def _signs(metrics: dict[str, float]) -> list[tuple[str, bool, bool]]:
    return sorted((name, value > 0, value == value) for name, value in metrics.items() if "_share" in name)


@pytest.fixture(scope="session", autouse=True)
def pictures_alike_are_drawn_once() -> Iterator[None]:
    """
    Cards are written by the hundred, and drawing is half of what one takes. The first of each shape is drawn: a picture
    of as many runs and layers by the same names, with the same shares that are none or undefined.
    """
    plot, drawn = model_card.plot_shares_over_depth, {}

    def plot_once(results: Any, baseline: str, file: BinaryIO) -> None:
        shares = [(name, [_signs(metrics) for metrics in runs]) for name, runs in results.items()]
        key = repr((shares, baseline))
        if key not in drawn:
            plot(results, baseline, buffer := io.BytesIO())
            drawn[key] = buffer.getvalue()
        file.write(drawn[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "plot_shares_over_depth", plot_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def imports_of_the_package_are_read_once() -> Iterator[None]:
    """Transformers looks through the code that goes with a model, with regular expressions, whenever one is saved."""
    read = dynamic_module_utils.get_relative_imports
    read_once = functools.cache(read)

    def relative_imports(module_file: str | Path) -> list[str]:
        is_ours = Path(module_file).parent == Path(modeling.__file__).parent
        return list(read_once(module_file)) if is_ours else read(module_file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "get_relative_imports", relative_imports)
        yield


@pytest.fixture(scope="session", autouse=True)
def code_that_lies_there_is_not_copied_again() -> Iterator[None]:
    """Transformers copies it whenever a model is saved, and once more with its configuration: a sixth of a training."""
    copied: dict[tuple[str, str], tuple[int, int, int]] = {}

    def state(path: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def copy(source: str | Path, target: str | Path) -> None:
        files = str(source), os.path.abspath(target)
        is_ours = Path(source).parent == Path(modeling.__file__).parent
        if not is_ours or files not in copied or state(files[1]) != copied[files]:
            shutil.copyfile(source, target)
            copied[files] = state(files[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "shutil", SimpleNamespace(copyfile=copy))
        yield


@pytest.fixture(scope="session")
def make_config() -> Callable[..., LocalistGPT2Config]:
    """Configuration of a tiny model; any field can be overridden."""

    def make(**overrides: Settings) -> LocalistGPT2Config:
        return LocalistGPT2Config(**{**TINY, **overrides})

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., LocalistGPT2Config]) -> Callable[..., LocalistGPT2LMHeadModel]:
    """A tiny random model in evaluation mode, its biases random too; fields of the configuration can be overridden."""

    def make(seed: int = 0, **overrides: Settings) -> LocalistGPT2LMHeadModel:
        torch.manual_seed(seed)
        model = LocalistGPT2LMHeadModel(make_config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from localist_hf.experiments.base import train_tokenizer

    return train_tokenizer(["Sentence number 0123456789 says something. some more of the words here\n"] * 5)


@pytest.fixture(scope="session")
def make_framed_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    """
    The same, with what it puts around every text as `tokenizers` writes it: `"<bos> $A"` as Gemma's, `"<bos> $A <eos>"`
    as Llama's with `add_eos_token`.
    """

    def make(template: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        special = [part for part in template.split() if part != "$A"]
        backend.add_special_tokens(special)
        ids = [(token, backend.token_to_id(token)) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        names = {name: token for name, token in (("bos_token", "<bos>"), ("eos_token", "<eos>")) if token in special}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


@pytest.fixture(scope="session")
def bos_tokenizer(make_framed_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before every text."""
    return make_framed_tokenizer("<bos> $A")


@pytest.fixture(scope="session")
def bos_model_folder(bos_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That tokenizer with a GPT-2 that attends to its token as real models do: half of the attention goes there."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(bos_tokenizer), bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[:, 0], model.transformer.wpe.weight[:, 0] = 0, 0
        model.transformer.wte.weight[bos_tokenizer.bos_token_id, 0] = 30
        for block in model.transformer.h:
            block.attn.c_attn.bias[[0, 8]] = 2.2  # the queries of either head
            block.attn.c_attn.weight[0, [16, 24]] = 1  # the keys
    folder = tmp_path_factory.mktemp("bos") / "model"
    model.save_pretrained(folder)
    bos_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_text() -> Callable[..., torch.Tensor]:
    """Random token ids of shape `(batch_size, length)`, none of them a special token."""

    def make(batch_size: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(2, TINY["vocab_size"], (batch_size, length), generator=torch.manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def gpt2_twin() -> Callable[..., GPT2LMHeadModel]:
    """Transformers' own GPT-2 with the weights of a localist model; `"eager"` gives its attention matrices."""

    def twin(model: LocalistGPT2LMHeadModel, attn_implementation: str = "sdpa") -> GPT2LMHeadModel:
        fields = {**model.config.to_dict(), "model_type": "gpt2"}
        fields.pop("auto_map")
        gpt2 = GPT2LMHeadModel(GPT2LMHeadModel.config_class(**fields, attn_implementation=attn_implementation))
        gpt2.load_state_dict(model.state_dict())
        return gpt2.train(model.training)

    return twin


@pytest.fixture
def transformers_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Collects what transformers' logger warns of, including what it has already said once."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()
