"""A Hub that refuses or breaks."""

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from published import MODEL, change_weights, files_of, repositories, titles

from localist_hf.hub import PublishError, publish


def test_no_token_a_wrong_token_and_a_namespace_of_others(
    hub: HubServer, api: HfApi, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(PublishError, match=r"no access token; log in with `hf auth login`, or set `HF_TOKEN`"):
        publish(runs, "org", api=HfApi(endpoint=hub.endpoint), report=str)
    with pytest.raises(PublishError, match=r"the access token is not accepted"):
        publish(runs, "org", api=HfApi(endpoint=hub.endpoint, token="hf_wrong"), report=str)
    with pytest.raises(PublishError, match=r"`namespace` is 'nobody'; .* may publish under 'alice', 'org'"):
        publish(runs, "nobody", api=api, report=str)
    assert repositories(hub) == set()


def test_a_name_that_another_type_of_repository_has(hub: HubServer, api: HfApi, runs: Path) -> None:
    hub.fail(method="POST", path="/api/repos/create", status=409)
    with pytest.raises(PublishError, match="the name is taken by a repository of another type"):
        publish(runs / "quintic", "org", api=api, report=str)
    publish(runs / "quintic", "org", api=api, report=str)
    assert set(files_of(hub, "quintic")) == MODEL


FAULTS = {
    "the commit fails": {"method": "POST", "path": r"quintic/commit/main$"},
    "the connection is cut in the commit": {"method": "POST", "path": r"quintic/commit/main$", "drop": True},
    # These the client tries again five times before it gives up.
    "the preupload fails": {"method": "POST", "path": "quintic/preupload/main$", "times": 6},
    "the storage fails": {"method": "PUT", "path": "lfs", "times": 6},
    "the storage is cut": {"method": "PUT", "path": "lfs", "drop": True, "times": 6},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("no_backoff")
def test_a_failure_leaves_the_former_commit_and_a_rerun_completes(
    hub: HubServer, api: HfApi, runs: Path, fault: dict[str, str | int]
) -> None:
    publish(runs, "org", api=api, report=str)
    former = files_of(hub, "quintic")
    change_weights(runs / "quintic")
    hub.fail(**fault)
    with pytest.raises(PublishError, match="the same call made again does what is left to do"):
        publish(runs / "quintic", "org", api=api, report=str)
    assert files_of(hub, "quintic") == former
    publish(runs / "quintic", "org", api=api, report=str)
    assert set(files_of(hub, "quintic")) == MODEL
    assert b"123.45" in files_of(hub, "quintic")["README.md"]
    assert len(titles(hub, "quintic")) == 3


def test_a_first_publication_that_fails_leaves_an_empty_repository(hub: HubServer, api: HfApi, runs: Path) -> None:
    hub.fail(method="POST", path=r"/commit/main$", status=500)
    with pytest.raises(PublishError, match="failed with status 500"):
        publish(runs / "quintic", "org", api=api, report=str)
    assert files_of(hub, "quintic") == {}
    publish(runs / "quintic", "org", api=api, report=str)
    assert set(files_of(hub, "quintic")) == MODEL


def test_a_lost_answer_is_no_second_commit(hub: HubServer, api: HfApi, runs: Path) -> None:
    hub.fail(method="POST", path=r"/commit/main$", lose_reply=True)
    with pytest.raises(PublishError, match="cannot be reached"):
        publish(runs / "quintic", "org", api=api, report=str)
    said: list[str] = []
    publish(runs / "quintic", "org", api=api, report=said.append)
    assert said[0] == f"{hub.endpoint}/org/localist-gpt2-quintic: unchanged"
    assert len(titles(hub, "quintic")) == 2
