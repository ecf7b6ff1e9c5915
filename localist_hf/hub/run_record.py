"""What a run trained on what, and what it measured: the one source of the numbers on a model card."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from ..configuration import LOCALITY_ARGUMENTS, VARIANTS
from ..errors import one_line
from ..evaluation.control_results import ControlResults
from ..evaluation.generation import GenerationFigures
from ..modeling import LOCALITY_FIELDS
from ..modeling.locality_dial import DIAL_FIELDS
from ..modeling.locality_schedule import schedule_lambdas
from .record_checks import EARLIER_PART, KEYS, check_controls, check_keys, check_metrics, check_printed, check_type
from .record_file import METRICS_FIELDS, RECORD_FILE, read_values, write_values
from .weights import weight_hashes


#: Stands for the namespace where it is not known yet.
PLACEHOLDER_NAMESPACE = "org"
# What transformers raises for values that make no configuration.
_OF_TRANSFORMERS = (StrictDataclassError, TypeError, AttributeError, LookupError)
# What makes a variant; runs that differ in other fields of locality measure other things.
_VARIANT_FIELDS = tuple(sorted({field for variant in VARIANTS.values() for field in variant}))


@dataclass(frozen=True)
class RunRecord:
    """
    What a run trained on what, and what it measured; `run.json` in the run's folder.

    It holds no path, no host name and no date, so it can be published and does not change when nothing else does.

    Args:
        name (`str`):
            Name of the run; see [`RunRecord.repository_id`].
        variant (`str`, *optional*):
            Locality configuration, where it has a name.
        seed (`int`):
            Random seed of the training.
        base_model (`str`, *optional*):
            Hub id of the model that the training started from.
        base_run (`str`, *optional*):
            Name of the local run or folder that it started from. Neither of the two for random weights.
        base_weights (`dict[str, str]`, *optional*):
            SHA-256 of every weight file of that local run or folder.
        adapter (`dict`, *optional*):
            Rank, alpha, target modules and number of parameters of a LoRA adapter; `"embeddings"`, which is true, where
            it brings all embeddings along, as with tokens that were added to its base; `"base_revision"`, the commit of
            the base on the Hub that it was trained on, where that is known.
        config (`dict`):
            The model's configuration, as a dictionary: [`LocalistGPT2Config`], with the settings of locality among its
            own, or that of any other model, with the settings under `locality`.
        num_parameters (`int`):
            Number of the model's parameters, without an adapter's.
        data (`dict`):
            Name, details, Hub id and configuration of the text, and how much of it was trained and measured on. Where
            the tokenizer puts something before a text, also what (`"text_prefix"`), and whether every sequence that was
            measured on begins with it (`"has_text_prefix"`).
        training (`dict`):
            Number of steps of all parts, and hyper-parameters (of the last part where there are several);
            `"has_other_teacher"`, which is true, where another model's predictions taught it than its own.
        earlier_parts (`list[dict]`):
            What was trained under other settings before, such as the part before a run was resumed with another seed;
            see [`training_parts`].
        metrics (`dict[str, float]`):
            Perplexity, and for every layer context fidelity, attention shares, visible keys, fidelity and entropy, on
            the evaluation part (see [`LocalityMeter.compute`]), on the blocks that the model finds itself. Of a layer
            without counted positions (each token sees its local set only) shares, visible keys and context fidelity
            are NaN (`null` in the file); the context fidelity also where no attention goes to other words. Loss and
            perplexity also at those dials of the training at which the rest was not measured, as
            `"perplexity_at_dial_1"`.
        metrics_on_base_blocks (`dict[str, float]`, *optional*):
            The same on the blocks that the common base of several runs finds.
        versions (`dict[str, str]`):
            Versions of Python and of the libraries.
        hardware (`str`):
            What it ran on.
        weights (`dict[str, str]`):
            SHA-256 of every weight file that the metrics belong to.
        license (`str`, *optional*):
            Licence of the weights, as the Hub spells it.
        language (`str`, *optional*):
            ISO 639-1 code of the text's language.
        example (`dict[str, str]`, *optional*):
            A prompt, and what the code on the card prints for it; see [`attention_example`].
        controls (`dict`, *optional*):
            The same model on other blocks and at other dials, by [`measure_controls`]; see
            [`ControlResults.to_dict`]. Perhaps with `"generation"`, what it writes itself, by [`measure_generation`].

    Raises:
        ValueError: where something is missing or of another type, or a metric is not a finite number.
    """

    name: str
    variant: str | None
    seed: int
    base_model: str | None
    base_run: str | None
    base_weights: dict[str, str] | None
    adapter: dict[str, Any] | None
    config: dict[str, Any]
    num_parameters: int
    data: dict[str, Any]
    training: dict[str, Any]
    earlier_parts: list[dict[str, Any]]
    metrics: dict[str, float]
    metrics_on_base_blocks: dict[str, float] | None
    versions: dict[str, str]
    hardware: str
    weights: dict[str, str]
    license: str | None
    language: str | None
    example: dict[str, str] | None
    controls: dict[str, Any] | None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # Which of the metrics are needed is said below.
            check_type(field.name, value, dict | None if field.name in METRICS_FIELDS else field.type)
            if value is not None:
                check_keys(field.name, value, KEYS.get(field.name, {}))
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"`variant` is {self.variant!r}; allowed are {', '.join(map(repr, VARIANTS))}.")
        for number, part in enumerate(self.earlier_parts):
            check_keys(f"earlier_parts[{number}]", part, EARLIER_PART)
        if not isinstance(self.locality, dict):
            raise ValueError(f"`config.locality` is {self.locality!r}; it must map names to values.")
        if missing := [name for name in LOCALITY_FIELDS if name not in self.locality]:
            raise ValueError(f"`config` has no {missing[0]!r}.")
        schedule_lambdas(self.locality["locality_schedule"], self.num_layers)
        for name in METRICS_FIELDS:
            if (metrics := getattr(self, name)) is not None:
                check_metrics(name, metrics, self.num_layers)
        if self.example is not None:
            check_printed(self.example["printed"])
        if self.controls is not None:
            check_controls(self.controls, self.num_layers, self.locality["num_previous_blocks"])

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """[`~transformers.PreTrainedConfig`]: `config` as an object, which has the same names in every architecture."""
        kind = self.config["model_type"]
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"`config.model_type` is {kind!r}, which transformers {transformers.__version__} has not.")
        try:
            return AutoConfig.for_model(**self.config)
        except _OF_TRANSFORMERS as error:
            name = next((name for name in self.config if name != "model_type" and not self._is_field(name)), None)
            what = "`config`" if name is None else f"`config.{name}`, {self.config[name]!r},"
            raise ValueError(f"{what} makes no configuration of a {kind!r}; transformers: {one_line(error)}") from error

    def _is_field(self, name: str) -> bool:
        """Whether transformers takes this value of `config` alone."""
        try:
            AutoConfig.for_model(self.config["model_type"], **{name: self.config[name]})
        except _OF_TRANSFORMERS:
            return False
        return True

    @property
    def locality(self) -> Mapping[str, Any]:
        """`Mapping[str, Any]`: the settings of locality, the fields of [`LocalityFields`] by name."""
        return self.config.get("locality", self.config)

    @property
    def num_layers(self) -> int:
        """`int`: number of layers."""
        return self.model_config.num_hidden_layers

    @property
    def is_native(self) -> bool:
        """Whether it is a localised model of transformers, whose repository loads as that model too."""
        return "locality" in self.config

    @property
    def architecture(self) -> str:
        """`str`: name of the model's class, which is the native one's of a localised model."""
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.model_config)].__name__

    @property
    def dial(self) -> dict[str, float]:
        """`dict[str, float]`: the dial and the guarantee that the model has unless a call says otherwise, but for 0."""
        return {name: value for name in DIAL_FIELDS if (value := self.locality[name])}

    @property
    def lambdas(self) -> list[float]:
        """`list[float]`: locality of each layer."""
        return schedule_lambdas(self.locality["locality_schedule"], self.num_layers)

    def repository_id(self, namespace: str = PLACEHOLDER_NAMESPACE, name: str | None = None) -> str:
        """The repository of the run, or of this `name`: `namespace/localist-<model type>-<name>`."""
        return repository_id(self.config["model_type"], name or self.name, namespace)

    @property
    def from_scratch(self) -> bool:
        """Whether the training started from random weights."""
        return self.base_model is None and self.base_run is None

    @property
    def objective(self) -> dict[str, Any] | None:
        """`dict[str, Any]`: arguments of the locality loss; `None` where no layer is local and they do nothing."""
        return {name: self.training[name] for name in LOCALITY_ARGUMENTS} if any(self.lambdas) else None

    def is_comparable(self, other: "RunRecord") -> bool:
        """
        Whether two runs differ in nothing but their variant, the locality loss and the seed. Runs with other block
        lengths, sinks or thresholds are not comparable, since their fidelities are shares of something else.
        """
        return all(
            (
                self.base_model == other.base_model,
                self.base_run == other.base_run,
                self.base_weights == other.base_weights,
                self.adapter == other.adapter,
                without(self.config, ("locality", *_VARIANT_FIELDS))
                == without(other.config, ("locality", *_VARIANT_FIELDS)),
                without(self.locality, _VARIANT_FIELDS) == without(other.locality, _VARIANT_FIELDS),
                self.data == other.data,
                without(self.training, LOCALITY_ARGUMENTS) == without(other.training, LOCALITY_ARGUMENTS),
                self.earlier_parts == other.earlier_parts,
            )
        )

    def is_repetition(self, other: "RunRecord") -> bool:
        """Whether two runs differ in nothing but the seed."""
        return self.is_comparable(other) and self.settings == other.settings

    @property
    def settings(self) -> dict[str, Any]:
        """`dict[str, Any]`: what comparable runs may differ in, but for the seed."""
        taught = {"distillation_weight": self.training["distillation_weight"]}
        return {name: self.locality[name] for name in _VARIANT_FIELDS} | (self.objective or taught)

    def is_base_of(self, other: "RunRecord") -> bool:
        """Whether the other run started from this one's weights."""
        return self.weights == other.base_weights

    def save(self, folder: str | Path) -> None:
        """
        Writes the record to a run's folder.

        Raises:
            ValueError: where a file of this name is there that is no record.
        """
        write_values(folder, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "RunRecord":
        """
        Reads the record of a run's folder.

        Raises:
            ValueError: where there is none, or it is not complete.
        """
        path = Path(folder) / RECORD_FILE
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} holds no finished run: there is no {RECORD_FILE}, which `localist-hf train`, "
                "`localist-hf family` and `LocalistTrainer.create_model_card` write."
            )
        try:
            values = read_values(path)
            missing = sorted({field.name for field in fields(cls)} ^ values.keys())
            if missing:
                raise ValueError(f"`{missing[0]}` is missing or unknown.")
            return cls(**values)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} is no record of a run: {one_line(error)}") from error

    @classmethod
    def find(cls, folder: str | Path) -> "RunRecord | None":
        """The record of a folder, read as by `load`; `None` where there is none."""
        return cls.load(folder) if (Path(folder) / RECORD_FILE).is_file() else None

    def with_measurements(
        self,
        metrics_on_base_blocks: Mapping[str, float] | None = None,
        controls: ControlResults | None = None,
        generation: Mapping[str, GenerationFigures] | None = None,
    ) -> "RunRecord":
        """
        The record with what was measured of the same weights after it was made.

        Args:
            metrics_on_base_blocks (`Mapping[str, float]`, *optional*):
                From [`measure`], with the common base as its `block_model`. Without it that of the record stays.
            controls ([`ControlResults`], *optional*):
                From [`measure_controls`]. Without them those of the record stay.
            generation (`Mapping[str, GenerationFigures]`, *optional*):
                From [`measure_generation`]; kept with the controls.

        Example:

        ```python
        >>> record = RunRecord.load(folder)
        >>> record.with_measurements(controls=measure_controls(model, dataset)).save(folder)
        ```
        """
        changes: dict[str, Any] = {}
        if metrics_on_base_blocks is not None:
            changes["metrics_on_base_blocks"] = dict(metrics_on_base_blocks)
        if controls is not None:
            changes["controls"] = controls.to_dict()
        if generation is not None:
            figures = {name: asdict(each) for name, each in generation.items()}
            changes["controls"] = changes.get("controls", self.controls) | {"generation": figures}
        return replace(self, **changes)

    def check_weights(self, folder: str | Path) -> None:
        """
        Checks that the weights in a folder are those that were measured.

        Raises:
            ValueError: for weights that are missing, changed or left over from another run.
        """
        if self.weights != (found := weight_hashes(folder)):
            names = ", ".join(sorted(self.weights.keys() | found.keys())) or "none"
            raise ValueError(
                f"The weights in {str(folder)!r} ({names}) are not those that its {RECORD_FILE} was measured on. "
                "Train or evaluate the run again."
            )


def repository_id(model_type: str, name: str, namespace: str = PLACEHOLDER_NAMESPACE) -> str:
    """The repository of a run of this name: `namespace/localist-<model type>-<name>`."""
    return f"{namespace}/localist-{model_type.removeprefix('localist-')}-{name}"


def check_tags(language: str | None, license: str | None) -> None:
    """
    Raises:
        ValueError: for a language or a licence that has not the form in which the Hub's cards name them.
    """
    if language is not None and not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual", language):
        raise ValueError(
            f"`language` is {language!r}; it must be a code of ISO 639, such as 'en', or 'code' or 'multilingual'."
        )
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.+-]+[a-z0-9]+)*[+]*", license):
        raise ValueError(f"`license` is {license!r}; it must be as the Hub spells it, such as 'apache-2.0' or 'mit'.")


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """All values but those of some names."""
    return {name: value for name, value in values.items() if name not in set(names)}
