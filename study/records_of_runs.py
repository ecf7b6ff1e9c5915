"""The records that `collect.py` has written, each with the settings that its grid gives it."""

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from localist_hf.configuration import BASELINE_VARIANT, LOCALITY_ARGUMENTS, PAPER_VARIANTS
from localist_hf.experiments import load_grid
from localist_hf.modeling import LocalityFields


Run = dict[str, Any]

GRIDS = Path(__file__).parent
RECORDS = GRIDS / "records"
BASELINE = BASELINE_VARIANT
#: The model that every run of a study started from.
BASE = "base"
#: The blocks of the controls.
KINDS = {"own": "own blocks", "wrong": "another text's", "windows": "windows", "recency": "last tokens"}

_DEFAULTS = {each.name: each.default for each in fields(LocalityFields)} | LOCALITY_ARGUMENTS
_HELD = {"locality_weight": 0, "locality_dial": 1}


class Study:
    """
    The records of one grid, which has their name: runs by name, each a list by seed and with its `"settings"`, the
    paper's configurations first.
    """

    def __init__(self, path: Path) -> None:
        #: That of the grid.
        self.name = path.stem
        self._grid = {run.name: run for run in load_grid(GRIDS / f"{path.stem}.yaml")}
        #: Fields of [`LocalityFields`] and training arguments of each run, the defaults among them.
        self.settings = {name: _DEFAULTS | run.settings | run.training for name, run in self._grid.items()}
        self._untrained: dict[str, Run] = {}
        runs: dict[str, dict[int, Run]] = {}
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            line["settings"] = self.settings[line["name"]]
            if line.get("untrained"):
                self._untrained[line["name"]] = line
            else:
                runs.setdefault(line["name"], {})[line["seed"]] = line
        #: Seeds that every run has; what only some have is left out, so that all comparisons are of the same ones.
        self.seeds = sorted(set.intersection(*map(set, runs.values())))
        self.runs = {name: [runs[name][seed] for seed in self.seeds] for name in sorted(runs, key=_order)}

    def runs_of(self, name: str) -> list[Run]:
        """A run by seed, or the base, which has none."""
        return [self.untrained(self._free[0])] * len(self.seeds) if name == BASE else self.runs[name]

    @property
    def _free(self) -> list[str]:
        """What was trained without locality."""
        return [name for name in self.runs if self.settings[name]["locality_schedule"] == BASELINE]

    @cached_property
    def reference(self) -> str:
        """What costs are ratios to: of the base and of what was trained without locality, the lowest perplexity."""
        names = [*self._free, *([BASE] if self._untrained else [])]
        return (
            min(names, key=lambda name: mean_figure(self.runs_of(name), "perplexity")) if len(names) > 1 else names[0]
        )

    def any_run(self) -> Run:
        return next(iter(self.runs.values()))[0]

    def those_of(self, names: Sequence[str]) -> list[str]:
        """The runs among these that it has."""
        return [name for name in names if name in self.runs]

    def untrained(self, name: str) -> Run:
        """The base under the settings of a run; runs that differ in their training alone share it."""
        settings = self._grid[name].settings
        return self._untrained[next(other for other, run in self._grid.items() if run.settings == settings)]

    def varied(self, *settings: str, of: str = "quintic") -> list[str]:
        """The run `of` and those that differ from it in these settings alone, in the order of their values."""
        values = {name: {setting: self.settings[name][setting] for setting in settings} for name in self.runs}
        found = [name for name in self.runs if self.settings[name] == self.settings[of] | values[name]]
        return sorted(found, key=lambda name: [*values[name].values()])

    @property
    def held_pairs(self) -> list[tuple[str, str]]:
        """Runs trained with the loss, each with the one that is trained at dial 1 in its place, all else alike."""
        held = [name for name, runs in self.runs.items() if is_held(runs[0])]
        free = [name for name in self.runs if name not in held]
        return [(name, at_1) for name in free for at_1 in held if self.settings[at_1] == self.settings[name] | _HELD]


def _order(name: str) -> tuple[int, str]:
    """The paper's configurations in their order, then the others."""
    return PAPER_VARIANTS.index(name) if name in PAPER_VARIANTS else len(PAPER_VARIANTS), name


def is_held(run: Run) -> bool:
    """Whether it was trained at dial 1, where nothing outside the blocks is seen."""
    return run["settings"]["locality_dial"] == 1 or run["settings"]["training_dials"] == [1]


def is_semantic(run: Run) -> bool:
    """Whether its blocks are found in the model's values, so that training moves them."""
    return run["settings"]["block_partition"] == "semantic"


def figures(run: Run) -> dict[str, float]:
    """What tables show of a run, or of the untrained base, by the titles of their columns; of the last layer."""
    controls, number = run["controls"], run["settings"]["num_previous_blocks"]
    blocks = next(each for each in controls["blocks"] if each["num_previous_blocks"] == number)
    found = {
        "perplexity": controls["perplexity"],
        "cost at dial 1": controls["cost_at_dial_1"],
        "psi": blocks["own"]["context_fidelity"],
        "another text's": blocks["wrong"]["context_fidelity"],
        "visible keys": blocks["own"]["visible_keys"],
        "self only": controls["self_only_perplexity"] / controls["perplexity"],
        "out of reach": controls.get("share_out_of_reach"),
        "KL (bits)": controls["divergence"],
        **{f"psi, {title}": blocks[kind]["context_fidelity"] for kind, title in KINDS.items()},
    }
    for kind, value in controls["perplexity_on_blocks"].items():
        found[f"dial 1, {KINDS[kind]}"] = value / controls["perplexity"]
    if not run.get("untrained"):
        last = run["last_layer"]
        found |= {share: last[f"{share}_share"] for share in ("self", "sink", "block", "outside")}
        found |= {"other words": last["context_share"], "phi": last["fidelity"]}
        on_base = run["last_layer_on_base_blocks"]["context_fidelity"]
        found["psi, the base's semantic blocks"] = on_base
        found["unmoved psi"] = on_base if is_semantic(run) else found["psi"]  # on blocks that training cannot move
    return found


def mean_figure(runs: Sequence[Run], title: str) -> float:
    """Over seeds."""
    return fmean(figures(run)[title] for run in runs)


def generated(run: Run, dial: str, figure: str) -> float:
    """A figure of what was written at a dial: `"loss"` is the mean of a token's under the base."""
    found = run["controls"]["generation"][dial]
    if figure == "loss":
        return sum(found["losses"]) / (len(found["losses"]) * found["num_tokens"])
    return fmean(found[figure])


def dials_of(runs: Sequence[Run]) -> list[float]:
    """The dials that they were measured at."""
    return [each["dial"] for each in runs[0]["controls"]["dials"]]
