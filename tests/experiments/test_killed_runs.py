"""A run that is killed at any operation on its files, and gone on with, leaves what the undisturbed run leaves."""

import builtins
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from transformers import modeling_utils

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.configuration import RECIPES
from localist_hf.errors import RunError
from localist_hf.experiments import folders
from localist_hf.experiments.folders import RUN_FILES, TRAINING_FILES, check_own, claim, lock_folder
from localist_hf.experiments.training_run import run_training
from localist_hf.hub import RunRecord
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments
from localist_hf.trainers.checkpoints import checkpoint_damage, list_checkpoints


class Killed(BaseException):
    """Stands for a process that is no more: nothing that it does on its way out reaches the disk."""


class Disk:
    """
    Counts the operations that change a folder, and ends the process before or, where it writes a file, within one.

    Args:
        folder: Whose changes count.
        last: Number of the operation that is the last; without one all are done.
        is_half: Whether that leaves half a file.
        is_full: Whether the process lives on and cannot write any more, in place of its end.
    """

    def __init__(self, folder: Path, last: int | None = None, is_half: bool = False, is_full: bool = False) -> None:
        self.folder, self.last, self.is_half, self.is_full = folder, last, is_half, is_full
        #: What was done, and to which file.
        self.done: list[tuple[str, str]] = []
        self.is_dead = False

    def note(self, what: str, path: Any) -> None:
        if isinstance(path, int) or not Path(os.fsdecode(path)).absolute().is_relative_to(self.folder):
            return
        if not self.is_dead and os.path.exists(path) == (what == "mkdir") and what not in ("write", "replace"):
            return  # it changes nothing
        if not self.is_dead:
            self.done.append((what, str(Path(os.fsdecode(path)).relative_to(self.folder))))
            self.is_dead = len(self.done) == self.last
            if self.is_dead and self.is_half and what == "write":
                with io.FileIO(path, "w") as file:
                    file.write(b'{"half')
        if self.is_dead and self.is_full:
            if what in ("write", "mkdir"):
                raise OSError(errno.ENOSPC, "No space left on device", os.fsdecode(path))
        elif self.is_dead:
            raise Killed

    @contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:

            def watch(module: Any, name: str, what: str, of: Callable[..., Any]) -> None:
                do = getattr(module, name)

                def noted(*args: Any, **kwargs: Any) -> Any:
                    if (path := of(*args, **kwargs)) is not None:
                        self.note(what, path)
                    return do(*args, **kwargs)

                patch.setattr(module, name, noted)

            def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                return path if set(mode) & set("wxa+") else None

            for module in (builtins, io):
                watch(module, "open", "write", opened)
            for module in (modeling_utils, peft.peft_model):
                watch(module, "safe_save_file", "write", lambda tensors, filename, *_, **__: filename)
            watch(torch, "save", "write", lambda content, path, *_, **__: path)
            for name in ("replace", "rename"):
                watch(os, name, "replace", lambda old, new, **_: new)
            for name in ("unlink", "remove", "rmdir", "mkdir"):
                watch(os, name, name, self._path)
            locks: list[FileLock] = []
            patch.setattr(folders, "FileLock", lambda path: locks.append(FileLock(path)) or locks[-1])
            try:
                yield
            finally:
                for lock in locks:  # which the operating system lets go
                    lock.release(force=True)

    @staticmethod
    def _path(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
        # `shutil.rmtree` goes by what is open.
        return path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)


def without_times(values: Any) -> Any:
    """Values of a JSON file but for those that tell how long something took."""
    if isinstance(values, dict):
        times = ("_runtime", "_per_second")
        return {name: without_times(value) for name, value in values.items() if not name.endswith(times)}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run; of the arguments that it was begun with, which a pickle holds, the name alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            is_timed = re.search(r"(trainer_state|_results)\.json$", path.name)
            text = path.read_text().replace(str(folder), "") if is_timed else ""
            content = without_times(json.loads(text)) if is_timed else path.read_bytes()
            is_known = path.name not in ("training_args.bin", ".localist-hf.json")  # which holds digests of times
            found[str(path.relative_to(folder))] = content if is_known else None
    return found


@pytest.fixture(scope="module")
def make_trainer(tokenizer, make_model, tmp_path_factory) -> Callable[..., LocalistTrainer]:
    base = tmp_path_factory.mktemp("base") / "base"
    sizes = {"n_layer": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(tokenizer)}
    make_model(**sizes, locality_schedule="linear", resid_pdrop=0.1).save_pretrained(base)

    def make(folder: Path, is_adapter: bool = False, **arguments: Any) -> LocalistTrainer:
        torch.manual_seed(0)
        model = LocalistGPT2LMHeadModel.from_pretrained(base)
        if is_adapter:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        whole = [each for each in list_checkpoints(folder) if checkpoint_damage(each) is None]
        defaults = {
            "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 1,
            "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2,
            "resume_from_checkpoint": str(whole[0]) if whole else None,
        }  # fmt: skip
        text = torch.randint(2, len(tokenizer), (7, 16), generator=torch.Generator().manual_seed(1)).tolist()
        return LocalistTrainer(
            model=model,
            args=LocalistTrainingArguments(**(defaults | arguments)),
            train_dataset=Dataset.from_dict({"input_ids": text[:5]}),
            eval_dataset=Dataset.from_dict({"input_ids": text[5:]}),
            processing_class=tokenizer,
        )

    return make


KINDS = {
    "whole weights": {},
    "the best": {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"},
    "an adapter": {"is_adapter": True, "save_total_limit": 1},
    "held and taught": {**RECIPES["hold"], "save_total_limit": 1},
    "within a budget": {"max_loss_increase": 0.01, "distillation_weight": 0.5, "save_total_limit": 1},
    "an adapter, held and taught": {**RECIPES["hold"], "is_adapter": True, "save_total_limit": 1},
}


class Undisturbed:
    """A run that nobody kills: what it did to the disk, and what it left."""

    def __init__(self, folder: Path, make: Callable[..., LocalistTrainer], kind: str) -> None:
        self.make, self.kind = make, kind
        disk = Disk(folder)
        with disk.watched():
            self.metrics = self.run(folder)
        self.operations, self.contents = disk.done, contents(folder)

    def run(self, folder: Path) -> dict[str, float]:
        with lock_folder(folder):  # as `main` does
            check_own(folder, "run", (*TRAINING_FILES, *RUN_FILES))
            claim(folder, "run", TRAINING_FILES)
            metrics = run_training(self.make(folder, **KINDS[self.kind]), dataset="a text", model_name="run")
        return {name: metrics[name] for name in RunRecord.load(folder).metrics}

    def kill(self, folder: Path, number: int, is_half: bool, is_full: bool = False) -> None:
        disk = Disk(folder, number, is_half, is_full)
        with (
            disk.watched(),
            pytest.raises((OSError, RunError) if is_full else Killed, match="(?i)no space" if is_full else None),
        ):
            self.run(folder)


@pytest.fixture(scope="module")
def undisturbed(make_trainer, tmp_path_factory) -> Callable[[str], Undisturbed]:
    runs: dict[str, Undisturbed] = {}

    def of(kind: str) -> Undisturbed:
        if kind not in runs:
            runs[kind] = Undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", make_trainer, kind)
        return runs[kind]

    return of


def assert_goes_on(run: Undisturbed, folder: Path, number: int, is_half: bool, is_full: bool = False) -> None:
    """A run that is ended there and gone on with ends as the undisturbed one; to go on once more changes nothing."""
    run.kill(folder, number, is_half, is_full)
    if (record := RunRecord.find(folder)) is not None:
        record.check_weights(folder)
    assert run.run(folder) == run.metrics
    assert contents(folder) == run.contents
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run.run(folder) == run.metrics
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left


MOMENTS = [
    ("whole weights", "write", "checkpoint-1/optimizer.pt", True),
    ("whole weights", "unlink", ".localist-hf.removed-checkpoint-1/optimizer.pt", False),
    ("whole weights", "mkdir", ".localist-hf.saving", False),
    ("whole weights", "replace", ".localist-hf.saved", False),
    ("whole weights", "write", "all_results.json", True),
    ("the best", "write", "checkpoint-3/trainer_state.json", True),
    ("the best", "replace", "run.json", False),
    ("an adapter", "write", "checkpoint-3/README.md", True),
    ("an adapter", "write", ".localist-hf.README.md.unfinished", True),
]


@pytest.mark.parametrize(("kind", "what", "file", "is_half"), MOMENTS)
def test_a_run_killed_at_a_save_goes_on(undisturbed, tmp_path: Path, kind: str, what: str, file: str, is_half) -> None:
    run = undisturbed(kind)
    last = len(run.operations) - run.operations[::-1].index((what, file))
    assert_goes_on(run, tmp_path / "run", last, is_half)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("held and taught", "checkpoint-2/model.safetensors"), ("whole weights", "checkpoint-3/trainer_state.json")],
)
def test_a_run_whose_disk_is_full_goes_on_when_it_has_room(undisturbed, tmp_path: Path, kind: str, file: str) -> None:
    run = undisturbed(kind)
    assert_goes_on(run, tmp_path / "run", 1 + run.operations.index(("write", file)), is_half=True, is_full=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_full", [False, True], ids=["killed", "full disk"])
def test_a_run_ended_at_any_operation_goes_on(undisturbed, tmp_path: Path, kind: str, is_full: bool) -> None:
    run = undisturbed(kind)
    failed = []
    for number, (what, file) in enumerate(run.operations, start=1):
        if file.endswith(".py") and number % 10:  # one as the other
            continue
        if is_full and what != "write":
            continue
        for is_half in (False, True) if what == "write" else (False,):
            folder = tmp_path / f"{number}-{is_half}" / "run"
            try:
                assert_goes_on(run, folder, number, is_half, is_full)
            except (Exception, pytest.fail.Exception) as error:
                failed.append((number, what, file, is_half, repr(error)[:300]))
            shutil.rmtree(folder.parent, ignore_errors=True)  # none is left where nothing was saved
    assert not failed
