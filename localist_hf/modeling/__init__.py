"""What travels with every model: these files are copied beside its weights and run there without this package."""

from .configuration_localist_gpt2 import LocalistGPT2Config
from .modeling_localist_gpt2 import (
    LocalistCausalLMOutput,
    LocalistGPT2LMHeadModel,
    LocalistGPT2Model,
    LocalistModelOutput,
)


__all__ = [
    "LocalistCausalLMOutput",
    "LocalistGPT2Config",
    "LocalistGPT2LMHeadModel",
    "LocalistGPT2Model",
    "LocalistModelOutput",
]
