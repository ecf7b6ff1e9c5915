"""Grids: which runs a YAML file names, and what is refused before the first of them."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from localist_hf.configuration import PAPER_VARIANTS, RECIPES, VARIANTS, LocalityArguments
from localist_hf.experiments import Grid, load_grid


def names(grid: Grid) -> list[str]:
    return [run.folder_name for run in grid]


def test_the_shipped_grids_are_the_papers_and_a_quick_one() -> None:
    paper = load_grid("paper")
    assert [run.variant for run in paper] == [*PAPER_VARIANTS, *PAPER_VARIANTS]
    assert names(paper)[:8] == [*PAPER_VARIANTS, "distributed-seed1"]
    assert names(load_grid("quick")) == ["distributed", "quintic", "quintic-hold", "upper_half-hold-previous1"]


def test_a_path_is_that_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in {"grid[1]": 3, "grid[1].yaml": 4, "quick": 5}.items():
        Path(name).write_text(yaml.safe_dump({"seeds": [seed], "runs": [{"variant": ["distributed", "quintic"]}]}))
    here = str(tmp_path)
    for path, seed in {"grid[1]": 3, f"{here}/grid[1]": 3, "grid[1].yaml": 4, "./quick": 5, f"{here}/quick": 5}.items():
        assert load_grid(path).seeds == [seed]
    assert load_grid("quick").seeds != [5]  # without a folder, the package's


def test_products_are_crossed_and_what_they_share_is_trained_once() -> None:
    grid = Grid(
        seeds=[5, 3],
        delimiters=["."],
        training={"max_steps": 7, "target_fidelity": 0.9},
        locality={"num_sink_tokens": 1, "window_length": 9},
        runs=[
            {"variant": ["distributed", "quintic"]},
            {"variant": "quintic", "target_fidelity": [0.5, 0.9], "num_sink_tokens": [0, 1]},
            {"variant": "quintic", "block_partition": ["semantic", "window", "delimiter"]},
            {"variant": ["window", "linear"], "locality_objective": "fidelity"},
            {"variant": "cubic", "locality_weight": 0, "locality_dial": 1},
        ],
    )
    of_a_seed = [
        "distributed", "quintic", "quintic-target0.5-sinks0", "quintic-target0.5", "quintic-sinks0", "window",
        "quintic-delimiter", "window-fidelity", "linear-fidelity", "cubic-weight0-dial1",
    ]  # fmt: skip
    assert names(grid) == [*of_a_seed, *(f"{name}-seed3" for name in of_a_seed)]
    runs = {run.folder_name: run for run in grid}
    run = runs["quintic-target0.5-sinks0-seed3"]
    assert (run.name, run.variant, run.seed) == ("quintic-target0.5-sinks0", "quintic", 3)
    assert run.settings == {"locality_schedule": "quintic", "num_sink_tokens": 0}
    assert run.training == {"max_steps": 7, "target_fidelity": 0.5}
    assert runs["window"].settings == VARIANTS["window"] | {"num_sink_tokens": 1, "window_length": 9}


def test_a_run_without_local_layers_has_no_use_for_the_loss() -> None:
    product = {"variant": ["distributed", "quintic"], "target_fidelity": [0.5, 0.7], "locality_objective": "fidelity"}
    grid = Grid(seeds=[0], runs=[product])
    assert names(grid) == ["distributed", "quintic-target0.5-fidelity", "quintic-target0.7-fidelity"]
    assert next(iter(grid)).training == {}


def test_what_the_trainer_sets_by_itself_makes_no_run_of_its_own() -> None:
    for each in fields(LocalityArguments):
        grid = Grid(
            seeds=[0], runs=[{"variant": ["distributed", "quintic"]}, {"variant": "quintic", each.name: each.default}]
        )
        assert names(grid) == ["distributed", "quintic"], each.name
        grid = Grid(seeds=[0], runs=[{"variant": ["distributed", "quintic"], each.name: "other"}])
        assert [run.variant for run in grid] == ["distributed", "quintic"], each.name
        # A teacher is of account without local layers too.
        name = "distributed-taughtother" if each.name == "distillation_weight" else "distributed"
        assert names(grid)[0] == name, each.name


def test_a_recipe_is_its_arguments_and_names_the_run() -> None:
    others = {"locality_weight": [0, 5.0], "training_dials": [[1], [0.5, 1]]}
    runs = [{"variant": ["distributed", "quintic"], "recipe": ["hold", "both"]}]
    grid = Grid(seeds=[0], runs=[*runs, {"variant": "quintic", "recipe": "hold"} | others])
    assert names(grid) == [
        "distributed-taught0.9", "quintic-hold", "quintic-both", "quintic-hold-dials0.5_1", "quintic-hold-weight5.0",
        "quintic-hold-weight5.0-dials0.5_1",
    ]  # fmt: skip
    by_name = {run.name: run.training for run in grid}
    assert by_name["distributed-taught0.9"] == {"distillation_weight": 0.9}
    assert by_name["quintic-hold"] == RECIPES["hold"]
    assert by_name["quintic-hold-weight5.0-dials0.5_1"] == RECIPES["hold"] | {
        "locality_weight": 5.0, "training_dials": [0.5, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match="`recipe` is 'fry'; allowed are 'hold', 'both'"):
        Grid(seeds=[0], runs=[{"variant": ["distributed", "quintic"], "recipe": "fry"}])


@given(
    st.lists(st.sampled_from(list(VARIANTS)), min_size=1, unique=True),
    st.lists(st.sampled_from([0.3, 0.5, 0.9]), min_size=1, unique=True),
    st.lists(st.integers(0, 2), min_size=1, unique=True),
    st.lists(st.integers(0, 100), min_size=1, unique=True),
)
def test_no_two_runs_are_alike_or_of_one_name(variants, targets, previous, seeds) -> None:
    product = {"variant": variants, "target_fidelity": targets, "num_previous_blocks": previous}
    runs = list(Grid(seeds=seeds, runs=[{"variant": "distributed"}, product, product]))
    assert len({run.folder_name for run in runs}) == len(runs)
    assert len({str((run.settings, run.training, run.seed)) for run in runs}) == len(runs)
    local = len(set(variants) - {"distributed"})
    free = len({*previous, 0}) if "distributed" in variants else 1
    assert len(runs) == len(seeds) * (local * len(targets) * len(previous) + free)


GOOD = {"seeds": [0], "runs": [{"variant": "distributed"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": []}, "`runs` is empty"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": [0, 1, 0]}, "`seeds` holds 0 twice"),
        ({"seeds": [-1]}, "`seeds` holds -1"),
        ({"seeds": 3}, "`seeds` is 3; it must be a list"),
        ({"seeds": [True]}, r"`seeds` is \[True\]"),
        ({"seeds": None}, "`seeds` is None"),
        ({"runs": [{"variant": []}]}, "`variant` is empty"),
        ({"runs": [{"variant": ["distributed", "distributed"]}]}, "`variant` holds 'distributed' twice"),
        ({"runs": [{"variant": "distributed", "target_fidelity": [0.5, 0.5]}]}, "`target_fidelity` holds 0.5 twice"),
        ({"runs": [{"variant": "sextic"}]}, "`variant` is 'sextic'; allowed are"),
        ({"runs": [{"variant": 3}]}, "`variant` is 3"),
        ({"runs": [{"num_sink_tokens": 3}]}, "has no `variant`"),
        ({"runs": [{"variant": "quintic"}]}, "`runs` have no variant 'distributed'"),
        ({"runs": [{"variant": "window", "block_partition": "semantic"}]}, "`block_partition` is 'semantic' for the"),
        ({"runs": ["quintic"]}, "each entry a dict"),
        ({"training": {"seed": 3}}, "`seed` is set"),
        ({"training": [1]}, "`training` is .* must map names"),
        ({"lora": 8}, "`lora` is 8"),
        ({"controls": {"dial": [0, 1]}}, "`controls` has 'dial'"),
        ({"controls": {"boundaries": "."}}, r"`controls` sets 'boundaries' to '\.'; it must be a list of texts"),
        ({"controls": {"boundaries": [". "]}}, r"`boundaries` holds '\. '; each must be the end of a token"),
        ({"separators": {"lines": [2]}}, r"`separators` sets 'lines' to \[2\]"),
        ({"separators": {"lines": [""]}}, "`lines` holds ''; each must be the end of a token"),
        ({"separators": {"lines": []}}, r"`separators` sets 'lines' to \[\]"),
        ({"separators": {1: ["."]}}, "`separators` has the name 1"),
        ({"separators": {None: ["."]}}, "`separators` has the name None"),
        ({"separators": {"": ["."]}}, "`separators` has the name ''"),
        ({"separators": {"delimiter": ["."]}}, "`separators` has the name 'delimiter'"),
        ({"runs": [{"variant": "quintic", "separators": {"a": 1}}]}, "`separators` is {'a': 1}; allowed are none"),
        (
            {
                "runs": [{"variant": ["distributed", "quintic"]}, {"variant": "quintic", "separators": "seed1"}],
                "seeds": [0, 1],
                "separators": {"seed1": ["."]},
            },
            "`runs` make two with the name 'quintic-seed1'",
        ),
        (
            {"runs": [{"variant": "window", "separators": "l"}], "separators": {"l": ["."]}},
            "`separators` is 'l', and the `block_partition` of the variant 'window' is 'window'",
        ),
        ({"separators": ["lines"]}, "`separators` is .* must map names"),
        ({"runs": [{"variant": "distributed", "separators": "lines"}]}, "`separators` is 'lines'; allowed are none"),
        (
            {
                "runs": [{"variant": "quintic", "separators": "l", "block_partition": "window"}],
                "separators": {"l": ["."]},
            },
            "`separators` is 'l', and the `block_partition` of the variant 'quintic' is 'window'",
        ),
        ({"sequence_length": 1}, "`sequence_length` is 1"),
        ({"measured_sequences": 2.5}, "`measured_sequences` is 2.5"),
        ({"variants": ["quintic"]}, "has the key 'variants'; allowed are runs, seeds"),
    ],
)
def test_bad_grids_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ValueError, match=message):
        load_grid(tmp_path / "grid.yaml")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("seeds: [0]\nruns: [{variant: distributed}]\nseeds: [1]\n", "seeds", 3),
        ("seeds: [0]\nruns:\n  - variant: distributed\n    variant: quintic\n", "variant", 4),
        ("seeds: [0]\ntraining: {max_steps: 1, max_steps: 2}\n", "max_steps", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, key: str, line: int) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"which cannot be read: the key '{key}' stands there twice\s.*line {line},"):
        load_grid(tmp_path / "grid.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "seeds: [0",
        "seeds: [0]",
        "runs: [{variant: distributed}]",
        "\0",
        "x: 1\n---\ny: 2",
        "a:\tb: c",
        "[" * 20000,
    ],
)
def test_what_is_no_grid_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"`grid` is '.*grid\.yaml', which") as refused:
        load_grid(tmp_path / "grid.yaml")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="`grid` is 'nowhere', which cannot be read"):
        load_grid("nowhere")


def test_a_recipe_that_is_no_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("seeds: [0]\nruns: [{variant: distributed}, {variant: quintic, recipe: [[hold]]}]\n")
    with pytest.raises(ValueError, match="recipe"):
        load_grid(path)
