# SPDX-License-Identifier: Apache-2.0
"""The test hub, driven by the real ``huggingface_hub`` client."""

from __future__ import annotations

import base64
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save_file


TOKEN, OTHER_TOKEN = "hf_test_token", "hf_other_test_token"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CARD = "---\nlicense: apache-2.0\ntags:\n- localist\nbase_model: org/base\n---\n\n# A model\n"


pytestmark = pytest.mark.usefixtures("plain_client")


@pytest.fixture
def model(api: HfApi) -> str:
    """An empty model repository."""
    return api.create_repo("org/model").repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a publisher uploads: weights, a picture, texts and a card."""
    path = tmp_path / "folder"
    (path / "docs").mkdir(parents=True)
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.int64)}
    save_file(weights, path / "model.safetensors")
    (path / "docs" / "plot 1.png").write_bytes(PNG)
    (path / "docs" / "notes.txt").write_text("Grüße\n", encoding="utf-8")
    (path / "empty.txt").touch()
    (path / "README.md").write_text(CARD)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def uploaded(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = hub.repo("org/model").files(revision)
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def calls(hub: HubServer, method: str, part: str) -> int:
    return sum(request.method == method and part in request.path for request in hub.requests)


def run(hub: HubServer, home: Path, code: str, token: str | None = TOKEN, **env: str) -> str:
    """Run Python in a subprocess that knows the test hub only through its environment."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=hub.env(home, token) | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Accounts and repositories


def test_whoami(hub: HubServer, api: HfApi) -> None:
    me = api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("alice", ["org"])
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as refused:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    assert refused.value.response.status_code == 401
    assert hub.requests[-1] == ("GET", "/api/whoami-v2", 401)


def test_create_and_delete_repo(hub: HubServer, api: HfApi) -> None:
    url = api.create_repo("org/model", private=True)
    assert (url, url.repo_id, url.repo_type) == (f"{hub.endpoint}/org/model", "org/model", "model")
    assert hub.repo("org/model").private
    assert [commit.title for commit in hub.repo("org/model").commits] == ["initial commit"]
    with pytest.raises(HfHubHTTPError, match="already created this model repo") as conflict:
        api.create_repo("org/model")
    assert conflict.value.response.status_code == 409
    assert api.create_repo("org/model", exist_ok=True) == url
    assert hub.repo("org/model").private, "exist_ok must not change an existing repository"
    # Each type of repository has its own names.
    assert api.create_repo("org/model", repo_type="dataset").repo_type == "dataset"
    assert api.create_repo("org/model", repo_type="space", space_sdk="static") == f"{hub.endpoint}/spaces/org/model"
    assert api.create_repo("mine").repo_id == "alice/mine"
    api.update_repo_settings("org/model", visibility="public")
    assert not hub.repo("org/model").private
    api.delete_repo("org/model")
    assert not api.repo_exists("org/model")
    assert api.repo_exists("org/model", repo_type="dataset")
    assert api.space_info("org/model").sdk == "static"


def test_missing_namespace(api: HfApi) -> None:
    for exist_ok in (False, True):
        with pytest.raises(HfHubHTTPError, match="don't have the rights") as refused:
            api.create_repo("nobody/model", exist_ok=exist_ok)
        assert refused.value.response.status_code == 403


def test_error_classes(hub: HubServer, api: HfApi, model: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(model, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(model, "none.txt", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):  # what a create_commit without create_repo gets
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/none")
    with pytest.raises(HfHubHTTPError, match="Discussions are disabled"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=model, create_pr=True)
    bob = HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        bob.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=model)
    wrong = HfApi(endpoint=hub.endpoint, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        wrong.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=model)
    assert not isinstance(refused.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="does not cover") as uncovered:
        api.get_repo_discussions(model).__next__()
    assert uncovered.value.response.status_code == 501
    assert len(hub.repo(model).commits) == 1


def test_private_repo(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("org/model", private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="org/model")
    for token, status in ((False, 401), (OTHER_TOKEN, 404)):
        stranger = HfApi(endpoint=hub.endpoint, token=token)
        for refused in (
            lambda api=stranger: api.model_info("org/model"),
            lambda api=stranger: api.hf_hub_download("org/model", "a.txt", cache_dir=tmp_path / "stranger"),
            lambda api=stranger: api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="org/model"),
        ):
            with pytest.raises(RepositoryNotFoundError) as error:
                refused()
            assert error.value.response.status_code == status
        assert list(stranger.list_models(author="org")) == []
    assert Path(api.hf_hub_download("org/model", "a.txt", cache_dir=tmp_path / "alice")).read_bytes() == b"secret"


# Uploads and downloads


def test_upload_folder_is_one_commit(hub: HubServer, api: HfApi, model: str, folder: Path, tmp_path: Path) -> None:
    done = api.upload_folder(repo_id=model, folder_path=folder, commit_message="Publish", commit_description="Why")
    repo = hub.repo(model)
    assert done.oid == repo.head and done.commit_url == f"{hub.endpoint}/{model}/commit/{repo.head}"
    assert [(c.title, c.description, c.author) for c in repo.commits[1:]] == [("Publish", "Why", "alice")]
    assert uploaded(hub) == content(folder)
    large = {path for path, blob in repo.commits[-1].files.items() if blob.lfs}
    assert large == {"model.safetensors", "docs/plot 1.png"}
    for path, data in content(folder).items():
        local = Path(api.hf_hub_download(model, path, cache_dir=tmp_path / "cache"))
        assert local.read_bytes() == data
        assert local.resolve().name == repo.commits[-1].files[path].oid, "the cache names a blob by its ETag"
    assert api.get_safetensors_metadata(model).parameter_count == {"F32": 6, "I64": 3}


def test_snapshots_and_offline_cache(hub: HubServer, api: HfApi, model: str, folder: Path, tmp_path: Path) -> None:
    first = api.upload_folder(repo_id=model, folder_path=folder).oid
    before = content(folder)
    (folder / "docs" / "notes.txt").write_text("Second\n")
    (folder / "empty.txt").unlink()
    second = api.upload_folder(repo_id=model, folder_path=folder, delete_patterns="empty.txt").oid
    assert uploaded(hub, first) == before and uploaded(hub) == content(folder)
    home = tmp_path / "home"
    code = "from huggingface_hub import snapshot_download as s; print(s('org/model'), s('org/model', revision={!r}))"
    code = code.format(first)
    new, old = map(Path, run(hub, home, code).split())
    assert (old.name, new.name) == (first, second)
    for snapshot, expected in ((old, before), (new, content(folder))):
        (snapshot / ".gitattributes").unlink()
        assert content(snapshot) == expected
        (snapshot / ".gitattributes").touch()
    seen = len(hub.requests)
    assert run(hub, home, code, HF_HUB_OFFLINE="1").split() == [str(new), str(old)]
    assert len(hub.requests) == seen


def test_identical_upload_makes_no_commit(hub: HubServer, api: HfApi, model: str, folder: Path) -> None:
    first = api.upload_folder(repo_id=model, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=model, folder_path=folder).oid == first.oid
    assert calls(hub, "POST", "/commit/") == calls(hub, "PUT", "/lfs-upload/") == 0
    (folder / "empty.txt").write_text("no longer")
    second = api.upload_folder(repo_id=model, folder_path=folder)
    assert hub.repo(model).commits[-1].parent == first.oid and second.oid == hub.repo(model).head
    assert calls(hub, "PUT", "/lfs-upload/") == 0, "large files that the Hub has are not sent again"
    assert uploaded(hub) == content(folder)


def test_deletions(hub: HubServer, api: HfApi, model: str, folder: Path) -> None:
    api.upload_folder(repo_id=model, folder_path=folder)
    api.create_commit(
        model,
        [
            CommitOperationDelete("docs/"),
            CommitOperationDelete("empty.txt"),
            CommitOperationAdd("docs/new.txt", b"new"),
        ],
        commit_message="Tidy up",
    )
    assert set(uploaded(hub)) == {"README.md", "model.safetensors", "docs/new.txt"}
    head = hub.repo(model).head
    for missing in ("none.txt", "none/"):
        with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
            api.create_commit(
                model, [CommitOperationAdd("x.txt", b"x"), CommitOperationDelete(missing)], commit_message="x"
            )
    assert hub.repo(model).head == head


def test_stale_parent(hub: HubServer, api: HfApi, model: str) -> None:
    start = hub.repo(model).head
    add = {"path_in_repo": "a.txt", "repo_id": model, "parent_commit": start}
    api.upload_file(path_or_fileobj=b"1", **add)
    head = hub.repo(model).head
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as stale:
        api.upload_file(path_or_fileobj=b"2", **add)
    assert stale.value.response.status_code == 412
    assert hub.repo(model).head == head


def test_bad_card_is_refused_before_any_upload(hub: HubServer, api: HfApi, model: str, folder: Path) -> None:
    for bad in ("---\nlicense: [\n---\n", "---\ntags: {a: b}\n---\n", "---\njust text\n---\n"):
        (folder / "README.md").write_text(bad)
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            api.upload_folder(repo_id=model, folder_path=folder)
    assert calls(hub, "POST", "preupload") == 0
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id=model)


def test_gitignore_and_size(hub: HubServer, api: HfApi, model: str) -> None:
    big = b"text " * 2_200_000
    files = {".gitignore": b"*.log\ntmp/\n", "a.log": b"x", "tmp/b.txt": b"x", "big.txt": big, "c.txt": b"x"}
    api.create_commit(model, [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="x")
    assert set(uploaded(hub)) == {".gitignore", "big.txt", "c.txt"}
    assert hub.repo(model).commits[-1].files["big.txt"].lfs


def test_large_file_storage_checks(hub: HubServer, api: HfApi, model: str) -> None:
    ours = {"Authorization": f"Bearer {TOKEN}"}
    oid = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # the SHA-256 of b"test"
    batch = f"{hub.endpoint}/{model}.git/info/lfs/objects/batch"
    wish = {"operation": "upload", "objects": [{"oid": oid, "size": 4}]}
    assert httpx2.post(batch, json=wish).status_code == 401
    actions = httpx2.post(batch, json=wish, headers=ours).json()["objects"][0]["actions"]
    upload = actions["upload"]["href"]
    line = b'{"key":"header","value":{"summary":"x"}}\n{"key":"lfsFile","value":{"path":"a.bin","oid":"%s"}}'
    commit = {"url": f"{hub.endpoint}/api/models/{model}/commit/main", "content": line % oid.encode(), "headers": ours}
    assert httpx2.put(upload, content=b"tesT").status_code == 400
    assert httpx2.put(upload, content=b"test+").status_code == 400
    assert httpx2.put(upload.partition("?")[0], content=b"test").status_code == 403
    assert httpx2.post(actions["verify"]["href"], json=wish["objects"][0], headers=ours).status_code == 404
    assert httpx2.post(**commit).status_code == 400
    assert httpx2.put(upload, content=b"test").status_code == 200
    assert httpx2.post(actions["verify"]["href"], json=wish["objects"][0], headers=ours).status_code == 200
    assert "actions" not in httpx2.post(batch, json=wish, headers=ours).json()["objects"][0]
    assert httpx2.post(**commit).status_code == 200
    assert uploaded(hub) == {"a.bin": b"test"}


def test_malformed_commits_change_nothing(hub: HubServer, api: HfApi, model: str) -> None:
    url, ours = f"{hub.endpoint}/api/models/{model}/commit/main", {"Authorization": f"Bearer {TOKEN}"}
    header = b'{"key":"header","value":{"summary":"x"}}\n{"key":"file","value":{"path":"ok.txt","content":""}}\n'
    for line in (
        b'{"key":"file","value":{"path":"../a","content":""}}',
        b'{"key":"file","value":{"path":"a","content":"!"}}',
        b'{"key":"file","value":{"path":"ok.txt/b","content":""}}',
        b"not json",
    ):
        assert httpx2.post(url, content=header + line, headers=ours).status_code == 400
    assert httpx2.post(url, content=header).status_code == 401
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=model, revision="none")
    assert len(hub.repo(model).commits) == 1


def test_ranges(hub: HubServer, api: HfApi, model: str) -> None:
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a.txt", repo_id=model)
    url = f"{hub.endpoint}/{model}/resolve/main/a.txt"
    for wanted, expected in (("0-3", b"0123"), ("4-", b"456789"), ("-2", b"89"), ("8-99", b"89")):
        reply = httpx2.get(url, headers={"Range": f"bytes={wanted}"})
        assert (reply.status_code, reply.content) == (206, expected)
    assert httpx2.get(url, headers={"Range": "bytes=10-"}).status_code == 416
    head = httpx2.head(url)
    assert (head.headers["Content-Length"], head.headers["X-Repo-Commit"]) == ("10", hub.repo(model).head)


def test_parallel_commits_are_all_kept(hub: HubServer, api: HfApi, model: str) -> None:
    def publish(number: int) -> None:
        api.upload_file(path_or_fileobj=bytes(number + 1), path_in_repo=f"{number}.bin", repo_id=model)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(16)))
    assert uploaded(hub) == {f"{number}.bin": bytes(number + 1) for number in range(16)}
    commits = hub.repo(model).commits
    assert len(commits) == 17
    assert [commit.parent for commit in commits[1:]] == [commit.oid for commit in commits[:-1]]


# Reading


def test_listings(hub: HubServer, api: HfApi, model: str, folder: Path) -> None:
    sha = api.upload_folder(repo_id=model, folder_path=folder, commit_message="Publish").oid
    api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=model, commit_message="More")
    files = {*content(folder), ".gitattributes"}
    assert set(api.list_repo_files(model, revision=sha)) == files
    top = {entry.path: entry for entry in api.list_repo_tree(model, expand=True)}
    assert set(top) == {".gitattributes", "README.md", "docs", "empty.txt", "model.safetensors", "new.txt"}
    assert (top["docs"].last_commit.title, top["new.txt"].last_commit.title) == ("Publish", "More")
    assert top["model.safetensors"].lfs.size == (folder / "model.safetensors").stat().st_size
    assert {entry.path for entry in api.list_repo_tree(model, "docs")} == {"docs/notes.txt", "docs/plot 1.png"}
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(model, "none"))
    assert [entry.path for entry in api.get_paths_info(model, ["docs", "none", "README.md"])] == ["docs", "README.md"]
    info = api.model_info(model, revision=sha, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private) == (model, "org", sha, False)
    assert {"localist", "license:apache-2.0", "base_model:org/base"} == set(info.tags)
    assert info.card_data.license == "apache-2.0" and info.created_at <= info.last_modified
    assert {file.rfilename: file.size for file in info.siblings if file.rfilename != ".gitattributes"} == {
        path: len(data) for path, data in content(folder).items()
    }
    assert api.model_info(model, expand=["tags"]).tags == info.tags
    assert [commit.title for commit in api.list_repo_commits(model)] == ["More", "Publish", "initial commit"]
    assert [found.id for found in api.list_models(author="org")] == [model]
    assert list(api.list_models(author="alice")) == []
    assert api.file_exists(model, "new.txt") and not api.file_exists(model, "new.txt", revision=sha)


def test_refs(hub: HubServer, api: HfApi, model: str) -> None:
    first = hub.repo(model).head
    api.create_tag(model, tag="v1")
    api.create_branch(model, branch="side/work")
    api.create_branch(model, branch="side/work", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag(model, tag="v1")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=model, revision="side/work")
    refs = api.list_repo_refs(model)
    assert {ref.name: ref.target_commit == first for ref in refs.branches} == {"main": True, "side/work": False}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", first)]
    assert api.model_info(model, revision="v1").sha == hub.repo(model).head == first
    assert "x.txt" in hub.repo(model).files("side/work")


# Failures


def test_failed_commit_leaves_the_branch_alone(hub: HubServer, api: HfApi, model: str, folder: Path) -> None:
    head = hub.repo(model).head
    hub.fail(method="POST", path=r"/commit/main$", status=500)
    with pytest.raises(HfHubHTTPError, match="Internal Error"):  # the client does not retry a commit
        api.upload_folder(repo_id=model, folder_path=folder)
    assert hub.repo(model).head == head and calls(hub, "POST", "/commit/main") == 1
    hub.requests.clear()
    api.upload_folder(repo_id=model, folder_path=folder)
    assert uploaded(hub) == content(folder)
    assert calls(hub, "PUT", "/lfs-upload/") == 0, "the first run's large files are still there"


@pytest.mark.parametrize("fault", [{"status": 500}, {"drop": True}])
def test_broken_large_file_upload(
    hub: HubServer, api: HfApi, model: str, folder: Path, no_backoff: None, fault: dict
) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    head = hub.repo(model).head
    hub.fail(method="PUT", path=r"/lfs-upload/", times=12, **fault)  # two files, six attempts each
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id=model, folder_path=folder)
    assert hub.repo(model).head == head and not hub.repo(model).lfs
    api.upload_folder(repo_id=model, folder_path=folder)
    assert uploaded(hub) == content(folder)


def test_one_dropped_upload_is_retried(hub: HubServer, api: HfApi, model: str, no_backoff: None) -> None:
    hub.fail(method="PUT", path=r"/lfs-upload/", drop=True)
    api.upload_file(path_or_fileobj=bytes(5_000_000), path_in_repo="a.bin", repo_id=model)
    assert [r.status for r in hub.requests if r.method == "PUT"] == [None, 200]
    assert uploaded(hub) == {"a.bin": bytes(5_000_000)}


@pytest.mark.parametrize("fault, kept", [({"drop": True}, False), ({"lose_reply": True}, True)])
def test_connection_lost_in_a_commit(hub: HubServer, api: HfApi, model: str, fault: dict, kept: bool) -> None:
    """A commit whose answer is lost may have happened; a rerun ends in the same state either way."""
    hub.fail(method="POST", path=r"/commit/main$", **fault)
    add = {"path_or_fileobj": b"x" * 100_000, "path_in_repo": "a.txt", "repo_id": model}
    with pytest.raises(httpx2.TransportError):
        api.upload_file(**add)
    assert len(hub.repo(model).commits) == (2 if kept else 1)
    assert api.upload_file(**add).oid == hub.repo(model).head
    assert len(hub.repo(model).commits) == 2 and uploaded(hub) == {"a.txt": b"x" * 100_000}


def test_dropped_download_is_resumed(hub: HubServer, api: HfApi, model: str, tmp_path: Path) -> None:
    api.upload_file(path_or_fileobj=bytes(1_000_000), path_in_repo="a.bin", repo_id=model)
    hub.fail(method="GET", path=r"/resolve/main/a\.bin$", drop=True)
    local = api.hf_hub_download(model, "a.bin", cache_dir=tmp_path)
    assert Path(local).read_bytes() == bytes(1_000_000)
    assert next(r.status for r in hub.requests if r.method == "GET") is None


def test_stopped_server(tmp_path: Path, no_backoff: None) -> None:
    with HubServer(users={TOKEN: {"name": "alice"}}) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo("alice/model")
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download("alice/model", "a.txt", cache_dir=tmp_path)


# Collections


def test_collections(hub: HubServer, api: HfApi, model: str) -> None:
    created = api.create_collection("My Models", namespace="org", description="All of them")
    assert created.slug.startswith("org/my-models-") and created.items == []
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_collection("My Models", namespace="org")
    assert api.create_collection("My Models", namespace="org", exists_ok=True).slug == created.slug
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_collection("My Models", namespace="nobody")
    filled = api.add_collection_item(created.slug, model, "model", note="The first")
    assert [(item.item_id, item.item_type, item.note) for item in filled.items] == [(model, "model", "The first")]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(created.slug, model, "model")
    again = api.add_collection_item(created.slug, model, "model", exists_ok=True)
    assert [item.item_id for item in again.items] == [model]
    with pytest.raises(RepositoryNotFoundError):
        api.add_collection_item(created.slug, "org/none", "model")
    assert [found.slug for found in api.list_collections(owner="org")] == [created.slug]
    assert [found.slug for found in api.list_collections(item=f"models/{model}")] == [created.slug]
    assert list(api.list_collections(owner="alice")) == []
    renamed = api.update_collection_metadata(created.slug, title="Our Models", private=True)
    assert renamed.slug.startswith("org/our-models-") and api.get_collection(created.slug).title == "Our Models"
    bob = HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN)
    with pytest.raises(HfHubHTTPError, match="404"):
        bob.get_collection(renamed.slug)
    api.delete_collection_item(renamed.slug, again.items[0].item_object_id)
    api.delete_collection_item(renamed.slug, again.items[0].item_object_id, missing_ok=True)
    assert api.get_collection(renamed.slug).items == []


# The client as users have it: in its own process, with HF_ENDPOINT


def test_cards_in_a_subprocess(hub: HubServer, tmp_path: Path) -> None:
    code = """
from huggingface_hub import ModelCard, create_repo, hf_hub_download, model_info
create_repo("org/model", private=True)
card = ModelCard("---\\nlicense: mit\\ntags:\\n- localist\\n---\\n# Hello\\n")
card.push_to_hub("org/model", commit_message="Card")
loaded = ModelCard.load("org/model")
assert loaded.data.license == "mit" and loaded.text.strip() == "# Hello", loaded
assert model_info("org/model").card_data.tags == ["localist"]
print(hf_hub_download("org/model", "README.md"))
try:
    ModelCard("---\\nlicense: [\\n---\\n").validate()
except Exception as error:
    print(type(error).__name__)
"""
    home = tmp_path / "home"
    path, error = run(hub, home, code).split()
    assert Path(path).is_relative_to(home) and Path(path).read_bytes() == uploaded(hub)["README.md"]
    assert error in ("ValueError", "ScannerError", "ParserError")
    assert hub.repo("org/model").commits[-1].title == "Card"


@pytest.mark.slow
def test_transformers_in_a_subprocess(hub: HubServer, tmp_path: Path) -> None:
    code = """
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
model = GPT2LMHeadModel(config).eval()
model.push_to_hub("org/model")
again = AutoModelForCausalLM.from_pretrained("org/model").eval()
ids = torch.tensor([[1, 2, 3]])
assert torch.equal(model(ids).logits, again(ids).logits)
"""
    run(hub, tmp_path / "home", code)
    assert {"config.json", "model.safetensors"} <= uploaded(hub).keys()
    assert len(hub.repo("org/model").commits) == 2
    assert not [request for request in hub.requests if request.status == 501], "transformers needs an endpoint more"
