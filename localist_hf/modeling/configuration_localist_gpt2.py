# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""LocalistGPT2 configuration: GPT-2's, and how local each layer's attention is."""

import os
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.utils import logging

from .locality_dial import check_share
from .locality_schedule import schedule_lambdas


if TYPE_CHECKING:
    # transformers copies, beside a saved configuration, this file and those that it names in this form. So no folder
    # holds an `auto_map` to files that are not there, whichever class writes it.
    from .modeling_localist_gpt2 import LocalistGPT2LMHeadModel  # noqa: F401

logger = logging.get_logger(__name__)

#: How the text is cut into blocks; explicit block starts can be passed to the model's `forward` instead.
BLOCK_PARTITIONS = ("semantic", "delimiter", "window")


@strict
class LocalistGPT2Config(GPT2Config):
    r"""
    Configuration of [`LocalistGPT2Model`] and [`LocalistGPT2LMHeadModel`]: every field of [`~transformers.GPT2Config`]
    and the following. Attention dropout is 0 by default, and set to 0 when a plain GPT-2 checkpoint is loaded, because
    fused attention kernels that measure locality have none.

    Args:
        locality_schedule (`str` or `list[float]`, *optional*, defaults to `"quintic"`):
            How locality grows over depth: `"distributed"`, `"linear"`, `"quadratic"`, `"cubic"`, `"quartic"`,
            `"quintic"`, `"localist"`, or one number in [0, 1] for each layer.
        block_partition (`str`, *optional*, defaults to `"semantic"`):
            How the text is cut into blocks. `"semantic"`: after the model's own separators, tokens whose value vectors
            are short; `"delimiter"`: after each of `delimiter_token_ids`; `"window"`: every `window_length` tokens.
        min_block_length (`int`, *optional*, defaults to 8):
            Fewest tokens of a block, for `"semantic"` and `"delimiter"`. The last block of a text may be shorter.
        max_block_length (`int`, *optional*, defaults to 64):
            Most tokens of a block, for `"semantic"` and `"delimiter"`.
        semantic_layer (`int`, *optional*):
            The last of the layers whose value vectors define the blocks of all layers above; the first is at 3/8 of the
            depth, or this one if it is lower. A layer below finds its own blocks in the values of those layers up to
            itself, or in its own alone. Defaults to `num_hidden_layers // 2`.
        semantic_threshold (`float`, *optional*, defaults to 1.25):
            A block starts after a token whose values are this many standard deviations shorter, in the mean logarithm
            of their lengths, than those of the text so far.
        delimiter_token_ids (`list[int]`, *optional*):
            Token ids that end a block; required by `"delimiter"`.
        window_length (`int`, *optional*, defaults to 16):
            Tokens of a block of the `"window"` partition.
        num_previous_blocks (`int`, *optional*, defaults to 0):
            Blocks before its own that are local to a token too. 0 is the setting of arXiv:2511.18375.
        num_sink_tokens (`int`, *optional*, defaults to 0):
            The first tokens of a text that count as local everywhere (attention sinks, arXiv:2309.17453). 0 is the
            setting of arXiv:2511.18375.
        locality_dial (`float`, *optional*, defaults to 0.0):
            The dial d in [0, 1], at inference: in layer l the attention weights outside a query's local set are
            multiplied by `1 - d * lambda_l` and renormalised. 0 changes nothing; at 1 a layer with `lambda_l = 1`
            attends to the local set only.
        min_fidelity (`float`, *optional*, defaults to 0.0):
            A guarantee in [0, 1], at inference: in layer l every query's fidelity is raised to
            `lambda_l * min_fidelity` where it is below. 0 changes nothing.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a value outside its range; the message names the argument, the
            value and what is allowed.

    Example:

    ```python
    >>> from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel

    >>> config = LocalistGPT2Config(n_layer=6, locality_schedule="cubic")
    >>> model = LocalistGPT2LMHeadModel(config)
    ```
    """

    model_type = "localist-gpt2"

    attn_pdrop: float | int = 0.0
    locality_schedule: str | list[float] | list[int] | list[int | float] = "quintic"
    block_partition: str = "semantic"
    min_block_length: int = 8
    max_block_length: int = 64
    semantic_layer: int | None = None
    semantic_threshold: float | int = 1.25
    delimiter_token_ids: list[int] | None = None
    window_length: int = 16
    num_previous_blocks: int = 0
    num_sink_tokens: int = 0
    locality_dial: float | int = 0.0
    min_fidelity: float | int = 0.0

    @property
    def locality(self) -> "LocalistGPT2Config":
        """Where the locality fields stand: here. Other models' configurations have an object for them."""
        return self

    @property
    def locality_lambdas(self) -> list[float]:
        """`list[float]`: the locality `lambda_l` in [0, 1] of each layer, from `locality_schedule`."""
        return schedule_lambdas(self.locality_schedule, self.num_hidden_layers)

    @property
    def semantic_band(self) -> range:
        """`range`: the layers whose value vectors define the semantic blocks of those above."""
        last = self.num_hidden_layers // 2 if self.semantic_layer is None else self.semantic_layer
        return range(min(3 * self.num_hidden_layers // 8, last), last + 1)

    @property
    def max_local_length(self) -> int:
        """`int`: most tokens of a block and of the previous ones that are local with it."""
        is_window = self.block_partition == "window"
        return (1 + self.num_previous_blocks) * (self.window_length if is_window else self.max_block_length)

    def validate_locality_schedule(self) -> None:
        """The schedule must be known and fit the number of layers."""
        schedule_lambdas(self.locality_schedule, self.num_hidden_layers)

    def validate_blocks(self) -> None:
        """Everything that defines the blocks must be in range and consistent."""
        if self.block_partition not in BLOCK_PARTITIONS:
            allowed = ", ".join(map(repr, BLOCK_PARTITIONS))
            raise ValueError(f"`block_partition` is {self.block_partition!r}; allowed are {allowed}.")
        for name, least in (
            ("min_block_length", 1),
            ("max_block_length", 1),
            ("window_length", 1),
            ("num_previous_blocks", 0),
            ("num_sink_tokens", 0),
            ("semantic_threshold", 0),
        ):
            if not getattr(self, name) >= least:  # nan is refused too
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.min_block_length > self.max_block_length:
            raise ValueError(
                f"`min_block_length` is {self.min_block_length}; it must not exceed `max_block_length`, which is "
                f"{self.max_block_length}."
            )
        if self.semantic_layer is not None and not 0 <= self.semantic_layer < self.num_hidden_layers:
            raise ValueError(
                f"`semantic_layer` is {self.semantic_layer}; it must lie in [0, {self.num_hidden_layers - 1}] for a "
                f"model of {self.num_hidden_layers} layers."
            )
        if self.block_partition == "delimiter" and not self.delimiter_token_ids:
            raise ValueError(
                f"`delimiter_token_ids` is {self.delimiter_token_ids}; `block_partition='delimiter'` needs at least "
                "one token id that ends a block."
            )
        outside = [token for token in self.delimiter_token_ids or () if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"`delimiter_token_ids` holds {outside[0]}; the vocabulary has the ids 0 to {self.vocab_size - 1}."
            )

    def validate_dial(self) -> None:
        """The dial and the guarantee must be shares."""
        check_share("locality_dial", self.locality_dial)
        check_share("min_fidelity", self.min_fidelity)

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
        fields = (cls.__dataclass_fields__.keys() | cls.attribute_map.keys()) - {"dtype"}
        if "semantic_window" in config_dict:
            config_dict = {name: value for name, value in config_dict.items() if name != "semantic_window"}
            if config_dict.get("block_partition", "semantic") == "semantic" and "semantic_threshold" not in kwargs:
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

__all__ = ["BLOCK_PARTITIONS", "LocalistGPT2Config"]
