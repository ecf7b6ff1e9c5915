# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What localist models add to the native ones: the arguments of a call, the measurements in its output, the dial."""

import functools
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import transformers
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .local_cache import whole_cache
from .locality import Locality, build_locality
from .locality_dial import LocalityDial, Setting, check_share, current_setting
from .locality_request import (
    CACHE_ARGUMENTS,
    LOCALIST_ATTENTION,
    REQUEST_ARGUMENTS,
    LocalityRequest,
    NativeInputs,
)
from .measurements import LocalityMeasurements, measurements
from .reach import Reach, no_bound, reach_of
from .rules import check_rules, repeated


#: By which configurations say that there are experts.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class LocalistMixin:
    """
    A model, with or without a language modeling head, that can measure its locality and has a dial. It stands before
    the native class among the bases of a class.
    """

    #: What `forward` returns: the fields of the native output and those of [`LocalityMeasurements`].
    output_class: ClassVar[type[ModelOutput]]
    _native_arguments: ClassVar[tuple[str, ...]]
    _cache_argument: ClassVar[str | None]
    _counts_from_zero: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives `forward` the native arguments and ours by name: transformers reads there what a model takes."""
        super().__init_subclass__(**kwargs)
        is_made = any(issubclass(base, LocalistMixin) and issubclass(base, PreTrainedModel) for base in cls.__bases__)
        if is_made or not issubclass(cls, PreTrainedModel):
            return  # a subclass of a user's, or a mixin
        native_forward = super().forward
        *native, rest = inspect.signature(native_forward).parameters.values()
        own = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(LocalityRequest)
        ]
        cls._native_arguments = tuple(parameter.name for parameter in native if parameter.name != "self")
        cls._cache_argument = next((name for name in CACHE_ARGUMENTS if name in cls._native_arguments), None)
        # Models that count positions from the padding token on, such as Roberta, have a function of this name for it.
        file = sys.modules[native_forward.__module__]
        entries = (file, *vars(file).values())
        cls._counts_from_zero = not any(hasattr(entry, "create_position_ids_from_input_ids") for entry in entries)
        if "output_class" not in cls.__dict__:
            cls.output_class = _localist_output(_native_output(native_forward))

        @can_return_tuple
        def forward(self, *args: Any, **kwargs: Any) -> cls.output_class:
            return LocalistMixin.forward(self, *args, **kwargs)

        arguments = textwrap.indent((inspect.getdoc(LocalityRequest) or "").partition("\n\n")[2], " " * 8)
        forward.__doc__ = (LocalistMixin.forward.__doc__ or "").replace("{arguments}", arguments.strip())
        forward.__signature__ = inspect.Signature([*native, *own, rest], return_annotation=cls.output_class)
        cls.forward = forward

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        No: parameters and their names are the native class's. Of custom code transformers would neither convert old
        names nor initialise modules without parameters of their own, as GPT-2's residual projections need it.
        """
        return False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers; `"localist"`, or nothing, is ours in place of the native model's default."""
        is_ours = requested_attention in (None, "localist")
        chosen = super().get_correct_attn_implementation(None if is_ours else requested_attention, is_init_check)
        return LOCALIST_ATTENTION[chosen] if is_ours else chosen

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        r"""
        Every argument of the native model's `forward`, and those of [`LocalityRequest`]:

        {arguments}

        Raises:
            ValueError: where locality is asked for and cannot be measured; the message names the argument.
        """
        kwargs.update(zip(self._native_arguments, args, strict=False))
        if "locality" in kwargs:  # the language model hands down its own, and measures itself
            return super().forward(**kwargs, return_dict=True)
        self._name_cache(kwargs)
        request = LocalityRequest(**{name: kwargs.pop(name) for name in REQUEST_ARGUMENTS if name in kwargs})
        # What is no cache stays under the name by which it was passed, to be refused.
        caches = (kwargs.get(name) for name in (self._cache_argument, "past_key_values"))
        cache = next((cache for cache in caches if cache is not None), None)
        inputs = NativeInputs(**{name: kwargs.get(name) for name in NativeInputs._fields} | {"cache": cache})
        locality = build_locality(self.config, request, inputs, is_training=self.training)
        if locality is None:
            return self.output_class(**super().forward(**kwargs, return_dict=True, locality=None))
        self._check_arguments(kwargs)
        self._prepare_cache(locality, kwargs)
        is_told = inputs.position_ids is not None or inputs.attention_mask is None
        if not is_told and self._counts_from_zero and "position_ids" in self._native_arguments:
            # Where a row begins with padding, some models would count that too.
            kwargs["position_ids"] = locality.positions_in_text()
        outputs = super().forward(**kwargs, return_dict=True, locality=locality)
        locality.check_attended(type(self).__name__, getattr(outputs, self._cache_argument, None))
        return self.output_class(**outputs, **measurements(locality))

    def _prepare_cache(self, locality: Locality, kwargs: dict[str, Any]) -> None:
        """The cache that the native model would make, ready for what is asked."""
        if locality.is_packed or locality.has_row_dials:
            kwargs["use_cache"] = False  # transformers separates packed documents only where there is no cache
        use_cache = self.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        made = None
        if kwargs.get(self._cache_argument) is None and use_cache and not self.training:
            made = kwargs[self._cache_argument] = DynamicCache(config=self.config)
        locality.prepare_cache(made)

    def _name_cache(self, kwargs: dict[str, Any]) -> None:
        """Gives a cache the name that the native model has for it, by whichever it is passed."""
        # Before transformers 5.24 continuous batching has another thing of the new name.
        given = [name for name in CACHE_ARGUMENTS if isinstance(kwargs.get(name), Cache)]
        if given and self._cache_argument not in (None, *given):
            kwargs[self._cache_argument] = kwargs.pop(given[0])
        for name in CACHE_ARGUMENTS:  # beside a cache that is made for it transformers would warn of it
            if name != self._cache_argument and kwargs.get(name, self) is None:
                del kwargs[name]

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        """
        Refuses what is asked for and cannot be had, and a native model whose `forward` is not what this code was
        written for.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                f"`output_attentions` is {kwargs['output_attentions']}; no attention matrix is made where locality is "
                "measured or held. The shares and the entropy say what it would."
            )
        if all(isinstance(kwargs.get(name), Cache) for name in CACHE_ARGUMENTS):
            raise ValueError(f"`{'` and `'.join(CACHE_ARGUMENTS)}` are both given; they are one argument.")
        for names in (CACHE_ARGUMENTS, ("attention_mask",)):
            if not any(name in self._native_arguments for name in names):
                raise ValueError(
                    f"The `forward` of {type(self).__name__} has no argument `{'` or `'.join(names)}` in transformers "
                    f"{transformers.__version__}, which this version of localist-hf counts on; its locality can be "
                    "neither measured nor held. A newer localist-hf may know it; the code in a model's repository is "
                    "renewed by its owner."
                )

    def set_locality_dial(self, dial: float = 0.0, min_fidelity: float = 0.0) -> LocalityDial:
        """
        Sets the dial, and the guarantee, for the calls that this thread (or asyncio task) makes from now on; as a
        context manager, for those inside. Other threads keep theirs, so that a server can give each request its own,
        and nothing is saved with the model. What holds for all threads, and is saved, stands in the configuration:
        `model.config.locality.locality_dial` and `model.config.locality.min_fidelity`.

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
        return LocalityDial(Setting(self.config, dial, min_fidelity))

    @torch.no_grad()
    def reach(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        block_starts: torch.LongTensor | None = None,
        locality_dial: float | None = None,
        min_fidelity: float | None = None,
    ) -> Reach:
        """
        The tokens that each prediction of a text can depend on: exactly, where every layer attends to its local sets
        only, which is at dial 1 (or `min_fidelity` 1) with every lambda 1. No other token, but for attention sinks,
        changes a prediction by a bit; of mixtures of experts, by no more than rounding, since experts work on tokens in
        groups. Where the model finds the blocks itself this is said of these blocks, which tokens out of reach may have
        moved: see `statement`. It is said of the native class: not of modules and hooks that others have put into the
        model, nor of adapters that put tokens of their own before a text. One pass over the text.

        Args:
            input_ids, attention_mask, position_ids, block_starts, locality_dial, min_fidelity:
                As for `forward`.

        Returns:
            [`Reach`]: which says so, and why, where there is no bound.

        Raises:
            ValueError: as `forward`; for a dial for each row.

        Example:

        ```python
        >>> model = localize(model, locality_schedule="localist", num_previous_blocks=1)
        >>> reach = model.reach(inputs["input_ids"], locality_dial=1.0)
        >>> reach.is_bounded, reach.first[0, -1].item(), reach.statement
        ```
        """
        setting = current_setting(self.config)
        dial = setting.dial if locality_dial is None else locality_dial
        floor = setting.min_fidelity if min_fidelity is None else min_fidelity
        if isinstance(dial, torch.Tensor):
            raise ValueError("`locality_dial` is a tensor; the reach is of one dial.")
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` has the shape {tuple(input_ids.shape)}; it must be (batch_size, length).")
        outputs = self(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            block_starts=block_starts,
            locality_dial=dial,
            min_fidelity=floor,
            output_fidelity=True,
            use_cache=False,
        )
        documents = outputs.document_starts
        if not self._counts_from_zero and position_ids is None:
            kind = type(self).__name__
            return no_bound(documents, f"{kind} counts positions by the padding tokens in a text; pass `position_ids`")
        has_experts = any((getattr(self.config, name, None) or 0) > 1 for name in _NUM_EXPERTS)
        given = dial, floor, block_starts is not None
        return reach_of(outputs.block_starts, documents, self.config.locality, *given, has_experts)


class LocalistGenerationMixin(LocalistMixin):
    """
    A [`LocalistMixin`] with a language modeling head: `generate` under the dial. `GenerationMixin` is to be named among
    the bases of the class too: transformers would otherwise make another class of one that it loads from a repository,
    which cannot be pickled.
    """

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        locality_dial: float | None = None,
        min_fidelity: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As [`~transformers.GenerationMixin.generate`], under the dial: every forward pass of this model that the
        generation makes, that of a guidance without the prompt too. An assistant model keeps its own dial.

        Args:
            inputs (`torch.Tensor`, *optional*), generation_config ([`~transformers.GenerationConfig`], *optional*), \
            args, kwargs:
                As in [`~transformers.GenerationMixin.generate`], and what `forward` takes.
            locality_dial (`float`, *optional*), min_fidelity (`float`, *optional*):
                In place of what is set.

        Raises:
            ValueError: for a value outside [0, 1].
        """
        setting = current_setting(self.config)
        dial = check_share("locality_dial", setting.dial if locality_dial is None else locality_dial)
        floor = check_share("min_fidelity", setting.min_fidelity if min_fidelity is None else min_fidelity)
        self._name_cache(kwargs)
        if dial or floor:
            self._check_arguments(kwargs)
            # What a configuration that is passed leaves open transformers takes from the model's own.
            configs = [config for config in (generation_config, self.generation_config) if config is not None]

            def said(name: str) -> Any:
                values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
                return next((value for value in values if value is not None), None)

            if (layer := said("assistant_early_exit")) is not None:
                # transformers takes the upper layers out of the model for a while: where locality then fails, for good.
                raise ValueError(
                    f"`assistant_early_exit` is {layer}; under `locality_dial` and `min_fidelity` no layer can be left "
                    "out. Use `prompt_lookup_num_tokens` or an `assistant_model`."
                )
            is_assisted = kwargs.get("assistant_model") is not None or said("prompt_lookup_num_tokens")
            for name in ("rules", "pointer_blocks"):
                if kwargs.get(name) is not None and (is_assisted or said("guidance_scale") not in (None, 1)):
                    raise ValueError(
                        f"`{name}` is given for an assisted or a guided generation, which calls a model without it."
                    )
            repeats = max(said("num_beams") or 1, said("num_return_sequences") or 1)
            if kwargs.get("rules") is not None and repeats > 1:
                check_rules(kwargs["rules"], kwargs.get("anchors"))
                kwargs["rules"], kwargs["anchors"] = repeated(kwargs["rules"], kwargs.get("anchors"), repeats)
            if is_assisted or said("is_assistant"):
                # Rejected tokens are removed from the cache, so that no layer can keep its blocks only.
                cache = kwargs.get(self._cache_argument)
                # transformers takes "hybrid", as configurations of Gemma have it, for nothing said.
                if cache is None and said("cache_implementation") in (None, "hybrid"):
                    kwargs[self._cache_argument] = whole_cache(self.config)
                elif isinstance(cache, DynamicCache) and not cache.get_seq_length():
                    cache.layers = whole_cache(self.config).layers
            if not is_assisted:
                # Where the dial stands in a call, a compiled one need not look for it. An assistant would be handed it.
                kwargs |= {"locality_dial": dial, "min_fidelity": floor}
        is_changed = (dial, floor) != (setting.dial, setting.min_fidelity)
        with self.set_locality_dial(dial, floor) if is_changed else nullcontext():
            return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.GenerationMixin.init_continuous_batching`], at dial 0 only: its attention is `sdpa`."""
        setting = current_setting(self.config)
        if setting.dial or setting.min_fidelity:
            raise ValueError(
                f"`locality_dial` is {setting.dial} and `min_fidelity` {setting.min_fidelity}; continuous batching "
                "allows 0 only. Use `generate`."
            )
        natives = {name: native for native, name in LOCALIST_ATTENTION.items()}
        if (native := natives.get(self.config._attn_implementation)) is not None:
            self.set_attn_implementation(native)
        return super().init_continuous_batching(*args, **kwargs)

    @contextmanager
    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As in transformers; the attention that the model had is set again at the end."""
        attention = self.config._attn_implementation
        try:
            with super().continuous_batching_context_manager(*args, **kwargs) as manager:
                yield manager
        finally:
            self.set_attn_implementation(attention)


def change_class(model: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """
    Gives a model another class, the localist or the native one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        cls (`type`):
            The class, which differs in its methods only.
    """
    before = type(model).forward
    model.__class__ = cls
    # Where a model is made transformers notes what its class can record, such as hidden states.
    PreTrainedModel.__init__(cls.__new__(cls), model.config)
    # What accelerate has put around the `forward` of a model on several devices stays there.
    if (wrapped := vars(model).get("_old_forward")) is not None and wrapped.__func__ is before:
        model._old_forward = types.MethodType(cls.forward, model)
        functools.update_wrapper(model.forward, model._old_forward)


def _native_output(forward: Callable) -> type[ModelOutput]:
    """The output class that the native model's `forward` says that it returns."""
    returned = inspect.signature(forward).return_annotation
    for kind in typing.get_args(returned) or (returned,):
        if inspect.isclass(kind) and issubclass(kind, ModelOutput):
            return kind
    raise ValueError(
        f"{forward.__qualname__} does not say which output class it returns, so that nothing can be added to it."
    )


@functools.cache
def _localist_output(native: type[ModelOutput]) -> type[ModelOutput]:
    """That output class with the fields of [`LocalityMeasurements`], one class for all models."""

    def __reduce__(self) -> tuple:
        # Where a pickle is read, the class may have to be made.
        _, values, *rest = native.__reduce__(self)
        return _make_output, (native, *values), *rest

    namespace = {
        "__module__": __name__,
        "__doc__": f"A [`~transformers.{native.__name__}`] and the fields of [`LocalityMeasurements`].",
        "__reduce__": __reduce__,
    }
    return dataclass(type(f"Localist{native.__name__}", (LocalityMeasurements, native), namespace))


def _make_output(native: type[ModelOutput], *values: Any) -> ModelOutput:
    return _localist_output(native)(*values)
