"""A Hub that keeps silent is told of at once, and asked for nothing where nothing of it is needed."""

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from localist_hf.cli.main import main
from localist_hf.hub import reachability
from localist_hf.hub.reachability import check_answers


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        monkeypatch.setattr(reachability, "is_offline_mode", lambda: False)
        # That nothing may reach the network holds in all other tests.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield endpoint
    reachability._ask.cache_clear()


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("evaluate org/model --output-dir out", 2, "`model` is 'org/model', which cannot be read: the Hub ("),
        ("train --model org/model --text-file text.txt", 2, "whose configuration cannot be used so: the Hub ("),
        ("family --model org/model", 2, "`model` is 'org/model', whose configuration cannot be used so: the Hub ("),
        ("export org/model out", 2, "the Hub ("),
        ("update org/model", 1, "the Hub ("),
        ("publish run --namespace me", 1, "the Hub ("),
    ],
)
def test_it_is_told_of_after_one_wait(command, status, words, silent_hub, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Some text. " * 100)
    with pytest.raises(SystemExit) as end:
        main(command.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line and silent_hub in line and "HF_HUB_OFFLINE=1" in line
    assert end.value.code == status


def test_what_is_local_or_offline_asks_nobody(silent_hub: str, tmp_path, monkeypatch) -> None:
    check_answers(str(tmp_path))
    with pytest.raises(TimeoutError, match=r"has not answered in 0\.1 s"):
        check_answers("org/model")
    monkeypatch.setattr(reachability, "is_offline_mode", lambda: True)
    check_answers("org/model")


def test_what_cannot_be_reached_may_be_in_the_cache(silent_hub: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 10)
    check_answers("org/model")
