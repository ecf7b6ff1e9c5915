"""The page with a server behind it: any text, any model, and the dial."""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import gradio as gr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .page_data import page_data
from .reading import Passage, Reading, read, read_beside
from .saved_page import TITLE


#: Longer texts are refused, whatever the model takes: the queries and keys of every layer are held in memory.
MAX_TOKENS = 2048
_KEPT_MODELS, _KEPT_READINGS = 2, 4

Load = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class Readings:
    """
    The models that a page's readers have asked for, and what was read with them. One thing is done at a time: a model
    serves one thread, and two at once would take twice as long. What was not asked for longest makes room.

    Args:
        load (`Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]`):
            Loads a localised model and its tokenizer by name. It raises a `ValueError` with a sentence for the reader
            where that cannot be done.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._models: OrderedDict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = OrderedDict()
        self._readings: OrderedDict[str, list[Reading]] = OrderedDict()

    def read(self, text: str, model: str, compare: str | None) -> dict[str, Any]:
        """
        Reads a text.

        Args:
            text (`str`), model (`str`):
                The text, and the name of the model.
            compare (`str`, *optional*):
                The name of a second one.

        Returns:
            `dict[str, Any]`: `"page"`, what the page draws, and `"key"`, by which the other methods know it.

        Raises:
            ValueError: for what cannot be read.
        """
        if not model:
            raise ValueError("`model` is empty; give a model's folder or Hub id.")
        with self._lock:
            first, tokenizer = self._model(model)
            passage = _passage(tokenizer, text)
            readings = [read(first, passage)]
            if compare:
                second, tokenizer = self._model(compare)
                readings.append(read_beside(readings[0], second, _passage(tokenizer, text)))
            key = uuid.uuid4().hex
            _keep(self._readings, key, readings, _KEPT_READINGS)
            return {"key": key, "page": page_data(readings, has_rows=False)}

    def weights(self, key: str, reading: int, layer: int, head: int | None, position: int) -> list[float]:
        """The attention weights of one query, of the mean over heads where `head` is `None`."""
        with self._lock:
            row = self._reading(key, reading).weights(layer, position)
            if head is not None and not 0 <= head < len(row):
                raise ValueError(f"`head` is {head}; it must be in 0 to {len(row) - 1}.")
            return (row.mean(0) if head is None else row[head]).tolist()

    def predict(self, key: str, reading: int, position: int, dial: float) -> dict[str, Any]:
        """What comes after a position under the dial: a [`Prediction`] for the page."""
        with self._lock:
            found = self._reading(key, reading).predict(position, dial)
            return {
                "tokens": found.tokens,
                "probabilities": found.probabilities,
                "actual": found.actual_probability,
                "divergence": found.divergence,
                "continuation": found.continuation,
            }

    def _model(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        loaded = self._models.get(name) or self._load(name)
        _keep(self._models, name, loaded, _KEPT_MODELS)
        kept = [model for model, _ in self._models.values()]
        for key in [key for key, found in self._readings.items() if not all(one.model in kept for one in found)]:
            del self._readings[key]  # it would hold its model in memory
        return loaded

    def _reading(self, key: str, reading: int) -> Reading:
        if key not in self._readings:
            raise ValueError("This text was read too long ago, and others have taken its place: read it again.")
        self._readings.move_to_end(key)
        readings = self._readings[key]
        if not 0 <= reading < len(readings):
            raise ValueError(f"`reading` is {reading}; it must be in 0 to {len(readings) - 1}.")
        return readings[reading]


def _keep(kept: OrderedDict[str, Any], key: str, value: Any, number: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > number:
        kept.popitem(last=False)


def _passage(tokenizer: PreTrainedTokenizerBase, text: str) -> Passage:
    passage = Passage.of(tokenizer, text)
    if len(passage) > MAX_TOKENS:
        raise ValueError(f"`text` has {len(passage)} tokens; this page takes {MAX_TOKENS}.")
    return passage


def live_page(
    load: Load, models: Sequence[str], text: str, compare: str | None = None, is_open: bool = True
) -> gr.Blocks:
    """
    The page as a Gradio app, in which nothing has been read yet; it reads the first text as soon as it is opened.

    Args:
        load:
            As for [`Readings`].
        models (`Sequence[str]`):
            The models to choose from; the first one is read with.
        text (`str`):
            The first text.
        compare (`str`, *optional*):
            The second model, to begin with.
        is_open (`bool`, *optional*, defaults to `True`):
            Whether readers may name other models. Not where strangers are: each would be loaded, and from the Hub.

    Returns:
        `gr.Blocks`: to be launched.
    """
    readings = Readings(load)

    def answer(ask: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What the page is told: an answer, or a sentence that says why there is none."""
        try:
            return {"answer": ask(*arguments)}
        except (ValueError, TypeError, KeyError) as error:
            return {"problem": str(error)}

    def read_text(text: str, model: str, compare: str | None) -> dict[str, Any]:
        return answer(readings.read, text, model, compare)

    def weights(asked: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda: readings.weights(**asked))

    def predict(asked: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda: readings.predict(**asked))

    files = resources.files(__package__)
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    css = files.joinpath("page.css").read_text(encoding="utf-8")
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        text_box = gr.Textbox(text, label="Text", lines=4, max_lines=12)
        with gr.Row():
            names = list(dict.fromkeys([*models, *filter(None, [compare])]))
            model_box = gr.Dropdown(names, value=models[0], label="Model", allow_custom_value=is_open)
            compare_box = gr.Dropdown(
                [("none", ""), *names], value=compare or "", label="Second model beside it", allow_custom_value=is_open
            )
        button = gr.Button("Read", variant="primary")
        drawing = gr.HTML(
            html_template='<div class="drawing"></div>',
            # Not in `js_on_load`, where Gradio takes every word in quotes for the name of an event.
            head=f"<script>{script}</script>",
            js_on_load=_CONNECT,
            css=css,
            server_functions=[weights, predict],
        )
        inputs = [text_box, model_box, compare_box]
        gr.on([page.load, button.click], read_text, inputs, drawing, api_name="read", concurrency_limit=1)
    return page


#: Draws what was read, and asks the server for the rest.
_CONNECT = """
const ask = (name, key) => async (asked) => {
  const { answer, problem } = await server[name]({ key, ...asked });
  if (problem) throw new Error(problem);
  return answer;
};
const draw = () => {
  const host = element.querySelector(".drawing");
  const { answer, problem } = props.value ?? {};
  if (problem) drawProblem(host, props.css, problem);
  else if (answer) {
    const { key, page } = answer;
    drawPage(host, props.css, page, { weights: ask("weights", key), predict: ask("predict", key) });
  }
};
watch("value", draw);
draw();
"""
