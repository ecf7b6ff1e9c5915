"""Tiny models for the tokens of the tests' tokenizer, what they read, and a browser to look at it."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from localist_hf import localize
from localist_hf.page import Passage, Reading, read, read_beside, saved_page


if TYPE_CHECKING:
    from playwright import sync_api

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = (
    "Sentence number 12 says something.\n\tsome <b>more</b> of the words here 😀\n"
    "number 3 says <script>alert(1)</script>."
)


@pytest.fixture
def model_for_tokenizer(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A plain random Llama, far from even in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    """One for all tests of a file."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: on Debian, apt-get install chromium")
    from playwright import sync_api

    sync_api.expect.set_options(timeout=60_000)  # a busy machine's answer comes late
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "sync_api.Browser") -> Iterator[Callable[..., "sync_api.Page"]]:
    """Opens an address; at the end of the test nothing may have gone wrong on the page, or been fetched from afar."""
    pages, complaints = [], []

    def complain(message: "sync_api.ConsoleMessage") -> None:
        # The page only draws; it is `check_blocks` that reads a canvas, and more than once.
        if message.type in ("error", "warning") and not message.text.startswith("Canvas2D: Multiple readback"):
            complaints.append(message.text)

    def watch_requests(request: "sync_api.Request") -> None:
        if not re.match(r"file:|data:|blob:|\w+://127\.0\.0\.1", request.url):
            complaints.append(f"asked for {request.url}")

    def open_address(address: str, width: int = 1280) -> "sync_api.Page":
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        pages.append(page)
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("an alert"))
        page.on("request", watch_requests)
        page.goto(address)
        page.wait_for_selector(".token[aria-selected=true]")
        return page

    yield open_address
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def models(model_for_tokenizer: LlamaForCausalLM) -> list[PreTrainedModel]:
    """Two models of one kind, with other weights."""
    settings = {"locality_schedule": "localist", "min_block_length": 3, "max_block_length": 12, "num_sink_tokens": 1}
    torch.manual_seed(1)
    other = LlamaForCausalLM(copy.deepcopy(model_for_tokenizer.config)).eval()
    return [localize(model, **settings) for model in (model_for_tokenizer, other)]


@pytest.fixture
def readings(models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> list[Reading]:
    passage = Passage.of(tokenizer, TEXT)
    first = read(models[0], passage, name="first")
    return [first, read_beside(first, models[1], passage, name="second")]


@pytest.fixture
def saved(readings: list[Reading], tmp_path: Path) -> str:
    saved_page(readings).save(tmp_path / "page.html")
    return (tmp_path / "page.html").as_uri()


@pytest.fixture
def address(models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from localist_hf.page.live_page import live_page
    from localist_hf.page.serving import launch_settings

    by_name = dict(zip(("first", "second"), models, strict=True))

    def load(name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if name not in by_name:
            raise ValueError(f"`model` is {name!r}, which cannot be loaded.")
        return by_name[name], tokenizer

    page = live_page(load, [*by_name], TEXT)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_settings("127.0.0.1"))
    yield address
    page.close()
