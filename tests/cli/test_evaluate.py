"""`localist-hf evaluate`, from its arguments to tables, pictures and numbers."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from localist_hf import localize
from localist_hf.cli import evaluate
from localist_hf.cli.main import main
from localist_hf.evaluation import measure
from localist_hf.hub.loading import load


FILES = {".localist-hf.json", "context_fidelity_of_heads.png", "locality.json", "shares_over_depth.png"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A plain GPT-2 and a plain Llama, an adapter, and texts."""
    root = tmp_path_factory.mktemp("evaluate")
    gpt2 = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    llama = LlamaConfig(
        num_hidden_layers=3, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=64,
    )  # fmt: skip
    for name, model in {"gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    model = localize(LlamaForCausalLM.from_pretrained(root / "llama"))
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, adapter).save_pretrained(root / "adapter")
    for name, words in {"one.txt": "says something", "two.txt": "more of the words"}.items():
        (root / name).write_text("".join(f"Sentence number {number} {words}. " for number in range(60)))
    return root


@pytest.fixture(autouse=True)
def _inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def run(*arguments: str) -> dict:
    """What the command has written, as numbers."""
    main(["evaluate", *arguments])
    folder = Path(arguments[arguments.index("--output-dir") + 1])
    assert {path.name for path in folder.iterdir()} == FILES
    return json.loads((folder / "locality.json").read_text())


def test_any_model_is_measured(workspace: Path, tokenizer, tmp_path: Path, capsys) -> None:
    found = run("llama", "--text-file", "one.txt", "two.txt", "--output-dir", str(tmp_path))
    assert (found["model"], found["sequence_length"]) == ("llama", 64)
    assert found["locality"]["locality_schedule"] == "quintic"
    model = localize(LlamaForCausalLM.from_pretrained(workspace / "llama"))
    sequences = evaluate.load_sequences(["one.txt", "two.txt"], tokenizer, 64)
    assert len(sequences) == found["num_sequences"]
    expected = measure(model, sequences).metrics
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert torch.tensor(found["heads"]["context_fidelity"]).shape == (3, 2)
    assert "dial_and_blocks" not in found

    printed = capsys.readouterr().out
    assert f"perplexity {expected['perplexity']:.2f}" in printed
    assert "semantic blocks, " in printed
    assert f"    2   1.000  {expected['context_fidelity_layer_2']:6.3f}" in printed
    assert "context fidelity of each head, in percent" in printed


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(bos_model_folder: Path, tmp_path: Path) -> None:
    flags = ("--text-file", "one.txt", "--sequence-length", "32", "--locality", '{"num_sink_tokens": 1}')
    found = run(str(bos_model_folder), *flags, "--output-dir", str(tmp_path))
    model, tokenizer = load(str(bos_model_folder), {"num_sink_tokens": 1})
    text = tokenizer((Path("one.txt")).read_text(), add_special_tokens=False)["input_ids"]
    pieces = [[tokenizer.bos_token_id, *text[start : start + 31]] for start in range(0, len(text) - 30, 31)]
    assert found["num_sequences"] == len(pieces)
    expected = measure(model, Dataset.from_dict({"input_ids": pieces})).metrics
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert 0.4 < found["metrics"]["sink_share_layer_1"] < 0.7  # 0.07 where only the first piece begins so


def test_controls_and_settings(tmp_path: Path, capsys) -> None:
    settings = '{"num_sink_tokens": 1, "locality_schedule": "localist", "max_block_length": 12}'
    flags = ("--text-file", "one.txt", "--sequence-length", "40", "--output-dir", str(tmp_path))
    found = run("gpt2", "--locality", settings, "--controls", *flags)
    assert found["lambdas"] == [1, 1]
    assert found["dial_and_blocks"]["dials"][-1]["dial"] == 1
    printed = capsys.readouterr().out
    assert "0 previous blocks, 1 sinks" in printed
    assert "| previous blocks | visible keys | own blocks | wrong blocks | windows | last tokens |" in printed
    assert f"{found['dial_and_blocks']['all_local_perplexity']:.2f}" in printed


def test_sequences_may_be_longer_than_a_rotary_model_was_made_for(tmp_path: Path) -> None:
    found = run("llama", "--text-file", "one.txt", "--sequence-length", "200", "--output-dir", str(tmp_path))
    assert found["sequence_length"] == 200


def test_the_blocks_of_a_common_base(workspace: Path, tokenizer, tmp_path: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(workspace / "llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    flags = ("--text-file", "one.txt", "--locality", '{"min_block_length": 2}', "--output-dir", str(tmp_path / "out"))
    own = run(str(tmp_path / "other"), *flags)
    of_base = run(str(tmp_path / "other"), "--block-model", "llama", *flags)
    base = run("llama", *flags[:2], *flags[4:])
    assert own["mean_block_length"] != of_base["mean_block_length"]
    assert of_base["mean_block_length"] == [base["mean_block_length"][-1]] * 3
    assert own["metrics"]["perplexity"] == pytest.approx(of_base["metrics"]["perplexity"])


def test_an_adapter_is_measured_on_its_base(workspace: Path, tmp_path: Path) -> None:
    flags = ("--text-file", "one.txt", "--output-dir", str(tmp_path))
    assert run("adapter", *flags)["metrics"]["loss"] != run("llama", *flags)["metrics"]["loss"]


def test_an_adapter_keeps_what_its_run_set(workspace: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    train = (
        "--model", "gpt2", "--text-file", "one.txt", "--sequence-length", "32", "--output-dir", folder, "--max_steps",
        "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
    )  # fmt: skip
    main(["train", *train, "--variant", "linear", "--locality", '{"num_sink_tokens": 2}', "--lora-rank", "2"])
    found = run(folder, "--text-file", "two.txt", "--output-dir", str(tmp_path / "out"))["locality"]
    assert (found["locality_schedule"], found["num_sink_tokens"]) == ("linear", 2)
    flags = ("--text-file", "two.txt", "--output-dir", str(tmp_path / "out"))
    again = run(folder, "--locality", '{"num_sink_tokens": 3}', *flags)["locality"]
    assert (again["locality_schedule"], again["num_sink_tokens"]) == ("linear", 3)


def test_the_default_text_and_folder(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {f"topic {number}": "Sentence number says something. " * 20 for number in range(40)}
    monkeypatch.setattr(evaluate, "python_text", lambda: texts)
    main(["evaluate", "gpt2/"])
    assert {path.name for path in (workspace / "runs/evaluate/gpt2").iterdir()} == FILES
