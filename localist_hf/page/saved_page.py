"""The page as one file that needs no server and no network, and in notebooks."""

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.check_model import core_model, num_positions
from ..page_title import TITLE
from ..version import __version__
from ..whole_file import write_whole
from .page_data import page_data
from .passage import Passage, num_tokens
from .reading import Reading, read, read_beside


#: A page of 56 MB takes 4 seconds and 620 MB of memory to open in Chromium, and half a minute to be made.
MAX_BYTES = 50e6
#: What packing leaves of the weights' bytes, roughly.
_BYTES_LEFT = 0.75


@dataclass(frozen=True, repr=False)
class Page:
    """
    A page that is shown where it is a notebook cell's last value.

    Args:
        html (`str`):
            The whole file: text, numbers, styles and script.
    """

    html: str

    def save(self, path: str | Path) -> None:
        """Writes the page to a file, which any browser opens."""
        write_whole(path, self.html)

    def _repr_html_(self) -> str:
        # A frame of its own keeps a notebook's styles and the page's apart.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="{TITLE}" '
            'style="width: 100%; height: 900px; border: 1px solid #c4c7d0"></iframe>'
        )


def view(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, compare: PreTrainedModel | None = None
) -> Page:
    """
    Shows where a model looks in a text: its blocks, and of each token the shares of its attention by layer, and the
    words that it looks at in each layer and head.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model, trained for locality or not; it is set to evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        text (`str`):
            The text. All attention weights are in the page, 2 MB at most for 256 tokens and 6 layers of 12 heads; they
            grow with the square of its length, and a page of more than some 50 MB is refused.
        compare (a localised language model, *optional*):
            A second model, with the same tokens, to be shown beside it on the same blocks.

    Returns:
        [`Page`]: shown in a notebook; `save` writes it to a file.

    Raises:
        ValueError: for a model that is not localised, and for a text that is empty, or longer than the models'
            positions or than a page can hold.

    Example:

    ```python
    >>> import localist_hf

    >>> model = localist_hf.localize(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
    >>> localist_hf.view(model, tokenizer, "Some text. And some more of it.").save("page.html")
    ```
    """
    models = [model] if compare is None else [model, compare]
    return page_of([(each, tokenizer) for each in models], text)


def page_of(models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]], text: str) -> Page:
    """
    The page of one text as several models read it, on the blocks of the first one.

    Args:
        models (`Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]]`):
            The models with their tokenizers.
        text (`str`):
            The text.

    Raises:
        ValueError: as [`Passage.of`], [`read`] and [`read_beside`], and for a text whose weights are too many.
    """
    length, limit = num_tokens(models[0][1], text), max_page_tokens(models)
    positions = min(num_positions(core_model(model).config) or math.inf for model, _ in models)
    if limit < length and limit < positions:  # of two limits that are too low a reader hears of the lower one
        num_megabytes = math.ceil(_bytes_of_pair(models) * length**2 / 1e6)
        raise ValueError(
            f"`text` has {length} tokens, whose attention weights would make a page of about {num_megabytes} MB, more "
            f"than a browser opens with ease; it must have {limit} at most, or be read with `localist-hf view` alone."
        )
    readings: list[Reading] = []
    for model, tokenizer in models:
        passage = Passage.of(tokenizer, text)
        readings.append(read_beside(readings[0], model, passage) if readings else read(model, passage))
    return saved_page(readings)


def max_page_tokens(models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> int:
    """Tokens of the longest text whose attention weights fit into a page."""
    return math.isqrt(int(MAX_BYTES / _bytes_of_pair(models)))


def _bytes_of_pair(models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> float:
    """What a page has for each pair of tokens."""
    num_bytes = 0.0
    for model, tokenizer in models:
        one = read(model, Passage(torch.zeros(1, dtype=torch.long), [""], tokenizer))  # which tells the numbers
        num_bytes += _BYTES_LEFT / 2 * one.num_layers * (2 + one.num_heads)
    return num_bytes


def is_saved_page(path: Path) -> bool:
    """Whether a file is such a page, of whatever version."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'<meta name="generator" content="localist-hf' in file.read(1024)


def saved_page(readings: Sequence[Reading]) -> Page:
    """
    The page of readings, with all of their attention weights.

    Args:
        readings (`Sequence[Reading]`):
            One, or several of the same tokens on the same blocks.
    """
    data = {"page": page_data(readings, has_rows=True), "css": own_file("page.css")}
    parts = {
        "title": html.escape(TITLE),
        "version": html.escape(__version__),
        "script": page_script(),
        # As JSON may write it, and so that no text can end the script that it stands in.
        "data": re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(data, allow_nan=False)),
    }
    template = own_file("saved_page.html")
    return Page(re.sub("@(title|version|script|data)@", lambda found: parts[found[1]], template))


def own_file(name: str) -> str:
    """The text of a file of the page."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def page_script() -> str:
    """What draws the page, in JavaScript."""
    return "\n".join(
        map(
            own_file,
            (
                "parts.js",
                "words.js",
                "tables.js",
                "blocks.js",
                "predictions.js",
                "dependence.js",
                "picture.js",
                "page.js",
            ),
        )
    )
