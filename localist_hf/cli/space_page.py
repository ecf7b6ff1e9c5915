"""What the app.py of a Space shows; `localist-hf publish --space` makes one."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .view import default_text, load_for_reading


def serve_page(models: Sequence[str], revisions: Mapping[str, str]) -> None:
    """
    Serves the page on which strangers read with some models and no others, where Gradio's environment variables say.

    Args:
        models (`Sequence[str]`):
            Hub ids; the first one is shown first, with the second beside it.
        revisions (`Mapping[str, str]`):
            The commit of each, and of each base that an adapter stands on.
    """
    from ..page.live_page import live_page  # only those who open one have Gradio
    from ..page.serving import launch_settings

    def load_pinned(name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_for_reading(name, {}, revisions, flag)

    compare = models[1] if len(models) > 1 else None
    page = live_page(load_pinned, models, default_text(), compare, is_open=False)
    page.launch(**launch_settings())  # its name is given by Hugging Face, whose servers are before it
