"""What a run trained on what, and what it measured: the one source of the numbers on a model card."""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import peft
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration import LOCALITY_ARGUMENTS, VARIANTS, variant_name
from ..evaluation import text_prefix
from ..evaluation.control_results import ControlResults
from ..evaluation.generation import GenerationFigures
from ..evaluation.text_prefix import have_prefix
from ..modeling.locality_dial import DIAL_FIELDS
from ..modeling.locality_mixin import SHARES
from ..modeling.locality_schedule import schedule_lambdas
from ..version import __version__
from ..whole_file import write_whole
from .adapters import brings_embeddings
from .example import attention_example, stored_config
from .run_history import (
    LOCALITY_FIELDS,
    RECORD_FILE,
    find_base,
    find_history,
    has_best_weights,
    training_parts,
    weight_hashes,
)


logger = logging.get_logger(__name__)

#: Stands for the namespace where it is not known yet.
PLACEHOLDER_NAMESPACE = "org"
# What makes a variant; runs that differ in other fields of locality measure other things.
_VARIANT_FIELDS = tuple(sorted({field for variant in VARIANTS.values() for field in variant}))
# What the card reads of the fields that are dictionaries.
_KEYS = {
    "config": ("model_type",),
    "data": (
        "name", "details", "dataset_id", "dataset_config", "evaluation_split", "training_sequences",
        "evaluation_sequences", "evaluation_lengths",
    ),
    "training": (
        "steps", "batch_size", "optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "betas",
        "max_grad_norm", "precision", *LOCALITY_ARGUMENTS,
    ),
    "adapter": ("rank", "alpha", "target_modules", "parameters"),
    "versions": ("localist-hf",),
    "example": ("prompt", "printed"),
    "controls": (
        "layers", "blocks", "dials", "perplexity", "retention", "self_only_perplexity", "all_local_perplexity",
        "all_local_self_only_perplexity", "divergence",
    ),
}  # fmt: skip
# The fields that hold an evaluation.
_METRICS = ("metrics", "metrics_on_base_blocks")
# What is measured overall and of every layer, always a number, and what is none where no position counts.
_ALWAYS = ("fidelity", "entropy")
_WHERE_COUNTED = (*SHARES, "context_share", "visible_keys")
_MEASURED = ("loss", "perplexity", *_ALWAYS, *_WHERE_COUNTED, "context_fidelity")


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
            Number of steps of all parts, and hyper-parameters (of the last part where there are several).
        earlier_parts (`list[dict]`):
            What was trained under other settings before, such as the part before a run was resumed with another seed;
            see [`training_parts`].
        metrics (`dict[str, float]`):
            Perplexity, and for every layer context fidelity, attention shares, visible keys, fidelity and entropy, on
            the evaluation part (see [`LocalityMeter.compute`]), on the blocks that the model finds itself. Of a layer
            without counted positions (each token sees its local set only) shares, visible keys and context fidelity
            are NaN (`null` in the file); the context fidelity also where no attention goes to other words.
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
            kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
            if not isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)):
                raise ValueError(f"`{field.name}` is {value!r}; it must be of type {field.type}.")
            missing = [key for key in _KEYS.get(field.name, ()) if value is not None and key not in value]
            if missing:
                raise ValueError(f"`{field.name}` has no {missing[0]!r}.")
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"`variant` is {self.variant!r}; allowed are {', '.join(map(repr, VARIANTS))}.")
        for part in self.earlier_parts:
            if missing := {"steps", "planned_steps", "seed", "variant", "locality", "training"} - part.keys():
                raise ValueError(f"`earlier_parts` holds one without {min(missing)!r}.")
        if missing := [name for name in LOCALITY_FIELDS if name not in self.locality]:
            raise ValueError(f"`config` has no {missing[0]!r}.")
        schedule_lambdas(self.locality["locality_schedule"], self.num_layers)
        for name in _METRICS:
            if (metrics := getattr(self, name)) is not None:
                _check_metrics(name, metrics, self.num_layers)
        if self.controls is not None:
            _check_controls(self.controls, self.num_layers, self.locality["num_previous_blocks"])

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """[`~transformers.PreTrainedConfig`]: `config` as an object, which has the same names in every architecture."""
        try:
            return AutoConfig.for_model(**self.config)
        except StrictDataclassError as error:
            raise ValueError(f"`config` is no configuration of a {self.config['model_type']!r}: {error}") from error

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
        return _repository_id(self.config["model_type"], name or self.name, namespace)

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
                _without(self.config, ("locality", *_VARIANT_FIELDS))
                == _without(other.config, ("locality", *_VARIANT_FIELDS)),
                _without(self.locality, _VARIANT_FIELDS) == _without(other.locality, _VARIANT_FIELDS),
                self.data == other.data,
                _without(self.training, LOCALITY_ARGUMENTS) == _without(other.training, LOCALITY_ARGUMENTS),
                self.earlier_parts == other.earlier_parts,
            )
        )

    def is_repetition(self, other: "RunRecord") -> bool:
        """Whether two runs differ in nothing but the seed."""
        return self.is_comparable(other) and self.settings == other.settings

    @property
    def settings(self) -> dict[str, Any]:
        """`dict[str, Any]`: what comparable runs may differ in, but for the seed."""
        return {name: self.locality[name] for name in _VARIANT_FIELDS} | (self.objective or {})

    def is_base_of(self, other: "RunRecord") -> bool:
        """Whether the other run started from this one's weights."""
        return self.weights == other.base_weights

    def save(self, folder: str | Path) -> None:
        """
        Writes the record to a run's folder.

        Raises:
            ValueError: where a file of this name is there that is no record.
        """
        path = Path(folder) / RECORD_FILE
        check_record(folder)
        values = asdict(self)
        for name in _METRICS:
            if (metrics := values[name]) is not None:
                values[name] = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        text = json.dumps(values, indent=2, allow_nan=False)
        # Lists of numbers in one line each; strings have their line ends escaped.
        text = re.sub(r'\[\n([^\[\]{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
        write_whole(path, f"{text}\n")

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
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object.")
            if isinstance(metrics := values.get("metrics"), dict) and "context_fidelity" not in metrics:
                raise ValueError("it is of localist-hf 0.1, which measured no attention shares; train the run again.")
            missing = sorted({field.name for field in fields(cls)} ^ values.keys())
            if missing:
                raise ValueError(f"`{missing[0]}` is missing or unknown.")
            for name in _METRICS:
                if isinstance(metrics := values[name], dict):
                    values[name] = {key: math.nan if value is None else value for key, value in metrics.items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no record of a run: {error}") from error

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

    @classmethod
    def from_trainer(
        cls,
        trainer: transformers.Trainer,
        name: str | None = None,
        dataset: str | None = None,
        dataset_details: str = "",
        dataset_id: str | None = None,
        dataset_config: str | None = None,
        evaluation_split: str = "evaluation",
        base_model: str | None = None,
        language: str | None = None,
        license: str | None = None,
    ) -> "RunRecord":
        """
        The record of a trainer that has trained, evaluated and saved its model.

        Args:
            trainer ([`~transformers.Trainer`]):
                The trainer, with a [`RunHistory`] among its callbacks.
            name (`str`, *optional*):
                Name of the run. Defaults to that of the variant, with `-lora` for an adapter, or else of the folder;
                never to that of the run that it started from.
            dataset (`str`, *optional*), dataset_details (`str`, *optional*):
                Name of the text, and a sentence on how it was used.
            dataset_id (`str`, *optional*), dataset_config (`str`, *optional*):
                Hub id and configuration of the data set, where it has one.
            evaluation_split (`str`, *optional*, defaults to `"evaluation"`):
                Name of the part that was measured on.
            base_model (`str`, *optional*):
                Hub id of the base. Defaults to where the model was loaded from.
            language (`str`, *optional*), license (`str`, *optional*):
                As on the Hub.

        Raises:
            ValueError: for a language or a licence of another form; without an evaluation of the trainer's present
                weights, or without saved weights; for a `name` that no repository can have or that is the base's.
        """
        check_tags(language, license)
        model, args = trainer.model, trainer.args
        folder = Path(args.output_dir)
        config = stored_config(model.get_base_model()) if isinstance(model, PeftModel) else model.config
        adapter, num_parameters = None, model.num_parameters()
        if isinstance(model, PeftModel):
            trained, total = model.get_nb_trainable_parameters()
            num_parameters = total - trained
            lora = model.active_peft_config
            targets = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
            adapter = {
                "rank": lora.r,
                "alpha": lora.lora_alpha,
                "target_modules": targets,
                "parameters": trained,
            }
        history = find_history(trainer)
        base = history.base or find_base(history.started_from)
        if base_model is not None:
            try:
                validate_repo_id(base_model)
            except ValueError as error:
                raise ValueError(f"`base_model` is {base_model!r}, which is no Hub id: {error}") from error
            base = {"base_model": base_model, "base_run": None, "base_weights": None}
        variant = variant_name(config.locality)
        metrics = last_evaluation(trainer)
        if metrics is None:
            raise ValueError(
                f"The weights of step {trainer.state.global_step} have not been evaluated, so there is no number for "
                "the card; call `trainer.evaluate()` on them first."
            )
        weights = weight_hashes(folder)
        if not weights:
            raise ValueError(f"`output_dir` {args.output_dir!r} holds no weights; call `save_model()` first.")
        if adapter is not None and brings_embeddings(folder, config.get_text_config().vocab_size):
            adapter["embeddings"] = True
        # Of what was loaded from the Hub, transformers notes it.
        if adapter is not None and base["base_model"] == history.started_from:
            revision = getattr(model.get_base_model().config, "_commit_hash", None) or lora.revision
            adapter |= {} if revision is None else {"base_revision": revision}
        wanted = f"{variant}-lora" if variant and adapter else variant
        *earlier_parts, last_part = training_parts(trainer)
        return cls(
            name=_free_name(wanted, folder, base, config) if name is None else _checked_name(name, base, config),
            variant=variant,
            seed=last_part["seed"],
            **base,
            adapter=adapter,
            # Where it was loaded from is a path of this machine, and the rest depends on who saves it.
            config=_without(config.to_dict(), ("_name_or_path", "auto_map", "architectures", "transformers_version")),
            num_parameters=num_parameters,
            data={
                "name": dataset,
                "details": dataset_details,
                "dataset_id": dataset_id,
                "dataset_config": dataset_config,
                "evaluation_split": evaluation_split,
                "training_sequences": _length(trainer.train_dataset),
                "evaluation_sequences": _length(trainer.eval_dataset),
                "evaluation_lengths": _lengths(trainer.eval_dataset),
            }
            | _text_prefix(trainer),
            training={"steps": last_part["steps"] + sum(part["steps"] for part in earlier_parts)}
            | last_part["training"],
            earlier_parts=earlier_parts,
            metrics=metrics,
            metrics_on_base_blocks=None,
            versions={
                "Python": platform.python_version(),
                "localist-hf": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            }
            | ({"peft": peft.__version__} if adapter else {}),
            hardware=_hardware(args.device, args.world_size),
            weights=weights,
            license=license,
            language=language,
            example=attention_example(model, trainer.processing_class, folder),
            controls=None,
        )


def last_evaluation(trainer: transformers.Trainer) -> dict[str, float] | None:
    """What the evaluation of the trainer's present weights measured; `None` where there was none."""
    for entry in reversed(trainer.state.log_history):
        if "train_runtime" in entry and has_best_weights(trainer.args, trainer.state):
            return None  # what was measured before the best weights were loaded was measured on others
        if "eval_perplexity" in entry and entry["step"] == trainer.state.global_step:
            metrics = {name.removeprefix("eval_"): value for name, value in entry.items()}
            return {name: value for name, value in metrics.items() if name.partition("_layer_")[0] in _MEASURED}
    return None


def check_record(folder: str | Path) -> None:
    """
    Checks that a record can be written to a folder.

    Raises:
        ValueError: where a file of its name is there that is no record of a run, of whatever version.
    """
    path = Path(folder) / RECORD_FILE
    if not os.path.lexists(path):
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict) or not {"name", "metrics", "weights"} <= values.keys():
        raise ValueError(f"{str(path)!r} is no record of a run, and would be overwritten; move it away.")


def load_siblings(folder: str | Path) -> list[RunRecord]:
    """
    The record of a run, then those of the finished runs beside it that are its [`siblings`]. What is no record is
    passed over with a warning.
    """
    record = RunRecord.load(folder)
    folder = Path(folder).resolve()
    others = []
    for path in sorted(folder.parent.glob(f"*/{RECORD_FILE}")):
        if path.parent == folder:
            continue
        try:
            others.append(RunRecord.load(path.parent))
        except (ValueError, OSError) as error:
            logger.warning(f"A folder beside {folder.name!r} is passed over: {error}")
    return [record, *siblings(record, others)]


def siblings(record: RunRecord, others: Iterable[RunRecord]) -> list[RunRecord]:
    """
    The runs that the card of another one speaks of: those that differ from it in their locality and seed only, the run
    that they all started from, or, of such a base, the runs that started from it.
    """
    return [
        other for other in others if other.is_comparable(record) or other.is_base_of(record) or record.is_base_of(other)
    ]


def _repository_id(model_type: str, name: str, namespace: str = PLACEHOLDER_NAMESPACE) -> str:
    return f"{namespace}/localist-{model_type.removeprefix('localist-')}-{name}"


def _parents(base: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """Names of runs that a base may have."""
    prefix = _repository_id(config.model_type, "").rpartition("/")[2]
    hub_name = (base["base_model"] or "").rpartition("/")[2].removeprefix(prefix)
    return [name for name in (base["base_run"], hub_name) if name]


def _checked_name(name: str, base: Mapping[str, Any], config: PreTrainedConfig) -> str:
    if name in _parents(base, config):
        raise ValueError(f"`name` is {name!r}, the name of the model that the run started from; it must be another.")
    try:
        validate_repo_id(_repository_id(config.model_type, name))
    except ValueError as error:
        raise ValueError(f"`name` is {name!r}, which no repository can be called: {error}") from error
    return name


def _free_name(variant: str | None, folder: Path, base: Mapping[str, Any], config: PreTrainedConfig) -> str:
    """The variant's name, or else the folder's; another where the base (or what that started from) is called so."""
    parents = _parents(base, config)
    # As a repository may be called, whatever the folder's name.
    folder_name = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)).strip("-.")[:80]
    names = [name for name in (variant, folder_name) if name] + [f"{parent}-2" for parent in parents] + ["run"]
    return next(
        name for name in names if not any(parent == name or parent.startswith(f"{name}-") for parent in parents)
    )


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


def _check_metrics(field: str, metrics: Mapping[str, float], num_layers: int) -> None:
    for part in ("", *(f"_layer_{layer}" for layer in range(num_layers))):
        needed = [f"{name}{part}" for name in _ALWAYS] + ([] if part else ["loss", "perplexity"])
        counted, psi = [f"{name}{part}" for name in _WHERE_COUNTED], f"context_fidelity{part}"
        values = {name: metrics.get(name) for name in (*needed, *counted, psi)}
        undefined = {name for name, value in values.items() if value != value}  # NaN
        if not undefined.issuperset(counted):
            needed += counted
            if psi not in undefined or values[f"context_share{part}"] != 0:
                needed.append(psi)
        for name in needed:
            if not (isinstance(values[name], int | float) and math.isfinite(values[name])):
                raise ValueError(f"`{field}` must hold a finite number {name!r}; it is {values[name]}.")


def _check_controls(controls: Mapping[str, Any], num_layers: int, number: int) -> None:
    layers = controls["layers"]
    if (last := num_layers - 1) not in layers:
        raise ValueError(f"`controls` are of the layers {layers}; the last, {last}, must be among them.")
    if number not in [blocks["num_previous_blocks"] for blocks in controls["blocks"]]:
        raise ValueError(f"`controls` must hold the blocks with {number} before them, as the configuration has it.")
    figures = [dial["locality"] for dial in controls["dials"]]
    for blocks in controls["blocks"]:
        figures += [blocks["own"], blocks["wrong"], *filter(None, (blocks["windows"], blocks["recency"]))]
    for name in ("visible_keys", "context_fidelity", "context_share", "fidelity"):
        if any(len(figure[name]) != len(layers) for figure in figures):
            raise ValueError(f"`controls` must hold {name!r} of each of the layers {layers}.")


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in set(names)}


def _length(dataset: Any) -> int | None:
    """Number of sequences; `None` for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def _lengths(dataset: Any) -> list[int]:
    """Tokens of the shortest and of the longest sequence."""
    try:
        lengths = [len(row["input_ids"]) for row in dataset]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "`eval_dataset` must be a data set with a column `input_ids`, for the card to say what was measured on."
        ) from error
    return [min(lengths), max(lengths)]


def _text_prefix(trainer: transformers.Trainer) -> dict[str, Any]:
    """What [`RunRecord`]'s `data` says of how texts begin; nothing where the tokenizer puts nothing before them."""
    tokenizer = trainer.processing_class
    if not (isinstance(tokenizer, PreTrainedTokenizerBase) and (prefix := text_prefix(tokenizer))):
        return {}
    return {"text_prefix": tokenizer.decode(prefix), "has_text_prefix": have_prefix(trainer.eval_dataset, prefix)}


def _hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    processes = f"{world_size} processes, " if world_size > 1 else ""
    return f"{processes}{device.type.upper()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
