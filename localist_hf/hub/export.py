"""Export to plain GPT-2, for engines that know no other model and run no code of a repository."""

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftType
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import InputError, reraised_as
from ..modeling import LocalistGPT2Config
from ..modeling.locality_dial import DIAL_FIELDS
from .adapters import has_tokenizer
from .loading import check_name, find_adapter, load_adapter, load_config, load_model, load_tokenizer
from .repository_files import read_json


logger = logging.get_logger(__name__)

#: What is read of a source as one JSON object.
_JSON_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"
)  # fmt: skip
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
        ValueError: for an occupied `folder`, or a `source` that cannot be read, is of another kind or lacks weights.
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
    check_name(source, "source")
    _check_json(source)
    places = [(source, "main", "source")]
    localist = LocalistGPT2Config.model_type
    if (adapter := find_adapter(source, flag="source")) is None:
        model = _load_model(*places[0], allowed=(localist,))
    else:
        if adapter.peft_type != PeftType.LORA:
            kind = getattr(adapter.peft_type, "value", None)
            raise ValueError(f"`source` is {source!r}, an adapter of type {kind!r}; it must be of type 'LORA'.")
        places.append((adapter.base_model_name_or_path, adapter.revision or "main", "source's base"))
        model = _merged_model(source, _load_model(*places[1], allowed=(localist, "gpt2")))

    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as temporary:
        written = Path(temporary) / "gpt2"  # the temporary folder itself is closed to other users
        _plain_gpt2(model).save_pretrained(written)
        _save_tokenizer(places, written)
        exported = GPT2LMHeadModel.from_pretrained(written, dtype="auto")
        _check_logits("the exported model", _probe_logits(exported), _probe_logits(model), tolerance=0.0)
        target.parent.mkdir(parents=True, exist_ok=True)
        written.rename(target)  # onto nothing or an empty folder; fails if there is something by now


def _check_json(source: str) -> None:
    """Refuses a folder with a damaged file, which transformers would pass over or stumble on without its name."""
    with reraised_as(InputError, ValueError, what=f"`source` is {source!r}, which cannot be read: "):
        for path in (Path(source) / name for name in _JSON_FILES):
            if path.is_file():
                read_json(path)


def _load_model(name: str, revision: str, flag: str, allowed: tuple[str, ...]) -> PreTrainedModel:
    """Loads a model of an allowed type in its own dtype, at dial 0; `revision` and `flag` as for [`load_config`]."""
    config = load_config(name, {}, revision, flag)
    saved, _ = PreTrainedConfig.get_config_dict(name, revision=revision)  # plain GPT-2 is loaded as LocalistGPT2
    model_type = saved.get("model_type")
    if "locality" in saved and "gpt2" not in allowed:
        raise ValueError(
            f"`{flag}` is {name!r}, which is a plain {model_type!r} model already: what knows no locality loads it as "
            "it is."
        )
    if model_type not in allowed:
        raise ValueError(
            f"`{flag}` is {name!r}, whose `model_type` is {model_type!r}; it must be {' or '.join(map(repr, allowed))}."
        )
    for field in DIAL_FIELDS:
        if value := getattr(config.locality, field):
            logger.warning(
                f"`{field}` of {name} is {value}; plain GPT-2 has no dial, so the export behaves as the model does at "
                "dial 0."
            )
            setattr(config.locality, field, 0.0)
    return load_model(name, config, revision=revision, flag=flag)


def _merged_model(source: str, base: PreTrainedModel) -> PreTrainedModel:
    """The base of a LoRA adapter with the adapter merged into its weights, in the base's dtype."""
    dtype = base.dtype
    # In bf16 every step would round, and hide from the check whether the merging is right.
    base.to(torch.promote_types(dtype, torch.float32))
    adapted = load_adapter(base, source, flag="source").eval()
    logits = _probe_logits(adapted)
    merged = adapted.merge_and_unload()
    _check_logits("the merged adapter", _probe_logits(merged), logits, tolerance=_MERGE_TOLERANCE)
    return merged.to(dtype)


def _plain_gpt2(model: PreTrainedModel) -> GPT2LMHeadModel:
    """GPT-2 around the very same weights."""
    config = GPT2Config(**{field.name: getattr(model.config, field.name) for field in fields(GPT2Config)})
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(model.state_dict(), assign=True)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    return gpt2


def _save_tokenizer(places: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """
    Saves the tokenizer of the first place that has one, each as [`load_tokenizer`] takes it, in words that transformers
    4 knows too.
    """
    place = next((place for place in places if has_tokenizer(*place[:2])), None)
    if place is None:
        return
    tokenizer = load_tokenizer(*place)
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
