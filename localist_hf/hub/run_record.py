"""What a run trained on what, and what it measured: the one source of the numbers on a model card."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel

from ..configuration import variant_name
from ..modeling import LocalistGPT2Config
from ..modeling.locality_schedule import schedule_lambdas
from ..version import __version__


#: The record's file in a run's folder.
RECORD_FILE = "run.json"
_LOCALITY_FIELDS = tuple(LocalistGPT2Config.__annotations__)
_LOCALITY_ARGUMENTS = ("target_fidelity", "locality_weight", "locality_exponent", "locality_warmup_steps")


@dataclass(frozen=True)
class RunRecord:
    """
    What a run trained on what, and what it measured; `run.json` in the run's folder.

    It holds no path, no host name and no date, so it can be published and does not change when nothing else does.

    Args:
        name (`str`):
            Name of the run; its repository is `localist-gpt2-<name>`.
        variant (`str`, *optional*):
            Locality configuration, where it has a name.
        seed (`int`):
            Random seed of the training.
        base_model (`str`, *optional*):
            Hub id of the model that the training started from.
        base_run (`str`, *optional*):
            Name of the local run or folder that it started from. Neither of the two for random weights.
        adapter (`dict`, *optional*):
            Rank, alpha, target modules and number of parameters of a LoRA adapter.
        config (`dict`):
            The model's [`LocalistGPT2Config`], as a dictionary.
        num_parameters (`int`):
            Number of the model's parameters, without an adapter's.
        data (`dict`):
            Name, details, Hub id and configuration of the text, and how much of it was trained and measured on.
        training (`dict`):
            Hyper-parameters.
        metrics (`dict[str, float]`):
            Perplexity, and fidelity and entropy of every layer, on the evaluation part (see
            [`LocalityMeter.compute`]), on the blocks that the model finds itself.
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

    Raises:
        ValueError: where a metric is missing or not a finite number.
    """

    name: str
    variant: str | None
    seed: int
    base_model: str | None
    base_run: str | None
    adapter: dict[str, Any] | None
    config: dict[str, Any]
    num_parameters: int
    data: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, float]
    metrics_on_base_blocks: dict[str, float] | None
    versions: dict[str, str]
    hardware: str
    weights: dict[str, str]
    license: str | None
    language: str | None

    def __post_init__(self) -> None:
        for field, metrics in (
            ("metrics", self.metrics),
            ("metrics_on_base_blocks", self.metrics_on_base_blocks),
        ):
            if metrics is not None:
                _check_metrics(field, metrics, self.config["n_layer"])

    @property
    def lambdas(self) -> list[float]:
        """`list[float]`: locality of each layer."""
        return schedule_lambdas(self.config["locality_schedule"], self.config["n_layer"])

    @property
    def from_scratch(self) -> bool:
        """Whether the training started from random weights."""
        return self.base_model is None and self.base_run is None

    def is_comparable(self, other: "RunRecord") -> bool:
        """Whether two runs differ in nothing but their locality and their seed."""
        return all(
            (
                self.base_model == other.base_model,
                self.base_run == other.base_run,
                self.adapter == other.adapter,
                _without(self.config, _LOCALITY_FIELDS) == _without(other.config, _LOCALITY_FIELDS),
                self.data == other.data,
                _without(self.training, _LOCALITY_ARGUMENTS) == _without(other.training, _LOCALITY_ARGUMENTS),
            )
        )

    def save(self, folder: str | Path) -> None:
        """Writes the record to a run's folder."""
        path = Path(folder) / RECORD_FILE
        unfinished = path.with_name(f".{RECORD_FILE}")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)

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
            missing = sorted({field.name for field in fields(cls)} ^ values.keys())
            if missing:
                raise ValueError(f"`{missing[0]}` is missing or unknown.")
            return cls(**values)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no record of a run: {error}") from error

    @classmethod
    def find(cls, folder: str | Path) -> "RunRecord | None":
        """The record of a folder, read as by `load`; `None` where there is none."""
        return cls.load(folder) if (Path(folder) / RECORD_FILE).is_file() else None

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
            trainer ([`LocalistTrainer`]):
                The trainer.
            name (`str`, *optional*):
                Name of the run. Defaults to that of the variant, with `-lora` for an adapter, or else of the folder.
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
            ValueError: without an evaluation of the trainer's present weights, or without saved weights.
        """
        model, args = trainer.model, trainer.args
        folder = Path(args.output_dir)
        config = model.config
        adapter, num_parameters = None, model.num_parameters()
        if isinstance(model, PeftModel):
            trained, total = model.get_nb_trainable_parameters()
            num_parameters = total - trained
            lora = model.active_peft_config
            adapter = {
                "rank": lora.r,
                "alpha": lora.lora_alpha,
                "target_modules": sorted(lora.target_modules),
                "parameters": trained,
            }
        base_run = None
        if base_model is None and trainer.started_from:
            source = Path(trainer.started_from)
            base_model, base_run = (None, _run_name(source)) if source.is_dir() else (trainer.started_from, None)
        variant = variant_name(config)
        metrics = last_evaluation(trainer)
        if metrics is None:
            raise ValueError(
                f"The weights of step {trainer.state.global_step} have not been evaluated, so there is no number for "
                "the card; call `trainer.evaluate()` on them first."
            )
        weights = weight_hashes(folder)
        if not weights:
            raise ValueError(f"`output_dir` {args.output_dir!r} holds no weights; call `save_model()` first.")
        return cls(
            name=name or (f"{variant}-lora" if variant and adapter else variant) or folder.resolve().name,
            variant=variant,
            seed=args.seed,
            base_model=base_model,
            base_run=base_run,
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
            },
            training=_hyperparameters(trainer),
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
        )


def last_evaluation(trainer: transformers.Trainer) -> dict[str, float] | None:
    """What the evaluation of the trainer's present weights measured; `None` where there was none."""
    for entry in reversed(trainer.state.log_history):
        if "eval_perplexity" in entry and entry["step"] == trainer.state.global_step:
            metrics = {name.removeprefix("eval_"): value for name, value in entry.items()}
            kinds = ("loss", "perplexity", "fidelity", "entropy")
            return {name: value for name, value in metrics.items() if name.split("_")[0] in kinds}
    return None


def weight_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every weight file in a folder, by its name."""
    hashes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def load_siblings(folder: str | Path) -> list[RunRecord]:
    """
    The records of the finished runs beside a run, its own first: those that differ from it in their locality and seed
    only, the run that they all started from, or, of such a base, the runs that started from it.
    """
    folder = Path(folder).resolve()
    record = RunRecord.load(folder)
    paths = sorted(folder.parent.glob(f"*/{RECORD_FILE}"))
    others = [RunRecord.load(path.parent) for path in paths if path.parent != folder]
    return [record] + [other for other in others if other.is_comparable(record) or _is_base(other, record)]


def _is_base(one: RunRecord, other: RunRecord) -> bool:
    """Whether one of the two started from the other."""
    return one.name == other.base_run or other.name == one.base_run


def _check_metrics(field: str, metrics: Mapping[str, float], num_layers: int) -> None:
    names = ["loss", "perplexity", "fidelity", "entropy"]
    names += [f"{name}_layer_{layer}" for name in ("fidelity", "entropy") for layer in range(num_layers)]
    for name in names:
        if not math.isfinite(metrics.get(name, math.nan)):
            raise ValueError(f"`{field}` must hold a finite number {name!r}; it is {metrics.get(name)}.")


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in set(names)}


def _run_name(folder: Path) -> str:
    """The name of the run in a folder; the folder's own name where it holds no record."""
    record = RunRecord.find(folder)
    return folder.resolve().name if record is None else record.name


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


def _hyperparameters(trainer: transformers.Trainer) -> dict[str, Any]:
    args = trainer.args
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return {
        "steps": trainer.state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "betas": [args.adam_beta1, args.adam_beta2],
        "max_grad_norm": args.max_grad_norm,
        "precision": precision,
    } | {name: getattr(args, name) for name in _LOCALITY_ARGUMENTS}


def _hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    processes = f"{world_size} processes, " if world_size > 1 else ""
    return f"{processes}{device.type.upper()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
