"""The runs beside a run that its card speaks of."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localist_hf.hub import RunRecord
from localist_hf.hub.siblings import load_siblings, pair_to_open, pair_to_show


def test_siblings_differ_in_locality_and_seed_only(family: Path, tmp_path: Path, train_run: Callable) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    train_run(folder / "longer", "linear", folder / "base", max_steps=2)
    train_run(folder / "weight", "linear", folder / "base", locality_weight=1.0, name="weight")
    names = [record.name for record in load_siblings(folder / "quintic")]
    assert names[0] == "quintic"
    # The other seed is a sibling too; the locality loss may differ; another number of steps or an adapter may not.
    assert sorted(names) == sorted(
        ["base", "cubic", "distributed", "linear", "localist", "quadratic", "quartic", "quintic", "quintic", "weight"]
    )
    assert {record.name for record in load_siblings(folder / "base")} >= {"base", "quintic", "quintic-lora", "linear"}
    assert [record.name for record in load_siblings(folder / "quintic-lora")] == ["quintic-lora", "base"]


@pytest.mark.parametrize(
    "fields",
    [{"num_sink_tokens": 2}, {"max_block_length": 20}, {"semantic_threshold": 2.0}, {"min_fidelity": 0.5}],
    ids=lambda fields: next(iter(fields)),
)
def test_runs_with_other_blocks_or_sinks_are_not_compared(family: Path, tmp_path: Path, fields: dict) -> None:
    folder = shutil.copytree(family, tmp_path / "family")
    record = RunRecord.load(folder / "quintic-seed1")
    replace(record, config=record.config | fields).save(folder / "quintic-seed1")
    assert 1 not in [record.seed for record in load_siblings(folder / "quintic")]
    assert [record.name for record in load_siblings(folder / "quintic-seed1")] == ["quintic", "base"]


def test_the_pair_to_show(family: Path) -> None:
    runs = {folder: RunRecord.load(family / folder) for folder in ("base", "distributed", "linear", "localist")}

    def with_psi(name: str, psi: float, **changes: Any) -> RunRecord:
        record = RunRecord.load(family / name)
        return replace(
            record, metrics=record.metrics | {f"context_fidelity_layer_{record.num_layers - 1}": psi}, **changes
        )

    runs |= {
        "linear": with_psi("linear", 0.7),
        "localist": with_psi("localist", 0.8),
        "free": with_psi("distributed", 0.9),
    }
    assert pair_to_show(runs) == ("localist", "distributed")  # what was not asked for does not count
    runs["steep"] = with_psi("quintic", 0.5)
    assert pair_to_show(runs) == ("steep", "distributed")
    runs["again"] = with_psi("quintic", 0.6, seed=1)
    runs["z"] = with_psi("distributed", 0.1, seed=1)
    assert pair_to_show(runs) == ("again", "z")
    held = runs["again"].config | {"locality_dial": 1.0}
    runs["again"] = with_psi("quintic", 1.0, config=held)
    assert pair_to_show(runs) == ("steep", "distributed")
    assert pair_to_show({"x": runs["base"]}) == ("x", None)
    assert pair_to_show({"x": runs["base"], "y": runs["steep"]}) == ("y", None)  # the base had another training


def test_the_pair_to_open_is_of_models_that_read_the_same_tokens(family: Path) -> None:
    runs = {folder: RunRecord.load(family / folder) for folder in ("base", "distributed", "linear", "quintic")}
    assert pair_to_open(runs) == pair_to_show(runs) == ("quintic", "distributed")
    del runs["distributed"]
    assert pair_to_show(runs) == ("quintic", None)
    assert pair_to_open(runs) in (("quintic", "base"), ("quintic", "linear"))
    assert pair_to_open({name: runs[name] for name in ("linear", "quintic")}) == ("quintic", "linear")
    assert pair_to_open({"quintic": runs["quintic"]}) == ("quintic", None)
    runs["linear"] = replace(runs["linear"], data=runs["linear"].data | {"name": "another"})
    assert pair_to_open({name: runs[name] for name in ("linear", "quintic")}) == ("quintic", None)
