"""`localist-hf family`: a tiny base and little text, but through every stage."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from generation_defaults import OWN_GENERATION, set_defaults
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback

from localist_hf.cli.main import main
from localist_hf.command_line import PARSERS
from localist_hf.experiments import comparison, data, folders, grid_runs, load_grid, preparation
from localist_hf.hub import RunRecord
from localist_hf.trainers.checkpoints import mark_as_own


QUICK = {
    "seeds": [0],
    "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    "controls": {"dials": [0, 1], "num_previous_blocks": [], "boundaries": ["s"]},
    "sequence_length": 40,
    "measured_sequences": 2,
    "runs": [{"variant": ["distributed", "quintic"]}],
}


@pytest.fixture
def workspace(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, a text to train on, one to measure on, and grids by name."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer) + 2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    for name, number in (("train.txt", 40), ("held-out.txt", 20)):
        (tmp_path / name).write_text(f"Sentence number {number} says something. " * number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes half of the time that a tiny family does."""
    monkeypatch.setattr(comparison.Comparison, "draw", lambda comparison: [])
    monkeypatch.setattr(Figure, "savefig", lambda *given, **settings: None)  # of the cards


def flags(folder: str = "family", **changes) -> list[str]:
    """Of a grid with these changes."""
    name = f"{abs(hash(str(changes)))}.yaml"
    Path(name).write_text(yaml.safe_dump(QUICK | changes))
    return [
        name,
        "--output-dir",
        folder,
        "--model",
        "small",
        "--train-text",
        "train.txt",
        "--held-out-text",
        "held-out.txt",
    ]


def test_all_stages_and_a_second_call_that_keeps_what_is_there(workspace: Path, capsys) -> None:
    folder = workspace / "family"
    main(["family", *flags(), "--model-cards", "cards"])
    printed = capsys.readouterr().out
    record = RunRecord.load(folder / "quintic")
    assert "[4/4] quintic, seed 0: perplexity" in printed
    progress = [line.rpartition("; ")[2] for line in printed.splitlines() if re.match(r"\[\d/4\]", line)]
    assert [re.sub(r"\d+ s", "N s", text) for text in progress] == ["3 left", "2 left", "about N s left", "none left"]
    assert f"| quintic       | {record.metrics['perplexity']:.2f}" in printed
    assert (folder / "table.md").read_text().strip() in printed
    base = json.loads((folder / "untrained" / "distributed.json").read_text())["controls"]["perplexity"]
    free, local = (RunRecord.load(folder / name).controls for name in ("distributed", "quintic"))
    reference = min(base, free["perplexity"])
    found = re.findall(
        r"^\| (the base|distributed|quintic) +\| ([\d.]+) +\| ([\d.-]+) +\| ([\d.-]+) +\|$", printed, re.M
    )[:3]
    at_1, self_only = (value / reference for value in (local["dials"][-1]["perplexity"], local["self_only_perplexity"]))
    assert found == [
        ("the base", f"{base / reference:.3f}", "-", "-"),
        ("distributed", f"{free['perplexity'] / reference:.3f}", "-", "-"),
        ("quintic", f"{local['perplexity'] / reference:.3f}", f"{at_1:.3f}", f"{self_only:.3f}"),
    ]
    assert "quintic, loaded with AutoModelForCausalLM" in printed
    assert "Format: the LocalistGPT2 family." in printed
    assert "read quintic beside distributed in a browser" in printed.rpartition("What next:")[2]
    for line in re.findall(r"^    \S+ (.*)$", printed.rpartition("What next:")[2], re.MULTILINE):
        command, *rest = line.split()
        PARSERS[command]().parse_args(rest)
    names = ("context_fidelity_over_depth", "shares_over_depth", "frontier", "perplexity_over_dial")
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (record.name, record.base_run, record.training["steps"], record.license) == ("quintic", "small", 2, None)
    assert record.data["name"] == "`train.txt`"
    assert record.metrics_on_base_blocks["perplexity"] == pytest.approx(record.metrics["perplexity"], rel=1e-6)
    assert record.controls.keys() >= {"documents", "perplexity_on_blocks", "generation", "block_lift"}
    assert record.controls["generation"].keys() == {"dial 0", "dial 1", "text"}
    assert not list(folder.glob("*/checkpoint-*"))
    untrained = json.loads((folder / "untrained/quintic.json").read_text())["controls"]
    assert len(untrained["dials"]) == 2 and untrained["perplexity"] != record.controls["perplexity"]
    for variant in ("distributed", "quintic"):
        # The first of them was trained before the other was there; its card has both all the same.
        card = (workspace / "cards" / variant / "README.md").read_text()
        assert card == (folder / variant / "README.md").read_text()
        assert f"{record.metrics['perplexity']:.2f}" in card

    weights = (folder / "quintic" / "model.safetensors").stat().st_mtime_ns
    (folder / "distributed" / "run.json").unlink()  # as if it had been interrupted
    wider = flags(runs=[{"variant": ["distributed", "quintic", "localist"]}])
    main(["family", *wider])
    printed = capsys.readouterr().out
    assert "3 of 6 are there already, 3 are left" in printed
    assert (folder / "quintic" / "model.safetensors").stat().st_mtime_ns == weights
    assert RunRecord.load(folder / "localist").variant == "localist"

    (folder / "quintic" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit) as error:
        main(["family", *wider])
    assert error.value.code == 2
    assert "are not those that its run.json was measured on" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("without_pictures")
def test_the_shipped_base_and_the_text_that_python_ships(workspace: Path, tokenizer, monkeypatch, capsys) -> None:
    texts = {f"module {number}": f"Sentence number {number} says something. " * 12 for number in range(60)}
    monkeypatch.setattr(preparation, "python_text", lambda: texts)
    runs = [{"variant": "distributed"}, {"variant": "quintic", "block_partition": "delimiter"}]
    (grid := workspace / "grid.yaml").write_text(yaml.safe_dump(QUICK | {"runs": runs, "delimiters": ["."]}))
    main(["family", str(grid), "--output-dir", "family"])
    base, record = RunRecord.load(preparation.BASE), RunRecord.load("family/quintic-delimiter")
    base.check_weights("family/base")
    assert (record.base_run, record.base_weights, record.license) == ("base", base.weights, "apache-2.0")
    assert "tokenised by the base's tokenizer" in record.data["details"]
    # Of that base's tokens, those that end with a full stop, spaces after it or not.
    ids = record.locality["delimiter_token_ids"]
    assert all(preparation.load_tokenizer("family/base").decode([token]).rstrip(" ").endswith(".") for token in ids)
    assert len(ids) > 1
    assert "localist-gpt2-base" in Path("family/quintic-delimiter/README.md").read_text()
    assert list(Path("family/base").glob("modeling_*.py"))  # it can be published as it stands
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["family", *flags(runs=runs, delimiters=["~~"])])
    assert "no token of the tokenizer ends so" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_what_was_begun_on_sequences_without_their_beginning_is_not_gone_on_with(
    workspace: Path, bos_model_folder: Path, monkeypatch, capsys
) -> None:
    arguments = [*flags(runs=[{"variant": "distributed"}]), "--model", str(bos_model_folder)]
    with monkeypatch.context() as older:
        older.setattr(data, "text_prefix", lambda tokenizer: [])
        main(["family", *arguments, "--shard", "1/2"])  # the base alone
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(["family", *arguments])
    assert error.value.code == 2
    assert "was begun with `measured on`" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("template", "ends"),
    [("$A", "<|endoftext|>"), ("<bos> $A", "<|endoftext|>"), ("<bos> $A <eos>", "<eos>"), ("$A <eos>", "<eos>")],
)
def test_a_text_ends_once(workspace: Path, make_framed_tokenizer, template: str, ends: str, monkeypatch) -> None:
    tokenizer = make_framed_tokenizer(template)
    tokenizer.eos_token = ends
    monkeypatch.setattr(preparation, "load_tokenizer", lambda *given: tokenizer)
    monkeypatch.setattr(preparation, "check_token_ids", lambda *given: None)  # the model has as many as the shared one
    rows = "".join(json.dumps({"text": f"Sentence number {number} says. "}) + "\n" for number in range(100))
    Path("rows.jsonl").write_text(f'{rows}{{"text": null}}\n')
    Path("others.jsonl").write_text(rows)
    work = preparation.prepare_grid(load_grid(flags()[0]), workspace, "small", "rows.jsonl", "others.jsonl")
    prefix = tokenizer("a")["input_ids"].index(tokenizer("a", add_special_tokens=False)["input_ids"][0])
    stream = tokenizer.decode([token for row in work.train["input_ids"] for token in row[prefix:]])
    assert all(row[:prefix] == tokenizer("")["input_ids"][:prefix] for row in work.train["input_ids"])
    whole = "".join(f"Sentence number {number} says. {ends}" for number in range(100))
    assert f"{whole}{ends}".startswith(stream) and len(stream) > 0.9 * len(whole)


@pytest.mark.usefixtures("without_pictures")
def test_several_seeds_and_their_names(workspace: Path, capsys) -> None:
    main(["family", *flags(seeds=[3, 4], runs=[{"variant": "distributed"}])])
    first, second = (RunRecord.load(f"family/{name}") for name in ("distributed", "distributed-seed4"))
    assert (first.seed, second.seed, second.name) == (3, 4, "distributed")
    assert first.metrics["perplexity"] != second.metrics["perplexity"]
    assert "± is half of the 95 % interval over seeds" in capsys.readouterr().out
    assert "seeds 3, 4" in Path("family/distributed/README.md").read_text()


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_is_measured_in_the_precision_that_it_was_trained_in(workspace: Path, bf16: bool) -> None:
    """Or its perplexity at dial 1 would be held against one at dial 0 in another."""
    training = QUICK["training"] | {"bf16": bf16, "use_cpu": True, "training_dials": [1], "locality_weight": 0}
    main(["family", *flags(training=training)])
    record = RunRecord.load(workspace / "family" / "quintic")
    dials = {entry["dial"]: entry["perplexity"] for entry in record.controls["dials"]}
    assert record.metrics["perplexity"] == pytest.approx(dials[0], rel=1e-6)
    assert record.metrics["perplexity_at_dial_1"] == pytest.approx(dials[1], rel=1e-6)


@pytest.mark.usefixtures("without_pictures")
def test_adapters_of_another_architecture(workspace: Path, tokenizer) -> None:
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    arguments = flags(lora={"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    main(["family", *arguments, "--model", "llama"])
    record = RunRecord.load("family/quintic")
    assert (record.adapter["rank"], record.architecture) == (2, "LlamaForCausalLM")
    assert not Path("family/quintic/model.safetensors").exists()
    assert record.controls["perplexity"] == pytest.approx(record.metrics["perplexity"], rel=1e-5)


@pytest.mark.usefixtures("without_pictures")
def test_shards_share_the_work_and_are_put_together(workspace: Path, capsys) -> None:
    for index in (1, 2, 3):
        main(["family", *flags(f"part{index}"), "--shard", f"{index}/3"])
        printed = capsys.readouterr().out
        assert "are not in" in printed and "no comparison" in printed
    found = [sorted(path.name for path in Path(f"part{index}").glob("*/run.json")) for index in (1, 2, 3)]
    assert sum(map(len, found)) == 2
    for index in (1, 2, 3):
        subprocess.run(["cp", "-r", f"part{index}/.", "whole"], check=True)
    main(["family", *flags("whole")])
    printed = capsys.readouterr().out
    assert "4 of 4 are there already, 0 are left" in printed
    assert "On the blocks that each model finds itself" in printed


def test_a_run_that_another_process_is_at_is_left_to_it(workspace: Path, capsys) -> None:
    with grid_runs.lock_folder(Path("family/quintic")):
        folders.claim(Path("family"), "grid", folders.GRID_FILES)
        main(["family", *flags()])
    printed = capsys.readouterr().out
    assert "quintic, seed 0: another process is at it" in printed
    assert "1 of 4 are not in family yet" in printed
    assert not Path("family/quintic/plan.json").exists()


class Killed(BaseException):
    pass


class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3 and "quintic" in args.output_dir:
            raise Killed


@pytest.mark.usefixtures("without_pictures")
def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_as_if_it_had_not_been(workspace, monkeypatch) -> None:
    given = {"training": QUICK["training"] | {"max_steps": 4}}
    main(["family", *flags("whole", **given)])
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/quintic")
    trainer, steps = grid_runs.LocalistTrainer, []

    class Counted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            steps.append((Path(args.output_dir).name, state.global_step))

    monkeypatch.setattr(grid_runs, "LocalistTrainer", lambda **given: trainer(**given, callbacks=[KillAtStep()]))
    with pytest.raises(Killed):
        main(["family", *flags("cut", **given)])
    monkeypatch.setattr(grid_runs, "LocalistTrainer", lambda **given: trainer(**given, callbacks=[Counted()]))
    main(["family", *flags("cut", **given)])
    assert steps == [("quintic", 3), ("quintic", 4)]
    whole, cut = (RunRecord.load(f"{folder}/quintic") for folder in ("whole", "cut"))
    assert cut.weights == whole.weights
    assert cut.controls == whole.controls

    # Killed after its training, it is only measured.
    unmeasured = json.loads(Path("cut/quintic/run.json").read_text()) | {"controls": None}
    Path("cut/quintic/run.json").write_text(json.dumps(unmeasured))
    steps.clear()
    main(["family", *flags("cut", **given)])
    assert steps == []
    assert RunRecord.load("cut/quintic").controls == whole.controls

    # Killed while its checkpoints are removed, it removes the rest.
    Path("cut/quintic/run.json").write_text(json.dumps(unmeasured))
    mark_as_own(Path("cut/quintic/checkpoint-4"))

    def die(folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(grid_runs, "remove_checkpoint", die)
        main(["family", *flags("cut", **given)])
    main(["family", *flags("cut", **given)])
    assert not list(Path("cut/quintic").glob("checkpoint-*"))
    assert RunRecord.load("cut/quintic").controls == whole.controls


@pytest.mark.usefixtures("without_pictures")
def test_another_plan_is_not_mixed_with_what_is_there(workspace: Path, capsys) -> None:
    alone = {"runs": [{"variant": "distributed"}]}
    main(["family", *flags(**alone)])
    others = [
        (flags(**alone, training=QUICK["training"] | {"max_steps": 3}), "`training`"),
        (flags(**alone, locality={"num_sink_tokens": 1}), "`locality`"),
        (flags(**alone, measured_sequences=3), "`measured on`"),
        (flags(**alone, controls={"dials": [0, 0.5, 1]}), "`controls`"),
    ]
    for arguments, name in others:
        with pytest.raises(SystemExit) as error:
            main(["family", *arguments])
        assert error.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"was begun with {name}" in message and "choose another `--output-dir`" in message


@pytest.mark.parametrize(
    ("changes", "others", "message"),
    [
        ({"training": {"max_step": 3}}, [], "`training` has 'max_step'"),
        ({"training": {"target_fidelity": 2}}, [], "`target_fidelity` is 2"),
        ({"locality": {"num_sink_tokens": -1}}, [], "`num_sink_tokens` is -1"),
        ({"locality": {"num_sinks": 1}}, [], "num_sinks"),
        ({"runs": [{"variant": "distributed"}, {"variant": "quintic", "tokens": 1}]}, [], "`training` has 'tokens'"),
        (
            {"training": {"max_steps": "two"}},
            [],
            "`training` sets 'max_steps' to 'two': Field 'max_steps' expected",
        ),
        ({"training": {"max_steps": True}}, [], "`training` sets 'max_steps' to True"),
        ({"training": {"max_steps": 0}}, [], "`max_steps` is 0; it must be at least 1, or -1"),
        ({"training": {"learning_rate": "1e-3"}}, [], "`training` sets 'learning_rate' to '1e-3'"),
        ({"training": {"report_to": ["nowhere"]}}, [], "`report_to` is 'nowhere', which is not installed"),
        ({"training": {"metric_for_best_model": "accuracy"}}, [], "`metric_for_best_model` is 'accuracy'; allowed are"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, [], "`lr_scheduler_type` is 'cosine_with_min_lr'"),
        ({"training": {"use_liger_kernel": True}}, [], "`use_liger_kernel` is true"),
        (
            {"runs": [{"variant": "distributed"}, {"variant": "quintic", "weight_decay": "no"}]},
            [],
            "`training` sets 'weight_decay' to 'no'",
        ),
        ({"training": {"optim_args": "fast=1"}}, [], "`optim_args` is 'fast=1'; `optim` 'adamw_torch_fused' takes no"),
        ({"training": {"folder": "x"}}, [], "`training` has 'folder', which is no training argument"),
        ({"controls": {"num_previous_blocks": [10**22]}}, [], "it must hold whole numbers from 0 to `sequence_length`"),
        ({"lora": {"r": 10**9, "target_modules": ["c_attn"]}}, [], "`r` is 1000000000; it must be at most 16"),
        ({"lora": {"rank": 3}}, [], "`lora` cannot be used"),
        ({"lora": {"r": "two"}}, [], "`lora` sets 'r' to 'two'"),
        ({"lora": {"target_modules": ["q_proj"]}}, [], "`lora` cannot be used: Target modules {'q_proj'} not found"),
        ({}, ["--held-out-text", "train.txt"], "which hold the same: what a model was trained on is no held-out text"),
        ({}, ["--held-out-text", "copy.txt"], "which hold the same: what a model was trained on is no held-out text"),
        ({"sequence_length": 65}, [], "`sequence_length` is 65; the model allows 2 to 64"),
        ({"training": {"per_device_train_batch_size": 500}}, [], "one step needs 500"),
        ({"controls": {"dials": [0.5]}}, [], "`dials`"),
        ({"controls": {"dials": 0.5}}, [], "`controls` sets 'dials' to 0.5; it must be a list of numbers."),
        ({"controls": {"num_previous_blocks": [0, -1]}}, [], "`num_previous_blocks` holds -1"),
        ({}, ["--held-out-text", "short.txt"], "tokens"),
        ({}, ["--held-out-text", "one.txt"], "two are needed"),
        ({}, ["--train-text", "nowhere.txt"], "`train_text` is 'nowhere.txt'; there is no such file"),
        (
            {},
            ["--held-out-text", "bad.jsonl"],
            "`held_out_text` is 'bad.jsonl', which cannot be read: line 1 is no JSON",
        ),
        ({}, ["--model", "nowhere/"], "nowhere"),
        ({}, ["--jobs", "0"], "`jobs` is 0"),
        ({}, ["--shard", "3/2"], "3/2"),
        ({}, ["--model-cards", "train.txt"], "`model_cards` is 'train.txt'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_run(workspace, changes, others, message, capsys) -> None:
    Path("short.txt").write_text("Sentence")
    Path("one.txt").write_text("Sentence number says something. " * 9)
    Path("bad.jsonl").write_text("{")
    shutil.copy("train.txt", "copy.txt")
    with pytest.raises(SystemExit) as error:
        main(["family", *flags(**changes), *others])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("family").glob("*/*")) if Path("family").exists() else True


@pytest.mark.slow
def test_jobs_side_by_side_repeat_nothing_and_lose_nothing_when_killed(workspace: Path) -> None:
    """Killed without warning in the middle, twice; the workers end with the first process."""
    arguments = flags(seeds=[0, 1], training=QUICK["training"] | {"max_steps": 40})
    command = [sys.executable, "-m", "localist_hf.cli.main", "family", *arguments, "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done: dict[Path, int] = {}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = len(done)
        while process.poll() is None and len(list(Path("family").glob("*/run.json"))) <= seen:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2)
        with grid_runs.lock_folder(Path("family/quintic")):  # no worker is left that holds it
            pass
        for path in Path("family").glob("*/model.safetensors"):
            assert done.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "On the blocks that each model finds itself" in output
    for path, written in done.items():
        if (path.parent / "run.json").exists():
            assert path.stat().st_mtime_ns == written
    assert len(list(Path("family").glob("*/run.json"))) == 4
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_grid_killed_twenty_times_ends_as_if_undisturbed(workspace: Path) -> None:
    """Without warning, now anywhere, now at a save."""
    runs = [
        {"variant": "distributed"},
        {"variant": "quintic", "recipe": "hold"},
        {"variant": "quintic", "max_loss_increase": 0.1},
    ]
    training = QUICK["training"] | {"max_steps": 24}
    random = Random(0)

    def command(folder: str) -> list[str]:
        return [sys.executable, "-m", "localist_hf.cli.main", "family", *flags(folder, runs=runs, training=training)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for number in range(20):
        process = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        is_aimed, before = number % 2, set(Path("cut").rglob("*"))
        while is_aimed and process.poll() is None and not any(
            path.match("*checkpoint*") or path.match("*.saving*") for path in {*Path("cut").rglob("*")} - before
        ):  # fmt: skip
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.4) if is_aimed else random.uniform(4, 12))
        process.kill()
        process.wait()
    subprocess.run(command("cut"), check=True, capture_output=True)
    for path in Path("whole").glob("*/run.json"):
        whole, cut = (RunRecord.load(Path(folder) / path.parent.name) for folder in ("whole", "cut"))
        assert (cut.weights, cut.controls, cut.metrics) == (whole.weights, whole.controls, whole.metrics)
    names = [sorted(path.name for path in Path(folder).rglob("*") if path.is_file()) for folder in ("whole", "cut")]
    assert names[0] == names[1]


def test_a_prompt_is_gone_on_with_whatever_the_checkpoint_says(make_model, make_framed_tokenizer) -> None:
    tokenizer = make_framed_tokenizer("<bos> $A <eos>")  # which ends every text
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = make_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    expected = comparison.continued(model, tokenizer, "Sentence number 1")
    assert re.match(r"<bos>Sentence number 1(?!<eos>).", expected, re.DOTALL)
    for names in (["suppress_tokens"], ["forced_bos_token_id", "num_beams"], OWN_GENERATION):
        set_defaults(model, **{name: OWN_GENERATION[name] for name in names})
        assert comparison.continued(model, tokenizer, "Sentence number 1") == expected, names
