"""What travels with every model: these files are copied beside its weights and run there without this package."""

from .configuration_localist_gpt2 import LocalistGPT2Config
from .locality_config import LOCALITY_FIELDS, LocalityConfig, LocalityFields
from .measurements import LocalityMeasurements
from .modeling_localist import delocalize, localize
from .modeling_localist_gpt2 import (
    LocalistCausalLMOutput,
    LocalistGPT2LMHeadModel,
    LocalistGPT2Model,
    LocalistModelOutput,
)
from .rules import Rule


__all__ = [
    "LOCALITY_FIELDS",
    "LocalistCausalLMOutput",
    "LocalistGPT2Config",
    "LocalistGPT2LMHeadModel",
    "LocalistGPT2Model",
    "LocalistModelOutput",
    "LocalityConfig",
    "LocalityFields",
    "LocalityMeasurements",
    "Rule",
    "delocalize",
    "localize",
]
