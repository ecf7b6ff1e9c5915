"""Language models whose attention can be read: progressive localisation for GPT-2 (arXiv:2511.18375)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model
from .version import __version__


AutoConfig.register("localist-gpt2", LocalistGPT2Config)
AutoModel.register(LocalistGPT2Config, LocalistGPT2Model)
AutoModelForCausalLM.register(LocalistGPT2Config, LocalistGPT2LMHeadModel)

__all__ = ["LocalistGPT2Config", "LocalistGPT2LMHeadModel", "LocalistGPT2Model", "__version__"]
