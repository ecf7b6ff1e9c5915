# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""LocalistGPT2 configuration: GPT-2's, and how local each layer's attention is."""

import os
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.utils import logging

from .locality_config import LocalityFields


if TYPE_CHECKING:
    # transformers copies, beside a saved configuration, this file and those that it names in this form. So no folder
    # holds an `auto_map` to files that are not there, whichever class writes it.
    from .modeling_localist_gpt2 import LocalistGPT2LMHeadModel  # noqa: F401

logger = logging.get_logger(__name__)


@strict
class LocalistGPT2Config(LocalityFields, GPT2Config):
    r"""
    Configuration of [`LocalistGPT2Model`] and [`LocalistGPT2LMHeadModel`]: every field of [`~transformers.GPT2Config`]
    and of [`LocalityFields`]. Attention dropout is 0 by default, and set to 0 when a plain GPT-2 checkpoint is loaded,
    because fused attention kernels that measure locality have none.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a value outside its range; the message names the argument, the
            value and what is allowed.

    Example:

    ```python
    >>> from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel

    >>> config = LocalistGPT2Config(n_layer=6, n_embd=128, n_head=4, locality_schedule="cubic")
    >>> model = LocalistGPT2LMHeadModel(config)
    ```
    """

    model_type = "localist-gpt2"

    attn_pdrop: float | int = 0.0

    @property
    def locality(self) -> "LocalistGPT2Config":
        """Where the settings of locality are, as in the configuration of any localised model: here."""
        return self

    @property
    def sliding_windows(self) -> list[None]:
        """GPT-2's layers have none."""
        return [None] * self.num_hidden_layers

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Reads a configuration as transformers does; one of plain GPT-2 is read as one of LocalistGPT2."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "gpt2":
            dropout = config_dict.get("attn_pdrop", GPT2Config.attn_pdrop)
            if dropout and "attn_pdrop" not in kwargs:
                logger.warning_once(
                    f"`attn_pdrop` of {pretrained_model_name_or_path} is {dropout}; it is set to 0.0, because the "
                    "fused attention that measures locality has no dropout. Pass `attn_pdrop` to keep it, at the "
                    "price of a slower attention in training."
                )
            config_dict = {**config_dict, "model_type": cls.model_type, "attn_pdrop": 0.0}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LocalistGPT2Config":
        """Builds a configuration from a dictionary; overrides in `kwargs` are checked together with the rest."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, "gpt2"):
            raise ValueError(
                f"The checkpoint's `model_type` is {model_type!r}; {cls.__name__} reads 'gpt2' and {cls.model_type!r}."
            )
        if "locality" in config_dict:  # a GPT-2 that `localize` has made local
            nested = config_dict["locality"]
            config_dict = {name: value for name, value in config_dict.items() if name not in ("locality", "auto_map")}
            config_dict |= nested
        fields = (cls.__dataclass_fields__.keys() | cls.attribute_map.keys()) - {"dtype"}
        if "semantic_window" in config_dict:
            config_dict = {name: value for name, value in config_dict.items() if name != "semantic_window"}
            partition = {**config_dict, **kwargs}.get("block_partition", "semantic")
            if partition == "semantic" and "semantic_threshold" not in kwargs:
                raise ValueError(
                    "The checkpoint was saved by localist-hf 0.1, whose semantic blocks were found by another rule: "
                    "this version would give it other blocks than those that it was trained on. Load it with its own "
                    "code (`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` where localist_hf is "
                    "not imported), or pass `semantic_threshold` to use the rule of this version."
                )
        # transformers would set the overrides one by one on a configuration already checked without them.
        overrides = {cls.attribute_map.get(name, name): kwargs.pop(name) for name in list(kwargs) if name in fields}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, with the `auto_map` of all three classes, whichever of them saves it."""
        config_dict = super().to_dict()
        config_dict["auto_map"] = {
            "AutoConfig": "configuration_localist_gpt2.LocalistGPT2Config",
            "AutoModel": "modeling_localist_gpt2.LocalistGPT2Model",
            "AutoModelForCausalLM": "modeling_localist_gpt2.LocalistGPT2LMHeadModel",
        }
        return config_dict


LocalistGPT2Config.register_for_auto_class()

__all__ = ["LocalistGPT2Config"]
