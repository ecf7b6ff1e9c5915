"""A model's own `push_to_hub`."""

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from published import files_of
from transformers import (
    PreTrainedModel,
)

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.hub import publish


@pytest.mark.usefixtures("environment")
def test_a_model_pushes_what_publish_publishes(hub: HubServer, api: HfApi, runs: Path) -> None:
    publish(runs / "quintic", "org", api=api, report=str)
    head = hub.repo("org/localist-gpt2-quintic").head
    model = LocalistGPT2LMHeadModel.from_pretrained(runs / "quintic")
    assert model.push_to_hub("org/localist-gpt2-quintic").oid == head  # nothing to add
    model.push_to_hub("mine", private=True, tags=["extra"], commit_message="Mine")
    repository = hub.repo("alice/mine")
    assert repository.private
    assert [commit.title for commit in repository.commits].count("Mine") == 1
    files = {path: content for path, content in repository.files().items() if path != ".gitattributes"}
    card = ModelCard(files.pop("README.md").decode())
    assert "extra" in card.data.tags
    assert 'repo_id = "alice/mine"' in card.text
    assert files == {path: content for path, content in files_of(hub, "quintic").items() if path != "README.md"}


@pytest.mark.usefixtures("environment")
def test_a_record_of_another_program_is_no_obstacle(
    runs: Path, monkeypatch: pytest.MonkeyPatch, transformers_warnings: pytest.LogCaptureFixture
) -> None:
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *args, **kwargs: pushed.append(args))
    model = LocalistGPT2LMHeadModel.from_pretrained(runs / "quintic")
    (runs / "quintic" / "run.json").write_text("[]")
    model.push_to_hub("org/mine")
    assert "is no record of a run" in transformers_warnings.text
    assert pushed == [(model, "org/mine")]


@pytest.mark.usefixtures("environment")
def test_other_weights_get_none_of_the_numbers(
    runs: Path, monkeypatch: pytest.MonkeyPatch, transformers_warnings: pytest.LogCaptureFixture
) -> None:
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *args, **kwargs: pushed.append((args, kwargs)))
    model = LocalistGPT2LMHeadModel.from_pretrained(runs / "quintic")
    model.transformer.ln_f.bias.data += 1e-3
    model.push_to_hub("org/changed", private=True)
    assert "are not those that" in transformers_warnings.text
    ((args, kwargs),) = pushed
    assert args == (model, "org/changed")
    assert kwargs["private"] is True
