"""The documents do what they say: their snippets run, their commands are ones, and the site has every public name."""

import doctest
import importlib
import math
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, make_dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from documents import CARDS, DOCUMENTS, ROOT, docstring_snippets, script_of
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import localist_hf
from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.arguments import build_parser
from localist_hf.command_line import PARSERS
from localist_hf.hub import RunRecord


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
        "my-org/localist-gpt2-quintic": make_model(n_positions=512, **size),
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


def card_scripts() -> dict[str, str]:
    """The code of the cards but for the name of the repository, each once, by a card that has it."""
    scripts = {
        re.sub('repo_id = ".*"', 'repo_id = "my-org/localist-gpt2-quintic"', script_of(card)): card for card in CARDS
    }
    return {card: script for script, card in scripts.items()}


@pytest.mark.parametrize("card", card_scripts())
def test_the_code_on_cards_runs(card: str, on_the_hub: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = "my-org/localist-gpt2-quintic"
    exec(compile(card_scripts()[card].replace(name, str(on_the_hub[name])), card, "exec"), {"__name__": "card"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    for line in lines:
        *shares, _ = map(float, line.split()[:5])
        assert sum(shares) == pytest.approx(1, abs=0.021)


@pytest.fixture(scope="module")
def names_in_docstrings(on_the_hub: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What snippets of docstrings take for given: what the package and its libraries have, a model, and data."""
    from localist_hf import configuration, evaluation, experiments, hub, trainers

    model = localist_hf.localize(AutoModelForCausalLM.from_pretrained(on_the_hub["HuggingFaceTB/SmolLM2-135M"]))
    book = "Sentence number 1 says something. " * 40
    ids = torch.tensor(tokenizer(book)["input_ids"])[:96].reshape(6, 16)
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    given = {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": {"input_ids": ids[:2], "attention_mask": torch.ones(2, 16, dtype=torch.long)},
        "dataset": dataset,
        "train_dataset": dataset,
        "eval_dataset": dataset,
        "batches": [{"input_ids": ids, "labels": ids}],
        "book": book,
        "sequence_length": 16,
        "losses": [[30.0, 90.0], [31.0, 95.0]],
        "tokens": [[10, 30], [10, 30]],
        "dataclass": dataclass,
        "math": math,
        "DataLoader": DataLoader,
    }
    libraries = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "Trainer", "TrainingArguments")}
    parts = (localist_hf, configuration, evaluation, experiments, hub, trainers)
    return {name: getattr(part, name) for part in parts for name in part.__all__} | libraries | given


@pytest.mark.parametrize("place", docstring_snippets())
def test_snippets_of_docstrings_run(
    place: str,
    names_in_docstrings: dict[str, Any],
    on_the_hub: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("snippet")  # where dataclasses look for what their annotations name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    of = place.partition(".py:")[0].removesuffix("/__init__").replace("/", ".")
    vars(module).update(vars(importlib.import_module(of)) | names_in_docstrings | {"__name__": module.__name__})
    snippet = docstring_snippets()[place]
    if "SFT" in snippet:
        trl = pytest.importorskip("trl")
        on_cpu = make_dataclass("SFTConfig", [("use_cpu", bool, True)], bases=(trl.SFTConfig,))
        vars(module).update(SFTTrainer=trl.SFTTrainer, SFTConfig=on_cpu)
    if "RunHistory" in snippet:
        vars(module)["args"] = transformers.TrainingArguments("out")
    if "RunRecord.load(folder)" in snippet:
        vars(module)["folder"] = tmp_path
        record = RunRecord.load(ROOT / "localist_hf" / "base")
        replace(record, config=record.config | {"n_layer": 3}, controls=None).save(tmp_path)
    if "recruit_separators(" in snippet:  # of a model that has learned nothing, from a text that goes on
        for name in ("_LEAST_COST", "_LEAST_GAIN", "_LEAST_CANDIDATES"):
            monkeypatch.setattr(f"localist_hf.evaluation.separators.{name}", -9)
        for name in ("_MOST_P_VALUE", "_TOLERANCE"):
            monkeypatch.setattr(f"localist_hf.evaluation.separators.{name}", 9)
        ids = torch.tensor(names_in_docstrings["tokenizer"](names_in_docstrings["book"] * 10)["input_ids"])
        vars(module)["dataset"] = Dataset.from_dict({"input_ids": ids[: len(ids) // 64 * 64].reshape(-1, 64).tolist()})
    if "runs/quintic" in snippet:
        shutil.copytree(on_the_hub["my-org/localist-gpt2-quintic"], "runs/quintic")
    for example in doctest.DocTestParser().get_examples(snippet):
        source = example.source
        for name, folder in on_the_hub.items():
            source = source.replace(f'"{name}"', repr(str(folder)))
        with redirect_stdout(StringIO()) as printed:
            exec(compile(source, place, "single"), vars(module))
        if example.want and "model" not in snippet:  # whose numbers would be others
            assert doctest.OutputChecker().check_output(example.want, printed.getvalue(), doctest.ELLIPSIS), printed


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
