"""The Space beside published models: its files, the commits that it reads, and what is refused before any upload."""

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, SpaceCard
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.publish import show
from localist_hf.evaluation.check_model import core_model
from localist_hf.hub import PublishError, RunRecord, prepare, publish
from localist_hf.hub import space as module
from localist_hf.hub.loading import load
from localist_hf.hub.space import GRADIO_VERSION, SPACE_TAG, package_files


TOKEN = "hf_test_token"
ROOT = Path(__file__).parents[2]
PACKAGE = {path: file.read_bytes() for path, file in package_files().items()}
SPACE = "org/localist-gpt2"
MODELS = [f"org/localist-gpt2-{name}" for name in ("quintic", "quintic-lora", "base")]


@pytest.fixture
def runs(family: Path, tmp_path: Path) -> Path:
    """A few runs of the family, to be changed at will."""
    for name in ("base", "quintic", "quintic-lora"):
        shutil.copytree(family / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def client(environment: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `HF_ENDPOINT` and `HF_HOME` say to a process that starts with them, to all libraries."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def files_of(hub: HubServer, space: str = SPACE, revision: str = "main") -> dict[str, bytes]:
    files = hub.repo(space, "space").files(revision)
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def constants(app: bytes) -> dict[str, object]:
    """The values that app.py sets, without running the rest of it."""
    found: dict[str, object] = {}
    exec(re.search(r"^MODELS = .*?^}\n", app.decode(), re.MULTILINE | re.DOTALL)[0], found)
    return {name: found[name] for name in ("MODELS", "REVISIONS")}


def folder_of(repo_id: str, runs: Path) -> Path:
    """The run that was published as this."""
    return next(path for path in runs.iterdir() if RunRecord.load(path).repository_id("org") == repo_id)


def spoil(api: HfApi, models: list[str]) -> None:
    """Another commit on top of each model, with which nothing can be loaded."""
    for repo_id in models:
        for name in ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
            api.upload_file(path_or_fileobj=b"{", path_in_repo=name, repo_id=repo_id)


# What is made


def test_the_page_is_one_commit_beside_the_models(hub: HubServer, api: HfApi, runs: Path) -> None:
    said: list[str] = []
    commits = publish(runs, "org", collection="Localist", space=SPACE, api=api, report=said.append)
    repository = hub.repo(SPACE, "space")
    assert [commit.title for commit in repository.commits][1:] == ["Publish with localist-hf"]
    assert (repository.sdk, repository.private, commits[-1].oid) == ("gradio", False, repository.head)
    files = files_of(hub)
    assert set(files) == {"README.md", "app.py", "requirements.txt", *PACKAGE}
    assert files | PACKAGE == files
    # The models at the commits that they were given just now.
    heads = {repo_id: hub.repo(repo_id).head for repo_id in MODELS}
    shown = constants(files["app.py"])
    assert shown["REVISIONS"] == heads
    assert sorted(shown["MODELS"]) == sorted(MODELS)
    assert shown["MODELS"][1] == MODELS[2]  # beside one of the others: the base that both started from
    assert f"{hub.endpoint}/spaces/{SPACE}: commit {repository.head[:12]}" in said
    assert said[-1].endswith(": 3 models and the Space")
    (found,) = api.list_collections(owner="org")
    assert [(item.item_type, item.item_id) for item in api.get_collection(found.slug).items][-1] == ("space", SPACE)


def test_its_card_says_what_the_hub_must_know(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs, "org", space=SPACE, api=api, report=str)
    card = SpaceCard(files_of(hub)["README.md"].decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert card.data.to_dict() == {
        "title": "Where a language model looks",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "suggested_hardware": "cpu-basic",
        "license": project["license"].lower(),
        "models": constants(files_of(hub)["app.py"])["MODELS"],
        "tags": [SPACE_TAG, "localist", "interpretability", "attention", "arxiv:2511.18375"],
    }
    for repo_id in MODELS:
        assert f"https://huggingface.co/{repo_id}/tree/{hub.repo(repo_id).head}" in card.text
    # The Gradio that the page is tried with, and that the extra allows.
    assert f"gradio=={GRADIO_VERSION}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (extra,) = project["optional-dependencies"]["view"]
    lowest, above = re.fullmatch(r"gradio>=([\d.]+),<(\d+)", extra).groups()
    assert tuple(map(int, lowest.split("."))) <= tuple(map(int, GRADIO_VERSION.split("."))) < (int(above),)


def test_it_has_the_package_as_it_runs_but_for_the_base_and_what_lies_about(tmp_path: Path) -> None:
    package = tmp_path / "localist_hf"
    shutil.copytree(ROOT / "localist_hf", package, ignore=shutil.ignore_patterns("__pycache__"))
    copied = {path.relative_to(tmp_path).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(PACKAGE) == {path for path in copied if not path.startswith("localist_hf/base/")}
    for name in (".env", "notes.txt", "hub/.#space.py", "hub/__pycache__/space.cpython-311.pyc", "runs/quintic/x.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("secret")
    assert set(package_files(package)) == set(PACKAGE)
    (package / "version.py").write_text(f"# {package.resolve()}")
    with pytest.raises(ValueError, match=r"localist_hf/version\.py of .* names the package's folder"):
        package_files(package)


def test_every_requirement_of_the_library_is_pinned(
    hub: HubServer, api: HfApi, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(runs, "org", space=SPACE, api=api, report=str)
    lines = [line for line in files_of(hub)["requirements.txt"].decode().splitlines() if not line.startswith("#")]
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]]
    assert [line.partition("==")[0] for line in lines[1:]] == needed
    assert f"torch=={torch.__version__.partition('+')[0]}+cpu" in lines

    versions = {"torch": "2.13.0+cu130", "transformers": "5.24.0.dev0"}
    monkeypatch.setattr(module, "version", lambda name: versions.get(name, "1.0"))
    with pytest.raises(ValueError, match=r"`transformers` is 5\.24\.0\.dev0 here, which no package index has"):
        prepare(runs, "org", space=SPACE)
    versions["transformers"] = "5.24.0"
    requirements = prepare(runs, "org", space=SPACE).space.requirements.decode()
    assert "transformers==5.24.0\n" in requirements
    assert "torch==2.13.0+cpu\n" in requirements

    def requires(name: str) -> list[str]:
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "requires", requires)
    with pytest.raises(ValueError, match="is not installed here: install it with pip"):
        prepare(runs, "org", space=SPACE)


def test_the_cards_link_to_it(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs, "org", space=SPACE, api=api, report=str)
    for repo_id in MODELS:
        card = ModelCard(hub.repo(repo_id).files()["README.md"].decode())
        assert f"[Read it in your browser](https://huggingface.co/spaces/{SPACE})" in card.text
    publish(runs / "base", "org", name="alone", api=api, report=str)
    assert b"/spaces/" not in hub.repo("org/localist-gpt2-alone").files()["README.md"]


def test_publishing_again_changes_nothing_or_follows_the_models(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs, "org", space=SPACE, api=api, report=str)
    first = hub.repo(SPACE, "space").head
    said: list[str] = []
    publish(runs, "org", space=SPACE, api=api, report=said.append)
    assert said[-1] == f"{hub.endpoint}/spaces/{SPACE}: unchanged"
    assert hub.repo(SPACE, "space").head == first

    theirs, earlier = (
        ["notes.txt", "localist_hf/notes.txt"],
        ["localist_hf/hub/own_wheel.py", "localist_hf-0.2-any.whl"],
    )
    for name in theirs + earlier:
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=SPACE, repo_type="space")
    record = json.loads((runs / "quintic/run.json").read_text())
    record["metrics"]["perplexity"] = 123.45
    (runs / "quintic/run.json").write_text(json.dumps(record))
    before = constants(files_of(hub)["app.py"])["REVISIONS"]
    publish(runs, "org", space=SPACE, api=api, report=str)
    repository = hub.repo(SPACE, "space")
    assert len(repository.commits) == 7  # the Hub's own, the first, the four files, and one more
    # What an earlier version had is gone, and what people put there is not.
    assert set(files_of(hub)) == {"README.md", "app.py", "requirements.txt", *PACKAGE, *theirs}
    after = constants(files_of(hub)["app.py"])["REVISIONS"]
    assert after == {repo_id: hub.repo(repo_id).head for repo_id in MODELS}
    assert after[MODELS[0]] != before[MODELS[0]]


def test_what_people_wrote_into_its_card_is_kept_and_what_they_changed_is_not_overwritten(
    hub: HubServer, api: HfApi, runs: Path
) -> None:
    publish(runs, "org", space=SPACE, api=api, report=str)
    card = hub.repo(SPACE, "space").files()["README.md"].decode()
    begin = "is made anew. -->\n"
    assert card.count(begin) == 1
    there = card.replace(begin, f"{begin}\nMy words.\n")
    api.upload_file(path_or_fileobj=there.encode(), path_in_repo="README.md", repo_id=SPACE, repo_type="space")
    api.delete_file("app.py", repo_id=SPACE, repo_type="space")
    publish(runs, "org", space=SPACE, api=api, report=str)
    files = hub.repo(SPACE, "space").files()
    assert files["README.md"].decode() == there
    assert "app.py" in files
    there = card.replace("sdk: gradio", "sdk: gradio\npinned: true")
    api.upload_file(path_or_fileobj=there.encode(), path_in_repo="README.md", repo_id=SPACE, repo_type="space")
    head = hub.repo(SPACE, "space").head
    with pytest.raises(ValueError, match=f"README.md of the Space {SPACE} is not as this version"):
        publish(runs, "org", space=SPACE, api=api, report=str)
    assert hub.repo(SPACE, "space").head == head


def test_nothing_of_this_machine_is_uploaded(hub: HubServer, api: HfApi, runs: Path) -> None:
    (runs / "quintic/.env").write_text("secret")
    publish(runs, "org", space=SPACE, api=api, report=str)
    files = files_of(hub)
    assert not [name for name in files if name.endswith((".bin", ".env", ".pyc"))]
    for name, content in files.items():
        for secret in (str(runs.parent), str(ROOT), f"{Path.home()}/", TOKEN):
            assert secret.encode() not in content, name


@pytest.mark.usefixtures("client")
def test_everything_is_loaded_at_its_commit(hub: HubServer, api: HfApi, runs: Path, llama_runs: Path) -> None:
    """Plain and localist GPT-2, any other architecture, and adapters on a base that was published with them."""
    shutil.copytree(llama_runs, runs, dirs_exist_ok=True)
    publish(runs, "org", space=SPACE, api=api, report=str)
    app = constants(files_of(hub)["app.py"])
    spoil(api, app["MODELS"])
    hub.requests.clear()
    tokens = torch.arange(2, 40)[None]
    for name in app["MODELS"]:
        model, tokenizer = load(name, {}, app["REVISIONS"])
        folder = folder_of(name, runs)
        record = RunRecord.load(folder)
        native = AutoModelForCausalLM if "llama" in name else LocalistGPT2LMHeadModel
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path if record.adapter else folder
        expected = native.from_pretrained(base)
        if record.adapter:
            expected = PeftModel.from_pretrained(expected, folder)
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens).logits, expected.eval()(tokens).logits), name
        # An adapter has its own settings, and not its base's.
        assert core_model(model).config.locality.locality_lambdas == record.lambdas, name
        assert len(tokenizer("Sentence number 12")["input_ids"]) > 1
    assert len(app["MODELS"]) == 6
    assert not [request for request in hub.requests if "/main" in request.path]


def test_a_base_of_somebody_else_is_pinned_too(hub: HubServer, api: HfApi, runs: Path) -> None:
    api.create_repo("alice/base")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/base")
    with pytest.raises(PublishError, match=r"an adapter stands on 'org/none', and the Hub shows this account no such"):
        change = json.loads((runs / "quintic-lora/run.json").read_text())
        changed = change | {"base_model": "org/none", "base_run": None, "base_weights": None}
        (runs / "quintic-lora/run.json").write_text(json.dumps(changed))
        publish(runs, "org", space=SPACE, api=api, report=str)
    assert {model.id for model in api.list_models(author="org")} == set()
    (runs / "quintic-lora/run.json").write_text(json.dumps(change))
    publish(runs / "quintic-lora", "org", base_model="alice/base", space=SPACE, api=api, report=str)
    app = constants(files_of(hub)["app.py"])
    assert app["MODELS"] == [MODELS[1]]
    assert app["REVISIONS"] == {repo_id: hub.repo(repo_id).head for repo_id in (MODELS[1], "alice/base")}
    assert SpaceCard(files_of(hub)["README.md"].decode()).data.models == [MODELS[1], "alice/base"]


def test_private_models_have_a_private_space(hub: HubServer, api: HfApi, runs: Path) -> None:
    said: list[str] = []
    publish(runs, "org", private=True, space=SPACE, api=api, report=said.append)
    assert hub.repo(SPACE, "space").private
    assert "give it a secret HF_TOKEN" in said[-1]
    publish(runs, "org", space="org/other", api=api, report=str)  # the models are private as they were
    assert hub.repo("org/other", "space").private
    publish(runs / "base", "org", name="public", space="org/public", api=api, report=str)
    assert not hub.repo("org/public", "space").private
    head = hub.repo("org/public", "space").head
    with pytest.raises(PublishError, match=r"exists and is public, and would show models that are private; nothing"):
        publish(runs, "org", space="org/public", api=api, report=str)
    assert hub.repo("org/public", "space").head == head
    api.create_repo("alice/base", private=True)
    publish(runs / "quintic-lora", "org", name="lora", base_model="alice/base", space="org/lora", api=api, report=str)
    assert hub.repo("org/lora", "space").private  # its base is, too


# What cannot be one is refused before anything is uploaded


@pytest.mark.parametrize("space", ["localist", "a/b/c", "no space/x", "", "https://huggingface.co/spaces/a/b"])
def test_an_id_that_cannot_be_one_is_refused(hub: HubServer, api: HfApi, runs: Path, space: str) -> None:
    with pytest.raises(ValueError, match=f"`space` is '{re.escape(space)}'; it must be the id of a Space on the Hub"):
        publish(runs, "org", space=space, api=api, report=str)
    assert hub.requests == []


def test_without_models_there_is_no_space(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        publish(tmp_path, "org", space=SPACE, api=api, report=str)
    assert hub.requests == []


def test_a_space_of_others_is_refused(hub: HubServer, api: HfApi, runs: Path) -> None:
    with pytest.raises(PublishError, match=r"`space` is 'nobody/x'; the token's account may publish under 'alice', 'o"):
        publish(runs, "org", space="nobody/x", api=api, report=str)
    api.create_repo("org/theirs", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id="org/theirs", repo_type="space")
    with pytest.raises(PublishError, match=r"'org/theirs', which exists and is no Space that this command has made"):
        publish(runs, "org", space="org/theirs", api=api, report=str)
    assert files_of(hub, "org/theirs") == {"app.py": b"app"}
    api.create_repo("org/static", repo_type="space", space_sdk="static")
    with pytest.raises(PublishError, match=r"exists with the SDK 'static'; the page needs 'gradio'"):
        publish(runs, "org", space="org/static", api=api, report=str)
    assert {model.id for model in api.list_models(author="org")} == set()
    # One that was made by hand, and is empty, may be filled.
    api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    publish(runs, "org", space=SPACE, api=api, report=str)
    assert "app.py" in files_of(hub)


def test_a_failure_leaves_the_former_page_and_a_rerun_completes(hub: HubServer, api: HfApi, runs: Path) -> None:
    hub.fail(method="POST", path=r"/api/spaces/.*/commit/main$")
    with pytest.raises(PublishError, match=r"failed with status 500.*the same call made again does what is left to do"):
        publish(runs, "org", space=SPACE, api=api, report=str)
    assert files_of(hub) == {}
    publish(runs, "org", space=SPACE, api=api, report=str)
    assert "app.py" in files_of(hub)


def test_a_dry_run_shows_it_and_writes_nothing(
    hub: HubServer, api: HfApi, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(prepare(runs, "org", space=SPACE), api)
    said = capsys.readouterr().out
    assert not [request for request in hub.requests if request.method not in ("GET", "HEAD")]
    assert f"{hub.endpoint}/spaces/{SPACE}\n  new (the Hub shows no such repository)\n" in said
    assert f"  {len(PACKAGE['localist_hf/hub/space.py']):>12,}  localist_hf/hub/space.py\n" in said
    assert "  | sdk: gradio\n" in said
    assert "  | serve_page(MODELS, REVISIONS)\n" in said
    assert f'  |     "{MODELS[0]}": "{"0" * 40}",\n' in said
    assert said.endswith("it would go to 3 repositories and a Space.\n")
    publish(runs, "org", private=True, space=SPACE, api=api, report=str)
    capsys.readouterr()
    show(prepare(runs, "org", space=SPACE), api)
    assert f"{hub.endpoint}/spaces/{SPACE}\n  exists, private\n" in capsys.readouterr().out
    api.create_repo("org/static", repo_type="space", space_sdk="static")
    show(prepare(runs, "org", space="org/static"), api)
    assert "not possible, or not known: `space` is 'org/static'" in capsys.readouterr().out


# As a Space runs it


@pytest.fixture
def address(hub: HubServer, api: HfApi, runs: Path, llama_runs: Path, tmp_path: Path) -> Iterator[str]:
    """app.py in a process of its own, with the library that lies beside it, over models that have moved on."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    shutil.copytree(llama_runs, runs, dirs_exist_ok=True)
    publish(runs, "org", space=SPACE, api=api, report=str)
    files = files_of(hub)
    spoil(api, constants(files["app.py"])["MODELS"])
    folder = tmp_path / "space"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    environment = hub.env(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 600
        while not (found := re.search(r"Running on.*?(http://[\d.:]+)", (tmp_path / "log").read_text())):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield found[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_app_py_reads_with_every_model(hub: HubServer, address: str, tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    client = gradio_client.Client(address, verbose=False)
    app = constants(files_of(hub)["app.py"])
    text = "Sentence number 12 says something. some more of the words here"
    for number, name in enumerate(app["MODELS"]):
        second = app["MODELS"][number - 1] if "llama" not in name else ""
        answer = client.predict(text, name, second, api_name="/read")
        assert "problem" not in answer, (answer, (tmp_path / "log").read_text())
        page = answer["answer"]["page"]
        assert "".join(page["tokens"]) == text
        assert [reading["name"] for reading in page["readings"]] == [name, second][: 1 + bool(second)]
        assert page["readings"][0]["lambdas"] == RunRecord.load(folder_of(name, tmp_path / "runs")).lambdas
    refused = client.predict(text, "openai-community/gpt2", "", api_name="/read")
    assert "'openai-community/gpt2'" in refused["problem"], refused
