# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""LocalistGPT2: GPT-2 that can say how much of each query's attention stays in its own block of the text."""

import copy
from dataclasses import dataclass

from transformers import GenerationMixin, GPT2LMHeadModel, GPT2Model, PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from .configuration_localist_gpt2 import LocalistGPT2Config
from .localist_attention import localist_attention_forward  # noqa: F401  registers it
from .locality_mixin import LocalistGenerationMixin, LocalistMixin, change_class
from .measurements import LocalityMeasurements


@dataclass
class LocalistModelOutput(LocalityMeasurements, BaseModelOutputWithPastAndCrossAttentions):
    """Output of [`LocalistGPT2Model`]: that of GPT-2, and the fields of [`LocalityMeasurements`]."""


@dataclass
class LocalistCausalLMOutput(LocalityMeasurements, CausalLMOutputWithCrossAttentions):
    """Output of [`LocalistGPT2LMHeadModel`]: that of GPT-2, and the fields of [`LocalityMeasurements`]."""


class LocalistGPT2Model(LocalistMixin, GPT2Model):
    """GPT-2's transformer, able to measure its locality. See [`LocalistGPT2LMHeadModel`]."""

    config: LocalistGPT2Config
    config_class = LocalistGPT2Config
    output_class = LocalistModelOutput

    def __init__(self, config: LocalistGPT2Config):
        _check_config(config)
        super().__init__(copy.deepcopy(config))  # other models, with dials of their own, may be made of the same one


class LocalistGPT2LMHeadModel(LocalistGenerationMixin, GPT2LMHeadModel, GenerationMixin):
    """
    GPT-2 with a language modeling head, able to measure its locality.

    The weights have GPT-2's names: GPT-2 checkpoints load into this class and its checkpoints into
    [`~transformers.GPT2LMHeadModel`], with no key missing or left over.

    Args:
        config ([`LocalistGPT2Config`]):
            The configuration.

    Raises:
        ValueError: for a configuration of another model.

    Example:

    ```python
    >>> from localist_hf import LocalistGPT2LMHeadModel

    >>> model = LocalistGPT2LMHeadModel.from_pretrained("openai-community/gpt2", locality_schedule="quintic")
    >>> outputs = model(**inputs, labels=inputs["input_ids"], output_fidelity=True, output_entropy=True)
    >>> [fidelity.mean().item() for fidelity in outputs.fidelity]  # one for each layer
    ```
    """

    config: LocalistGPT2Config
    config_class = LocalistGPT2Config
    output_class = LocalistCausalLMOutput

    def __init__(self, config: LocalistGPT2Config):
        _check_config(config)
        super().__init__(copy.deepcopy(config))
        change_class(self.transformer, LocalistGPT2Model)
        # transformers guesses it from class names, of which GPT-2's tells nothing; Trainer then counts a label too many
        # in every sequence and the training loss comes out too small.
        self.loss_type = "ForCausalLM"


def _check_config(config: PreTrainedConfig) -> None:
    # The class may come from another copy of this code, so it is told by its model type.
    if config.model_type != LocalistGPT2Config.model_type:
        raise ValueError(
            f"`config` is a {type(config).__name__}; it must be a LocalistGPT2Config: "
            "`LocalistGPT2Config.from_dict(config.to_dict())` makes one of GPT-2's."
        )


LocalistGPT2Model.register_for_auto_class("AutoModel")
LocalistGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["LocalistCausalLMOutput", "LocalistGPT2LMHeadModel", "LocalistGPT2Model", "LocalistModelOutput"]
