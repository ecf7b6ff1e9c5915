"""Language models whose attention can be read: progressive localisation (arXiv:2511.18375)."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model, delocalize, localize
from .modeling.localist_model import LocalistGenerationMixin
from .version import __version__


AutoConfig.register("localist-gpt2", LocalistGPT2Config)
AutoModel.register(LocalistGPT2Config, LocalistGPT2Model)
AutoModelForCausalLM.register(LocalistGPT2Config, LocalistGPT2LMHeadModel)


def _push_to_hub(self: LocalistGenerationMixin, repo_id: str, **kwargs: Any) -> Any:
    """See [`localist_hf.hub.push_to_hub`]."""
    from .hub import push_to_hub

    return push_to_hub(self, repo_id, **kwargs)


# Of every localised model, before the native class's own. Not in `modeling`: the code that travels with every model
# touches no file and no network.
LocalistGenerationMixin.push_to_hub = _push_to_hub

__all__ = [
    "LocalistGPT2Config",
    "LocalistGPT2LMHeadModel",
    "LocalistGPT2Model",
    "__version__",
    "delocalize",
    "localize",
]
