"""Output folders: nobody else's file is changed or removed, and a model is there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from localist_hf.cli.main import main
from localist_hf.errors import RunError
from localist_hf.experiments import base, folders
from localist_hf.hub import RunRecord


NAMES = [
    "README.md", "run.json", "config.json", "model.safetensors", "mine.safetensors", "model-00001-of-00002.safetensors",
    "modeling_mine.py", "notes.txt", "checkpoint-3/notes.txt", "untrained/x.json", "quintic/notes.txt", "table.md",
    "locality.json", "frontier.png", "tokenizer.json", ".saving/x", "book[1].txt", ".run.json", "all_results.json",
    "adapter_config.json", "additional_chat_templates/mine.jinja", "base/model.safetensors", ".eval_results/mine.yaml",
]  # fmt: skip
trees = st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=8), min_size=1, max_size=6)


def put(folder: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A plain GPT-2 with a tokenizer, and a text beside it."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(root / "small")
    tokenizer.save_pretrained(root / "small")
    (root / "book.txt").write_text("".join(f"Sentence number {number} says something. " for number in range(60)))
    return root


COMMANDS = {
    "train": "train --model {root}/small --text-file {root}/book.txt --output-dir {out} --max_steps 1",
    "base": "base --output-dir {out} --steps 1",
    "family": "family quick --output-dir {out}",
    "evaluate": "evaluate {root}/small --text-file {root}/book.txt --output-dir {out}",
    "recruit": "recruit {root}/small --text-file {root}/book.txt --output-dir {out}",
    "export": "export {root}/small {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
@given(tree=trees)
@settings(max_examples=15)
@example(tree={"README.md": b"mine"})
@example(tree={"notes.txt": b"mine"})
def test_no_command_writes_to_a_folder_of_others(command: str, tree: dict[str, bytes], small: Path) -> None:
    out = small / "out"
    shutil.rmtree(out, ignore_errors=True)
    put(out, tree)
    arguments = [part.format(root=small, out=out) for part in COMMANDS[command].split()]
    with pytest.raises(SystemExit) as error:
        base.main(arguments[1:]) if command == "base" else main(arguments)
    assert error.value.code == 2
    assert tree_of(out) == tree


def test_a_page_is_saved_over_a_page_only(small: Path, capsys) -> None:
    arguments = ["view", str(small / "small"), "--text", "A word. Another.", "--save"]
    book = (small / "book.txt").read_bytes()
    with pytest.raises(SystemExit):
        main([*arguments, str(small / "book.txt")])
    assert (small / "book.txt").read_bytes() == book
    assert "no page of ours" in capsys.readouterr().err
    page = small / "page.html"
    main([*arguments, str(page)])
    first = page.read_bytes()
    main([*arguments[:2], "--text", "Something else.", "--save", str(page)])
    assert page.read_bytes() != first


def save(folder: Path, files: dict[str, bytes]) -> None:
    with folders.lock_folder(folder), folders.replacing(folder) as saving:
        put(saving, files)


OURS = [
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "modeling_localist.py",
    "additional_chat_templates/tool.jinja", "additional_chat_templates/chat.jinja", "adapter_config.json",
]  # fmt: skip
saves = st.lists(
    st.dictionaries(st.sampled_from(OURS), st.binary(max_size=4), min_size=1).map(
        lambda files: files | {"weights": b"w"}
    ),
    min_size=1,
    max_size=3,
)


@given(foreign=trees, saved=saves)
@settings(max_examples=25)
def test_saves_replace_each_other_and_nothing_else(
    foreign: dict[str, bytes], saved: list[dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saves")
    present: dict[str, bytes] = {}
    for number, files in enumerate(saved):
        in_the_way = set()
        if number == 1:  # somebody puts files there, none in place of ours
            foreign = {name: content for name, content in foreign.items() if name not in present}
            put(folder, foreign)
        if number >= 1:
            in_the_way = files.keys() & foreign.keys() - present.keys()
        if in_the_way:
            with pytest.raises(RunError, match="the model is saved in") as error:
                save(folder, files)
            rescued = Path(str(error.value).split("'")[-2])
            assert tree_of(rescued) == files
            shutil.rmtree(rescued)
        else:
            save(folder, files)
            present = files
        found = {name: content for name, content in tree_of(folder).items() if name != ".localist-hf.json"}
        assert found == (foreign | present if number else present)


def in_a_child(work: Callable[[], None], last: int) -> bool:
    """Does something in a process that ends before its n-th change of the disk; tells whether it got to the end."""
    if (child := os.fork()) == 0:
        left = [last]

        def ending(change: Callable) -> Callable:
            def counted(*arguments, **options):
                if not left[0]:
                    os._exit(9)
                left[0] -= 1
                return change(*arguments, **options)

            return counted

        for owner, name in (
            (Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (Path, "mkdir"),
            (Path, "write_bytes"), (shutil, "rmtree"),
        ):  # fmt: skip
            setattr(owner, name, ending(getattr(owner, name)))
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


def test_a_model_is_replaced_whole_or_not_at_all_whenever_the_process_is_killed(tmp_path: Path) -> None:
    old = {"config.json": b"old", "model-00001-of-00002.safetensors": b"old", "old/template.jinja": b"old"}
    new = {"config.json": b"new", "model.safetensors": b"new", "tokenizer.json": b"new", "new/template.jinja": b"new"}
    mine = {"notes.txt": b"mine", "mine.safetensors": b"mine", "new/mine.txt": b"mine"}
    is_done, last, seen = False, 0, set()
    while not is_done:
        folder = tmp_path / str(last)
        folder.mkdir()
        save(folder, old)
        folders.claim(folder, "run", folders.CARD_FILES)
        put(folder, mine | {"run.json": b"old"})
        is_done = in_a_child(lambda: save(folder, new), last)  # noqa: B023
        last += 1
        files = tree_of(folder)
        if "config.json" in files:  # what can be loaded is one of the two
            loaded = {name: files.get(name) for name in (old if files["config.json"] == b"old" else new)}
            assert loaded in (old, new)
            # The record is of the old one.
            assert files["config.json"] == b"old" or "run.json" not in files
        # The next one that holds the folder completes what was begun, and leaves no trace.
        with folders.lock_folder(folder):
            pass
        found = {name: content for name, content in tree_of(folder).items() if not name.startswith(".")}
        found.pop("run.json", None)
        assert found in (old | mine, new | mine)
        seen.add(found["config.json"])
    assert seen == {b"old", b"new"}


@pytest.fixture(scope="module")
def finished(small: Path) -> Path:
    """The folder of a run of two steps, and its checkpoints."""
    folder = small / "finished"
    main([*train(small, folder), "--max_steps", "2", "--save_steps", "1"])
    return folder


def train(small: Path, folder: Path) -> list[str]:
    return [
        "train", "--model", str(small / "small"), "--text-file", str(small / "book.txt"), "--output-dir", str(folder),
        "--sequence-length", "16", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
        "--per-device-train-batch-size", "2",
    ]  # fmt: skip


MINE = {
    "notes.txt": b"mine", "mine.safetensors": b"mine", "mine.py": b"mine", "plots/loss.png": b"mine",
    "checkpoint-best/notes.txt": b"mine", "model.fp16.safetensors": b"mine",
}  # fmt: skip


def test_going_on_and_starting_anew_leave_what_lies_beside_a_run(finished: Path, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    put(folder, MINE)
    main([*train(small, folder), "--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert MINE.items() <= tree_of(folder).items()
    main([*train(small, folder), "--max_steps", "1", "--lora-rank", "2", "--overwrite_output_dir"])
    assert MINE.items() <= tree_of(folder).items()
    # And none of it is taken for the model's.
    assert RunRecord.load(folder).weights.keys() == {"adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()


def test_what_is_told_to_be_overwritten_is_named_first(small: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    theirs = {"README.md": b"mine", "run.json": b"mine", "model-00001-of-00002.safetensors": b"mine"}
    put(folder, MINE | theirs)
    main([*train(small, folder), "--max_steps", "1", "--overwrite_output_dir"])
    said = f"`overwrite_output_dir` replaces in {folder}: README.md, model-00001-of-00002.safetensors, run.json\n"
    assert said in capsys.readouterr().out
    assert MINE.items() <= tree_of(folder).items()
    assert not theirs.items() & tree_of(folder).items()
    RunRecord.load(folder).check_weights(folder)


def test_a_stopped_run_does_not_go_on_over_the_files_of_others(finished: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-1", stopped / "checkpoint-1")
    shutil.copy(finished / "run_settings.json", stopped)
    folders.claim(stopped, "run", folders.TRAINING_FILES)
    with folders.lock_folder(stopped):  # which notes that nobody is at work
        pass
    before = tree_of(stopped)
    for name in ("model.safetensors", "README.md", "all_results.json"):
        put(stopped, {name: b"mine"})
        with pytest.raises(SystemExit):
            main(["train", "--output-dir", str(stopped), "--resume_from_checkpoint", "true"])
        assert tree_of(stopped) == before | {name: b"mine"}
        (stopped / name).unlink()
    main(["train", "--output-dir", str(stopped), "--resume_from_checkpoint", "true"])
    assert (stopped / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_what_people_made_of_our_files_is_theirs(finished: Path, small: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    resume = [*train(small, folder), "--max_steps", "3", "--resume_from_checkpoint", "true"]
    for name in ("run.json", "all_results.json", "config.json", "generation_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_text('{"my": "file"}')
        for _ in range(2):  # a command that is refused does not take it for its own
            with pytest.raises(SystemExit):
                main(resume)
            assert name in capsys.readouterr().err
        assert (folder / name).read_text() == '{"my": "file"}'
        (folder / name).write_bytes(before)
    main(resume)


def test_nothing_is_written_through_links(finished: Path, small: Path, tmp_path: Path, capsys) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "file").write_text("mine")
    for name, target in ((".localist-hf.json", "file"), (".localist-hf.lock", "file"), ("README.md", "none")):
        folder.mkdir()
        (folder / name).symlink_to(outside / target)
        with pytest.raises(SystemExit):
            main([*train(small, folder), "--max_steps", "1"])
        (folder / name).unlink()
        folder.rmdir()
    shutil.copytree(finished, folder)
    for name in ("trainer_state.json", "README.md", "eval_results.json"):
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)
    before = tree_of(outside)
    with pytest.raises(SystemExit):
        main([*train(small, folder), "--max_steps", "3", "--resume_from_checkpoint", "true"])
    (folder / "checkpoint-9").symlink_to(outside)
    (folder / "frontier.png").symlink_to(outside / "none")
    (folder / "run_settings.json").unlink()
    (folder / "run_settings.json").symlink_to(outside / "none")
    main([*train(small, folder), "--max_steps", "1", "--overwrite_output_dir"])
    assert tree_of(outside) == before
    assert not any((folder / name).is_symlink() for name in ("README.md", "trainer_state.json", "run_settings.json"))
    page = tmp_path / "page.html"
    page.symlink_to(outside / "none")
    with pytest.raises(SystemExit):
        main(["view", str(small / "small"), "--text", "A word.", "--save", str(page)])
    assert tree_of(outside) == before


def test_checkpoints_of_others_are_neither_removed_nor_overwritten(
    finished: Path, small: Path, tmp_path: Path, capsys
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    mine = {"checkpoint-2-best/model": b"mine", "checkpoint-0-backup/notes": b"mine", "checkpoint-last": b"mine"}
    put(folder, mine)
    resume = [*train(small, folder), "--max_steps", "6", "--resume_from_checkpoint", "true", "--save_total_limit", "1"]
    for name in ("checkpoint-4/config.json", "checkpoint-5"):  # where one would be written to
        put(folder, {name: b"mine"})
        with pytest.raises(SystemExit):
            main(resume)
        assert f"{name.partition('/')[0]} is no checkpoint of localist-hf" in capsys.readouterr().err
        assert (folder / name).read_bytes() == b"mine"
        shutil.rmtree(folder / "checkpoint-4", ignore_errors=True)
    (folder / "checkpoint-5").unlink()
    main(resume)
    assert mine.items() <= tree_of(folder).items()
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        *(name.partition("/")[0] for name in mine),
        "checkpoint-6",
    }


def test_a_run_of_a_former_version_is_gone_on_with(finished: Path, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / ".localist-hf.json").unlink()
    put(folder, {"mine.safetensors": b"mine"})
    main([*train(small, folder), "--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert RunRecord.load(folder).training["steps"] == 3
    assert (folder / "mine.safetensors").read_bytes() == b"mine"


def test_a_measurement_does_not_take_the_place_of_a_run_s_picture(finished: Path, small: Path, capsys) -> None:
    before = tree_of(finished)
    with pytest.raises(SystemExit):
        main(["evaluate", str(finished), "--text-file", str(small / "book.txt"), "--output-dir", str(finished)])
    assert "shares_over_depth.png would be written to and stands there already" in capsys.readouterr().err
    assert tree_of(finished) == before


def test_a_card_that_was_edited_is_refused_before_any_work_and_its_own_part_is_kept(
    finished: Path, small: Path, tmp_path: Path, capsys
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("## Results", "## Mine\n\nMy words.\n\n## Results"))
    before = tree_of(folder)
    resume = [*train(small, folder), "--max_steps", "3", "--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit):
        main(resume)
    assert "README.md' is not as this version of localist-hf writes it" in capsys.readouterr().err
    assert tree_of(folder) == before
    begin = "is made anew. -->\n"
    assert card.count(begin) == 1
    (folder / "README.md").write_text(card.replace(begin, f"{begin}\n## Mine\n\nMy words.\n"))
    main(resume)
    main([*train(small, folder), "--max_steps", "1", "--overwrite_output_dir"])
    new = (folder / "README.md").read_text()
    assert "## Mine\n\nMy words.\n" in new
    assert new != card


def test_the_base_is_replaced_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = tmp_path / "base"
    base.copy_base(folder)
    put(folder, {"mine.py": b"mine", "notes.txt": b"mine"})
    before = tree_of(folder)
    monkeypatch.setattr(base, "train_base", lambda *given: pytest.fail("it was trained"))
    with pytest.raises(SystemExit):
        base.main(["--output-dir", str(folder)])
    assert "which already holds a model" in capsys.readouterr().err
    assert tree_of(folder) == before


@pytest.mark.parametrize("content", [b"[", b"[]", b'{"run": 3}', b'{"saved": ["../x"]}', b'{"saved": ["/x"]}'])
def test_a_list_of_own_files_that_is_damaged_is_named(tmp_path: Path, content: bytes, capsys) -> None:
    put(tmp_path, {".localist-hf.json": content, "notes.txt": b"mine"})
    with pytest.raises(SystemExit):
        base.main(["--output-dir", str(tmp_path)])
    assert ".localist-hf.json' is damaged" in capsys.readouterr().err
    assert tree_of(tmp_path) == {".localist-hf.json": content, "notes.txt": b"mine"}
