# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""The settings of locality, defined once: flat fields of LocalistGPT2's configuration, `locality` in any other's."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .locality_dial import check_share
from .locality_schedule import schedule_lambdas


#: How the text is cut into blocks; explicit block starts can be passed to the model's `forward` instead.
BLOCK_PARTITIONS = ("semantic", "delimiter", "window")


@dataclass(repr=False, kw_only=True)
class LocalityFields:
    r"""
    How local each layer's attention is, and how the text is cut into blocks.

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
            itself, or in its own alone. Defaults to `3 * num_hidden_layers // 4`.
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
    """

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
    def locality_lambdas(self) -> list[float]:
        """`list[float]`: the locality `lambda_l` in [0, 1] of each layer, from `locality_schedule`."""
        return schedule_lambdas(self.locality_schedule, self.num_hidden_layers)

    @property
    def semantic_band(self) -> range:
        """`range`: the layers whose value vectors define the semantic blocks of those above."""
        num_layers, last = self.num_hidden_layers, self.semantic_layer
        last = 3 * num_layers // 4 if last is None else last
        return range(min(3 * num_layers // 8, last), last + 1)

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
            if isinstance(getattr(self, name), int) and getattr(self, name) >= 2**31:  # no text is so long
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be below 2**31.")
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


#: The names of these fields.
LOCALITY_FIELDS = tuple(field.name for field in dataclasses.fields(LocalityFields))


@strict
class LocalityConfig(LocalityFields, PreTrainedConfig):
    r"""
    `config.locality` of a model that [`localize`] has made local: the fields of [`LocalityFields`], which are saved,
    and what they refer to of the model, which its configuration says already.

    Args:
        num_hidden_layers (`int`), vocab_size (`int`):
            Of the model.
        sliding_windows (`list[int | None]`, *optional*):
            Keys that each layer sees, its own token among them, where that is a sliding window. Defaults to none in
            any layer.
        native_auto_map (`dict`, *optional*):
            What the configuration's `auto_map` was before.
    """

    model_type = "locality"

    num_hidden_layers: int = 1
    vocab_size: int = 1
    sliding_windows: list[int | None] | None = None
    native_auto_map: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sliding_windows is None:
            self.sliding_windows = [None] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields of [`LocalityFields`], and the version, which a configuration takes out of those that it holds."""
        fields = super().to_dict()
        return {name: fields[name] for name in (*LOCALITY_FIELDS, "transformers_version")}


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """
    What a configuration says of locality: the fields of [`LocalityFields`] by name; empty where it says nothing.

    Raises:
        ValueError: for what are no settings.
    """
    if isinstance(config, LocalityFields):
        return {name: getattr(config, name) for name in LOCALITY_FIELDS}
    saved = getattr(config, "locality", None)
    if isinstance(saved, PreTrainedConfig):  # perhaps of another copy of this code
        saved = saved.to_dict()
    if not isinstance(saved, dict | None):
        raise ValueError(f"`locality` is {saved!r}; it must map names of settings to values.")
    saved = dict(saved or {})
    saved.pop("transformers_version", None)
    return saved


def check_settings(settings: dict[str, Any]) -> None:
    """
    Refuses names that are no setting of locality.

    Raises:
        ValueError: which names them, and those that are.
    """
    if unknown := sorted(settings.keys() - set(LOCALITY_FIELDS)):
        raise ValueError(
            f"{', '.join(map('`{}`'.format, unknown))}: no such setting; allowed are {', '.join(LOCALITY_FIELDS)}."
        )


__all__ = ["BLOCK_PARTITIONS", "LOCALITY_FIELDS", "LocalityConfig", "LocalityFields"]
