"""`localist-hf train`, from its flags to the saved model, and every bad input refused before anything is written."""

import json
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.main import main
from localist_hf.cli.train import card_of, parse
from localist_hf.hub import RunRecord
from localist_hf.trainers import LocalistTrainer


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer) -> Path:
    """A plain GPT-2 folder with a tokenizer."""
    folder = tmp_path / "gpt2"
    config = GPT2Config(
        n_layer=4, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Sentence number {number} says something. " for number in range(400)), encoding="utf-8")
    return path


@pytest.fixture
def flags(checkpoint: Path, book: Path, tmp_path: Path) -> list[str]:
    return [
        "--model", str(checkpoint), "--text-file", str(book), "--output-dir", str(tmp_path / "run"), "--max_steps", "2",
        "--sequence-length", "32", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
        "--per-device-train-batch-size", "2", "--locality", '{"min_block_length": 3, "max_block_length": 9}',
    ]  # fmt: skip


def train(*arguments: str) -> None:
    main(["train", *arguments])


def test_a_run_leaves_a_model_that_loads_and_its_results(flags, tmp_path: Path, capsys) -> None:
    train("--variant", "cubic", *flags)
    folder = tmp_path / "run"
    model = LocalistGPT2LMHeadModel.from_pretrained(folder)
    assert model.config.locality_schedule == "cubic"
    assert model.config.max_block_length == 9
    assert AutoTokenizer.from_pretrained(folder)("Sentence")["input_ids"]
    results = json.loads((folder / "eval_results.json").read_text())
    card = (folder / "README.md").read_text()
    assert "`book.txt`: " in card
    assert f"perplexity is {results['eval_perplexity']:.2f}" in card
    assert "fine-tuned from gpt2 on" in card  # the folder's name, and not its path
    assert str(tmp_path) not in card
    printed = capsys.readouterr().out
    assert f"cubic: perplexity {results['eval_perplexity']:.2f}" in printed
    assert f"    3   1.000  {results['eval_fidelity_layer_3']:8.3f}" in printed
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


def test_yaml_and_flags_are_read_together_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "variant: linear\nlearning_rate: 5e-4\nnum-train-epochs: 7\nlocality:\n  num_sink_tokens: 2\nbf16: false\n"
    )
    run, args = parse(["--config", str(path), "--num_train_epochs", "2"])
    assert (run.variant, args.learning_rate, args.num_train_epochs) == ("linear", 5e-4, 2)
    assert run.locality == {"num_sink_tokens": 2}
    assert args.output_dir == "runs/linear"


def test_a_resumed_run_goes_on(flags, tmp_path: Path) -> None:
    train(*flags, "--save_steps", "1")
    train(*flags, "--save_steps", "1", "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3


def test_an_occupied_folder_is_refused_and_left_alone(flags, tmp_path: Path) -> None:
    train(*flags)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"`output_dir` is '.*run', which already holds a run"):
        train(*flags)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    train(*flags, "--overwrite_output_dir", "--seed", "7")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights
    assert RunRecord.load(tmp_path / "run").seed == 7


def test_a_run_that_breaks_leaves_no_record_of_the_one_before(flags, tmp_path: Path, monkeypatch) -> None:
    train(*flags)
    assert (tmp_path / "run" / "run.json").exists()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LocalistTrainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(*flags, "--overwrite_output_dir")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_hub_data_set_is_named_on_the_card(flags) -> None:
    run, _ = parse(
        [*flags, "--dataset", "Salesforce/wikitext", "--dataset-config", "wikitext-2-raw-v1", "--language", "en"]
    )
    run.text_file = None
    card = card_of(run)
    assert card["dataset_tags"] == card["dataset"] == "Salesforce/wikitext"
    assert (card["dataset_args"], card["language"], card["license"]) == ("wikitext-2-raw-v1", "en", None)


def test_a_lora_run_leaves_an_adapter_that_loads(flags, tmp_path: Path) -> None:
    train(*flags, "--lora-rank", "2")
    folder = tmp_path / "run"
    assert (folder / "adapter_model.safetensors").exists()
    assert AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--variant", "sextic"], "`variant` is 'sextic'; allowed are 'distributed'"),
        (["--sequence-length", "65"], "`sequence_length` is 65; the model allows 2 to 64"),
        (["--text-file", "missing.txt"], "`text_file` is 'missing.txt'; there is no such file"),
        (["--validation-share", "1.5"], "`validation_share` is 1.5"),
        (["--lora-rank", "-1"], "`lora_rank` is -1"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--locality", "{bad"], "`locality` is '{bad'; it must be a JSON object"),
        (["--locality", '{"n_layer": 3}'], "it must be a JSON object with fields among"),
        (["--locality", '{"min_block_length": 9, "max_block_length": 3}'], "`min_block_length` is 9"),
        (["--locality", '{"locality_schedule": [0, 1]}'], "the model has 4 layers"),
        (
            ["--locality", '{"block_partition": "sentences"}'],
            "`block_partition` is 'sentences'; allowed are 'semantic'",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        train(*flags, *extra)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--target_fidelity", "1.2"], "`target_fidelity` is 1.2; it must lie in (0, 1]"),
        (["--locality_weight", "-1"], "`locality_weight` is -1.0"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_bad_flags_are_refused_by_the_parser(flags, extra: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        train(*flags, *extra)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_key_of_the_yaml_file_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("learnin_rate: 1\n")
    with pytest.raises(SystemExit):
        train("--config", str(tmp_path / "run.yaml"))
    assert "'learnin_rate', which is no flag" in capsys.readouterr().err


def test_another_architecture_is_refused(flags, tmp_path: Path) -> None:
    LlamaConfig(vocab_size=10).save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit, match="`model_type` is 'llama'"):
        train(*flags, "--model", str(tmp_path / "llama"))


def test_help_names_our_flags_and_works_without_the_long_list(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        train("--help")
    printed = capsys.readouterr().out
    assert error.value.code == 0
    assert all(
        flag in printed for flag in ("--variant", "--text-file", "--target-fidelity", "--learning-rate", "--config")
    )
    assert "--fsdp" not in printed
    assert len(printed.splitlines()) < 110
