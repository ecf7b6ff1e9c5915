"""The page with a server behind it: any text, any model, and the dial."""

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import gradio as gr

from .readings import Load, Readings
from .saved_page import TITLE


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

    def go_on(asked: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda: readings.go_on(**asked))

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
            server_functions=[weights, predict, go_on],
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
    const source = { weights: ask("weights", key), predict: ask("predict", key), goOn: ask("go_on", key) };
    drawPage(host, props.css, page, source);
  }
};
watch("value", draw);
draw();
"""
