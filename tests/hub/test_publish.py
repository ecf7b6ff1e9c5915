"""What is published, what never is, and what a Hub that refuses or breaks leaves behind."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from published import ADAPTER, MODEL, TOKEN, change_record, change_weights, files_of, repositories, titles

from localist_hf.cli.publish import show
from localist_hf.hub import PublishError, RunRecord, prepare, publish, repository_files, upload
from localist_hf.hub.weights import weight_hashes


# What is published


def test_every_run_becomes_a_complete_repository_in_one_commit(hub: HubServer, api: HfApi, family: Path) -> None:
    said: list[str] = []
    publish(family, "org", api=api, report=said.append)
    names = ["base", "cubic", "distributed", "linear", "localist", "quadratic", "quartic", "quintic", "quintic-lora"]
    assert repositories(hub) == {f"org/localist-gpt2-{name}" for name in names}
    assert said[0].startswith(f"{hub.endpoint}/org/localist-gpt2-base: commit")  # the base first
    for name in names:
        assert len(titles(hub, name)) == 2  # the Hub's own first commit, and ours
        assert set(files_of(hub, name)) == (ADAPTER if name.endswith("lora") else MODEL)
    # Of two seeds the first is published; the other is in the card's statistics.
    assert files_of(hub, "quintic")["model.safetensors"] == (family / "quintic" / "model.safetensors").read_bytes()
    assert b"means over seeds" in files_of(hub, "quintic")["README.md"]


def test_each_record_is_read_once(api: HfApi, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs / "quintic", runs / "quintic-seed1")
    change_record(runs / "quintic-seed1", seed=1)
    (runs / "notes").mkdir()
    read, load = [], RunRecord.load
    monkeypatch.setattr(RunRecord, "load", lambda folder: read.append(Path(folder).name) or load(folder))
    folders = sorted(path.name for path in runs.iterdir())
    publish(runs, "org", api=api, report=str)
    assert sorted(read) == folders
    read.clear()
    show(prepare(runs, "org"), api)
    assert sorted(read) == folders
    read.clear()
    publish(runs / "quintic", "org", name="alone", base_model="org/localist-gpt2-base", api=api, report=str)
    assert sorted(read) == sorted(set(folders) - {"notes"})


def test_nothing_of_this_machine_and_no_training_state_is_published(hub: HubServer, api: HfApi, runs: Path) -> None:
    assert (runs / "quintic" / "training_args.bin").exists()
    for name in ("optimizer.pt", "trainer_state.json", "notes.txt", ".env", "stray.py", "events.out.tfevents.1"):
        (runs / "quintic" / name).write_text("secret")
    (runs / "quintic" / "checkpoint-1").mkdir()
    (runs / "quintic" / "checkpoint-1" / "optimizer.pt").write_text("secret")
    publish(runs, "org", api=api, report=str)
    for name in ("base", "distributed", "quintic", "quintic-lora"):
        for path, content in files_of(hub, name).items():
            for secret in (str(runs.parent), f"{Path.home()}/", TOKEN, "secret"):
                assert secret.encode() not in content, path
            if path in {"README.md", "run.json", "config.json", "adapter_config.json", "tokenizer_config.json"}:
                assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content.decode()), path
    assert "is_local" not in json.loads(files_of(hub, "quintic")["tokenizer_config.json"])


def test_an_adapter_on_a_variant_loads_that_variant(runs: Path) -> None:
    record = json.loads((runs / "quintic-lora" / "run.json").read_text())
    record |= {"base_run": "quintic", "base_weights": weight_hashes(runs / "quintic"), "name": "again"}
    (runs / "quintic-lora" / "run.json").write_text(json.dumps(record))
    files = prepare(runs, "org").repositories["org/localist-gpt2-again"]  # before `quintic` in the alphabet
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/localist-gpt2-quintic"


def test_an_adapter_names_a_base_that_others_can_load(hub: HubServer, api: HfApi, runs: Path, family: Path) -> None:
    publish(runs, "org", api=api, report=str)
    adapter = json.loads(files_of(hub, "quintic-lora")["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "org/localist-gpt2-base"
    config = json.loads(files_of(hub, "quintic-lora")["config.json"])
    assert (config["locality_schedule"], config["model_type"]) == ("quintic", "localist-gpt2")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all(reference.startswith("org/localist-gpt2-quintic-lora--") for reference in config["auto_map"].values())
    with pytest.raises(ValueError, match=r"local folder 'base', which nobody else can load.*--base-model"):
        repository_files(runs / "quintic-lora")
    files = repository_files(runs / "quintic-lora", base_model="me/base")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert b'base_id = "org/localist-gpt2-quintic-lora", "me/base"' in files["README.md"]
    assert b"base_revision" not in files["README.md"]  # which is not known


def test_publishing_again_changes_nothing_or_adds_one_clean_commit(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs, "org", api=api, report=str)
    heads = {name: hub.repo(f"org/localist-gpt2-{name}").head for name in ("base", "quintic")}
    said: list[str] = []
    publish(runs, "org", api=api, report=said.append)
    assert all(line.endswith(": unchanged") or line.startswith("Format: ") for line in said)
    assert {name: hub.repo(f"org/localist-gpt2-{name}").head for name in heads} == heads

    # Files of an earlier publication that would be loaded by mistake go; what others have added stays.
    for name in ("handler.py", "gguf/model.safetensors", "training_args.bin"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="org/localist-gpt2-quintic")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="model-00001-of-00002.safetensors",
                    repo_id="org/localist-gpt2-quintic")  # fmt: skip
    api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="org/localist-gpt2-quintic")
    change_weights(runs / "quintic")
    before = len(titles(hub, "quintic"))
    publish(runs, "org", api=api, report=str)
    assert len(titles(hub, "quintic")) == before + 1
    assert set(files_of(hub, "quintic")) == MODEL | {"notes.txt", "handler.py", "gguf/model.safetensors"}
    assert b"123.45" in files_of(hub, "quintic")["README.md"]
    assert hub.repo("org/localist-gpt2-base").head == heads["base"]
    assert len(titles(hub, "distributed")) == 3  # its card has a row for quintic


def test_repositories_can_be_private_and_a_public_one_is_not_used_then(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs / "quintic", "org", private=True, api=api, report=str)
    assert hub.repo("org/localist-gpt2-quintic").private
    publish(runs / "distributed", "org", api=api, report=str)
    assert not hub.repo("org/localist-gpt2-distributed").private
    with pytest.raises(
        PublishError, match=r"localist-gpt2-distributed exists and is public; nothing has been uploaded"
    ):
        publish(runs, "org", private=True, api=api, report=str)
    assert repositories(hub) == {"org/localist-gpt2-quintic", "org/localist-gpt2-distributed"}


def test_a_collection_gets_every_sibling_once(hub: HubServer, api: HfApi, runs: Path) -> None:
    for _ in range(2):
        publish(runs, "org", collection="Localist GPT-2", api=api, report=str)
    (found,) = api.list_collections(owner="org")
    collection = api.get_collection(found.slug)
    assert collection.title == "Localist GPT-2"
    assert [item.item_id for item in collection.items] == [
        f"org/localist-gpt2-{name}" for name in ("base", "distributed", "quintic", "quintic-lora")
    ]


# What cannot be published is refused before anything is uploaded


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "tokenizer_config.json", "tokenizer.json", "config.json", "local_cache.py"]
)
def test_an_incomplete_run_is_refused(hub: HubServer, api: HfApi, runs: Path, missing: str) -> None:
    (runs / "quintic" / missing).unlink()
    with pytest.raises((ValueError, OSError), match=missing.removesuffix("_config.json").removesuffix(".py")):
        publish(runs, "org", api=api, report=str)
    assert hub.requests == []


def test_weights_without_numbers_of_their_own_are_refused(hub: HubServer, api: HfApi, runs: Path) -> None:
    record = (runs / "quintic" / "run.json").read_bytes()
    change_weights(runs / "quintic")
    (runs / "quintic" / "run.json").write_bytes(record)
    with pytest.raises(ValueError, match="are not those that its"):
        publish(runs, "org", api=api, report=str)
    assert hub.requests == []


def test_folders_without_runs_are_refused(api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`run` is '.*nowhere'; there is no such folder"):
        publish(tmp_path / "nowhere", "org", api=api)
    with pytest.raises(ValueError, match="holds no finished run"):
        publish(tmp_path, "org", api=api)


@pytest.mark.parametrize("namespace", ["no/slash", "no space", ""])
def test_a_namespace_that_cannot_be_one_is_refused(hub: HubServer, api: HfApi, runs: Path, namespace: str) -> None:
    with pytest.raises(ValueError, match="Repo id"):
        publish(runs, namespace, api=api, report=str)
    assert hub.requests == []


@pytest.mark.parametrize("base_model", ["gpt2", "a/b/c", "no space/x", "", "https://huggingface.co/a/b", "./base"])
def test_a_base_that_is_no_hub_id_is_refused(hub: HubServer, api: HfApi, runs: Path, base_model: str) -> None:
    with pytest.raises(ValueError, match=f"`base_model` is '{re.escape(base_model)}'; it must be the id of a model"):
        publish(runs / "quintic", "org", base_model=base_model, api=api, report=str)
    assert hub.requests == []


def test_a_base_is_named_only_for_runs_that_started_from_a_folder(hub: HubServer, api: HfApi, runs: Path) -> None:
    with pytest.raises(ValueError, match=r"`base_model` is 'org/x'; no run in .* started from a local folder"):
        publish(runs / "base", "org", base_model="org/x", api=api, report=str)
    with pytest.raises(ValueError, match=r"`base_model` is 'org/x'; the run in .*base' started from random weights"):
        repository_files(runs / "base", base_model="org/x")
    assert hub.requests == []
    with pytest.raises(PublishError, match="`base_model` is 'org/x'; the Hub shows this account no such model"):
        publish(runs, "org", base_model="org/x", api=api, report=str)
    assert repositories(hub) == set()
    api.create_repo("org/x")
    publish(runs, "org", base_model="org/x", api=api, report=str)
    assert ModelCard(files_of(hub, "quintic")["README.md"].decode()).data.base_model == "org/x"
    assert ModelCard(files_of(hub, "base")["README.md"].decode()).data.base_model is None


def test_a_run_does_not_replace_the_one_that_it_started_from(hub: HubServer, api: HfApi, runs: Path) -> None:
    change_record(runs / "quintic", base_model="org/localist-gpt2-quintic", base_run=None, base_weights=None)
    with pytest.raises(ValueError, match="started from org/localist-gpt2-quintic and cannot be published over it"):
        publish(runs / "quintic", "org", api=api, report=str)
    assert hub.requests == []
    publish(runs / "quintic", "org", name="second", api=api, report=str)
    assert ModelCard(files_of(hub, "second")["README.md"].decode()).data.base_model == "org/localist-gpt2-quintic"


def test_one_run_can_have_another_name(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs / "quintic", "org", name="mine", api=api, report=str)
    assert repositories(hub) == {"org/localist-gpt2-mine"}
    assert b'repo_id = "org/localist-gpt2-mine"' in files_of(hub, "mine")["README.md"]
    with pytest.raises(ValueError, match=r"`name` is 'mine', for one run; '.*runs' holds 4"):
        publish(runs, "org", name="mine", api=api, report=str)
    with pytest.raises(ValueError, match=r"`namespace` is 'org' and `name` is 'a/b', which give no name of a repos"):
        publish(runs / "quintic", "org", name="a/b", api=api, report=str)


def test_what_is_left_out_is_told_with_its_reason(hub: HubServer, api: HfApi, runs: Path, family: Path) -> None:
    shutil.copytree(family / "quintic-seed1", runs / "quintic-seed1")
    shutil.copytree(runs / "quintic", runs / "with-sinks")
    record = json.loads((runs / "with-sinks" / "run.json").read_text())
    change_record(runs / "with-sinks", config=record["config"] | {"num_sink_tokens": 2})
    shutil.copytree(runs / "quintic", runs / "broken")
    (runs / "broken" / "run.json").write_text("{")
    (runs / "unfinished").mkdir()
    (runs / "table.md").write_text("no folder")
    said: list[str] = []
    publish(runs, "org", api=api, report=said.append)
    left_out = {line.split(": ")[1]: line for line in said if line.startswith("left out: ")}
    assert {Path(path).name for path in left_out} == {"quintic-seed1", "with-sinks", "broken", "unfinished"}
    assert "seed 1 of 'quintic', whose card has it in its statistics" in left_out[str(runs / "quintic-seed1")]
    assert (
        "called 'quintic' as well: publish it by itself with another name (`--name`)"
        in (left_out[str(runs / "with-sinks")])
    )
    assert "is no record of a run" in left_out[str(runs / "broken")]
    assert "holds no finished run" in left_out[str(runs / "unfinished")]
    assert files_of(hub, "quintic")["run.json"] == (runs / "quintic" / "run.json").read_bytes()


def test_an_adapter_does_not_get_the_weights_of_another_run_of_its_base_s_name(runs: Path, family: Path) -> None:
    shutil.copytree(family / "quintic-seed1", runs / "quintic-seed1")
    change_record(runs / "quintic-lora", base_run="quintic", base_weights=weight_hashes(runs / "quintic-seed1"))
    with pytest.raises(ValueError, match="was trained on the local folder 'quintic', which nobody else can load"):
        prepare(runs, "org")


OWN_PART = "is made anew. -->\n"


def edit(card: bytes, old: str, new: str) -> bytes:
    text = card.decode()
    assert text.count(old) == 1
    return text.replace(old, new).encode()


def test_no_file_of_another_tokenizer_stays(hub: HubServer, api: HfApi, runs: Path) -> None:
    """Those of an earlier publication would have their effect where they lie."""
    (runs / "base" / "chat_template.jinja").write_text("{{ messages }} OLD")
    publish(runs / "base", "org", api=api, report=str)
    there = ("added_tokens.json", "spiece.model", "additional_chat_templates/tool.jinja")
    for name in there:
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="org/localist-gpt2-base")
    assert "chat_template.jinja" in files_of(hub, "base")
    (runs / "base" / "chat_template.jinja").unlink()
    publish(runs / "base", "org", api=api, report=str)
    assert not {"chat_template.jinja", *there} & files_of(hub, "base").keys()


def test_what_people_wrote_into_a_card_is_kept(hub: HubServer, api: HfApi, runs: Path) -> None:
    card = runs / "base" / "README.md"
    card.write_bytes(edit(card.read_bytes(), OWN_PART, f"{OWN_PART}\nOf the folder.\n"))
    publish(runs, "org", api=api, report=str)
    assert b"\nOf the folder.\n" in files_of(hub, "base")["README.md"]
    there = edit(files_of(hub, "quintic")["README.md"], OWN_PART, f"{OWN_PART}\nOf the Hub.\n")
    api.upload_file(path_or_fileobj=there, path_in_repo="README.md", repo_id="org/localist-gpt2-quintic")
    head = hub.repo("org/localist-gpt2-quintic").head
    publish(runs, "org", api=api, report=str)
    assert hub.repo("org/localist-gpt2-quintic").head == head
    change_weights(runs / "quintic")
    publish(runs, "org", api=api, report=str)
    new = files_of(hub, "quintic")["README.md"]
    assert b"123.45" in new
    assert b"\nOf the Hub.\n" in new


def test_a_card_that_people_have_edited_elsewhere_is_not_overwritten(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs, "org", api=api, report=str)
    there = edit(files_of(hub, "quintic")["README.md"], "## Results", "## Mine\n\nMy words.\n\n## Results")
    api.upload_file(path_or_fileobj=there, path_in_repo="README.md", repo_id="org/localist-gpt2-quintic")
    heads = {name: hub.repo(f"org/localist-gpt2-{name}").head for name in ("base", "quintic")}
    change_weights(runs / "quintic")  # with it the card of the base is another, which would be uploaded first
    message = r"^README\.md of org/localist-gpt2-quintic is not as .* Remove the file there; text of your own"
    with pytest.raises(ValueError, match=message):
        publish(runs, "org", api=api, report=str)
    with pytest.raises(ValueError, match=message):
        show(prepare(runs, "org"), api)
    with pytest.raises(ValueError, match=message):
        upload(api, "org/localist-gpt2-quintic", repository_files(runs / "quintic"))
    assert {name: hub.repo(f"org/localist-gpt2-{name}").head for name in heads} == heads
    api.delete_file("README.md", repo_id="org/localist-gpt2-quintic")
    publish(runs, "org", api=api, report=str)
    assert b"My words." not in files_of(hub, "quintic")["README.md"]
    card = runs / "quintic" / "README.md"
    card.write_bytes(edit(card.read_bytes(), "## Results", "## Mine\n\n## Results"))
    with pytest.raises(ValueError, match=r"README\.md' is not as .* Move the file away"):
        prepare(runs, "org")


@pytest.mark.usefixtures("environment")
def test_a_trainer_asks_for_the_card_before_it_trains(
    hub: HubServer, api: HfApi, runs: Path, make_trainer: Callable, tmp_path: Path
) -> None:
    publish(runs / "quintic", "org", api=api, report=str)
    trainer = make_trainer(tmp_path / "run", "quintic", runs / "base")
    for trainer.hub_model_id in ("org/localist-gpt2-quintic", "org/new"):
        trainer.check_push()
    there = edit(files_of(hub, "quintic")["README.md"], "## Results", "## Mine")
    api.upload_file(path_or_fileobj=there, path_in_repo="README.md", repo_id="org/localist-gpt2-quintic")
    trainer.hub_model_id = "org/localist-gpt2-quintic"
    with pytest.raises(ValueError, match=r"README\.md of org/localist-gpt2-quintic is not as"):
        trainer.check_push()


def test_a_dry_run_says_what_the_hub_has(
    hub: HubServer, api: HfApi, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(runs / "base", "org", api=api, report=str)
    publish(runs / "quintic", "org", private=True, api=api, report=str)
    api.create_repo("org/localist-gpt2-distributed")
    change_weights(runs / "quintic")
    heads = {name: hub.repo(f"org/localist-gpt2-{name}").head for name in ("base", "quintic")}
    show(prepare(runs, "org"), api)
    said = dict(re.findall(r"^http.*localist-gpt2-(.*)\n  (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert said == {
        "base": "exists, public, with these weights",
        "quintic": "exists, private, with other weights, which would be replaced",
        "distributed": "exists, public, without weights",
        "quintic-lora": "new (the Hub shows no such repository)",
    }
    assert {name: hub.repo(f"org/localist-gpt2-{name}").head for name in heads} == heads
    show(prepare(runs, "org", base_model="org/none"), api)
    assert "The Hub shows no model 'org/none', which `--base-model` names." in capsys.readouterr().out
