"""The documents do what they say: their snippets run, their commands are ones, and the site has every public name."""

import importlib
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import DOCUMENTS, ROOT, script_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.arguments import build_parser
from localist_hf.command_line import PARSERS


PARTS = ("", ".configuration", ".evaluation", ".trainers", ".hub", ".experiments", ".page")


@pytest.fixture(scope="module")
def on_the_hub(
    tokenizer: PreTrainedTokenizerFast,
    make_model: Callable[..., LocalistGPT2LMHeadModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """By the names on the Hub that documents have, tiny models of the same kind."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **size
    )
    models = {
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(llama),
        "openai-community/gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **size)),
        "my-org/localist-gpt2-quintic": make_model(**size),
    }
    folder = tmp_path_factory.mktemp("hub")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if script_of(document)])
def test_snippets_run(
    document: str, on_the_hub: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Sentence number 1 says something. " * 200, encoding="utf-8")
    script = script_of(document)
    for name, folder in on_the_hub.items():
        script = script.replace(f'"{name}"', repr(str(folder)))
    module = types.ModuleType("snippets")  # where dataclasses look for what their annotations name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(script, document, "exec"), vars(module))


def commands() -> list[tuple[str, str]]:
    """Every `localist-hf` command in a block of the documents, with the document."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found += [(document, line) for line in block.splitlines() if line.startswith("localist-hf ")]
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_have_their_flags(document: str, line: str) -> None:
    _, command, *rest = shlex.split(line, comments=True)
    parser = build_parser() if command == "train" else PARSERS[command]()
    parser.parse_args([*rest, *["--output-dir", "run"] * (command == "train")])


def test_there_is_one_snippet_and_little_to_read_in_the_readme() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 9 * 1024
    assert text.count(b"```python") == 1


@pytest.mark.parametrize("part", PARTS)
def test_every_public_name_is_documented(part: str) -> None:
    module = importlib.import_module(f"localist_hf{part}")
    page = (ROOT / "docs" / "api" / f"{part.removeprefix('.') or 'localist_hf'}.md").read_text(encoding="utf-8")
    assert f"::: {module.__name__}\n" in page
    for name in module.__all__:
        thing = getattr(module, name)
        assert not callable(thing) or (thing.__doc__ or "").strip(), name
