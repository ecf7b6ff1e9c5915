"""The command as a newcomer meets it."""

import errno
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import localist_hf_main
from localist_hf import __version__
from localist_hf.cli import export, publish, update
from localist_hf.cli.arguments import build_parser
from localist_hf.cli.main import main
from localist_hf.command_line import CommandParser, check_train_flags
from localist_hf.experiments.base import BASE
from localist_hf.hub import PublishError


def test_help_explains_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "family" in printed
    assert "localist-hf train --variant quintic --text-file book.txt" in printed


def test_version_and_unknown_commands(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["retrain"])
    assert error.value.code == 2
    assert "retrain" in capsys.readouterr().err


EXPORT = ("export", "run", "out")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("`folder` is 'out', which is occupied."), 2, "error: `folder` is 'out', which is occupied."),
        (FileNotFoundError(errno.ENOENT, "No such file", "run"), 2, "error: [Errno 2] No such file: 'run'"),
        (ValueError("One line\nand   another"), 2, "error: One line and another"),
        (ValueError("word " * 200), 2, "error: " + "word " * 79 + "..."),
        (RuntimeError("The logits differ."), 1, "error: The logits differ."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: no space is left on the disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "error: no space is left on the disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "error: memory ran out; try a machine with more memory (MemoryError:)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), 1, "error: memory ran out; try"),
        (RuntimeError("can't start new thread"), 1, "error: memory ran out; try"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "error: memory ran out; try"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, "error: memory ran out; try"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: memory ran out; try"),
    ],
)
def test_an_expected_end_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys, monkeypatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(export, "export_gpt2", fail)
    with pytest.raises(SystemExit) as end:
        main([*EXPORT])
    assert end.value.code == status
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"localist-hf export: {line}")


def test_a_process_that_the_system_has_ended(capsys, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(update, "main", fail)
    with pytest.raises(SystemExit) as end:
        main(["update", "org/model"])
    assert end.value.code == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("localist-hf update: error: a process was ended from outside; if memory ran out, try")


def test_a_hub_that_refuses_is_a_failure_and_no_bad_input(capsys, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise PublishError("the Hub cannot be reached")

    monkeypatch.setattr(publish, "publish", fail)
    with pytest.raises(SystemExit) as end:
        main(["publish", "run", "--namespace", "me"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "localist-hf publish: error: the Hub cannot be reached\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(export, "export_gpt2", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*EXPORT])


def test_it_runs_as_a_module_too(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main", "--version"])
    with pytest.raises(SystemExit) as end, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("localist_hf.cli.main", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"localist-hf {__version__}\n"


ROOT = Path(localist_hf_main.__file__).parent


def test_help_and_what_is_wrong_need_nothing_of_the_package() -> None:
    calls = [["--help"], ["--version"], ["retrain"]]
    for command in localist_hf_main.COMMANDS.keys() - {"train"}:
        calls += [[command, "--help"], [command, "--no-such-flag", "x", "y"]]
    calls += [["publish", "run", "--namespace", "a/b"], ["train", "--no-such-flag", "x"]]
    program = (
        "import sys, localist_hf_main\n"
        f"for arguments in {calls}:\n"
        "    try:\n"
        "        localist_hf_main.main(arguments)\n"
        "    except SystemExit:\n"
        "        print(sorted({'localist_hf', 'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("[]")] == ["[]"] * len(calls)
    first, *others = done.stderr.splitlines()
    assert first.startswith("localist-hf: error: argument COMMAND: invalid choice: 'retrain'")
    assert len(others) == (len(calls) - 2) // 2 + 1 and all(": error: " in line for line in others)


def test_every_flag_of_train_is_known_without_what_it_takes_to_train() -> None:
    options = [option for action in build_parser()._actions for option in action.option_strings if option[:2] == "--"]
    assert len(options) > 100
    for option in options:
        check_train_flags([option, "--", "-1", "x", f"{option}=3"], CommandParser())
    with pytest.raises(SystemExit):
        check_train_flags([f"{options[0]}s"], CommandParser())


def test_interrupted_while_libraries_are_imported(tmp_path: Path) -> None:
    """Where an exception would come out of their midst, or be taken for a fault of theirs."""
    (tmp_path / "transformers.py").write_text(
        "import time\ntry:\n    print('here', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "localist_hf_main", "export", "run", "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch("localist-hf( export)?: interrupted\n", printed)


@pytest.mark.parametrize(
    "reason", ["raise ImportError('libtorch.so: failed to map segment\\nfrom shared object')", "raise MemoryError"]
)
def test_what_cannot_be_imported(reason: str, tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text(f"{reason}\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "localist_hf_main", "view", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    (line,) = done.stderr.splitlines()
    start = "localist-hf view: error: the program could not be loaded: memory ran out, or the installation is broken ("
    assert line.startswith(f"{start}{'Import' if 'Import' in reason else 'Memory'}Error:")
    assert done.returncode == 1


@pytest.mark.slow
def test_no_progress_bar_before_the_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A word.")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    flags = ["--model", str(BASE), "--text-file", "short.txt", "--output-dir", "run", "--use_cpu"]
    command = [sys.executable, "-m", "localist_hf_main", "train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    line = "localist-hf train: error: The text of train has 3 tokens; one sequence needs 256.\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.slow
def test_interrupted_at_any_moment(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Sentence number {number} says something. " for number in range(50_000)))
    for number in range(20):
        folder = tmp_path / str(number)
        flags = ["--text-file", str(book), "--controls", "--output-dir", str(folder)]
        command = [sys.executable, "-m", "localist_hf_main", "evaluate", str(BASE), *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
            time.sleep(0.1 + 0.05 * number**2)
            process.send_signal(signal.SIGINT)
            _, printed = process.communicate(timeout=60)
        assert process.returncode == 130, (number, printed)
        assert re.search(rb"(^|\n)localist-hf( evaluate)?: interrupted\n$", printed), (number, printed)
        assert b"Traceback" not in printed, (number, printed)
        assert not folder.exists(), number


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.0])
def test_interrupted_with_its_processes(seconds: float, tmp_path: Path) -> None:
    """From a terminal, all of them are; while they import, each had a traceback of its own."""
    command = [
        sys.executable,
        "-m",
        "localist_hf_main",
        "family",
        "quick",
        "--output-dir",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "0 of 6 are there already, 6 are left\n"
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert printed.endswith("localist-hf family: interrupted\n") and "Traceback" not in printed


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    # Unbuffered, argparse passes over it by itself.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for arguments in (["--help"], ["export", "--help"]):
        command = [sys.executable, "-m", "localist_hf.cli.main", *arguments]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (1, "")
    os.close(writing)
