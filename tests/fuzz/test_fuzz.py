"""A short slice of `make fuzz`, and that its cases, its state and its refusals are what they are said to be."""

import json
import re
from pathlib import Path

import fuzz
import fuzz_inputs
import fuzz_method
import pytest
import torch
from every_architecture import written_table

from localist_hf.modeling.fidelity import LayerDial


RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_page_has_the_bounds() -> None:
    text = RELIABILITY.read_text(encoding="utf-8")
    for dtype, bounds in fuzz_method.BOUNDS.items():
        (row,) = re.findall(rf"^\| {str(dtype).removeprefix('torch.')} \| (.+) \|$", text, re.MULTILINE)
        written = [0.0 if cell == "not compared" else float(cell) for cell in row.split(" | ")]
        assert written == [bounds.logits, bounds.shares, bounds.bits, bounds.parts, bounds.gradients]


def test_the_page_counts_the_architectures_of_the_table() -> None:
    text = " ".join(RELIABILITY.read_text(encoding="utf-8").split())
    version, types, work = re.match(r"Transformers (\S+) has (\d+) types; (\d+) work", written_table()).groups()
    assert f"Of the {types} types of transformers {version}, {work} work" in text


def test_a_slice_of_the_method() -> None:
    assert {fuzz_method.run(fuzz_method.draw(number, with_compiled=False)) for number in range(12)} >= {"equal"}


def test_a_slice_of_the_inputs() -> None:
    came = {fuzz_inputs.run(fuzz_inputs.draw(number)).partition(" ")[2] for number in range(20)}
    assert came == {"taken", "refused"}


def test_a_case_is_the_same_whenever_it_is_drawn() -> None:
    one, other = fuzz_method.draw(7, seed=3), fuzz_method.draw(7, seed=3)
    assert str(one) == str(other) and torch.equal(one.ids, other.ids)
    assert str(fuzz_method.draw(7, seed=4)) != str(one)


def test_what_is_wrong_in_the_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    of_layer = LayerDial.of_layer
    monkeypatch.setattr(LayerDial, "of_layer", lambda dial, floor, value: of_layer(0.99 * dial, floor, value))
    cases = [fuzz_method.draw(number, with_compiled=False) for number in range(20)]
    case = next(each for each in cases if each.dial == 1.0 and each.floor == 0 and not each.is_half)
    with pytest.raises(AssertionError):
        fuzz_method.run(case)


def test_a_run_goes_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(case: fuzz_inputs.Case) -> str:
        seen.append(case.number)
        if case.number == 4:
            raise KeyError("x")
        return "taken"

    monkeypatch.setattr(fuzz_inputs, "run", run)
    arguments = ["--only", "inputs", "--cases", "3", "--state", str(tmp_path / "state.json")]
    assert fuzz.main(arguments) == 0
    assert fuzz.main(arguments) == 1
    assert seen == [0, 1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "state.json").read_text())["inputs 0"] == {
        "next": 6, "came": {"taken": 5, "wrong": 1}, "wrong": [4], "code, since case": {fuzz._code(): 0}
    }  # fmt: skip
    assert "Again: python tests/fuzz/fuzz.py --only inputs --seed 0 --case 4" in capsys.readouterr().out
