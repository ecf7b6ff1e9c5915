"""Output folders: locked by one process at a time, told from other people's, and given their files as a whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import modeling
from ..errors import INPUT_ERRORS, InputError, RunError, reraised_as
from ..hub import CARD_FILE, EVAL_RESULTS_FILE, PICTURE_FILE, RECORD_FILE
from ..hub.loading import PLAN_FILE, SETTINGS_FILE
from ..hub.model_code import is_own_code
from ..hub.repositories import TOKENIZER_FILES
from ..hub.repository_files import read_json
from ..trainers.checkpoints import remove_leftovers
from ..whole_file import write_whole


_LOCK_FILE = ".localist-hf.lock"
#: The files of a folder that are ours, by the kind of output that they are part of; and under `_SAVED` those of the
#: model that was saved last, under `_STALE` those that go when the next one is in place, under `_LEFT` what they were
#: when a command ended: such a file with another digest is somebody's. `_WRITING` says that a command is at work.
_OWN_FILES = ".localist-hf.json"
_SAVED, _STALE, _LEFT, _WRITING = "saved", "stale", "left", "writing"
#: Where a model is written, and its name when it is whole: from then on it takes the place of the one before, whatever
#: happens meanwhile.
_STAGING, _WHOLE = ".localist-hf.saving", ".localist-hf.saved"
_INTERNAL = ".localist-hf."  # what their names begin with
#: What a model cannot be loaded without; of one that is only partly in place it is not there.
_ENTRIES = ("config.json", "adapter_config.json")

#: What a run writes when it begins. Checkpoints say themselves whose they are.
TRAINING_FILES = (SETTINGS_FILE, PLAN_FILE)
#: What a card is made of.
CARD_FILES = (RECORD_FILE, CARD_FILE, PICTURE_FILE, EVAL_RESULTS_FILE)
#: What a run writes of itself when its model is saved.
RESULT_FILES = (*CARD_FILES, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
_WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    *_ENTRIES,
)  # fmt: skip
#: What a run leaves in its folder when it ends.
RUN_FILES = (
    *RESULT_FILES, *_WEIGHTS, "generation_config.json", "training_args.bin", *TOKENIZER_FILES,
    *sorted(path.name for path in Path(modeling.__file__).parent.glob("*.py")),
)  # fmt: skip
#: What a measurement writes.
MEASURED_FILES = ("locality.json", PICTURE_FILE, "context_fidelity_of_heads.png")
#: What is written of separators.
RECRUITED_FILES = ("separators.json", "train.yaml")
#: What is written of a prediction.
EXPLAINED_FILES = ("explanation.json", "explanation.png")
#: What a grid writes beside the folders of its runs; 0.2 drew an attention map too.
GRID_FILES = (
    "table.md", "untrained/*.json", "context_fidelity_over_depth.png", PICTURE_FILE, "frontier.png",
    "perplexity_over_dial.png", "attention_map.png",
)  # fmt: skip
_WRITTEN = {
    "run": (*TRAINING_FILES, *RUN_FILES), "measurement": MEASURED_FILES, "separators": RECRUITED_FILES,
    "explanation": EXPLAINED_FILES,
    "grid": GRID_FILES, "card": CARD_FILES,
}  # fmt: skip
# What former versions left, which kept no list of their files: a file, and a key in it.
_SIGNS = {SETTINGS_FILE: "locality", RECORD_FILE: "metrics", PLAN_FILE: "controls", "locality.json": "lambdas"}


class FolderLocked(InputError):
    """Another process is at work in a folder."""


@contextmanager
def lock_folder(folder: Path, timeout: float = 0) -> Iterator[None]:
    """
    Locks an output folder, which is made where it is missing, for this process alone; the operating system unlocks it
    when the process ends, however that happens. A folder that was made and is still empty at the end is removed. Where
    another process ended while a model was put in its place, that is done now.

    Args:
        folder (`Path`):
            The folder.
        timeout (`float`, *optional*, defaults to 0):
            Seconds to wait for another process.

    Raises:
        FolderLocked: where another process has locked it.
        InputError: where it cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, had_own = FileLock(folder / _LOCK_FILE), (folder / _OWN_FILES).exists()
    with reraised_as(InputError, *INPUT_ERRORS, what=f"`output_dir` is {str(folder)!r}, which cannot be used: "):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_INTERNAL}*"):
            if path.is_symlink():
                raise ValueError(f"{path.name} in it is a link.")
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise FolderLocked(
                f"`output_dir` is {str(folder)!r}, where another `localist-hf` is at work; choose another folder, or "
                "wait for its end."
            ) from None
    try:
        if (folder / _WHOLE).is_dir():
            _put_in_place(folder)
        shutil.rmtree(folder / _STAGING, ignore_errors=True)
        for path in folder.glob(f"{_INTERNAL}*.unfinished"):
            path.unlink()
        remove_leftovers(folder)
        _end_writing(folder, is_over=False)
        yield
        _end_writing(folder)
    except BaseException:
        if not had_own and not _entries(folder):
            (folder / _OWN_FILES).unlink(missing_ok=True)
        _end_writing(folder)
        raise
    finally:
        with suppress(OSError):
            (folder / _LOCK_FILE).unlink()
        lock.release()
        for path in missing:
            with suppress(OSError):  # not empty
                path.rmdir()


def check_own(
    folder: Path, kind: str, patterns: Sequence[str], replaces: bool = False, otherwise: str = ""
) -> list[str]:
    """
    Refuses an output folder that holds what this program has not written: one that holds nothing of ours, and one with
    somebody else's files where ours would be.

    Args:
        folder (`Path`):
            The folder, which need not be there.
        kind (`str`):
            What is written to it: `"run"`, `"measurement"`, `"separators"`, `"grid"` or `"card"`.
        patterns (`Sequence[str]`):
            The files that are, as paths in it; `*` stands for any characters.
        replaces (`bool`, *optional*, defaults to `False`):
            Whether whatever stands there is to be replaced.
        otherwise (`str`, *optional*, defaults to `""`):
            What else than to choose another folder can be done, for the message.

    Returns:
        `list[str]`: what is there of the files that would be written and is not ours.

    Raises:
        ValueError: where there is any, or the folder is not ours, and nothing is to be replaced.
    """
    own = _read_own(folder, kind)
    left = (own or {}).get(_LEFT, {})
    others = [
        name
        for name in found_files(folder, patterns)
        if not _matches(name, (own or {}).get(kind, ()))
        or (folder / name).is_symlink()
        or (name in left and left[name] != _digest(folder / name))
    ]
    if replaces:
        return others
    if own is None and (entries := _entries(folder)):
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, which holds what localist-hf has not written ({_some(entries)}); choose "
            f"another folder, new or empty{otherwise}."
        )
    if others:
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, where {_some(others)} would be written to and stands there already, "
            f"not as this command has written it; move it away, or choose another folder{otherwise}."
        )
    return []


def found_files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Lists those of some files that are there, as patterns of [`check_own`] name them; links that lead nowhere too."""
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(found | {name for name in patterns if os.path.lexists(folder / name)})


def claim(folder: Path, kind: str, patterns: Sequence[str], leaving: Sequence[str] = ()) -> None:
    """
    Notes, before they are written, that files of an output folder are ours. [`check_own`] tells whether they can be.

    Args:
        folder (`Path`), kind (`str`), patterns (`Sequence[str]`):
            As for [`check_own`].
        leaving (`Sequence[str]`, *optional*):
            Files that go when the next model is in place.
    """
    before = _read_own(folder, kind) or {}
    own = before | {kind: sorted({*before.get(kind, ()), *patterns, *leaving})}
    own = _while_writing(own)
    if leaving:
        own[_SAVED] = sorted({*own.get(_SAVED, ()), *leaving})
    if own != before or not (folder / _OWN_FILES).exists():
        _write_own(folder, own)


@contextmanager
def replacing(folder: Path, is_main_process: bool = True) -> Iterator[Path]:
    """
    A folder to save a model to, whose files take the place of those of the model before when all of them are written;
    where the saving fails, that model stays as it is. They are put in place at once: should the process end meanwhile,
    the next one that holds the folder completes it, and until then no model can be loaded there. What is not ours
    stays.

    Raises:
        RunError: where something that is not ours has come to stand in the way; the new model is kept beside it.
    """
    staging = folder / _STAGING
    try:
        yield staging
        if is_main_process:
            _replace(folder, staging)
    finally:
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(folder: Path, staging: Path) -> None:
    own = _read_own(folder, "run") or {}
    saved = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    told = {*own.get("run", ()), *own.get(_SAVED, ())}
    others = [name for name in saved if _is_occupied(folder, name, _matches(name, told))]
    if others:
        rescued = next(path for n in range(1, 1000) if not (path := folder / f"saved-model-{n}").exists())
        staging.rename(rescued)
        raise RunError(
            f"`output_dir` is {str(folder)!r}, where {_some(others)} stands, which localist-hf has not written; the "
            f"model is saved in {str(rescued)!r} instead."
        )
    own["run"] = sorted({*own.get("run", ()), *saved})
    own[_STALE] = sorted({*own.get(_STALE, ()), *own.get(_SAVED, ())} - set(saved))
    own[_SAVED] = saved
    _write_own(folder, _while_writing(own))
    staging.rename(folder / _WHOLE)
    _put_in_place(folder)


def _put_in_place(folder: Path) -> None:
    whole, own = folder / _WHOLE, _read_list(folder) or {}
    going: list[str] = []
    if any((whole / name).exists() for name in _ENTRIES):  # or else the new ones are there
        # A record is of the weights that go.
        going = [name for name in (*_ENTRIES, RECORD_FILE) if _matches(name, own.get("run", ()))]
    for name in [*going, *own.get(_STALE, ())]:
        (folder / name).unlink(missing_ok=True)
        if len(parts := Path(name).parts) > 1:
            with suppress(OSError):  # not empty
                (folder / parts[0]).rmdir()
    files = [path for path in whole.rglob("*") if path.is_file()]
    last = (*_ENTRIES, RECORD_FILE)
    for path in sorted(files, key=lambda path: last.index(path.name) if path.name in last else -1):
        target = folder / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    own.pop(_STALE, None)
    _write_own(folder, own)
    shutil.rmtree(whole)


def _is_occupied(folder: Path, name: str, is_ours: bool) -> bool:
    """Whether a file cannot be put into a folder: one that is not ours is there, or a folder in place of a file."""
    path = folder / name
    between = [parent for parent in path.parents if folder in parent.parents]
    in_the_way = any((parent.exists() or parent.is_symlink()) and not parent.is_dir() for parent in between)
    return in_the_way or path.is_dir() or (not is_ours and (path.exists() or path.is_symlink()))


def _entries(folder: Path) -> list[str]:
    """Lists what lies in a folder, perhaps somebody else's."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in names if not name.startswith(_INTERNAL))


def _while_writing(own: dict[str, Any]) -> dict[str, Any]:
    """Returns the list of our files for when a command begins to write them: what they were before counts no more."""
    return {kind: names for kind, names in own.items() if kind != _LEFT} | {_WRITING: []}


def _end_writing(folder: Path, is_over: bool = True) -> None:
    """
    Notes what our small files are when a command that has written to them is over, or that one was killed meanwhile.
    Weights have a record, and cards say who wrote them; settings may be changed by hand.
    """
    try:
        own = _read_list(folder) or {}
    except ValueError:  # which is said elsewhere
        return
    if _WRITING not in own:
        return
    del own[_WRITING]
    if is_over:
        names = set(found_files(folder, list(chain.from_iterable(own.get(kind, ()) for kind in _WRITTEN))))
        names = {name for name in names.difference(CARD_FILES, TRAINING_FILES) if not name.endswith(".safetensors")}
        own[_LEFT] = {name: _digest(folder / name) for name in sorted(names)}
    _write_own(folder, own)


def _digest(path: Path) -> str:
    """Returns the digest of a file; the empty text for what is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _matches(name: str, patterns: Sequence[str] | set[str]) -> bool:
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _read_own(folder: Path, kind: str) -> dict[str, Any] | None:
    """
    Reads the list of files that are ours, by their kind; `None` for a folder in which there are none. Of what a former
    version left, that kept no list, it is what is there of those that it wrote.
    """
    if (own := _read_list(folder)) is not None:
        return own
    if not _is_of_former_version(folder, kind):
        return None
    found = found_files(folder, _WRITTEN[kind])
    if kind != "run":
        return {kind: found}
    code = [path.name for path in folder.glob("*.py") if is_own_code(path.read_bytes())]
    return {kind: [*found, *code], _SAVED: [*found_files(folder, _WEIGHTS), *code]}


def _read_list(folder: Path) -> dict[str, Any] | None:
    """Reads the list of our files in a folder; `None` where there is none."""
    path = folder / _OWN_FILES
    try:
        own = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not all(isinstance(names, dict if kind == _LEFT else list) for kind, names in own.items()):
        raise ValueError(f"{str(path)!r} is damaged: it holds no lists of files.")
    for name in chain.from_iterable(own.values()):
        # What comes from elsewhere may hold anything.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{str(path)!r} is damaged: {name!r} is no path in this folder.")
    return own


def _is_of_former_version(folder: Path, kind: str) -> bool:
    # A family's own folder holds those of its runs.
    places = folder.glob(f"*/{PLAN_FILE}") if kind == "grid" else [folder / name for name in _SIGNS]
    for path in places:
        with suppress(ValueError, OSError):
            if _SIGNS[path.name] in read_json(path):
                return True
    return False


def _write_own(folder: Path, own: dict[str, Any]) -> None:
    write_whole(folder / _OWN_FILES, f"{json.dumps(own, indent=2)}\n")


def _some(names: Sequence[str]) -> str:
    """Joins the first three of some names, and says how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
