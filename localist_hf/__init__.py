"""Language models whose attention can be read: progressive localisation (arXiv:2511.18375)."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model, delocalize, localize
from .version import __version__


AutoConfig.register("localist-gpt2", LocalistGPT2Config)
AutoModel.register(LocalistGPT2Config, LocalistGPT2Model)
AutoModelForCausalLM.register(LocalistGPT2Config, LocalistGPT2LMHeadModel)


def _push_to_hub(self: LocalistGPT2LMHeadModel, repo_id: str, **kwargs: Any) -> Any:
    """See [`localist_hf.hub.push_to_hub`]."""
    from .hub import push_to_hub

    return push_to_hub(self, repo_id, **kwargs)


# Not in `modeling`: the code that travels with every model touches no file and no network.
LocalistGPT2LMHeadModel.push_to_hub = _push_to_hub

__all__ = [
    "LocalistGPT2Config",
    "LocalistGPT2LMHeadModel",
    "LocalistGPT2Model",
    "__version__",
    "delocalize",
    "localize",
]
