"""The page with a server behind it: any text, any model, and the dial."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from .answers import answer
from .reading_server import Load, Readings, max_characters
from .saved_page import TITLE, own_file, page_script


def live_page(
    load: Load,
    models: Sequence[str],
    text: str,
    compare: str | None = None,
    is_open: bool = True,
    max_tokens: int | None = None,
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
            Whether readers may name other models, by whatever they ask with. Not where strangers are: each would be
            loaded, and from the Hub.
        max_tokens (`int`, *optional*):
            As for [`Readings`].

    Returns:
        `gr.Blocks`: to be launched with [`launch_settings`].
    """
    names = list(dict.fromkeys([*models, *filter(None, [compare])]))
    readings = Readings(load, max_tokens, None if is_open else names)

    def read(text: str, model: str, compare: str | None) -> dict[str, Any]:
        about = {"text": text, "model": model, "compare": compare}  # which all that is asked of it comes back with
        return {"page": readings.read(**about), "about": about}

    def read_text(text: Any, model: Any, compare: Any) -> dict[str, Any]:
        return answer(read, {"text": text, "model": model, "compare": compare})

    def weights(asked: Any) -> dict[str, Any]:
        return answer(readings.weights, asked)

    def blocks(asked: Any) -> dict[str, Any]:
        return answer(readings.blocks, asked)

    def looked_at(asked: Any) -> dict[str, Any]:
        return answer(readings.looked_at, asked)

    def reach(asked: Any) -> dict[str, Any]:
        return answer(readings.reach, asked)

    def influence(asked: Any) -> dict[str, Any]:
        return answer(readings.influence, asked)

    def predict(asked: Any) -> dict[str, Any]:
        return answer(readings.predict, asked)

    def go_on(asked: Any) -> dict[str, Any]:
        return answer(readings.go_on, asked)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        text_box = gr.Textbox(text, label="Text", lines=4, max_lines=12)
        with gr.Row():
            model_box = gr.Dropdown(names, value=models[0], label="Model", allow_custom_value=is_open)
            compare_box = gr.Dropdown(
                [("none", ""), *names], value=compare or "", label="Second model beside it", allow_custom_value=is_open
            )
        button = gr.Button("Read", variant="primary")
        drawing = gr.HTML(
            html_template='<div class="drawing"></div>',
            # Not in `js_on_load`, where Gradio takes every word in quotes for the name of an event.
            head=f"<script>{page_script()}</script><style>textarea {{ unicode-bidi: plaintext }}</style>",
            js_on_load=_CONNECT,
            css=own_file("page.css"),
            server_functions=[weights, looked_at, blocks, reach, influence, predict, go_on],
        )
        # No more is sent of a text than is refused. JavaScript counts some characters twice. An emptied box is null.
        most = 2 * max_characters(max_tokens) + 2
        cut = f'(text, ...models) => [text.slice(0, {most}), ...models.map((name) => name ?? "")]'
        gr.on(
            [page.load, button.click],
            read_text,
            [text_box, model_box, compare_box],
            drawing,
            js=cut,
            api_name="read",
            preprocess=False,  # which would make texts of whatever comes
            concurrency_limit=None,  # what has been read already waits for nobody; [`Readings`] has the others wait
        )
    return page


#: Draws what was read, and asks the server for the rest.
_CONNECT = """
const ask = (name, about) => async (asked) => {
  const { answer, problem } = await server[name]({ ...about, ...asked });
  if (problem) throw new Error(problem);
  return answer;
};
const draw = () => {
  const host = element.querySelector(".drawing");
  const { answer, problem } = props.value ?? {};
  if (problem) drawProblem(host, props.css, problem);
  else if (answer) {
    const { page, about } = answer;
    const source = {
      weights: ask("weights", about),
      lookedAt: ask("looked_at", about),
      reach: ask("reach", about),
      influence: ask("influence", about),
      blocks: async (asked) => unpack(await ask("blocks", about)(asked), Uint16Array),
      predict: ask("predict", about),
      goOn: ask("go_on", about),
    };
    drawPage(host, props.css, page, source);
  }
};
watch("value", draw);
draw();
"""
