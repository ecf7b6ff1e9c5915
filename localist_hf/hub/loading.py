"""Loads models and adapters by name: GPT-2 as LocalistGPT2, and any other causal language model localised."""

import copy
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import InputError, one_line, reraised_as
from ..evaluation.check_model import num_positions
from ..evaluation.text_prefix import known_text
from ..json_text import load_json
from ..modeling import LOCALITY_FIELDS, LocalistGPT2Config, LocalistGPT2LMHeadModel, localize
from .adapters import fit_embeddings, has_tokenizer
from .reachability import check_answers, unreachable
from .run_record import RunRecord


#: What a run keeps in its folder from its beginning: its settings, or its place in a grid.
SETTINGS_FILE, PLAN_FILE = "run_settings.json", "plan.json"
#: What is relied on, whatever a checkpoint says: that calls return what is asked for, by name, and localist attention.
#: Other attention cannot be measured, and a configuration that asks for its weights cannot be saved.
_OUTPUTS = {
    "return_dict": True, "output_attentions": False, "output_hidden_states": False, "_attn_implementation": None
}  # fmt: skip


def check_name(name: str, flag: str = "model") -> None:
    """
    Checks what can be known of a model's name without asking anybody: that it is a folder with a model or an adapter in
    it, or may be a Hub id.

    Args:
        name (`str`):
            The model's folder or Hub id.
        flag (`str`, *optional*, defaults to `"model"`):
            What a message calls it.

    Raises:
        ValueError: where it is neither.
    """
    what, folder = f"`{flag}` is {name!r}", Path(name)
    if os.path.isdir(name):
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{what}; there is no config.json in this folder.{_unfinished(folder)}")
        return
    if os.path.exists(name):
        raise ValueError(f"{what}, which is a file; it must be a model's folder or Hub id.")
    if os.path.lexists(name):
        raise ValueError(f"{what}, a link that leads nowhere; it must be a model's folder or Hub id.")
    try:
        validate_repo_id(name)
    except ValueError:
        raise ValueError(
            f"{what}; there is no such folder, and a model on the Hub is called NAMESPACE/NAME or NAME."
        ) from None


def _unfinished(folder: Path) -> str:
    """Says what to do about a folder in which a training began and no model is saved."""
    if (folder / PLAN_FILE).is_file():
        return " Its run is not finished; start the same `localist-hf family` again."
    if not (folder / SETTINGS_FILE).is_file():
        return ""
    if get_last_checkpoint(folder) is not None:
        command = f"localist-hf train --output-dir {shlex.quote(str(folder))} --resume_from_checkpoint true"
        return f" Its run is not finished; go on with `{command}`."
    return " Its run is not finished, and left no checkpoint to go on from; start it again."


def _missing(name: str) -> str:
    """Says so where a name may have been meant for a folder, and the Hub has no such model either."""
    parent = os.path.dirname(name)
    is_missing = parent and os.path.isdir(parent) and not os.path.exists(name)
    return f"there is no such folder in {parent!r}, and on the Hub: " if is_missing else ""


def load_config(name: str, settings: dict[str, Any], revision: str = "main", flag: str = "model") -> PreTrainedConfig:
    """
    Loads the configuration of a model under some settings of locality, once it is known that the model can be
    localised; no weight is read for that. No code out of a repository is run: it is transformers' class that is loaded,
    and localised by this library.

    Args:
        name (`str`):
            The model's folder or Hub id.
        settings (`dict[str, Any]`):
            Fields of [`LocalityFields`], in place of those that the model was saved with; for GPT-2 any fields of
            [`LocalistGPT2Config`].
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        flag (`str`, *optional*, defaults to `"model"`):
            What a message calls the name.

    Raises:
        ValueError: where it cannot be read, or the model cannot be localised so.
    """
    folder = Path(name)
    check_name(name, flag)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`{flag}` is {name!r}; there is no config.json in this folder. It holds an adapter; give its base."
        )
    # What strangers have written may be anything: no list of exceptions is complete.
    try:
        with reraised_as(
            InputError, Exception, what=f"`{flag}` is {name!r}, whose configuration cannot be used so: {_missing(name)}"
        ):
            check_answers(name)
            if folder.is_dir():  # of a key that stands twice transformers would take the last
                values = load_json((folder / "config.json").read_text(encoding="utf-8"))
                if not isinstance(values, dict):
                    raise ValueError("its config.json holds no JSON object.")
            return _localised_config(name, settings, revision)
    except InputError as error:
        is_of_hub = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, TimeoutError)
        if is_of_hub and (fault := unreachable(name)) is not None:
            raise InputError(f"`{flag}` is {name!r}; {_missing(name)}{fault}.") from error.__cause__
        if not settings or isinstance(error.__cause__, OSError):  # no setting keeps a file from being read
            raise
        try:
            _localised_config(name, {}, revision)
        except Exception:
            raise error from error.__cause__
        raise InputError(
            f"`locality` cannot be used with `{flag}` {name!r}: {one_line(error.__cause__ or error)}"
        ) from error.__cause__


def _localised_config(name: str, settings: dict[str, Any], revision: str) -> PreTrainedConfig:
    saved, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    # A GPT-2 that `localize` has made stays what it is.
    if saved.get("model_type") == LocalistGPT2Config.model_type or (
        saved.get("model_type") == "gpt2" and "locality" not in saved
    ):
        config = LocalistGPT2Config.from_pretrained(name, revision=revision, **_OUTPUTS, **settings)
    else:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **_OUTPUTS)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"its `model_type` is {config.model_type!r}, which is no causal language model.")
        with torch.device("meta"):
            config = localize(AutoModelForCausalLM.from_config(config), **settings).config
    if config.locality.num_hidden_layers < 1:
        raise ValueError(f"it has {config.locality.num_hidden_layers} layers.")
    return config


def load_tokenizer(name: str, revision: str = "main", flag: str = "model") -> PreTrainedTokenizerBase:
    """
    Loads a model's tokenizer; `revision` and `flag` as for [`load_config`]. It may know more tokens than the model,
    such as one for pictures in those of Gemma 3: it is texts that [`~localist_hf.experiments.data.check_token_ids`]
    refuses.
    """
    with reraised_as(InputError, Exception, what=f"`{flag}` is {name!r}, whose tokenizer cannot be used: "):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        known_text(tokenizer)  # where there are no files, transformers makes one without a vocabulary
    return tokenizer


def load_model(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | str = "auto",
    revision: str = "main",
    flag: str = "model",
) -> PreTrainedModel:
    """
    Loads a localised model with all of its weights; transformers would fill in random numbers for those that are
    missing.

    Args:
        name (`str`):
            The model's folder or Hub id.
        config ([`~transformers.PreTrainedConfig`]):
            From [`load_config`].
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Of the weights; by default what they were saved in.
        revision (`str`, *optional*, defaults to `"main"`), flag (`str`, *optional*, defaults to `"model"`):
            As for [`load_config`].

    Raises:
        ValueError: for weights that cannot be read, are missing or do not fit the configuration.
    """
    is_gpt2 = isinstance(config, LocalistGPT2Config)
    what = f"`{flag}` is {name!r}, which cannot be loaded: "
    with reraised_as(InputError, Exception, what=what):
        model, info = (LocalistGPT2LMHeadModel if is_gpt2 else AutoModelForCausalLM).from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    if info["missing_keys"]:
        raise ValueError(f"{what}its weights lack {_some(info['missing_keys'])}.")
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{what}{key} has the shape {tuple(found)}; by its configuration it is {tuple(expected)}.")
    if layers := [key for key in info["unexpected_keys"] if re.search(r"\.\d+\.", f".{key}")]:
        raise ValueError(f"{what}its weights have {_some(layers)}, of which its configuration does not know.")
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{what}{key} holds numbers that are not finite.")
    return model if is_gpt2 else localize(model)


def in_native_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """
    Makes a model's weights float32 where they are of half precision and there is but a CPU without instructions for it,
    which takes up to ten times as long as in float32.
    """
    return model if _is_native(model.dtype) else model.float()


def _is_native(dtype: torch.dtype) -> bool:
    of_cpu = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in of_cpu or torch.accelerator.is_available():
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, of_cpu[dtype])()


def without_weights(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Makes the layers of a model by its configuration, both as for [`load_model`]; they take no memory."""
    with (
        reraised_as(InputError, Exception, what=f"`model` is {name!r}, which cannot be loaded: "),
        torch.device("meta"),
    ):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def find_adapter(name: str, revision: str = "main", flag: str = "model") -> PeftConfig | None:
    """The adapter's configuration in a folder or Hub repository, which names its base; `None` where that holds none."""
    if Path(name).exists() and not (Path(name) / "adapter_config.json").is_file():
        return None
    with reraised_as(InputError, Exception, what=f"`{flag}` is {name!r}, which cannot be read: "):
        check_answers(name)
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        config = PeftConfig.from_pretrained(name, revision=revision)
        base = config.base_model_name_or_path
        if not base or not isinstance(base, str):
            raise ValueError(f"its adapter_config.json does not name the base: `base_model_name_or_path` is {base!r}.")
        for field, value in vars(config).items():
            numbers = value.values() if isinstance(value, dict) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise ValueError(f"`{field}` of its adapter_config.json is {value!r}; it must be finite.")
        return config


def adapter_settings(name: str, revision: str = "main", flag: str = "model") -> dict[str, Any]:
    """The settings of locality that an adapter was trained for, of which its base's configuration does not know."""
    with reraised_as(InputError, Exception, what=f"`{flag}` is {name!r}, which cannot be read: "):
        if (record := RunRecord.find(name)) is not None:
            config = record.config
        # Beside an adapter that was published lies the configuration of the model that it makes of its base.
        elif has_file(name, "config.json", revision=revision, local_files_only=is_offline_mode()):
            config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        else:
            return {}
    saved = config.get("locality") or config
    return {field: saved[field] for field in LOCALITY_FIELDS if field in saved}


def load_adapter(model: PreTrainedModel, name: str, revision: str = "main", flag: str = "model") -> PeftModel:
    """
    Puts an adapter on its base with all of its weights, and the embeddings of tokens that were added for it; PEFT would
    leave those that are missing as it has made them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
        name (`str`):
            The adapter's folder or Hub id.
        revision (`str`, *optional*, defaults to `"main"`), flag (`str`, *optional*, defaults to `"model"`):
            As for [`load_config`].

    Raises:
        ValueError: for weights that cannot be read, are missing or do not fit the base.
    """
    what = f"`{flag}` is {name!r}, whose adapter "
    with reraised_as(InputError, Exception, what=f"{what}cannot be loaded: "):
        saved = load_peft_weights(name, device="cpu", revision=revision)
        fit_embeddings(model, saved)
        adapted = PeftModel.from_pretrained(model, name, revision=revision)
        # Embeddings that were not trained need not be there.
        missing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - saved.keys()
    if missing:
        raise ValueError(f"{what}lacks the weights {_some(missing)}.")
    return adapted


def load(
    name: str, settings: dict[str, Any], revisions: Mapping[str, str] = MappingProxyType({}), flag: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a localised model, perhaps with an adapter on it, and its tokenizer: the one beside the adapter, where there
    is one. Weights are of the dtype that they were saved in, or of what [`in_native_dtype`] makes of that.

    Args:
        name (`str`), settings (`dict[str, Any]`):
            See [`load_config`].
        revisions (`Mapping[str, str]`, *optional*):
            Commits of repositories, also of adapters' bases; of others the newest is loaded.
        flag (`str`, *optional*, defaults to `"model"`):
            What a message calls the name.
    """
    check_name(name, flag)
    revision = revisions.get(name, "main")
    if (adapter := find_adapter(name, revision, flag)) is None:
        config = load_config(name, settings, revision, flag)
        model = in_native_dtype(load_model(name, config, revision=revision, flag=flag))
        return model, load_tokenizer(name, revision, flag)
    base = adapter.base_model_name_or_path
    base_revision = revisions.get(base) or adapter.revision or "main"
    base_flag = f"{flag}'s base"
    config = load_config(base, adapter_settings(name, revision, flag) | settings, base_revision, base_flag)
    model = in_native_dtype(load_model(base, config, revision=base_revision, flag=base_flag))
    model = load_adapter(model, name, revision, flag)
    model.get_base_model().name_or_path = name  # by which it is shown, and not as what it stands on
    with reraised_as(InputError, Exception, what=f"`{flag}` is {name!r}, which cannot be read: "):
        is_own = has_tokenizer(name, revision)
    return model, load_tokenizer(name, revision, flag) if is_own else load_tokenizer(base, base_revision, base_flag)


def checked_sequence_length(wanted: int | None, config: PreTrainedConfig) -> int:
    """
    Returns how many tokens a sequence has: as many as are wanted, or as the model was made for, at most 1024.

    Raises:
        ValueError: for less than 2, or more than the model has positions.
    """
    if wanted is None:
        return min(config.max_position_embeddings, 1024) if hasattr(config, "max_position_embeddings") else 1024
    limit = num_positions(config)
    if wanted < 2 or (limit is not None and wanted > limit):
        allowed = "at least 2" if limit is None else f"2 to {limit}"
        raise ValueError(f"`sequence_length` is {wanted}; the model allows {allowed} positions.")
    return wanted


def _some(names: Any) -> str:
    """Names the first of many, and says how many more there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
