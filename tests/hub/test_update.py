"""Published repositories of other versions get the code of this one, and nothing else of them changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi
from python_process import run_python

from localist_hf import LocalistGPT2LMHeadModel, __version__, modeling
from localist_hf.cli.main import main
from localist_hf.hub import PublishError, publish, repository_files, update
from localist_hf.hub.model_code import code_files


TOKEN = "hf_test_token"
MODELING = Path(modeling.__file__).parent
GPT2_CODE = {name: path.read_bytes() for name, path in code_files(MODELING / "modeling_localist_gpt2.py").items()}
LLAMA_CODE = {name: path.read_bytes() for name, path in code_files(MODELING / "modeling_localist.py").items()}
VERSION_0_1 = Path(__file__).with_name("version_0_1") / "repository"
# One file reads otherwise, one was not there yet, and one has gone since.
FORMER = {
    "local_cache.py": GPT2_CODE["local_cache.py"] + b"# as it was\n",
    "opaque_ops.py": None,
    "old_search.py": GPT2_CODE["local_cache.py"],
}
# How 0.2.0 read a `semantic_layer` of none.
BAND = GPT2_CODE["locality_config.py"].replace(
    b"last = 3 * num_layers // 4 if last is None else last",
    b"last = self.num_hidden_layers // 2 if self.semantic_layer is None else self.semantic_layer",
)
assert GPT2_CODE["locality_config.py"] != BAND
# What a process that knows nothing of the package loads and measures.
LOAD = """
import sys
sys.modules["localist_hf"] = None
import torch
from transformers import AutoModelForCausalLM

tokens = torch.arange(2, 82).view(2, 40)
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(f"org/localist-{name}", trust_remote_code=True)
    with torch.no_grad():
        outputs = model(tokens, output_fidelity=True, locality_dial=1.0)
    torch.save([outputs.logits, *outputs.block_starts], f"{name}.pt")
"""


@pytest.fixture
def runs(family: Path, llama_runs: Path, tmp_path: Path) -> Path:
    for name in ("base", "quintic", "quintic-lora"):
        shutil.copytree(family / name, tmp_path / "runs" / name)
    return shutil.copytree(llama_runs / "llama-quintic", tmp_path / "runs" / "llama-quintic").parent


def put(api: HfApi, repo_id: str, files: dict[str, bytes | None]) -> None:
    for name, content in files.items():
        if content is None:
            api.delete_file(name, repo_id)
        else:
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def run(code: str, hub: HubServer, home: Path, *arguments: str) -> None:
    home.mkdir(exist_ok=True)
    done = run_python(code, *arguments, env=hub.env(home, TOKEN), cwd=home)
    assert done.returncode == 0, done.stderr


def test_code_is_replaced_and_nothing_else(hub: HubServer, api: HfApi, environment: None, runs: Path, capsys) -> None:
    publish(runs, "org", api=api, report=str)
    names = ["gpt2-quintic", "gpt2-quintic-lora", "llama-quintic"]
    ids = [f"org/localist-{name}" for name in names]
    for repo_id in ids:
        put(api, repo_id, FORMER | {"notes.txt": b"mine", "model.py": b"import torch\n", "gguf/local_cache.py": b""})
    put(api, ids[0], {"locality_config.py": BAND})
    before = {repo_id: hub.repo(repo_id).files() for repo_id in ids}
    heads = {repo_id: hub.repo(repo_id).head for repo_id in ids}

    main(["update", *ids, "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == (
        f"{hub.endpoint}/{ids[1]}: would get another local_cache.py; new opaque_ops.py; no more old_search.py"
    )
    assert said[0].endswith("; `semantic_layer: 2` in config.json, as its code had it by default")
    assert said[-1] == "Dry run: nothing was changed."
    assert {repo_id: hub.repo(repo_id).head for repo_id in ids} == heads

    main(["update", *ids])
    said = capsys.readouterr().out.splitlines()
    for repo_id, line, code in zip(ids, said, (GPT2_CODE, GPT2_CODE, LLAMA_CODE), strict=True):
        repo = hub.repo(repo_id)
        assert line.startswith(f"{hub.endpoint}/{repo_id}: commit {repo.head[:12]}, another ")
        assert [commit.oid for commit in repo.commits[-2:]] == [heads[repo_id], repo.head]  # one commit
        assert repo.commits[-1].title == f"Code of localist-hf {__version__}"
        after = repo.files()
        changes = {"config.json", "locality_config.py"} if repo_id == ids[0] else set()
        assert changed(before[repo_id], after) == changes | FORMER.keys()
        assert {name: after[name] for name in after if name in code} == code
    config, new_config = (json.loads(files["config.json"]) for files in (before[ids[0]], hub.repo(ids[0]).files()))
    assert new_config == config | {"semantic_layer": 2}

    requests = len(hub.requests)
    assert update(ids, api=api, report=str) == []
    assert {request.method for request in hub.requests[requests:]} <= {"GET", "HEAD"}

    home = runs.parent / "stranger"
    run(LOAD, hub, home, "gpt2-quintic")
    tokens = torch.arange(2, 82).view(2, 40)
    model = LocalistGPT2LMHeadModel.from_pretrained(runs / "quintic", semantic_layer=2)
    with torch.no_grad():
        outputs = model(tokens, output_fidelity=True, locality_dial=1.0)
    for theirs, ours in zip(torch.load(home / "gpt2-quintic.pt"), [outputs.logits, *outputs.block_starts], strict=True):
        assert torch.equal(theirs, ours)


def test_a_run_trained_by_another_version_is_published_with_this_code(runs: Path) -> None:
    run = runs / "quintic"
    (run / "locality_config.py").write_bytes(BAND)
    (run / "local_cache.py").write_bytes(FORMER["local_cache.py"])
    files = repository_files(run)
    assert {name: content for name, content in files.items() if name in GPT2_CODE} == GPT2_CODE
    assert json.loads(files["config.json"])["semantic_layer"] == 2
    shutil.copytree(MODELING, run, dirs_exist_ok=True)
    assert json.loads(repository_files(run)["config.json"])["semantic_layer"] is None  # the default of its own code


def upload_0_1(api: HfApi, repo_id: str, **settings: object) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in VERSION_0_1.iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | settings).encode()
    api.create_repo(repo_id)
    put(api, repo_id, files)
    return files


def test_models_of_0_1(hub: HubServer, api: HfApi) -> None:
    """With semantic blocks they keep their code, but for its entry (`test_version_0_1.py` runs it); others get ours."""
    upload_0_1(api, "org/semantic")
    files = upload_0_1(api, "org/window", block_partition="window")
    before = hub.repo("org/semantic").files()
    said: list[str] = []
    update(["org/semantic", "org/window"], api=api, report=said.append)
    assert changed(before, hub.repo("org/semantic").files()) == {"modeling_localist_gpt2.py"}
    assert b"_CACHE = " in hub.repo("org/semantic").files()["modeling_localist_gpt2.py"]
    new = hub.repo("org/window").files()
    assert new.items() >= GPT2_CODE.items()
    assert new.items() >= {name: content for name, content in files.items() if not name.endswith(".py")}.items()
    assert update(["org/semantic", "org/window"], api=api, report=str) == []

    other = files["modeling_localist_gpt2.py"] + b"# past_key_values=past_key_values,\n"
    put(api, "org/semantic", {"modeling_localist_gpt2.py": other})
    with pytest.raises(ValueError, match=r"org/semantic cannot be .* saved by localist-hf 0\.1, .* is not as 0\.1\.0"):
        update(["org/semantic"], api=api)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "holds no config.json"),
        ({"config.json": b"{}"}, "its `auto_map` names None, which is not of localist-hf"),
        (
            {"config.json": b'{"auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}}'},
            r"its `auto_map` names 'modeling_other\.Other', which is not of localist-hf",
        ),
        (
            {"config.json": b'{"auto_map": {"AutoModelForCausalLM": "a/b--modeling_localist.LlamaForCausalLM"}}'},
            "its `auto_map` names the code of 'a/b', which is where to renew it",
        ),
        ({"modeling_localist_gpt2.py": None}, "modeling_localist_gpt2.py is not there"),
        ({"modeling_localist_gpt2.py": b"import torch\n"}, "modeling_localist_gpt2.py is not there, or not as"),
        ({"opaque_ops.py": b"import torch\n"}, "opaque_ops.py is not of localist-hf"),
        (
            {"mine.py": b"", "local_cache.py": FORMER["local_cache.py"] + b"from .mine import *\n"},
            "mine.py is not of localist-hf, and stands among its code or builds on it",
        ),
        (FORMER | {"handler.py": b"from old_search import BlockCacheLayer\n"}, "handler.py is not of localist-hf"),
    ],
)  # fmt: skip
def test_what_is_not_ours_alone_is_refused(
    files: dict[str, bytes | None], message: str, hub: HubServer, api: HfApi, runs: Path
) -> None:
    publish(runs / "base", "org", api=api, report=str)
    upload_0_1(api, "org/old", block_partition="window")
    put(api, "org/localist-gpt2-base", files)
    head = hub.repo("org/old").head
    with pytest.raises(ValueError, match=f"org/localist-gpt2-base .*{message}"):
        update(["org/old", "org/localist-gpt2-base"], api=api)
    assert hub.repo("org/old").head == head  # all are checked before the first is changed


def test_what_the_hub_does_not_show_or_take(hub: HubServer, api: HfApi, environment: None, capsys) -> None:
    with pytest.raises(ValueError, match="`repository` is 'runs/family/quintic'; it must be the id of a model"):
        update(["runs/family/quintic"], api=api)
    with pytest.raises(SystemExit) as error:
        main(["update", "org/none"])
    assert error.value.code == 1
    assert "update: error: org/none: the Hub shows no such model." in capsys.readouterr().err
    upload_0_1(api, "org/old")
    hub.fail(method="POST", path=r"/commit/main$", status=403)
    with pytest.raises(PublishError, match=r"^org/old: "):
        update(["org/old"], api=api)
