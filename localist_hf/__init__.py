"""Language models whose attention can be read: progressive localisation (arXiv:2511.18375)."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model, Rule, delocalize, localize
from .modeling.locality_mixin import LocalistGenerationMixin
from .version import __version__


if TYPE_CHECKING:
    from .page import view

AutoConfig.register("localist-gpt2", LocalistGPT2Config)
AutoModel.register(LocalistGPT2Config, LocalistGPT2Model)
AutoModelForCausalLM.register(LocalistGPT2Config, LocalistGPT2LMHeadModel)


def _push_to_hub(self: LocalistGenerationMixin, repo_id: str, **kwargs: Any) -> Any:
    """See [`localist_hf.hub.push_to_hub`]."""
    from .hub import push_to_hub

    return push_to_hub(self, repo_id, **kwargs)


def __getattr__(name: str) -> Any:
    """[`localist_hf.page.view`]; what it needs is imported by those who view something."""
    if name == "view":
        from .page import view

        return view
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Of every localised model, before the native class's own. Not in `modeling`: the code that travels with every model
# touches no file and no network.
LocalistGenerationMixin.push_to_hub = _push_to_hub

__all__ = [
    "LocalistGPT2Config",
    "LocalistGPT2LMHeadModel",
    "LocalistGPT2Model",
    "Rule",
    "__version__",
    "delocalize",
    "localize",
    "view",
]
