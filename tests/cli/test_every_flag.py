"""Every command, flag and field with wrong values: one line and status 2, at once; never a traceback."""

import inspect
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import AcceleratorConfig

import localist_hf_main
from localist_hf.cli import evaluate, export, publish, recruit, train, update
from localist_hf.cli.arguments import build_parser
from localist_hf.cli.main import main
from localist_hf.command_line import PARSERS, CommandParser
from localist_hf.errors import InputError
from localist_hf.experiments import Grid, load_grid, preparation, training_checks
from localist_hf.experiments.base import BASE
from localist_hf.experiments.grid_runs import training_arguments
from localist_hf.experiments.training_checks import JSON_FLAGS, check_types
from localist_hf.hub import loading
from localist_hf.modeling import LOCALITY_FIELDS
from localist_hf.trainers import LocalistTrainingArguments


#: What each command is called with beside the wrong value.
COMMANDS = {
    "train": ["--model", str(BASE), "--text-file", "book.txt", "--output-dir", "run", "--use_cpu"],
    "family": ["grid.yaml", "--output-dir", "run"],
    "evaluate": [str(BASE), "--output-dir", "run"],
    "recruit": [str(BASE), "--text-file", "book.txt", "--output-dir", "run"],
    "explain": [str(BASE), "--output-dir", "run"],
    "view": [str(BASE), "--save", "page.html"],
    "publish": ["run", "--namespace", "me", "--dry-run"],
    "update": ["me/model"],
    "export": [str(BASE), "run"],
}
#: Wrong for some flag or other, and for some right.
VALUES = (
    "two", "-1", "0", "3.5", "nan", "inf", "1e400", "true", "null", "{", "[1]", "{}", "../..", "a/b/c", "a::b", "a\0b",
    "x" * 5000, "\udcff", "loop", "book.txt", "grid.yaml", "/proc/none", "--flag",
)  # fmt: skip
#: What no flag of a type takes; nothing is no value of any.
WRONG = {
    int: ("two", "3.5", "nan", "1" + "0" * 20, "-1" + "0" * 20),
    float: ("two", "nan", "inf", "1e400", "1e300", "-1e300", "-0.5"),
    bool: ("perhaps", "2"),
}
#: What no flag with a JSON object takes, be it in a file.
WRONG_OBJECTS = (
    "5", "null", "[]", '"two"', "{", '{"no_such_key": 1}', '{"no_such_key": NaN}', '{"no_such_key": 1e400}',
    '{"no_such_key": [{"two": -Infinity}]}', "nowhere.json", "book.txt", "grid.yaml", "loop", ".", "list.json",
    "keys.json", "a\0b",
)  # fmt: skip
#: Of some of them every key, for none of which this is a value.
KEYS = {
    "accelerator_config": [each.name for each in fields(AcceleratorConfig)],
    "fsdp_config": [*training_checks._FSDP, *(f"fsdp_{key}" for key in training_checks._FSDP)],
    "gradient_checkpointing_kwargs": training_checks._CHECKPOINTING,
    "activation_checkpointing_kwargs": training_checks._CHECKPOINTING,
}
TEXTS = (str, bool | str, str | list[str])
WRONG_VALUES = (float("nan"), 2**70, [1], [{"two": []}], "")
OTHERS = (None, True, -1, 0, 2.5, float("nan"), "two", "", [], ["two"], [[1]], {}, {"two": [1]})


class Accepted(Exception):
    """What comes next is work."""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, a grid and a loop of links; nothing is loaded, trained or sent."""

    def accept(*args: Any, **kwargs: Any) -> NoReturn:
        raise Accepted

    (tmp_path / "book.txt").write_text("Sentence number says something. " * 100)
    (tmp_path / "grid.yaml").write_text("runs: [{variant: [distributed, quintic]}]\nseeds: [0]\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "keys.json").write_text('{"no_such_key": 1}')
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for module, name in (
        (loading, "load_model"), (train, "load_model"), (train, "load_text"), (update, "update"),
        (preparation, "load_texts"), (publish, "prepare"), (publish, "publish"), (evaluate, "load"), (recruit, "load"),
        (export, "export_gpt2"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, accept)
    return tmp_path


@pytest.fixture
def outcome(workspace: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """How a call ends: `"accepted"` or `"refused"`, with the line that says why; anything else is an error."""
    before = sorted(workspace.iterdir())

    def call(command: str, arguments: list[str]) -> tuple[str, str]:
        sys.stderr.reconfigure(errors="backslashreplace")  # as it is in a process
        start = time.monotonic()
        try:
            main([command, *arguments])
        except Accepted:
            return "accepted", ""
        except SystemExit as end:
            status = end.code
        seconds, lines = time.monotonic() - start, capsys.readouterr().err.splitlines()
        ours = [line for line in lines if line.startswith("localist-hf")]
        assert (status, len(ours)) == (2, 1) and ours[0] == lines[-1], (command, arguments, status, lines)
        assert "usage:" not in "".join(lines)
        assert ours[0].startswith(f"localist-hf {command}: error: ")
        assert seconds < 1, (command, arguments, seconds)
        assert sorted(workspace.iterdir()) == before, (command, arguments)
        return "refused", ours[0]

    return call


def parser_of(command: str) -> CommandParser:
    """The parser that a command makes."""
    return build_parser() if command == "train" else PARSERS[command]()


def flags_of(command: str) -> Iterator[tuple[Any, str]]:
    for action in parser_of(command)._actions:
        if action.dest != "help" and action.option_strings:
            yield action, f"--{action.dest}" if command == "train" else action.option_strings[0]


def surely_wrong() -> Iterator[tuple[str, list[str]]]:
    """Of every flag of every command what its type and its choices do not allow."""
    for command, arguments in COMMANDS.items():
        yield command, [*arguments, "--no-such-flag"]
        for action, flag in flags_of(command):
            is_bool = getattr(action.type, "__name__", "") == "string_to_bool"
            for value in WRONG.get(bool if is_bool else action.type, ()):
                yield command, [*arguments, f"{flag}={value}"]
            if command == "train" and action.type is int:
                yield command, [*arguments, f"{flag}=-2"]
            if action.dest in JSON_FLAGS:
                yield from ((command, [*arguments, f"{flag}={value}"]) for value in WRONG_OBJECTS)
                for key, value in itertools.product(KEYS.get(action.dest, ()), WRONG_VALUES):
                    if not (value == "" and training_checks._FSDP.get(key.removeprefix("fsdp_")) in TEXTS):
                        yield command, [*arguments, f"{flag}={json.dumps({key: value})}"]
            if action.choices is not None:
                yield command, [*arguments, f"{flag}=no-such-choice"]
            yield command, [*arguments, f"{flag}="]  # a shell's variable that is not set
            if action.nargs != 0:
                yield command, [*arguments, flag, ""]
            if action.nargs is None:
                yield command, [*arguments, flag]  # without a value


def perhaps_wrong() -> Iterator[tuple[str, list[str]]]:
    """Every flag and every other argument of every command with values of all kinds."""
    for command, arguments in COMMANDS.items():
        for _, flag in flags_of(command):
            yield from ((command, [*arguments, f"{flag}={value}"]) for value in VALUES)
        for index in range(len(arguments)):
            yield from ((command, [*arguments[:index], value, *arguments[index + 1 :]]) for value in ("", *VALUES))


def some_of(cases: Iterator[Any], number: int) -> list[Any]:
    """Others each day, and on a day the same."""
    everything = list(cases)
    return random.Random(time.strftime("%j")).sample(everything, number)


def test_every_command_is_called() -> None:
    assert COMMANDS.keys() == localist_hf_main.COMMANDS.keys()
    assert len(list(surely_wrong())) > 500 and len(list(perhaps_wrong())) > 3000


def test_what_a_flag_does_not_allow_is_refused(outcome: Callable) -> None:
    for command, arguments in some_of(surely_wrong(), 100):
        assert outcome(command, arguments)[0] == "refused", (command, arguments)


def test_whatever_is_given_ends_in_work_or_in_a_line(outcome: Callable) -> None:
    for command, arguments in some_of(perhaps_wrong(), 100):
        outcome(command, arguments)


@pytest.mark.slow
def test_all_that_a_flag_does_not_allow_is_refused(outcome: Callable) -> None:
    for command, arguments in surely_wrong():
        assert outcome(command, arguments)[0] == "refused", (command, arguments)


@pytest.mark.slow
def test_whatever_is_given_anywhere_ends_in_work_or_in_a_line(outcome: Callable) -> None:
    for command, arguments in perhaps_wrong():
        outcome(command, arguments)


def test_every_wrong_object_is_refused(outcome: Callable) -> None:
    for command, arguments in surely_wrong():
        if arguments[-1].partition("=")[0].removeprefix("--") in JSON_FLAGS:
            assert outcome(command, arguments)[0] == "refused", arguments


def test_what_torch_and_transformers_take_of_objects_is_taken(outcome: Callable) -> None:
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state", "every_n_layers", "offload"}
    assert {*training_checks._CHECKPOINTING} == known - {"function", "args", "kwargs", "context_fn"}
    accumulation = '"gradient_accumulation_kwargs": {"num_steps": 2, "sync_each_batch": true}'
    for flag, value in (
        ("gradient_checkpointing_kwargs", '{"use_reentrant": false, "early_stop": false, "determinism_check": "none"}'),
        ("activation_checkpointing_kwargs", '{"use_reentrant": "false", "every_n_layers": 2}'),
        ("activation_checkpointing_kwargs", '{"every_n_layers": 2}'),
        ("accelerator_config", f'{{"even_batches": "true", "dispatch_batches": null, {accumulation}}}'),
        ("fsdp_config", '{"fsdp_version": 2, "reshard_after_forward": "true", "use_orig_params": "True"}'),
        ("lr_scheduler_kwargs", "{}"),
    ):
        assert outcome("train", [*COMMANDS["train"], "--fsdp=full_shard", f"--{flag}={value}"])[0] == "accepted", (
            flag,
            value,
        )


@pytest.mark.parametrize("field", [each.name for each in fields(Grid)])
def test_every_field_of_a_grid(field: str, tmp_path: Path) -> None:
    right = {"runs": [{"variant": ["distributed", "quintic"]}], "seeds": [0]}
    refused = 0
    for value in OTHERS:
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(right | {field: value}))
        try:
            list(load_grid(tmp_path / "grid.yaml"))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert refused >= 8


@pytest.mark.parametrize("field", LOCALITY_FIELDS)
def test_every_setting_of_locality(field: str) -> None:
    refused = 0
    for value in OTHERS:
        try:
            loading.load_config(str(BASE), {field: value})
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 5


def test_every_training_argument_of_a_grid(tmp_path: Path) -> None:
    for field in fields(LocalistTrainingArguments):
        refused = 0
        for value in OTHERS:
            try:
                check_types("training", {field.name: value}, LocalistTrainingArguments)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"`training` sets {field.name!r} to ") and "\n" not in str(error)
        assert refused >= 3 or field.name == "parallelism_config", field.name
        # Their own defaults are right.
        if field.default is not MISSING:
            check_types("training", {field.name: field.default}, LocalistTrainingArguments)
    for name, value in (
        ("max_steps", "two"), ("max_steps", 10**20), ("learning_rate", float("nan")), ("optim", "none"),
        ("save_steps", 0), ("gradient_checkpointing_kwargs", {"no_such_key": 1}), ("accelerator_config", "nowhere"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            training_arguments(tmp_path, **{name: value})


def test_every_argument_of_an_adapter() -> None:
    right = {"r": 2, "lora_alpha": 4, "lora_dropout": 0, "target_modules": ["c_attn"], "bias": "none"}
    check_types("lora", right, LoraConfig)
    for value in ("two", 2.5, [2], None):
        with pytest.raises(InputError, match="`lora` sets 'r' to "):
            check_types("lora", {"r": value}, LoraConfig)


@pytest.mark.parametrize(
    ("command", "argument", "name"),
    [
        *((command, "--output-dir", "output_dir") for command in ("train", "family", "evaluate", "recruit")),
        ("family", "--model-cards", "model_cards"),
        ("export", "", "folder"),
    ],
)
def test_a_folder_that_cannot_be_made(command: str, argument: str, name: str, outcome: Callable) -> None:
    for folder, words in (
        ("\udcff", "it must be UTF-8 without zero bytes."),
        ("a\0b", "it must be UTF-8 without zero bytes."),
        ("new/" + "x" * 256, "a name in it has more than 255 bytes"),
        ("new/" * 1000, "it has more than 3583 bytes"),
        ("loop", "'loop' is a link that leads nowhere"),
        ("loop/new", "'loop' is a link that leads nowhere"),
        ("book.txt", "'book.txt' is a file"),
        ("book.txt/new/run", "'book.txt' is a file"),
    ):
        arguments = [*COMMANDS[command], argument, folder] if argument else [COMMANDS[command][0], folder]
        ended, line = outcome(command, arguments)
        assert (ended, words in line) == ("refused", True) and f"error: `{name}` is " in line and len(line) < 450, line


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("train", ["--config", "fifo"], "`config` is 'fifo', which cannot be read: it is no file that can be read tw"),
        ("view", ["--text-file", "fifo"], "`text_file` is 'fifo'; it is no file that can be read twice."),
        ("view", ["--text-file", "rows.csv"], "`text_file` is 'rows.csv', a file with rows; one text is read"),
        ("view", ["--text-file", "/proc/self/mem"], "`text_file` is '/proc/self/mem'; it cannot be read ("),
        ("evaluate", ["--text-file", "/proc/self/mem"], "`text_file` is '/proc/self/mem'; it cannot be read ("),
        (
            "train",
            ["--locality", '{"num_sink_tokens": -1}'],
            f"`locality` cannot be used with `model` '{BASE}': `num_sink_tokens` is -1; it must be at least 0.",
        ),
        ("family", ["--shard", f"{'1' * 5000}/{'1' * 5000}"], "it must be I/N with I from 1 to N"),
        ("publish", ["--collection", " "], "argument --collection: ' '; it must be one line with something to read"),
        ("publish", ["--collection", "x" * 500], "of 150 letters at most"),
        ("publish", ["--collection", "a\nb"], "argument --collection: 'a\\nb'; it must be one line"),
        *(
            (command, ["--locality", f'{{"num_sink_tokens": {value}}}'], words)
            for command in ("train", "evaluate", "recruit", "view")
            for value, words in (
                ('1, "num_sink_tokens": 2', "it must be a JSON object (the key 'num_sink_tokens' stands there twice)"),
                ("9" * 5000, " has more than 1000 digits)."),
            )
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_called_by_its_name(
    command: str, arguments: list[str], words: str, workspace: Path, capsys: pytest.CaptureFixture
) -> None:
    os.mkfifo(workspace / "fifo")
    (workspace / "rows.csv").write_text("text\nSome text.\n")
    with pytest.raises(SystemExit) as end:
        main([command, *COMMANDS[command], *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (2, 1)
    assert words in lines[0] and len(lines[0]) < 700


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("training: {push_to_hub: true}", "`push_to_hub` is set; a grid's runs are published by `localist-hf publish`"),
        ("training: {dataloader_persistent_workers: true}", "`dataloader_persistent_workers` is true; it needs"),
        ("training: {save_strategy: best}", "`save_strategy` is 'best'; it needs `metric_for_best_model`"),
        ("training: {optim: foo}", "`optim` is 'foo'; allowed are adamw_torch, "),
        ("training: {eval_strategy: foo}", "`eval_strategy` is 'foo'; allowed are no, steps, epoch."),
        ("training: {per_device_eval_batch_size: 4294967295}", "is 4294967295; it must be in 1 to 65536."),
        (f"training: {{max_steps: {'9' * 5000}}}", "`training` sets 'max_steps' to '999"),
        ("training: {fsdp_config: {version: 2}}", "`fsdp_config` is {'version': 2}; it needs `fsdp`"),
        ("locality: {num_sink_tokens: -1}", "`locality` cannot be used with `model`"),
        ('delimiters: [""]', "`delimiters` holds ''; each must be the end of a token"),
        ("runs: [{variant: [distributed, quintic], block_partition: delimiter}]", "it needs `delimiters`, such as"),
        ('runs: [{variant: distributed, run_name: "\\uDCFF"}]', "of its values; it is the name of its folder"),
        ("runs: [{variant: distributed, run_name: a/../../b}]", "of its values; it is the name of its folder"),
        (f"runs: [{{variant: distributed, run_name: {'x' * 300}}}]", "and of 200 bytes at most"),
        ("controls: {dials: 5}", "`controls` sets 'dials' to 5; it must be a list of numbers."),
        ("controls: {num_previous_blocks: 5}", "sets 'num_previous_blocks' to 5; it must be a list of whole numbers."),
        ("lora: {r: 0}", "`lora` sets 'r' to 0; it must be at least 1."),
        ("lora: {r: 2, lora_alpha: 0}", "`lora` sets 'lora_alpha' to 0; it must be at least 1."),
        ("lora: {r: 2, lora_dropout: 2}", "`lora` sets 'lora_dropout' to 2; it must be at least 0 and below 1."),
        ("seeds: [2020-99-99]", "`seeds` is ['2020-99-99']; it must be a list, each entry a int."),
        ("seeds: 2020-01-01", "`seeds` is '2020-01-01'; it must be a list, each entry a int."),
        (f"seeds: [{'9' * 5000}]", "`seeds` is ['9999"),
        ("sequence_length: !!int two", "`sequence_length` is 'two'; it must be a whole number"),
        ("measured_sequences: !!bool two", "`measured_sequences` is 'two'; it must be a whole number"),
        ("seeds: [0]\nseeds: [1]", "the key 'seeds' stands there twice"),
    ],
)  # fmt: skip
def test_a_grid_is_refused_by_the_name_of_its_key(
    settings: str, words: str, workspace: Path, outcome: Callable
) -> None:
    given = {line.partition(":")[0] for line in settings.splitlines()}
    right = {"runs": "runs: [{variant: [distributed, quintic]}]", "seeds": "seeds: [0]"}
    lines = [*(line for key, line in right.items() if key not in given), settings]
    (workspace / "grid.yaml").write_text("\n".join(lines))
    ended, line = outcome("family", COMMANDS["family"])
    assert (ended, words in line) == ("refused", True) and len(line) < 1100, line
