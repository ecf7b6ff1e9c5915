"""`localist-hf train`, from its flags to the saved model; what it refuses is in `test_bad_input.py`."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, modeling_utils

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.arguments import _FIXED, RunArguments, parse
from localist_hf.cli.main import main
from localist_hf.cli.train import card_of, prepare_trainer
from localist_hf.hub import RunRecord
from localist_hf.trainers import LocalistTrainer, LocalityArguments


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A plain GPT-2 folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    config = GPT2Config(
        n_layer=4, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("".join(f"Sentence number {number} says something. " for number in range(400)), encoding="utf-8")
    return path


def flags_of(checkpoint: Path, book: Path, folder: Path) -> list[str]:
    return [
        "--model", str(checkpoint), "--text-file", str(book), "--output-dir", str(folder), "--max_steps", "2",
        "--sequence-length", "32", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
        "--per-device-train-batch-size", "2", "--locality", '{"min_block_length": 3, "max_block_length": 9}',
    ]  # fmt: skip


@pytest.fixture
def flags(checkpoint: Path, book: Path, tmp_path: Path) -> list[str]:
    return flags_of(checkpoint, book, tmp_path / "run")


def train(*arguments: str) -> None:
    main(["train", *arguments])


def refused(capsys: pytest.CaptureFixture, message: str, *arguments: str, status: int = 2) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("localist-hf train: error: ")
    assert error.value.code == status


def test_a_run_leaves_a_model_that_loads_and_its_results(flags, tmp_path: Path, capsys) -> None:
    train("--variant", "cubic", *flags)
    folder = tmp_path / "run"
    model = LocalistGPT2LMHeadModel.from_pretrained(folder)
    assert model.config.locality_schedule == "cubic"
    assert model.config.max_block_length == 9
    assert AutoTokenizer.from_pretrained(folder)("Sentence")["input_ids"]
    results = json.loads((folder / "eval_results.json").read_text())
    card = (folder / "README.md").read_text()
    assert " on `book.txt` under " in card
    assert f"| {results['eval_perplexity']:.2f} |" in card
    assert "fine-tuned from gpt2 on" in card  # the folder's name, and not its path
    assert str(tmp_path) not in card
    printed = capsys.readouterr().out
    assert f"cubic: perplexity {results['eval_perplexity']:.2f}" in printed
    psi = re.search(r"^ +3 +1\.000 +(\S+) ", printed, re.MULTILINE).group(1)
    assert psi == f"{results['eval_context_fidelity_layer_3']:.3f}"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


def test_a_recipe_stands_for_its_arguments_which_flags_and_yaml_overrule(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: hold\nlocality_weight: 2.5\n")
    _, args, kept = parse(["--config", str(path), "--training-dials", "0", "1"])
    assert (args.training_dials, args.distillation_weight, args.locality_weight) == ([0, 1], 0.9, 2.5)
    assert "recipe" not in kept
    refused(capsys, "`recipe` is 'fry'; allowed are 'hold', 'both'.", "--recipe", "fry")


@pytest.mark.parametrize("dial", ["locality_dial", "min_fidelity"])
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_damage_at_dial_0_is_told_whatever_the_model_is_set_to(flags, rate: float, dial: str, capsys) -> None:
    locality = json.dumps({"min_block_length": 3, "max_block_length": 9, dial: 1})
    train(*flags, "--locality", locality, "--learning-rate", str(rate), "--bf16", "true")
    assert ("At dial 0 the training has done damage" in capsys.readouterr().out) == (rate > 0)


def test_a_held_run_says_what_it_stands_for_what_it_costs_and_what_it_broke(flags, tmp_path: Path, capsys) -> None:
    train("--recipe", "hold", *flags, "--learning-rate", "0.5")
    printed = capsys.readouterr().out
    assert "`recipe` 'hold' stands for: --training-dials 1.0 --distillation-weight 0.9 --locality-weight 0" in printed
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert f"on held-out text, {metrics['eval_perplexity_at_dial_1']:.2f} at dial 1" in printed
    assert "At dial 0 the training has done damage: perplexity " in printed
    assert "Try a lower `--learning-rate` (it is 0.5); or `--recipe both`, if it is to be used at dial 0" in printed
    record = RunRecord.load(tmp_path / "run")
    assert record.training["training_dials"] == [1]
    train("--resume_from_checkpoint", "true", "--output-dir", str(tmp_path / "run"))
    assert "nothing is left to train" in capsys.readouterr().out


def test_yaml_and_flags_are_read_together_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "variant: linear\nlearning_rate: 5e-4\nnum-train-epochs: 7\nlocality:\n  num_sink_tokens: 2\nbf16: false\n"
    )
    run, args, _ = parse(["--config", str(path), "--num_train_epochs", "2"])
    assert (run.variant, args.learning_rate, args.num_train_epochs) == ("linear", 5e-4, 2)
    assert run.locality == {"num_sink_tokens": 2}
    assert args.output_dir == "runs/linear"


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("use_cpu: yes", "use_cpu", True),
        ("max-steps: 7", "max_steps", 7),
        ("report_to: none", "report_to", []),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("lr_scheduler_kwargs: {min_lr: 0.5}", "lr_scheduler_kwargs", {"min_lr": 0.5}),
        ("run_name: 007", "run_name", "007"),
        ("logging_steps:", "logging_steps", 500),
    ],
)
def test_yaml_values_are_read_as_on_the_command_line(tmp_path: Path, yaml: str, name: str, value: object) -> None:
    (tmp_path / "run.yaml").write_text(yaml)
    _, args, _ = parse(["--config", str(tmp_path / "run.yaml")])
    assert getattr(args, name) == value


def test_a_schedule_in_locality_stands_in_place_of_a_variant_and_a_dial_beside_it(
    flags, tmp_path: Path, capsys
) -> None:
    run, args, _ = parse(["--locality", '{"locality_schedule": "linear"}'])
    assert (run.variant, args.output_dir) == ("linear", "runs/linear")
    locality = '{"locality_schedule": [0, 0, 0.5, 1], "locality_dial": 1}'
    train(*flags, "--locality", locality, "--locality_weight", "0")
    record = RunRecord.load(tmp_path / "run")
    assert record.variant is None
    assert record.lambdas == [0, 0, 0.5, 1]
    assert record.dial == {"locality_dial": 1}
    # Trained and measured with nothing outside of the blocks in sight.
    assert record.metrics["outside_share_layer_3"] == 0
    assert "own schedule, locality_dial 1: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_with_rows_is_trained_on(flags, tmp_path: Path, suffix: str) -> None:
    rows = Dataset.from_dict({"content": [f"Sentence number {number} says something. " * 4 for number in range(100)]})
    path = tmp_path / f"rows.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    run, args, _ = parse([*flags, "--text-file", str(path), "--text-column", "content"])
    assert len(prepare_trainer(run, args).train_dataset) > 50


def test_a_tokenizer_that_begins_texts_begins_every_sequence(
    bos_model_folder: Path, book, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    flags = ["--variant", "quintic", *flags_of(bos_model_folder, book, folder), "--learning_rate", "1e-6"]
    flags += ["--save_steps", "1", "--locality", '{"num_sink_tokens": 1, "min_block_length": 3, "max_block_length": 9}']
    run, args, _ = parse(flags)
    trainer = prepare_trainer(run, args)
    bos = trainer.processing_class.bos_token_id
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert {(row[0], len(row)) for row in dataset["input_ids"]} == {(bos, 32)}

    train(*flags)
    record, card = RunRecord.load(folder), (folder / "README.md").read_text()
    assert (record.data["text_prefix"], record.data["has_text_prefix"]) == ("<bos>", True)
    assert "sequences of 32 tokens (`<bos>` first) of such text" in card
    # What was measured of the layer is what its example prints, on average over tokens that see more than their block.
    measured = record.metrics[f"sink_share_layer_{record.num_layers - 1}"]
    lines = [line.split(" ", 5) for line in record.example["printed"].splitlines()]
    assert lines[0][5].startswith("'<bos>T")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [len(tokenizer(text[1:-1], add_special_tokens=False)["input_ids"]) for *_, text in lines[1:]]
    printed = sum(float(line[1]) * length for line, length in zip(lines[1:], lengths, strict=True)) / sum(lengths)
    assert 0.3 < printed < 0.8
    assert measured == pytest.approx(printed, abs=0.05)

    # What an older version began would go on with other sequences.
    train("--output-dir", str(folder), "--max_steps", "3", "--resume_from_checkpoint", "true")
    settings = json.loads((folder / "run_settings.json").read_text())
    assert settings.pop("text_prefix") == [bos]
    (folder / "run_settings.json").write_text(json.dumps(settings))
    message = f"each begins with the tokens [{bos}] now, which the tokenizer puts before a text, and began with [] then"
    refused(capsys, message, "--output-dir", str(folder), "--max_steps", "4", "--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def trained(checkpoint: Path, book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = flags_of(checkpoint, book, folder)
    train("--variant", "cubic", *flags, "--save_steps", "1", "--seed", "7", "--hub_token", "secret")
    return folder


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(trained, tmp_path / "run")


def steps(folder: Path) -> int:
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


def test_a_recipe_that_a_run_did_not_begin_with_is_refused(stopped: Path, capsys) -> None:
    message = "`training_dials` is [1.0], but the run in"
    refused(capsys, message, "--recipe", "hold", "--output-dir", str(stopped), "--resume_from_checkpoint", "true")


def test_a_resumed_run_goes_on_with_its_own_settings(stopped: Path) -> None:
    assert "secret" not in (stopped / "run_settings.json").read_text()
    train("--output-dir", str(stopped), "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (stopped / "checkpoint-3").is_dir()  # `save_steps` is still 1
    record = RunRecord.load(stopped)
    assert (record.variant, record.seed, record.training["steps"]) == ("cubic", 7, 3)
    assert record.training["batch_size"] == 2
    assert record.config["max_block_length"] == 9
    # and from a checkpoint by its name, into its own folder
    train("--resume_from_checkpoint", str(stopped / "checkpoint-1"))
    assert steps(stopped) == 3


def test_a_finished_run_is_left_as_it_is(stopped: Path, capsys) -> None:
    resume = ("--output-dir", str(stopped), "--resume_from_checkpoint", "true")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    train(*resume)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert f"The run in '{stopped}' is finished: nothing is left to train or to measure." in said
    assert f"perplexity {RunRecord.load(stopped).metrics['perplexity']:.2f} on held-out text" in said

    # A card that a kill has left out is written; another licence is another wish, which trains nothing either.
    (stopped / "README.md").unlink()
    train(*resume)
    assert (stopped / "README.md").read_bytes() == before[stopped / "README.md"]
    train(*resume, "--license", "mit")
    assert "license: mit" in (stopped / "README.md").read_text()
    expected = json.loads(before[stopped / "run.json"]) | {"license": "mit"}
    assert json.loads((stopped / "run.json").read_text()) == expected


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_killed_before_its_last_save_leaves_what_the_undisturbed_one_leaves(
    stopped: Path, trained: Path, step: int
) -> None:
    for path in stopped.iterdir():
        if path.is_dir() and path.name > f"checkpoint-{step}":
            shutil.rmtree(path)
        elif path.is_file() and path.name != "run_settings.json":
            path.unlink()
    train("--output-dir", str(stopped), "--resume_from_checkpoint", "true")
    assert {path.name for path in stopped.iterdir()} == {path.name for path in trained.iterdir()}
    for name in ("run.json", "README.md", "model.safetensors", "config.json", "run_settings.json"):
        assert (stopped / name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--variant", "linear"), "`variant` is 'linear', but the run in '{}' began with 'cubic'"),
        (("--seed", "8"), "`seed` is 8, but the run in '{}' began with 7"),
        (("--learning_rate", "1"), "`learning_rate` is 1.0, but the run in '{}' began with 5e-05"),
        (("--lora-rank", "2"), "`lora_rank` is 2, but the run in '{}' began with 0"),
        (("--locality", "{{}}"), "`locality` is {{}}, but the run in '{}' began with {{'min_block_length': 3"),
        (("--locality_objective", "fidelity"), "`locality_objective` is 'fidelity', but the run in '{}' began with 'c"),
        (("--target_fidelity", "0.5"), "`target_fidelity` is 0.5, but the run in '{}' began with 0.9"),
    ],
)
def test_a_resumed_run_cannot_become_another(stopped: Path, extra, message: str, capsys) -> None:
    before = (stopped / "run.json").read_bytes()
    extra = [word.format() for word in extra]
    refused(capsys, message.format(stopped), "--output-dir", str(stopped), "--resume_from_checkpoint", "true", *extra)
    assert (stopped / "run.json").read_bytes() == before


def test_every_flag_of_a_run_is_fixed_or_says_nothing_about_it() -> None:
    names = {entry.name for entry in fields(RunArguments)}
    assert names - {*_FIXED} == {"language", "license", "overwrite_output_dir", "recipe"}
    assert {entry.name for entry in fields(LocalityArguments)} <= {*_FIXED}


def test_a_run_of_0_2_goes_on_with_its_objective(stopped: Path, capsys) -> None:
    """It was kept only where it was not the default."""
    path = stopped / "run_settings.json"
    saved = json.loads(path.read_text())
    del saved["locality_objective"]
    resume = ["--output-dir", str(stopped), "--resume_from_checkpoint", "true"]
    for kept, objective in ((saved, "context"), (saved | {"locality_objective": "fidelity"}, "fidelity")):
        path.write_text(json.dumps(kept))
        assert parse(resume)[1].locality_objective == objective
        refused(capsys, f"began with {objective!r}", *resume, "--locality_objective", "contrast")


def test_a_resumed_run_keeps_its_model(stopped: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    resume = ("--output-dir", str(stopped), "--resume_from_checkpoint", "true")
    refused(
        capsys,
        f"`model` is '{other}', but the run in '{stopped}' began with '{checkpoint}'",
        *resume,
        "--model",
        str(other),
    )
    (stopped / "run_settings.json").write_text("{}")
    refused(capsys, "run_settings.json' is not complete", *resume)
    (stopped / "run_settings.json").unlink()
    refused(capsys, "where there is no run_settings.json", *resume)


@pytest.mark.parametrize(
    ("file", "length", "what"),
    [
        ("model.safetensors", -50, "model.safetensors cannot be read ("),
        ("model.safetensors", None, "its weights are missing"),
        ("optimizer.pt", -50, "optimizer.pt cannot be read"),
        ("rng_state.pth", 0, "rng_state.pth cannot be read"),
        ("trainer_state.json", -50, "trainer_state.json cannot be read ("),
        ("trainer_state.json", None, "trainer_state.json, which is written last, is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(stopped: Path, file: str, length: int | None, what: str, capsys) -> None:
    last = stopped / "checkpoint-2"
    content = (last / file).read_bytes()
    (last / file).unlink()
    if length is not None:
        (last / file).write_bytes(content[:length])
    _, args, _ = parse(["--output-dir", str(stopped), "--resume_from_checkpoint", "true"])
    assert args.resume_from_checkpoint == str(stopped / "checkpoint-1")
    said = capsys.readouterr().err
    assert f"localist-hf train: {last} is damaged ({what}" in said
    assert f"; going on from {stopped / 'checkpoint-1'}\n" in said
    _, args, _ = parse(["--resume_from_checkpoint", str(last)])
    assert args.resume_from_checkpoint == str(stopped / "checkpoint-1")
    capsys.readouterr()
    (stopped / "checkpoint-1" / "trainer_state.json").write_text("{")
    refused(
        capsys,
        "there is no whole checkpoint",
        "--output-dir",
        str(stopped),
        "--resume_from_checkpoint",
        "true",
    )


def test_a_folder_in_use_is_refused_until_its_process_is_gone(flags, tmp_path: Path, capsys) -> None:
    # What `lock_folder` does in another process, without what takes seconds to import.
    code = "import sys, time, filelock\n"
    code += "with filelock.FileLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    folder = tmp_path / "run"
    folder.mkdir()
    lock = str(folder / ".localist-hf.lock")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        refused(capsys, f"`output_dir` is '{folder}', where another `localist-hf` is at work", *flags)
        process.kill()
    train(*flags)
    assert [path.name for path in folder.glob(".*")] == [".localist-hf.json"]


class FullDisk:
    """Lets safetensors write as many times as there is room for, then half a file and the error of a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.write = room, modeling_utils.safe_save_file
        monkeypatch.setattr(modeling_utils, "safe_save_file", self)

    def __call__(self, tensors: dict, filename: str, metadata: dict) -> None:
        if self.room == 0:
            Path(filename).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        self.room -= 1
        self.write(tensors, filename, metadata=metadata)


def test_a_full_disk_leaves_no_half_of_a_model(flags, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "run"
    FullDisk(monkeypatch, room=0)
    flags += ["--save_strategy", "no"]
    refused(capsys, f"`output_dir` is '{folder}', on whose disk no space is left (Error while", *flags, status=1)
    assert {path.name for path in folder.iterdir()} == {".localist-hf.json", "run_settings.json"}


def test_a_full_disk_loses_nothing_that_is_there(stopped: Path, flags, capsys, monkeypatch) -> None:
    finished = {path: path.read_bytes() for path in (stopped / "model.safetensors", stopped / "run.json")}
    again = (*flags, "--overwrite_output_dir", "--save_steps", "1", "--seed", "3")
    with monkeypatch.context() as patch:
        FullDisk(patch, room=1)  # for the first checkpoint
        refused(capsys, f"{stopped / 'checkpoint-1'} is complete: make room, and pass", *again, status=1)
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-1"]
    resume = ("--output-dir", str(stopped), "--resume_from_checkpoint", "true")
    with monkeypatch.context() as patch:
        FullDisk(patch, room=1)  # for the second checkpoint, not for the model
        refused(capsys, f"{stopped / 'checkpoint-2'} is complete: make room, and pass", *resume, status=1)
    assert {path: path.read_bytes() for path in finished} == finished
    assert not (stopped / ".saving").exists()
    train(*resume)
    assert RunRecord.load(stopped).seed == 3
    assert (stopped / "model.safetensors").read_bytes() != finished[stopped / "model.safetensors"]


def test_a_full_disk_under_the_optimizer_state_is_told_too(flags, tmp_path: Path, capsys, monkeypatch) -> None:
    def fail(*args: object) -> None:
        # What torch.save makes of it.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(LocalistTrainer, "_save_optimizer_and_scheduler", fail)
    refused(capsys, "on whose disk no space is left", *flags, "--save_steps", "1", status=1)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_training_that_diverges_is_told_in_one_line(flags, tmp_path: Path, capsys) -> None:
    refused(capsys, "on held-out text, with a `learning_rate` of 4000000000.0.", *flags,
            "--learning_rate", "4e9", status=1)  # fmt: skip
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_adapter_takes_the_place_of_whole_weights(stopped: Path, flags) -> None:
    train(*flags, "--lora-rank", "2", "--overwrite_output_dir")
    assert [path.name for path in stopped.glob("*.safetensors")] == ["adapter_model.safetensors"]
    train(*flags, "--overwrite_output_dir")
    assert [path.name for path in stopped.glob("*.safetensors")] == ["model.safetensors"]
    assert not (stopped / "adapter_config.json").exists()


def test_an_occupied_folder_is_refused_and_left_alone(stopped: Path, flags, capsys) -> None:
    weights = (stopped / "model.safetensors").read_bytes()
    refused(capsys, f"`output_dir` is '{stopped}', which already holds a run", *flags)
    assert (stopped / "model.safetensors").read_bytes() == weights
    train(*flags, "--overwrite_output_dir", "--seed", "8")
    assert (stopped / "model.safetensors").read_bytes() != weights
    assert RunRecord.load(stopped).seed == 8


def test_a_run_that_breaks_leaves_no_record_of_the_one_before(stopped: Path, flags, monkeypatch) -> None:
    assert (stopped / "run.json").exists()

    def fail(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr(LocalistTrainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        train(*flags, "--overwrite_output_dir")
    assert not (stopped / "run.json").exists()


def test_a_hub_data_set_is_named_on_the_card(flags) -> None:
    run, *_ = parse(
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
    adapter = AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules) == (2, 4, 0.0, {"c_attn"})


def test_an_adapter_takes_its_flags(flags, tmp_path: Path) -> None:
    flags = [
        *flags,
        "--lora-rank",
        "2",
        "--lora-alpha",
        "3",
        "--lora-dropout",
        "0.25",
        "--lora-targets",
        "c_fc",
        "c_attn",
    ]
    train(*flags)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (2, 3, 0.25)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"c_fc", "c_attn"}
    assert RunRecord.load(tmp_path / "run").adapter["target_modules"] == ["c_attn", "c_fc"]


def test_an_adapter_begins_as_the_seed_says(flags) -> None:
    def adapter(seed: int) -> dict[str, torch.Tensor]:
        run, args, _ = parse([*flags, "--lora-rank", "2", "--seed", str(seed)])
        model = prepare_trainer(run, args).model
        return {name: parameter for name, parameter in model.named_parameters() if "lora_A" in name}

    first, again, other = adapter(1), adapter(1), adapter(2)
    for name, parameter in first.items():
        assert torch.equal(again[name], parameter)
        assert not torch.equal(other[name], parameter)


def test_help_names_our_flags_and_works_without_the_long_list(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        train("--help")
    printed = capsys.readouterr().out
    assert error.value.code == 0
    assert all(
        flag in printed for flag in ("--variant", "--text-file", "--target-fidelity", "--learning-rate", "--config")
    )
    assert "--fsdp" not in printed
    assert len(printed.splitlines()) < 135


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hold", "both"])
def test_two_processes_leave_what_one_leaves(flags, checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    """The command under torchrun, as docs/guides/train.md has it, with the same global batch."""
    shutil.copytree(checkpoint, tmp_path / "base")
    path = tmp_path / "base" / "config.json"  # dropout is drawn by each process for itself
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}))
    others = ["--model", str(tmp_path / "base"), "--recipe", recipe, "--warmup-steps", "0", "--learning-rate", "1e-3"]
    train(*flags, *others, "--per-device-train-batch-size", "4", "--output-dir", str(tmp_path / "one"))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "localist_hf.cli.main"]
    command = [*launch, "train", *flags, *others, "--ddp-backend", "gloo", "--output-dir", str(tmp_path / "two")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out text") == 1  # one of them speaks
    one, two = (RunRecord.load(tmp_path / name) for name in ("one", "two"))
    assert two.metrics == pytest.approx(one.metrics, rel=1e-4, abs=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)
