"""`localist-hf export`."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from localist_hf.cli.export import main


@pytest.fixture
def run(make_model, tokenizer, tmp_path: Path) -> Path:
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_it_writes_the_folder_and_says_how_to_load_it(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    main([str(run), str(out)])
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-3].startswith(f"{run} written to {out} as plain GPT-2")
    line = printed[-1].removeprefix("transformers.")
    assert type(eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM})) is GPT2LMHeadModel


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["run", "--to", "gpt2", "out"], "unrecognized arguments: --to"),
        (["run"], "the following arguments are required: FOLDER"),
    ],
)
def test_bad_flags_are_refused_by_the_parser(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localist-hf export: error: ") and message in line
