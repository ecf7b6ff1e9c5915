"""Which models can be measured."""

import inspect
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig


def core_model(model: nn.Module) -> nn.Module:
    """The model inside of what distribution, compilation and adapters have put around it."""
    core = extract_model_from_parallel(model, keep_torch_compile=False)
    return core.get_base_model() if isinstance(core, PeftModel) else core


def has_own_tokens(model: nn.Module) -> bool:
    """Whether an adapter puts tokens of its own before a text, whose places are then not its own."""
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())


def check_own_places(name: str, model: nn.Module) -> None:
    """An error for such an adapter."""
    if has_own_tokens(model):
        raise ValueError(
            f"`{name}` has an adapter that puts tokens of its own before a text, whose places are not its own."
        )


def num_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a text may have; `None` where positions are not learned, so that there is no last one."""
    # By this attribute transformers tells rotary models; `max_position_embeddings` is what those were trained with.
    if hasattr(config, "rope_parameters") or not hasattr(config, "max_position_embeddings"):
        return None
    return config.max_position_embeddings


def check_model(name: str, model: Any, needs_head: bool = True) -> None:
    """
    Refuses a model that cannot report its locality. Its class may come from a model repository's own code, so it is
    told by the arguments that it takes.

    Args:
        name (`str`):
            What the caller calls the model.
        model (`Any`):
            The model, perhaps compiled, or with an adapter.
        needs_head (`bool`, *optional*, defaults to `True`):
            Whether it must be a language model, not only a transformer.

    Raises:
        ValueError: for any other class.
    """
    core = core_model(model) if isinstance(model, nn.Module) else model
    takes = inspect.signature(core.forward).parameters if isinstance(core, nn.Module) else ()
    if "output_fidelity" not in takes or (needs_head and "labels" not in takes):
        raise ValueError(
            f"`{name}` is a {type(core).__name__}; it must be a localised {'language ' if needs_head else ''}model, as "
            "`localize(model)` makes it of any causal language model and `LocalistGPT2LMHeadModel.from_pretrained` of "
            "GPT-2."
        )
