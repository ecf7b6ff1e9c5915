# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""LocalistGPT2: GPT-2 that can say how much of each query's attention stays in its own block of the text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, GPT2LMHeadModel, GPT2Model
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import can_return_tuple

from .block_partition import delimiter_block_starts, document_starts
from .configuration_localist_gpt2 import LocalistGPT2Config, check_share
from .localist_attention import Locality, build_locality


@dataclass
class LocalistModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """
    Output of [`LocalistGPT2Model`]: that of GPT-2, and, with `output_fidelity`, one tensor for each measured layer.

    Args:
        fidelity (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            Share of each query's attention that stays in its local set, in [0, 1], float32, differentiable; 1 where
            `fidelity_mask` is False.
        fidelity_mask (`tuple(torch.BoolTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            True on tokens that see more than their local set, whose fidelity is not 1 by construction. Losses and
            means count these only.
        block_starts (`tuple(torch.LongTensor)` of shape `(batch_size, sequence_length)`, *optional*):
            Position at which each token's block starts; -1 on padding.
        entropy (`tuple(torch.Tensor)` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            Entropy of each query's attention in bits, float32; 0 on padding. Only with `output_entropy=True`.
    """

    fidelity: tuple[torch.Tensor, ...] | None = None
    fidelity_mask: tuple[torch.Tensor, ...] | None = None
    block_starts: tuple[torch.Tensor, ...] | None = None
    entropy: tuple[torch.Tensor, ...] | None = None


@dataclass
class LocalistCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """Output of [`LocalistGPT2LMHeadModel`]: that of GPT-2, and the fields of [`LocalistModelOutput`]."""

    fidelity: tuple[torch.Tensor, ...] | None = None
    fidelity_mask: tuple[torch.Tensor, ...] | None = None
    block_starts: tuple[torch.Tensor, ...] | None = None
    entropy: tuple[torch.Tensor, ...] | None = None


def _measurements(locality: Locality | None, query_length: int) -> dict[str, tuple[torch.Tensor, ...] | None]:
    """The fields that the outputs add to GPT-2's; a key-value cache's positions are left out."""
    if locality is None or not locality.measured:
        return {}
    layers = sorted(locality.measured)
    return {
        "fidelity": tuple(locality.fidelities[layer] for layer in layers),
        "fidelity_mask": tuple(locality.fidelity_mask(layer)[:, -query_length:] for layer in layers),
        "block_starts": tuple(locality.block_starts(layer)[:, -query_length:] for layer in layers),
        "entropy": tuple(locality.entropies[layer] for layer in layers) if locality.entropy else None,
    }


class _DialMixin:
    """`set_locality_dial`, for the transformer and the language model alike."""

    def set_locality_dial(self, dial: float = 0.0, min_fidelity: float = 0.0) -> "LocalityDial":
        """
        Sets the dial, and the guarantee, of every call from now on; as a context manager, of the calls inside.

        Args:
            dial (`float`, *optional*, defaults to 0.0):
                d in [0, 1]: weights outside a query's local set are multiplied by `1 - d * lambda_l`.
            min_fidelity (`float`, *optional*, defaults to 0.0):
                In [0, 1]: fidelities of layer l are raised to `lambda_l * min_fidelity`.

        Returns:
            `LocalityDial`: restores the former setting on leaving a `with` block.

        Raises:
            ValueError: for a value outside [0, 1]; nothing is changed then.

        Example:

        ```python
        >>> model.set_locality_dial(0.6)  # from now on
        >>> with model.set_locality_dial(1.0):  # only inside
        ...     tokens = model.generate(**inputs)
        ```
        """
        check_share("dial", dial)
        check_share("min_fidelity", min_fidelity)
        before = LocalityDial(self.config, self.config.locality_dial, self.config.min_fidelity)
        self.config.locality_dial, self.config.min_fidelity = dial, min_fidelity
        return before


@dataclass
class LocalityDial:
    """A setting of the dial that leaving a `with` block restores."""

    config: LocalistGPT2Config
    dial: float
    min_fidelity: float

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.config.locality_dial, self.config.min_fidelity = self.dial, self.min_fidelity


class LocalistGPT2Model(_DialMixin, GPT2Model):
    """GPT-2's transformer, able to measure its locality. See [`LocalistGPT2LMHeadModel`] for the arguments."""

    config: LocalistGPT2Config
    config_class = LocalistGPT2Config

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_fidelity: bool | Sequence[int] | None = None,
        output_entropy: bool = False,
        block_starts: torch.LongTensor | None = None,
        locality_dial: float | None = None,
        min_fidelity: float | None = None,
        **kwargs,
    ) -> LocalistModelOutput:
        if "locality" in kwargs:
            locality = kwargs.pop("locality")  # the language model hands down its own; None where nothing is asked for
        else:
            locality = build_locality(
                self.config, output_fidelity, output_entropy, input_ids, inputs_embeds, attention_mask, position_ids,
                past_key_values, block_starts, locality_dial, min_fidelity,
            )  # fmt: skip
        if locality is not None:
            kwargs["locality"] = locality
            if past_key_values is None and attention_mask is None and position_ids is not None:
                use_cache = False  # transformers separates packed documents only where there is no cache
            if (
                past_key_values is None
                and not self.training
                and (self.config.use_cache if use_cache is None else use_cache)
            ):
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is not None:
                locality.use_cache(past_key_values)
        outputs = super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        query_length = outputs.last_hidden_state.shape[1]
        return LocalistModelOutput(**outputs, **_measurements(locality, query_length))


class LocalistGPT2LMHeadModel(_DialMixin, GPT2LMHeadModel):
    """
    GPT-2 with a language modeling head, able to measure its locality.

    The weights have GPT-2's names: GPT-2 checkpoints load into this class and its checkpoints into
    [`~transformers.GPT2LMHeadModel`], with no key missing or left over.

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

    def __init__(self, config: LocalistGPT2Config):
        super(GPT2LMHeadModel, self).__init__(config)  # not GPT2LMHeadModel's own, which builds a plain GPT2Model
        self.transformer = LocalistGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # transformers guesses it from class names, of which GPT-2's tells nothing; Trainer then counts a label too many
        # in every sequence and the training loss comes out too small.
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_fidelity: bool | Sequence[int] | None = None,
        output_entropy: bool = False,
        block_starts: torch.LongTensor | None = None,
        locality_dial: float | None = None,
        min_fidelity: float | None = None,
        **kwargs,
    ) -> LocalistCausalLMOutput:
        r"""
        Every argument of [`~transformers.GPT2LMHeadModel.forward`], and:

        Args:
            output_fidelity (`bool` or `Sequence[int]`, *optional*):
                Measure the fidelity of every layer, or of these layers only. Without it no block is computed and the
                model is GPT-2. The `attention_mask` must then have padding at its ends only. Without a mask and a
                cache, `position_ids` that start anew mark packed documents, which then attend and are measured as if
                each stood alone (plain GPT-2 separates them only with `use_cache=False`).
            output_entropy (`bool`, *optional*, defaults to `False`):
                Measure the entropy of the same layers too.
            block_starts (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The position at which each token's block starts, in place of the partition of the configuration, for
                all layers. With a filled cache it covers the cached tokens too.
            locality_dial (`float`, *optional*), min_fidelity (`float`, *optional*):
                The dial and the guarantee of [`LocalistGPT2Config`], for this call in place of the configuration's.

        Raises:
            ValueError: where locality is asked for and cannot be measured; the message names the argument.
        """
        locality = build_locality(
            self.config, output_fidelity, output_entropy, input_ids, inputs_embeds, attention_mask, position_ids,
            past_key_values, block_starts, locality_dial, min_fidelity,
        )  # fmt: skip
        outputs = super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            locality=locality,
            **kwargs,
        )
        query_length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        return LocalistCausalLMOutput(**outputs, **_measurements(locality, query_length))

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """As in transformers; delimiter blocks are found here, where all tokens are at hand, not only the new ones."""
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        config = self.config
        asked = (config.locality_dial, config.min_fidelity) + tuple(
            inputs.get(name) for name in ("locality_dial", "min_fidelity", "output_fidelity")
        )
        # Free when not asked: plain generation computes no block.
        if any(asked) and config.block_partition == "delimiter" and inputs.get("block_starts") is None:
            inputs["block_starts"] = delimiter_block_starts(
                input_ids,
                document_starts(*input_ids.shape, attention_mask, device=input_ids.device),
                config.delimiter_token_ids,
                config.min_block_length,
                config.max_block_length,
            )
        return inputs


LocalistGPT2Model.register_for_auto_class("AutoModel")
LocalistGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["LocalistCausalLMOutput", "LocalistGPT2LMHeadModel", "LocalistGPT2Model", "LocalistModelOutput"]
