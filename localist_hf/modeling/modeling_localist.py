# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Any causal language model of transformers, able to measure its locality. Its *localist class* is a subclass of the
native one, with the mixin before it. It bears the native name: by it engines choose what runs a checkpoint
(`architectures`), and transformers the conversions of weights and the loss. This module has each of these classes under
that name, which is what a repository's `auto_map` and a pickle refer to.
"""

import copy
import functools
import inspect
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .localist_attention import localist_attention_forward  # noqa: F401  registers it
from .locality_config import LocalityConfig, LocalityFields, check_settings, settings_of
from .locality_mixin import LocalistGenerationMixin, LocalistMixin, change_class
from .locality_request import LOCALIST_ATTENTION


def localize(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """
    Makes a causal language model of transformers able to measure its locality, and gives it the dial: it then takes the
    arguments of [`LocalistMixin.forward`], and has `generate` and `set_locality_dial` as [`LocalistGPT2LMHeadModel`]
    has. Its weights, and what it computes while nobody asks for locality, stay as they are.

    What it saves can be loaded in two ways: as the native model, by every program that knows nothing of this one, and
    with `trust_remote_code=True` as the localised one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, which is changed in place. The attention of every layer must go through transformers' attention
            interface, as `sdpa` or `eager`. Where its configuration has settings of locality, as after loading what a
            localised model saved, they hold if nothing else is said.
        settings:
            The fields of [`LocalityFields`].

    Returns:
        [`~transformers.PreTrainedModel`]: the same model.

    Raises:
        ValueError: for a model that cannot be localised, with the reason, and for settings that do not fit it.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from localist_hf import localize

    >>> model = localize(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"), num_sink_tokens=1)
    >>> outputs = model(**inputs, output_fidelity=True)
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; it must be a causal language model of transformers. An adapter or a "
            "compiled model is made of one that has been localised."
        )
    native = _native_class(type(model))
    _check_native(native, model.config)
    config = _locality_config(model.config, settings)
    native_attention = _native_attention(model.config._attn_implementation)
    if native_attention not in LOCALIST_ATTENTION:
        raise ValueError(
            f"`model` uses the attention implementation {native_attention!r}; allowed are "
            f"{', '.join(map(repr, LOCALIST_ATTENTION))}. Load it with `attn_implementation='sdpa'`."
        )
    _check_layers(model, config)
    give_own_config(model)
    _write_config(model.config, config)
    change_class(model, localist_class(native))
    if model.base_model is not model:
        change_class(model.base_model, localist_class(_native_class(type(model.base_model))))
    model.set_attn_implementation(LOCALIST_ATTENTION[native_attention])
    return model


def delocalize(model: PreTrainedModel) -> PreTrainedModel:
    """
    Undoes [`localize`]: the native class, and its configuration without the settings of locality.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A localised model, which is changed in place.

    Returns:
        [`~transformers.PreTrainedModel`]: the same model.

    Raises:
        ValueError: for a model that [`localize`] has not made.
    """
    native = _native_class(type(model))
    if native is type(model):
        raise ValueError(f"`model` is a {type(model).__name__} that `localize` has not made; there is nothing to undo.")
    if model.base_model is not model:
        change_class(model.base_model, _native_class(type(model.base_model)))
    change_class(model, native)
    config = model.config
    model.set_attn_implementation(_native_attention(config._attn_implementation))
    if config.locality.native_auto_map:
        config.auto_map = config.locality.native_auto_map
    else:
        del config.auto_map
    del config.locality
    return model


@functools.cache
def localist_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The localist class of a native one. Its configuration, or what is passed beside it, holds the settings."""
    has_head = issubclass(native, GenerationMixin)

    def __init__(self, config: PreTrainedConfig, *args: Any, **settings: Any) -> None:
        _check_native(native, config)
        config = copy.deepcopy(config)  # other models may be made of the same one
        _write_config(config, _locality_config(config, settings))
        native.__init__(self, config, *args)
        _check_layers(self, config.locality)
        if self.base_model is not self:
            change_class(self.base_model, localist_class(type(self.base_model)))

    namespace = {
        "__init__": __init__,
        "__module__": __name__,
        "__qualname__": native.__name__,
        "__doc__": f"[`~transformers.{native.__name__}`], able to measure its locality. See [`localize`].",
        "native_class": native,
        "_auto_class": "AutoModelForCausalLM" if has_head else "AutoModel",
    }
    bases = (LocalistGenerationMixin, native, GenerationMixin) if has_head else (LocalistMixin, native)
    return type(native.__name__, bases, namespace)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """The localist class of the native class of this name."""
    native = None if name.startswith("_") else getattr(transformers, name, None)
    if isinstance(native, type) and issubclass(native, PreTrainedModel):
        return localist_class(native)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MODULE = __name__.split(".")[-1]
#: Where a configuration says what loads it, and in what class each of these mappings finds it.
_AUTO_CLASSES = {"AutoModel": MODEL_MAPPING, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING}


def _native_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The native class of a localist one, perhaps of another copy of this code; any other class itself."""
    return getattr(cls, "native_class", cls)


def _native_attention(name: str) -> str:
    """The attention implementation in whose place one stands, perhaps that of another copy of this code."""
    if name.startswith("localist_"):
        return "eager" if name.startswith("localist_eager_") else "sdpa"
    return name


def _check_native(native: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Refuses classes that cannot be localised, by name and with the reason."""
    reason = None
    own = {name: mapping.get(type(config), None) for name, mapping in _AUTO_CLASSES.items()}
    if config.is_encoder_decoder:
        reason = "it is an encoder and a decoder, and attention to an encoder has no blocks"
    elif isinstance(config, LocalityFields):
        reason = "it is local already; its configuration holds the settings"
    elif getattr(transformers, native.__name__, None) is not native:
        reason = "its class is none of transformers'"
    elif not getattr(config, "is_causal", True):
        reason = "by its configuration (`is_causal`) tokens see those after them too, and blocks are of those before"
    elif config.get_text_config() is not config:
        reason = "it is a model of several parts; localise its language model"
    elif own["AutoModelForCausalLM"] is None:
        reason = f"`AutoModelForCausalLM` has no model for a {type(config).__name__}, by which it would be loaded again"
    elif missing := [name for name in ("num_hidden_layers", "vocab_size") if not hasattr(config, name)]:
        reason = f"its configuration has no `{'` and no `'.join(missing)}`, as those of causal language models have"
    elif native not in own.values():
        names = " and ".join(cls.__name__ for cls in own.values() if isinstance(cls, type)) or "none"
        reason = f"of its kind those that `AutoModel` and `AutoModelForCausalLM` load can be ({names})"
    elif other := _other_layers(config):
        reason = f"not all of its layers are causal softmax attention with keys and values of their own ({other})"
    # Of some classes only the latter is true, because of other attention in their file.
    elif not (native._supports_sdpa or native._supports_attention_backend) or not native._can_set_attn_implementation():
        reason = "its layers do not attend through transformers' attention interface"
    elif "kwargs" not in inspect.signature(native.forward).parameters:
        reason = "its `forward` takes no further keyword arguments, by which the attention would be told"
    if reason:
        raise ValueError(f"{native.__name__} cannot be localised: {reason}.")


def _other_layers(config: PreTrainedConfig) -> str:
    """The kinds of layers that are neither full nor sliding window attention."""
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    if num_shared := getattr(config, "num_kv_shared_layers", None):
        return f"num_kv_shared_layers is {num_shared}"
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _check_layers(model: PreTrainedModel, locality: LocalityConfig) -> None:
    """Refuses what only the model's own modules show."""
    base = _native_class(type(model.base_model))
    if getattr(transformers, base.__name__, None) is not base:
        raise ValueError(
            f"{type(model).__name__} cannot be localised: its layers are in a {base.__name__}, which is none of "
            "transformers' public models."
        )
    numbers = {module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")}
    layers = set(range(locality.num_hidden_layers))
    if not layers <= numbers:
        raise ValueError(
            f"{type(model).__name__} cannot be localised: its configuration counts {len(layers)} layers, of which "
            f"{len(layers & numbers)} have attention of their own."
        )
    # As transformers' own attention functions read it.
    if any(hasattr(module, "layer_idx") and not getattr(module, "is_causal", True) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} cannot be localised: its tokens see those after them too, and blocks are of "
            "those before."
        )
    if locality.block_partition == "semantic" and any(name.endswith(".v_norm") for name, _ in model.named_modules()):
        raise ValueError(
            f"`block_partition` is 'semantic'; {type(model).__name__} normalises its values, whose lengths then say "
            "nothing of where thoughts end. Allowed are 'delimiter' and 'window'."
        )


def _locality_config(config: PreTrainedConfig, settings: dict[str, Any]) -> LocalityConfig:
    """What is set, in place of what the configuration says, and checked against the model."""
    # Copied, since lists among them may be the caller's, or another model's.
    settings = copy.deepcopy({**settings_of(config), **settings})
    check_settings(settings)
    layers = DynamicCache(config=config).layers
    return LocalityConfig(
        **settings,
        num_hidden_layers=len(layers),
        vocab_size=config.vocab_size,
        sliding_windows=[getattr(layer, "sliding_window", None) for layer in layers],
    )


def give_own_config(model: PreTrainedModel) -> None:
    """Gives a model a configuration that no other model has: what is written into it is then of this one alone."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """What loads the localist classes of a native configuration's model: `auto_map` of its `config.json`."""
    return {name: f"{_MODULE}.{mapping[type(config)].__name__}" for name, mapping in _AUTO_CLASSES.items()}


def _write_config(config: PreTrainedConfig, locality: LocalityConfig) -> None:
    entries = getattr(config, "auto_map", None) or {}
    # What names other code would load other classes than these; `delocalize` gives it back.
    locality.native_auto_map = {name: entry for name, entry in entries.items() if f"{_MODULE}." not in str(entry)}
    config.locality = locality
    config.auto_map = auto_map(config)


__all__ = ["delocalize", "localist_class", "localize"]
