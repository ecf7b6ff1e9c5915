"""What a run's repository holds, and what is refused before anything is uploaded."""

import ast
import json
import re
from pathlib import Path

import pytest
from published import MODEL
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CTRLTokenizer,
    EsmTokenizer,
    PreTrainedTokenizerBase,
)

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.hub import repository_files
from localist_hf.hub.repository_files import _tokenizer_files
from localist_hf.hub.weights import weight_hashes


def test_content_that_names_this_machine_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((runs / "quintic" / "config.json").read_text())
    (runs / "quintic" / "config.json").write_text(json.dumps(config | {"task": str(runs.resolve() / "quintic")}))
    with pytest.raises(ValueError, match=r"config\.json of .* names the run's folder"):
        repository_files(runs / "quintic")
    (runs / "quintic" / "config.json").write_text(json.dumps(config | {"task": str(Path.home() / "x")}))
    with pytest.raises(ValueError, match="names the home directory"):
        repository_files(runs / "quintic")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    (runs / "quintic" / "config.json").write_text(json.dumps(config | {"task": "hf_planted"}))
    with pytest.raises(ValueError, match="names the access token"):
        repository_files(runs / "quintic")


def test_a_home_that_is_the_root_is_no_secret(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")  # as in many containers; every address would hold it
    assert set(repository_files(runs / "quintic")) == MODEL


@pytest.mark.parametrize("others", [{}, {"embeddings": True}])
def test_an_adapter_and_its_card_pin_the_base_where_its_commit_is_known(runs: Path, others: dict) -> None:
    record = json.loads((runs / "quintic-lora" / "run.json").read_text())
    record |= {"base_model": "me/base", "base_run": None, "base_weights": None}
    record["adapter"] |= {"base_revision": "c" * 40} | others
    (runs / "quintic-lora" / "run.json").write_text(json.dumps(record))
    files = repository_files(runs / "quintic-lora")
    assert json.loads(files["adapter_config.json"])["revision"] == "c" * 40
    (code, *_) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    (loading,) = (
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("AutoModelForCausalLM.from_pretrained(base_id")
    )
    assert {each.arg: ast.unparse(each.value) for each in loading.keywords}["revision"] == "base_revision"
    assert f'base_revision = "{"c" * 40}"' in code


def esm(folder: Path) -> PreTrainedTokenizerBase:
    (folder / "words.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\nC\nG\n")
    return EsmTokenizer(vocab_file=str(folder / "words.txt"))


def ctrl(folder: Path) -> PreTrainedTokenizerBase:
    (folder / "words.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b@@": 2}))
    (folder / "pairs.txt").write_text("#version: 0.2\n")
    return CTRLTokenizer(vocab_file=str(folder / "words.json"), merges_file=str(folder / "pairs.txt"))


@pytest.mark.parametrize(
    ("make", "vocabulary"),
    [
        (lambda folder: ByT5Tokenizer(extra_ids=3), {"added_tokens.json"}),
        (esm, {"vocab.txt"}),
        (ctrl, {"vocab.json", "merges.txt"}),
    ],
    ids=["bytes", "words", "pairs"],
)
def test_a_tokenizer_of_any_kind_is_published_with_all_that_it_is_loaded_from(make, vocabulary, tmp_path) -> None:
    tokenizer = make(tmp_path)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    names = {"tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    files = _tokenizer_files(tmp_path / "run")
    assert files.keys() | {"added_tokens.json"} == names | vocabulary | {"added_tokens.json"}
    for name, content in files.items():
        path = tmp_path / "published" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    found = AutoTokenizer.from_pretrained(tmp_path / "published")
    assert (type(found), found.get_vocab()) == (type(tokenizer), tokenizer.get_vocab())
    assert found.chat_template == tokenizer.chat_template
    for name in vocabulary - {"added_tokens.json"}:
        content = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).unlink()
        with pytest.raises(ValueError, match=r"The tokenizer in '.*run' cannot be loaded"):
            _tokenizer_files(tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(content)


def test_files_that_would_not_load_are_refused(runs: Path) -> None:
    folder = runs / "quintic"
    for name, text, message in (
        ("tokenizer.json", "{}", "The tokenizer in '.*quintic' cannot be loaded"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json' is damaged: it holds no JSON object"),
        ("generation_config.json", "{", r"generation_config.json' is damaged"),
        ("config.json", "{", r"config.json' is damaged"),
        ("config.json", '{"n_layer": "4"}', r"config.json of '.*quintic' is damaged: .*n_layer"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            repository_files(folder)
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_sink_tokens": 2}))
    with pytest.raises(ValueError, match=r"`num_sink_tokens` in config\.json of .* is 2; the run was measured with 0"):
        repository_files(folder)
    (runs / "quintic-lora" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json' is damaged"):
        repository_files(runs / "quintic-lora", base_model="org/base")


def test_weights_in_several_files_need_their_index(runs: Path) -> None:
    folder = runs / "quintic"
    LocalistGPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="30kB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"weights": weight_hashes(folder)}))
    assert "model.safetensors.index.json" in repository_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is missing"):
        repository_files(folder)
