"""`localist-hf recruit`, from its arguments to separators that are trained on."""

import dataclasses
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from localist_hf.cli import recruit
from localist_hf.cli.arguments import parse
from localist_hf.cli.main import main
from localist_hf.evaluation import Separators
from localist_hf.experiments import Grid
from localist_hf.experiments.base import BASE
from localist_hf.experiments.preparation import prepare_grid
from localist_hf.experiments.python_text import python_text, split_text
from localist_hf.hub.loading import load, load_config, load_model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's sources, and what the small base makes of them."""
    root = tmp_path_factory.mktemp("recruit")
    (root / "python.txt").write_text("\n".join(split_text(python_text())["variants"])[:40_000])
    return root


@pytest.fixture(autouse=True)
def _inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def printed_and_found(workspace: Path) -> tuple[str, dict]:
    """What the command prints and writes."""
    text, out = str(workspace / "python.txt"), str(workspace / "out")
    flags = ["--output-dir", out, "--mean-length", "14", "--boundaries", "\n", "@@"]

    def in_float32(*args) -> tuple:  # it is saved in bfloat16, which most CPUs are slow in
        model, tokenizer = load(*args)
        return model.float(), tokenizer

    with redirect_stdout(StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(recruit, "load", in_float32)
        main(["recruit", str(BASE), "--text-file", text, *flags])
    return printed.getvalue(), json.loads((workspace / "out/separators.json").read_text())


@pytest.fixture
def found(printed_and_found: tuple[str, dict]) -> dict:
    return printed_and_found[1]


def test_the_small_base_knows_where_lines_end(found: dict) -> None:
    assert found["mean_length"] == pytest.approx(14, rel=0.15)
    assert found["reliability"] > 0.5
    assert found["mean_cost_at_separators"] < 0.7 * found["mean_cost"]
    # Nobody has said what a line is.
    assert {"\n", "):", ")"} <= set(found["texts"])
    assert found["block_lift"]["\n"] > 1.8
    assert found["cost"] == sorted(found["cost"])
    assert min(found["occurrences"]) >= 60
    assert found["locality"] == {"block_partition": "delimiter", "delimiter_token_ids": found["token_ids"]}


def test_what_is_written_is_trained_on(found: dict, workspace: Path) -> None:
    assert {path.name for path in Path("out").iterdir()} == {".localist-hf.json", "separators.json", "train.yaml"}
    run, _, _ = parse(["--config", "out/train.yaml", "--text-file", "python.txt", "--variant", "upper_half"])
    assert (run.model, run.locality) == (str(BASE), found["locality"])
    assert yaml.safe_load(Path("out/train.yaml").read_text())["locality"] == found["locality"]
    model, _ = load(run.model, run.locality)
    assert model.config.delimiter_token_ids == found["token_ids"]
    flags = ["--config", "out/train.yaml", "--text-file", "python.txt", "--locality", '{"num_sink_tokens": 2}']
    run, *_ = parse(flags)
    assert run.locality == found["locality"] | {"num_sink_tokens": 2}


def test_of_an_adapter_the_base_is_written(found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is nothing that a training starts from."""
    model = load_model(str(BASE), load_config(str(BASE), {}), dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    fields = {field.name: found[field.name] for field in dataclasses.fields(Separators)}
    monkeypatch.setattr(recruit, "recruit_separators", lambda *_: Separators(**fields))
    flags = ["--text-file", "python.txt", "--locality", '{"num_sink_tokens": 1}', "--output-dir", str(tmp_path / "out")]
    main(["recruit", str(tmp_path / "adapter"), *flags])
    run, *_ = parse(["--config", str(tmp_path / "out" / "train.yaml"), "--text-file", "python.txt"])
    assert (run.model, run.locality) == (str(BASE), found["locality"] | {"num_sink_tokens": 1})


def test_a_grid_takes_what_is_written(found: dict, workspace: Path) -> None:
    runs = [
        {"variant": ["distributed", "quintic"]},
        {"variant": "quintic", "separators": ["own", "lines"], "num_previous_blocks": [0, 1]},
        {"variant": "quintic", "block_partition": "delimiter"},
    ]
    files = {"own": "out/separators.json", "lines": ["\n"]}
    grid = Grid(runs=runs, seeds=[0], training={"max_steps": 1}, delimiters=["."], separators=files)
    work = prepare_grid(grid, workspace / "grid")
    settings = {run.name: work.settings_of(run) for run in grid}
    assert [*settings] == [
        "distributed", "quintic", "quintic-own", "quintic-previous1-own", "quintic-lines", "quintic-previous1-lines",
        "quintic-delimiter",
    ]  # fmt: skip
    assert settings["quintic-own"]["delimiter_token_ids"] == found["token_ids"]
    tokens = {name: work.tokenizer.batch_decode([[each] for each in of["delimiter_token_ids"]])
              for name, of in settings.items() if "delimiter_token_ids" in of}  # fmt: skip
    assert all(token.rstrip(" ").endswith("\n") for token in tokens["quintic-lines"])
    assert all(token.rstrip(" ").endswith(".") for token in tokens["quintic-delimiter"])
    # The base is measured on each of these blocks.
    assert len([task for task in work.tasks if not task.is_trained]) == len(settings)


@pytest.mark.parametrize(("content", "message"), [
    (None, "'nowhere.json', which cannot be read: there is no such file"),
    ("[1]", "'nowhere.json', which is no file that `localist-hf recruit` has written"),
    ('{"token_ids": ["a"], "tokens": ["a"]}', "which is no file that `localist-hf recruit` has written"),
    ('{"token_ids": [99999999], "tokens": ["a"]}', "whose separators are of a model with other tokens"),
    ('{"token_ids": [5], "tokens": ["no such"]}', "whose separators are of a model with other tokens"),
    ("{", "which cannot be read"),
])  # fmt: skip
def test_a_grid_refuses_other_files(content: str | None, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("nowhere.json").write_text(content)
    runs = [{"variant": ["distributed", "quintic"], "separators": "own"}]
    grid = Grid(runs=runs, seeds=[0], training={"max_steps": 1}, separators={"own": "nowhere.json"})
    with pytest.raises(ValueError, match=r"`separators` sets 'own' to 'nowhere.json', ") as error:
        prepare_grid(grid, tmp_path / "grid")
    assert message in str(error.value)
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--mean-length", "8"], "`mean_length` is 8.0; blocks have 8 to 64 tokens"),
    (["--mean-length", "65"], "`mean_length` is 65.0; blocks have 8 to 64 tokens"),
    (["--text-file", "nowhere.txt"], "`text_file` is 'nowhere.txt'"),
    (["--text-file", "few.txt"], "token(s) that occur 60 times"),
    (["--locality", '{"no_such": 1}'], "`locality` is"),
    (["--locality", '{"block_partition": "window"}'], "`locality` sets 'block_partition', which is what is to be f"),
    (["--boundaries", ""], "it is empty"),
    (["--boundaries", ". "], "`boundaries` holds '. '; each must be the end of a token"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    Path("few.txt").write_text(Path("python.txt").read_text()[:1500])
    with pytest.raises(SystemExit) as error:
        main(["recruit", str(BASE), "--text-file", "python.txt", "--output-dir", str(tmp_path / "other"), *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_is_printed(printed_and_found: tuple[str, dict], workspace: Path) -> None:
    printed, found = printed_and_found
    assert f"{len(found['texts'])} separators among {found['num_candidates']} candidates" in printed
    assert f"`{found['texts'][0]!r}`" in printed
    assert f"'\\n' {found['block_lift'][chr(10)]:.1f}, '@@' not found as the end of a token" in printed
    assert f"localist-hf train --config {workspace}/out/train.yaml" in printed
