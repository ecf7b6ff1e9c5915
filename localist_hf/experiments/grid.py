"""
Grids: which runs are to be compared, as a short YAML file says it.

    seeds: [0, 1]
    training: {max_steps: 150, learning_rate: 6.0e-4, distillation_weight: 0.9}
    runs:
      - variant: [distributed, quintic, localist]
      - variant: quintic
        target_fidelity: [0.3, 0.5, 0.7]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from ..configuration import BASELINE_VARIANT, LOCALITY_ARGUMENTS, RECIPES, VARIANTS, variant_config, variant_name
from ..errors import one_line
from ..modeling import LocalityFields
from ..modeling.locality_config import BLOCK_PARTITIONS
from .text_files import file_fault
from .yaml_files import TypedLoader


#: What is called by its value alone in the name of a run, and what by another word than its own.
_WORDS = {
    "block_partition": "",
    "locality_objective": "",
    "target_fidelity": "target",
    "num_previous_blocks": "previous",
    "num_sink_tokens": "sinks",
    "locality_weight": "weight",
    "locality_dial": "dial",
    "training_dials": "dials",
    "distillation_weight": "taught",
    "max_loss_increase": "budget",
    "max_steps": "steps",
}
#: Of a run's name: the file system takes no more, with what is put behind it.
_MOST_BYTES = 200
#: What is of no account where no layer is local. A teacher is.
_OF_LOCALITY = LOCALITY_ARGUMENTS.keys() - {"distillation_weight"}
_LOCALITY_FIELDS = {each.name: each.default for each in fields(LocalityFields)}


class GridRun(NamedTuple):
    """
    One training of a grid.

    Args:
        name (`str`):
            The variant, and whatever else the run does not share with the grid: `"quintic-target0.5"`.
        variant (`str`):
            A name in `VARIANTS`.
        settings (`dict[str, Any]`):
            Fields of [`LocalityFields`].
        training (`dict[str, Any]`):
            Training arguments, those of the locality loss among them, but for the seed.
        seed (`int`):
            Random seed of the training.
        folder_name (`str`):
            The name, with the seed for all but the grid's first.
        separators (`str`, *optional*):
            Of the `"delimiter"` partition, the name of the grid's separators that end its blocks; `None` for the
            `delimiters`.
    """

    name: str
    variant: str
    settings: dict[str, Any]
    training: dict[str, Any]
    seed: int
    folder_name: str
    separators: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """
    Runs to be compared, and what they share.

    Args:
        runs (`list[dict[str, Any]]`):
            Products: every combination of the values of its keys, each a value or a list, is a run. `variant` must be
            among the keys; the others are `recipe`, a name in `RECIPES`, whose arguments hold where neither the run
            nor the grid says otherwise, `separators`, a name among those of the grid, which makes the partition
            `"delimiter"`, fields of [`LocalityFields`] and training arguments. What two products have in
            common is trained once. One run must be of the baseline, `"distributed"`.
        seeds (`list[int]`):
            Every run is trained from each.
        training (`dict[str, Any]`, *optional*):
            Training arguments of all runs.
        locality (`dict[str, Any]`, *optional*):
            Fields of [`LocalityFields`] for all runs.
        delimiters (`list[str]`, *optional*):
            Ends of the tokens that end a block of the `"delimiter"` partition, such as `"."`; spaces after them do not
            count.
        separators (`dict[str, str | list[str]]`, *optional*):
            Other tokens that end a block, by a name for them: such ends again, or a file that `localist-hf recruit` has
            written, `separators.json`.
        lora (`dict[str, Any]`, *optional*):
            Arguments of [`~peft.LoraConfig`], where adapters are to be trained.
        controls (`dict[str, Any]`, *optional*):
            Arguments of [`measure_controls`]: `dials`, `num_previous_blocks`, and, as `boundaries`, the ends of the
            tokens after which a reader would begin a part of the text, for the block lift.
        sequence_length (`int`, *optional*, defaults to 256), measured_sequences (`int`, *optional*, defaults to 96):
            Tokens of a sequence, and how many sequences of the held-out text are measured at most.

    Raises:
        ValueError: for what is missing, empty, of another type, or there twice, and for an unknown variant.
    """

    runs: list[dict[str, Any]]
    seeds: list[int]
    training: dict[str, Any] = field(default_factory=dict)
    locality: dict[str, Any] = field(default_factory=dict)
    delimiters: list[str] = field(default_factory=list)
    separators: dict[str, str | list[str]] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    controls: dict[str, Any] = field(default_factory=dict)
    sequence_length: int = 256
    measured_sequences: int = 96

    def __post_init__(self) -> None:
        for name, kind in (("runs", dict), ("seeds", int), ("delimiters", str)):
            values = getattr(self, name)
            if not isinstance(values, list) or not all(type(value) is kind for value in values):
                raise ValueError(f"`{name}` is {values!r}; it must be a list, each entry a {kind.__name__}.")
            if not values and name != "delimiters":
                raise ValueError(f"`{name}` is empty; it must hold one entry at least.")
        for name in ("training", "locality", "controls", "separators"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must map names to values.")
        if not isinstance(self.lora, dict | None):
            raise ValueError(f"`lora` is {self.lora!r}; it must map names to values.")
        for name, least in (("sequence_length", 2), ("measured_sequences", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number and at least {least}.")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"`seeds` holds {seed}; seeds must be between 0 and 2**32 - 1.")
        _check_different("seeds", self.seeds)
        check_ends("delimiters", self.delimiters)
        for name, ends in self.separators.items():
            if not isinstance(name, str) or not name or name in ("delimiter", "delimiters", *BLOCK_PARTITIONS):
                raise ValueError(f"`separators` has the name {name!r}; it must be a text, and no partition's.")
            if not isinstance(ends, str) and not (isinstance(ends, list) and ends and {*map(type, ends)} == {str}):
                raise ValueError(
                    f"`separators` sets {name!r} to {ends!r}; it must be a list of ends of tokens, or the file that "
                    "`localist-hf recruit` has written."
                )
            if not isinstance(ends, str):
                check_ends(name, ends)
        if unknown := self.locality.keys() - _LOCALITY_FIELDS.keys():
            raise ValueError(f"`locality` has {min(unknown)!r}; allowed are {', '.join(_LOCALITY_FIELDS)}.")
        kinds = {"dials": (int, float), "num_previous_blocks": (int,), "boundaries": (str,)}
        if unknown := self.controls.keys() - kinds.keys():
            raise ValueError(f"`controls` has {min(unknown)!r}; allowed are {', '.join(map(repr, kinds))}.")
        for name, values in self.controls.items():
            if not isinstance(values, list) or not all(type(value) in kinds[name] for value in values):
                kind = {"dials": "numbers", "num_previous_blocks": "whole numbers", "boundaries": "texts"}[name]
                raise ValueError(f"`controls` sets {name!r} to {values!r}; it must be a list of {kind}.")
        check_ends("boundaries", self.controls.get("boundaries", []))
        if any("push_to_hub" in each for each in (self.training, *self.runs)):
            raise ValueError(
                "`push_to_hub` is set; a grid's runs are published by `localist-hf publish`, all together."
            )
        for name in ("seed", "output_dir"):
            if any(name in each for each in (self.training, *self.runs)):
                raise ValueError(
                    f"`{name}` is set; it follows from the grid's `seeds` and from where its runs are put."
                )
        folders: dict[str, GridRun] = {}
        for run in self:
            if (other := folders.setdefault(run.folder_name, run)) is not run:
                raise ValueError(
                    f"`runs` make two with the name {run.folder_name!r} ({other} and {run}), by which their folder is "
                    "called; give the `separators` another name."
                )
            if not run.name.isprintable() or "/" in run.name or len(run.name.encode()) > _MOST_BYTES:
                raise ValueError(
                    f"`runs` make one with the name {run.name!r}, made of its values; it is the name of its folder, so "
                    f"it must be printable, without '/', and of {_MOST_BYTES} bytes at most."
                )
            is_delimiter = run.settings.get("block_partition") == "delimiter"
            if is_delimiter and run.separators is None and not self.delimiters:
                raise ValueError("`block_partition` is 'delimiter'; it needs `delimiters`, such as ['.'].")
        if BASELINE_VARIANT not in {run.variant for run in self}:
            raise ValueError(f"`runs` have no variant {BASELINE_VARIANT!r}, which the others are compared with.")

    def __iter__(self) -> Iterator[GridRun]:
        """Every [`GridRun`], seed by seed."""
        settings: list[tuple[str, str, dict[str, Any], dict[str, Any], str | None]] = []
        for each in chain.from_iterable(map(self._settings_of, self.runs)):
            if each not in settings:
                settings.append(each)
        for seed in self.seeds:
            for name, variant, locality, training, separators in settings:
                folder_name = name if seed == self.seeds[0] else f"{name}-seed{seed}"
                yield GridRun(name, variant, locality, training, seed, folder_name, separators)

    def _settings_of(
        self, entry: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any], str | None]]:
        if "variant" not in entry:
            raise ValueError(f"`runs` holds {dict(entry)!r}, which has no `variant`.")
        lists = {name: values if isinstance(values, list) else [values] for name, values in entry.items()}
        for name, values in lists.items():
            if not values:
                raise ValueError(f"`{name}` is empty; it must hold one entry at least.")
            _check_different(name, values)
        for combination in product(*lists.values()):
            given = dict(zip(lists, combination, strict=True))
            variant = given.pop("variant")
            if not isinstance(variant, str):
                raise ValueError(f"`variant` is {variant!r}; it must be a name.")
            of_variant = variant_config(variant)
            recipe = given.pop("recipe", None)
            if recipe is not None and (not isinstance(recipe, str) or recipe not in RECIPES):
                raise ValueError(f"`recipe` is {recipe!r}; allowed are {', '.join(map(repr, RECIPES))}.")
            separators = given.pop("separators", None)
            if separators is not None:
                if not isinstance(separators, str) or separators not in self.separators:
                    allowed = ", ".join(map(repr, self.separators)) or "none: the grid has no `separators`"
                    raise ValueError(f"`separators` is {separators!r}; allowed are {allowed}.")
                partition = given.get("block_partition", of_variant.get("block_partition", "delimiter"))
                if partition != "delimiter":
                    raise ValueError(
                        f"`separators` is {separators!r}, and the `block_partition` of the variant {variant!r} is "
                        f"{partition!r}; separators are of the partition 'delimiter'."
                    )
                if variant == BASELINE_VARIANT:  # which has no blocks to end
                    separators = None
                else:
                    given["block_partition"] = "delimiter"
            of_recipe = {} if recipe is None else RECIPES[recipe]
            if variant == BASELINE_VARIANT:  # without local layers there is no use for the rest
                given, recipe, of_recipe = of_recipe | given, None, {}
            # What the grid's runs have anyway makes no other run.
            shared = _LOCALITY_FIELDS | LOCALITY_ARGUMENTS | self.locality | of_recipe | self.training
            given = {name: value for name, value in given.items() if name in of_variant or value != shared.get(name)}
            locality = {name: value for name, value in given.items() if name in _LOCALITY_FIELDS}
            for name, value in locality.items():
                if of_variant.get(name, value) != value:
                    raise ValueError(
                        f"`{name}` is {value!r} for the variant {variant!r}, which sets it to {of_variant[name]!r}."
                    )
            locality = self.locality | of_variant | locality
            if locality.get("block_partition") != "window":
                locality.pop(
                    "window_length", None
                )  # so that a run is the same in a grid with windows and in one without
            # `quintic` on windows is the variant `window`.
            variant = variant_name(SimpleNamespace(**(_LOCALITY_FIELDS | locality)))
            training = of_recipe | self.training
            training |= {name: value for name, value in given.items() if name not in locality}
            if variant == BASELINE_VARIANT:
                unused = _OF_LOCALITY - self.training.keys()
                training = {name: value for name, value in training.items() if name not in unused}
            differences = {
                name: value
                for name, value in given.items()
                if name not in VARIANTS[variant] and name in locality | training
            }
            words = [f"{_WORDS.get(name, name.replace('_', '-'))}{_word(value)}" for name, value in differences.items()]
            if separators is not None:
                words = [word for word in words if word != "delimiter"] + [separators]
            name = "-".join([variant, *filter(None, [recipe]), *words])
            yield name, variant, locality, training, separators


def load_grid(name: str | Path) -> Grid:
    """
    Reads a grid.

    Args:
        name (`str` or `Path`):
            `"paper"` (the seven configurations of arXiv:2511.18375 from two seeds), `"quick"` (three of them), or a
            YAML file with the fields of [`Grid`].

    Raises:
        ValueError: for a file that is missing or is no such grid.
    """
    path = resources.files(__package__) / "grids" / f"{Path(name).name}.yaml"
    if Path(name).name != str(name) or not path.is_file():  # what has folders in it is a file of the user's
        path = Path(name)
        if (fault := file_fault(path)) is not None:
            raise ValueError(f"`grid` is {str(name)!r}, which cannot be read: {fault}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=TypedLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"`grid` is {str(name)!r}, which cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`grid` is {str(name)!r}, which is no grid: it must map names to values.")
    names = [each.name for each in fields(Grid)]
    if unknown := [key for key in values if key not in names]:
        raise ValueError(f"`grid` is {str(name)!r}, which has the key {unknown[0]!r}; allowed are {', '.join(names)}.")
    for needed in ("runs", "seeds"):
        if needed not in values:
            raise ValueError(f"`grid` is {str(name)!r}, which has no `{needed}`.")
    return Grid(**values)


def _word(value: Any) -> str:
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


def check_ends(name: str, ends: list[str]) -> None:
    """
    Raises:
        ValueError: for what no token can end with, spaces left out.
    """
    for end in ends:
        if not end or end.endswith(" "):
            raise ValueError(f"`{name}` holds {end!r}; each must be the end of a token, without spaces after it.")


def _check_different(name: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"`{name}` holds {value!r} twice.")
