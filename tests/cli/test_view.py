"""`localist-hf view`: what it saves, what it serves, and what it refuses."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import localist_hf_main
from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli import view
from localist_hf.cli.main import main
from localist_hf.experiments.python_text import part_of
from localist_hf.hub import RECORD_FILE, RunRecord
from localist_hf.hub.loading import load_config, load_model
from localist_hf.page import Passage, read, read_beside, saved_page


ROOT = Path(localist_hf_main.__file__).parent
TEXT = "Sentence number 12 says something. some more of the words here"


@pytest.fixture
def folders(
    tmp_path: Path, make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Two models with their tokenizer."""
    for seed, name in enumerate(("one", "two")):
        make_model(seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def data_of(file: Path) -> dict[str, Any]:
    (data,) = re.findall(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(data)["page"]


def test_the_saved_page_is_that_of_the_models(
    folders: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8-sig")  # the mark is no part of the text
    locality = {"num_sink_tokens": 2}
    flags = ["--compare", folders[1], "--locality", json.dumps(locality), "--save", str(file)]
    main(["view", folders[0], "--text-file", str(text), *flags])
    assert capsys.readouterr().out == f"Written: {file}, {file.stat().st_size / 1e6:.1f} MB\n"
    models = [load_model(folder, load_config(folder, locality)) for folder in folders]
    passage = Passage.of(tokenizer, TEXT)
    first = read(models[0], passage)
    assert file.read_text(encoding="utf-8") == saved_page([first, read_beside(first, models[1], passage)]).html
    assert [reading["name"] for reading in data_of(file)["readings"]] == ["one", "two"]

    main(["view", folders[0], "--text", TEXT, "--save", str(file)])
    (reading,) = data_of(file)["readings"]
    assert reading["numSinks"] == 0


def test_without_a_text_there_is_one(folders: list[str], tmp_path: Path) -> None:
    assert 300 < len(view.default_text()) <= 700
    assert part_of(f"reference/{view.DEFAULT_TOPIC}") == "held-out"
    main(["view", folders[0], "--save", str(tmp_path / "page.html"), "--text", view.default_text()[:40]])
    assert "".join(data_of(tmp_path / "page.html")["tokens"]) == view.default_text()[:40]


def test_a_folder_of_runs_is_to_choose_from(tmp_path: Path, folders: list[str]) -> None:
    assert view.models_of(folders[0]) == ([folders[0]], None)
    assert view.models_of("org/model") == (["org/model"], None)
    assert view.models_of(str(tmp_path)) == ([str(tmp_path)], None)  # nothing in it is a run
    (Path(folders[0]) / RECORD_FILE).write_text("{}", encoding="utf-8")
    assert view.models_of(str(tmp_path)) == ([str(tmp_path)], None)  # nor can it be read as one


def test_a_folder_of_runs_opens_on_the_most_local_beside_its_baseline(
    tmp_path: Path, make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    for folder, of in {"a": "base", "b": "distributed", "c": "localist", "d": "quintic"}.items():
        make_model(0, vocab_size=len(tokenizer)).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        RunRecord.load(ROOT / "model_cards" / of).save(tmp_path / folder)
    paths = [str(tmp_path / folder) for folder in "dbac"]
    assert view.models_of(str(tmp_path)) == (paths, paths[1])
    file = tmp_path / "page.html"
    for more, shown in (([], ["d", "b"]), (["--compare", paths[3]], ["d", "c"])):
        main(["view", str(tmp_path), "--text", TEXT, "--save", str(file), *more])
        assert [reading["name"] for reading in data_of(file)["readings"]] == shown


def test_without_a_model_the_base_is_read_with_a_dial_that_changes_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    main(["view", "--text", "def main() -> None:", "--save", str(file)])
    (reading,) = data_of(file)["readings"]
    assert reading["lambdas"][-1] == 1
    main(
        [
            "view",
            "--text",
            "def main() -> None:",
            "--save",
            str(file),
            "--locality",
            '{"locality_schedule": "localist"}',
        ]
    )
    (reading,) = data_of(file)["readings"]
    assert set(reading["lambdas"]) == {1}


def test_what_cannot_be_used_is_refused(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty.txt").write_text(" \n")
    save = ["--save", str(tmp_path / "page.html")]
    for arguments, message in (
        ([str(tmp_path / "none"), *save], "`model` is "),
        ([folders[0], "--compare", str(tmp_path / "none"), *save], "`compare` is "),
        ([folders[0], "--text", " ", *save], "`text` is empty; it must have at least one word."),
        ([folders[0], "--text", "caf\udce9", *save], "`text` is 'caf\\udce9'; it must be UTF-8 without zero bytes."),
        ([folders[0], "--text", TEXT * 30, *save], "tokens; the model has positions for 300."),
        ([folders[0], "--text-file", str(tmp_path / "none"), *save], "`text_file` is "),
        (
            [folders[0], "--text-file", str(tmp_path / "latin.txt"), *save],
            "latin.txt'; it must be UTF-8",
        ),
        (
            [folders[0], "--text-file", str(tmp_path / "empty.txt"), *save],
            "empty.txt'; the file is empty",
        ),
        ([folders[0], "--locality", '{"sinks": 1}', *save], "`locality` is "),
        ([folders[0], "--save", str(tmp_path / "none" / "page.html")], "`save` is "),
        ([folders[0], "--save", str(tmp_path / ("x" * 300))], "', which cannot be written: File name too long."),
        ([folders[0], "--save", str(tmp_path / "a\0b")], "a\\x00b'; it must be UTF-8 without zero bytes."),
        ([folders[0], "--save", str(tmp_path / ("x" * 300) / "a.html")], "`save` is '"),
        ([folders[0], "--save", str(tmp_path / "loop")], "loop', which is there and no page of ours"),
        ([folders[0], "--port", "70000"], "`port` is 70000; it must be in 1 to 65535."),
        ([folders[0], "--max-tokens", "0"], "`max_tokens` is 0; it must be at least 1."),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["view", *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2, arguments
        assert message in error
        assert "Traceback" not in error
        assert "Errno" not in error or "--text-file" in arguments
        assert not (tmp_path / "page.html").exists()
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["view", folders[0]])
    assert f"`gradio` is not installed, which the page needs: pip install '{view.GRADIO}'." in capsys.readouterr().err


def test_what_cannot_be_written_or_listened_on_is_found_before_the_model_is_loaded(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "load", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(view, "find_spec", lambda name: True)
    pytest.importorskip("starlette", reason="gradio, which brings it, is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, message in (
            (["--save", str(tmp_path / ("x" * 300))], "`save` is "),
            (["--save", str(tmp_path / "none" / "page.html")], "`save` is "),
            (["--host", "192.0.2.1"], "`host` is '192.0.2.1'; it must be an address of this machine"),
            (["--port", port], f"`port` is {port}; it must be one that is free"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["view", folders[0], *flags])
            (line,) = capsys.readouterr().err.splitlines()
            assert ended.value.code == 2
            assert line.startswith(f"localist-hf view: error: {message}")


def test_names_that_no_folder_can_have_are_those_of_models(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "x/" * 3000, "a\0b", str(tmp_path / "loop"), str(tmp_path / "loop" / "x")):
        assert view.models_of(name) == ([name], None)


def test_the_text_that_nobody_gave_fits_the_model(
    tmp_path: Path, make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(tokenizer(view.default_text())["input_ids"]) > 128
    make_model(0, vocab_size=len(tokenizer), n_positions=128).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    file = tmp_path / "page.html"
    main(["view", str(tmp_path / "short"), "--save", str(file)])
    tokens = data_of(file)["tokens"]
    assert 100 < len(tokens) <= 128
    assert view.default_text().startswith("".join(tokens))
    assert view.beginning("one two  three", tokenizer, 1000) == "one two  three"
    assert view.beginning("one two", tokenizer, 1) == "one"


@pytest.mark.slow
@pytest.mark.parametrize("is_at_work", [False, True])
def test_ctrl_c_ends_the_page_as_all_else(is_at_work: bool) -> None:
    """Also where a stream is open, and where threads are in the midst of an answer, at which torch would abort."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "localist_hf_main", "view", "--text", TEXT, "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    address = f"http://127.0.0.1:{port}"

    def ask_on(component: int, number: int) -> None:
        for turn in range(1000):  # one waits for the other: long enough for the server not to
            text = f"Sentence number {number}{turn:03} says something. " * 5
            about = {"text": text, "model": str(view.BASE), "compare": None, "reading": 0, "position": 30, "dial": 1.0}
            asked = {"data": about, "fn_name": "go_on", "component_id": component, "session_hash": "a"}
            request = urllib.request.Request(f"{address}/gradio_api/component_server", json.dumps(asked).encode())
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    told.append(json.load(response))
            except OSError:  # the server has gone
                return

    told: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert any("To create a public link" in line for line in process.stdout)
        with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/abc", timeout=60):
            if is_at_work:
                with urllib.request.urlopen(f"{address}/config") as response:
                    components = json.load(response)["components"]
                component = [each["id"] for each in components if each["type"] == "html"][-1]
                for number in range(12):
                    threading.Thread(target=ask_on, args=(component, number), daemon=True).start()
                while not told:
                    time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            start, printed = time.monotonic(), ""
            while "interrupted" not in printed:
                line = process.stderr.readline()
                assert line, printed
                printed += line
            seconds = time.monotonic() - start
            rest, more = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest == ""
    assert all("answer" in each for each in told)
    assert (printed + more).splitlines()[-1] == "localist-hf view: interrupted"
    assert seconds < 4
    assert "Traceback" not in printed and "ERROR" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "is_open"),
    [([], True), (["--host", "localhost"], True), (["--host", "0.0.0.0"], False), (["--share"], False)],
)
def test_the_page_is_served_on_this_machine_unless_told_otherwise(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], is_open: bool
) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **settings: launched.append((page, settings)))
    main(["view", folders[0], "--compare", folders[1], "--text", TEXT, "--max-tokens", "2", *flags])
    ((page, settings),) = launched
    (read,) = [function.fn for function in page.fns.values() if function.api_name == "read"]
    assert "this page takes 2 tokens" in read(TEXT, folders[0], "")["problem"]
    of_names = [] if "0.0.0.0" in flags else ["TrustedHostMiddleware"]
    middleware = [each.cls.__name__ for each in settings["app_kwargs"]["middleware"]]
    assert middleware == ["_BoundedRequests", "_OwnSite", *of_names]
    assert settings["server_name"] == (flags[1] if "--host" in flags else "127.0.0.1")
    assert settings["share"] == ("--share" in flags)
    for wrong in (None, ["a"], 1, True):  # as it comes, and not made a text of
        (told,) = [
            asyncio.run(page.process_api(function, [wrong, folders[0], ""]))["data"][0]
            for function in page.fns.values() if function.api_name == "read"
        ]  # fmt: skip
        assert told["problem"] == f"`text` is {json.dumps(wrong)}; it must be a text."
    told = read(TEXT, folders[0], str(tmp_path))
    assert ("this page has" in told["problem"]) is not is_open
    dropdowns = [block for block in page.blocks.values() if isinstance(block, gradio.Dropdown)]
    assert [dropdown.value for dropdown in dropdowns] == folders
    for dropdown in dropdowns:  # strangers choose among what is there
        assert dropdown.allow_custom_value == is_open
        assert {value for _, value in dropdown.choices} - {""} == set(folders)
