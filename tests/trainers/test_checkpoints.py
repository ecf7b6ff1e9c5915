"""Training goes on from whole checkpoints only."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments
from localist_hf.trainers.checkpoints import checkpoint_damage, find_checkpoint


@pytest.fixture(scope="module")
def make_trainer(make_model, make_text) -> Callable[..., LocalistTrainer]:
    def make(folder: Path, **arguments) -> LocalistTrainer:
        args = LocalistTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, save_steps=2, use_cpu=True, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, **{"max_steps": 6, **arguments},
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": make_text(4, 30).tolist()})
        return LocalistTrainer(model=make_model(), args=args, train_dataset=rows)

    return make


@pytest.fixture(scope="module")
def finished(make_trainer, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run's folder with the checkpoints of steps 2, 4 and 6, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, trainer.model.state_dict()


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that folder, to damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_half_written_checkpoint_is_told_from_a_whole_one(run, name: str, damage: Callable) -> None:
    checkpoint = run / "checkpoint-4"
    assert checkpoint_damage(checkpoint) is None
    damage(checkpoint / name)
    expected = "its weights are missing" if damage is Path.unlink and name == "model.safetensors" else name
    assert expected in checkpoint_damage(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("is_told_by_zip", [True, False])
def test_a_damaged_pickle_in_a_whole_file(run: Path, name: str, is_told_by_zip: bool) -> None:
    path = run / "checkpoint-4" / name
    with zipfile.ZipFile(path) as archive:
        contents = {each: archive.read(each) for each in archive.namelist()}
    (pickled,) = (each for each in contents if each.endswith("data.pkl"))
    damaged = bytes(byte ^ 0xFF for byte in contents[pickled])
    if is_told_by_zip:
        path.write_bytes(path.read_bytes().replace(contents[pickled], damaged))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in contents.items():
                archive.writestr(each, damaged if each == pickled else content)
    assert checkpoint_damage(run / "checkpoint-4") == f"{name} cannot be read"


def test_a_state_of_another_form_is_damaged(run: Path) -> None:
    (run / "checkpoint-4" / "trainer_state.json").write_text("[]")
    assert checkpoint_damage(run / "checkpoint-4").startswith("trainer_state.json cannot be read")


def test_what_is_left_out_on_purpose_is_not_missing(run, make_trainer, tmp_path) -> None:
    make_trainer(tmp_path / "light", save_only_model=True, max_steps=2).train()
    assert checkpoint_damage(tmp_path / "light" / "checkpoint-2") is None


def test_a_missing_shard_is_named(run) -> None:
    index = run / "checkpoint-4" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    assert checkpoint_damage(index.parent) == "model-2.safetensors is missing"
    index.write_text("[]")
    assert checkpoint_damage(index.parent).startswith("model.safetensors.index.json cannot be read")


def test_a_damaged_one_is_passed_over(run, finished, make_trainer, transformers_warnings) -> None:
    truncate(run / "checkpoint-6" / "model.safetensors")
    trainer = make_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is no whole checkpoint and is passed over: model.safetensors" in transformers_warnings.text
    assert trainer.state.global_step == 6
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, finished[1][name]), name


def test_a_damaged_one_that_is_asked_for_gives_way_to_the_one_before(run, make_trainer) -> None:
    truncate(run / "checkpoint-6" / "optimizer.pt")
    last, before = run / "checkpoint-6", run / "checkpoint-4"
    assert find_checkpoint(last, run) == (before, {last: "optimizer.pt cannot be read"})
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is '.*checkpoint-5'; there is no such folder\."):
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-5"))


def test_nothing_to_go_on_from_is_an_error(run, make_trainer, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is True, but `output_dir` .* has no checkpoint"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    for checkpoint in run.glob("checkpoint-*"):
        truncate(checkpoint / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no whole checkpoint \(.*checkpoint-6: trainer_state.json cannot be read"):
        make_trainer(run).train(resume_from_checkpoint=True)


def test_without_a_wish_training_starts_anew(run, make_trainer) -> None:
    shutil.rmtree(run / "checkpoint-6")
    trainer = make_trainer(run, max_steps=1)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 1
