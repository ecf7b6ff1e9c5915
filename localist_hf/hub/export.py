"""Export to plain GPT-2, for engines that know no other model and run no code of a repository."""

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..modeling.locality_dial import DIAL_FIELDS
from .adapters import fit_embeddings, has_tokenizer
from .reachability import check_answers


logger = logging.get_logger(__name__)

#: What is read of a source as one JSON object.
_JSON_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"
)  # fmt: skip
#: What there is one of wherever a model or an adapter is saved.
_ENTRIES = ("config.json", "adapter_config.json")
#: Largest difference that merging an adapter may make, as a share of the largest logit: float32 rounding.
_MERGE_TOLERANCE = 1e-5


def export_gpt2(source: str | Path, folder: str | Path) -> None:
    """
    Writes a LocalistGPT2 model as plain GPT-2: weights, configuration, generation configuration, and the tokenizer if
    the source has one. The folder holds no code and no field that GPT-2 does not know. A LoRA adapter is merged into
    its base, in float32 or better, and the result rounded once to the base's dtype.

    Before the folder gets its name, what was written is loaded again and must give, on a fixed text, the very logits of
    the source at dial 0. So the folder is either complete and right, or not there.

    Args:
        source (`str` or `Path`):
            A run folder of LocalistGPT2, or of a LoRA adapter of it or of GPT-2; or the Hub id of either.
        folder (`str` or `Path`):
            Where to write; it must not exist yet, or be empty.

    Raises:
        ValueError: for an occupied `folder`, or a `source` of another kind or without all its weights.
        OSError: for a `source` that cannot be read.
        RuntimeError: where the logits differ.

    Example:

    ```python
    >>> from localist_hf.hub.export import export_gpt2
    >>> from transformers import GPT2LMHeadModel

    >>> export_gpt2("runs/quintic", "exports/quintic-gpt2")
    >>> model = GPT2LMHeadModel.from_pretrained("exports/quintic-gpt2")
    ```
    """
    if os.path.lexists(folder) and not os.path.exists(folder):
        raise ValueError(f"`folder` is {str(folder)!r}, a link that leads nowhere; it must be new or empty.")
    source, target = str(source), Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"`folder` is {str(folder)!r}, which is occupied; it must be new or empty.")
    # On the target's file system, so that the last step is a renaming. Missing parents are made when all is well.
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}; {str(parent)!r} is a file.")
    if Path(source).is_file():
        raise ValueError(f"`source` is {source!r}, which is a file; it must be a run's folder or a Hub id.")
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _ENTRIES):
        raise ValueError(f"`source` is {source!r}; there is no config.json in this folder, so no model is saved there.")
    _check_json(source)
    check_answers(source)
    if _is_adapter(source):
        adapter = _lora_config(source)
        model = _merged_model(source, adapter)
        tokenizer_sources = {source: None, adapter.base_model_name_or_path: adapter.revision}
    else:
        model, tokenizer_sources = _load_model(source), {source: None}

    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as temporary:
        written = Path(temporary) / "gpt2"  # the temporary folder itself is closed to other users
        _plain_gpt2(model).save_pretrained(written)
        _save_tokenizer(tokenizer_sources, written)
        exported = GPT2LMHeadModel.from_pretrained(written, dtype="auto")
        _check_logits("the exported model", _probe_logits(exported), _probe_logits(model), tolerance=0.0)
        target.parent.mkdir(parents=True, exist_ok=True)
        written.rename(target)  # onto nothing or an empty folder; fails if there is something by now


def _check_json(source: str) -> None:
    """Refuses a folder with a damaged file, which transformers would pass over or stumble on without its name."""
    for path in (Path(source) / name for name in _JSON_FILES):
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"`source` is {source!r}, whose {path.name} is damaged: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"`source` is {source!r}, whose {path.name} is damaged: it holds no JSON object.")


def _load_model(name: str, revision: str | None = None, adapter: str | None = None) -> LocalistGPT2LMHeadModel:
    """Loads a model in its own dtype, at dial 0; plain GPT-2 only where it is the base of an adapter."""
    described = f"`source` is {name!r}" if adapter is None else f"`source` is {adapter!r}, an adapter of {name!r}"
    allowed = (LocalistGPT2Config.model_type,) if adapter is None else (LocalistGPT2Config.model_type, "gpt2")
    try:
        # GPT2Config's own: LocalistGPT2Config reads plain GPT-2 as LocalistGPT2.
        values, _ = GPT2Config.get_config_dict(name, revision=revision)
        model_type = values.get("model_type")
        if "locality" in values and adapter is None:
            raise ValueError(
                f"{described}, which is a plain {model_type!r} model already: what knows no locality loads it as it is."
            )
        if model_type not in allowed:
            raise ValueError(
                f"{described}, whose `model_type` is {model_type!r}; it must be {' or '.join(map(repr, allowed))}."
            )
        model, info = LocalistGPT2LMHeadModel.from_pretrained(
            name,
            revision=revision,
            dtype="auto",
            attn_implementation="localist",
            return_dict=True,
            output_attentions=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, SafetensorError) as error:
        raise OSError(f"{described}, which cannot be read: {error}") from error
    except StrictDataclassError as error:
        raise ValueError(f"{described}, whose configuration is wrong: {error}") from error
    if info["mismatched_keys"]:
        weight, found, expected = min(info["mismatched_keys"])
        raise ValueError(
            f"{described}, whose weights do not fit its configuration: {weight} has the shape {tuple(found)}, not "
            f"{tuple(expected)}."
        )
    if info["missing_keys"]:  # transformers has filled them with random numbers
        raise ValueError(f"{described}, which lacks the weights {', '.join(sorted(info['missing_keys']))}.")
    for field in DIAL_FIELDS:
        if getattr(model.config, field):
            logger.warning(
                f"`{field}` of {name} is {getattr(model.config, field)}; plain GPT-2 has no dial, so the export "
                "behaves as the model does at dial 0."
            )
    model.config.locality_dial = model.config.min_fidelity = 0.0
    return model.eval()


def _is_adapter(source: str) -> bool:
    try:
        return find_adapter_config_file(source) is not None
    except OSError:  # no name of a repository; loading it says so, and names the argument
        return False


def _lora_config(source: str) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(source)
    except (OSError, TypeError) as error:
        raise OSError(f"`source` is {source!r}, whose adapter cannot be read: {error}") from error
    if config.peft_type is None or not config.base_model_name_or_path:
        field = "peft_type" if config.peft_type is None else "base_model_name_or_path"
        raise ValueError(f"`source` is {source!r}, whose adapter_config.json has no `{field}`.")
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`source` is {source!r}, an adapter of type {config.peft_type.value!r}; it must be of type 'LORA'."
        )
    return config


def _merged_model(source: str, config: PeftConfig) -> LocalistGPT2LMHeadModel:
    """The base of a LoRA adapter with the adapter merged into its weights, in the base's dtype."""
    base = _load_model(config.base_model_name_or_path, config.revision, adapter=source)
    dtype = base.dtype
    # In bf16 every step would round, and hide from the check whether the merging is right.
    base.to(torch.promote_types(dtype, torch.float32))
    try:
        found = load_peft_weights(source, device="cpu").keys()
        fit_embeddings(base, source)
        adapted = PeftModel.from_pretrained(base, source).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"`source` is {source!r}, whose adapter's weights cannot be read: {error}") from error
    except RuntimeError as error:  # another shape
        raise ValueError(
            f"`source` is {source!r}, whose adapter does not fit {config.base_model_name_or_path!r}: {error}"
        ) from error
    if missing := get_peft_model_state_dict(adapted).keys() - found:
        raise ValueError(f"`source` is {source!r}, whose adapter lacks the weights {', '.join(sorted(missing))}.")
    logits = _probe_logits(adapted)
    merged = adapted.merge_and_unload()
    _check_logits("the merged adapter", _probe_logits(merged), logits, tolerance=_MERGE_TOLERANCE)
    return merged.to(dtype)


def _plain_gpt2(model: LocalistGPT2LMHeadModel) -> GPT2LMHeadModel:
    """GPT-2 around the very same weights."""
    config = GPT2Config(**{field.name: getattr(model.config, field.name) for field in fields(GPT2Config)})
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(model.state_dict(), assign=True)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    return gpt2


def _save_tokenizer(sources: Mapping[str, str | None], folder: Path) -> None:
    """
    Saves the tokenizer of the first source, at its revision, that has one, in words that transformers 4 knows too.
    """
    source = next((source for source, revision in sources.items() if has_tokenizer(source, revision)), None)
    if source is None:
        return
    tokenizer = AutoTokenizer.from_pretrained(source, revision=sources[source] or "main")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(name, None)
    if config["tokenizer_class"] == "TokenizersBackend":
        # The older name of the class; and its older form would make `token_type_ids`, which GPT-2 adds to the tokens.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _probe_logits(model: nn.Module) -> torch.Tensor:
    """The logits of a fixed text, of 64 tokens or as many as the model has positions."""
    length = min(64, model.config.max_position_embeddings)
    tokens = torch.arange(length) * 7919 % model.config.vocab_size  # a prime, so as to visit the whole vocabulary
    # Kernels may round differently where the same weights lie otherwise in memory, as those read from two files do.
    model = copy.deepcopy(model)
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits


def _check_logits(what: str, logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance * expected.abs().max().item():  # nan is refused too
        raise RuntimeError(f"The logits of {what} differ from the source's by up to {difference}; nothing was written.")
