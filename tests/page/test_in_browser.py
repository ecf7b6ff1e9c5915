"""The saved page in a browser: what a reader does, and what the page then shows, against the model's own numbers."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from browsing import (
    WIDTHS,
    check_blocks,
    check_fits,
    check_looked_at,
    check_shares,
    check_weights,
    press_tokens,
    settled,
    shades,
    sync_api,
)
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from localist_hf.page import Passage, Reading, read, saved_page


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", WIDTHS)
def test_a_saved_page_shows_the_models_numbers(
    open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading], width: int
) -> None:
    page = open_page(saved, width)
    last, length = readings[0].num_layers - 1, len(readings[0].passage)
    for panel, reading in enumerate(readings):
        check_weights(page, reading, last, None, length - 1, panel)
        check_shares(page, reading, length - 1, panel)
        assert page.locator(".text").nth(panel).locator(".block").count() == reading.block_starts.unique().numel()
    press_tokens(page, 11)  # both models' panels follow
    for panel, reading in enumerate(readings):
        check_weights(page, reading, last, None, 11, panel)
        check_shares(page, reading, 11, panel)
        check_blocks(page, reading, last, None, panel)
    # One panel's layer and head, by the lists, and by the overview.
    panel = page.locator(".panel").nth(1)
    panel.get_by_role("combobox", name="Layer").select_option("1")
    panel.get_by_role("combobox", name="Head").select_option("3")
    check_weights(page, readings[1], 1, 3, 11, 1)
    check_weights(page, readings[0], last, None, 11, 0)
    check_blocks(page, readings[1], 1, 3, 1)
    panel.get_by_role("button", name=re.compile("^Layer 0, head 2: context fidelity")).click()
    check_weights(page, readings[1], 0, 2, 11, 1)
    cells = panel.locator(".heat td").all_inner_texts()
    fidelity = readings[1].profile.context_fidelity
    assert [int(cell) for place, cell in enumerate(cells) if place % 5] == pytest.approx(
        (100 * fidelity).flatten().tolist(), abs=0.51
    )
    panel.get_by_role("button", name="Layer 2, mean of all heads", exact=True).click()
    check_weights(page, readings[1], 2, None, 11, 1)
    for narrower in (width, 320):
        check_fits(page, "#page", narrower)


def test_the_text_is_whole_and_stays_text(
    open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading]
) -> None:
    page = open_page(saved)
    text = page.locator(".text").first
    assert re.sub("[↵⇥·]", "", text.text_content()) == "".join(readings[0].passage.pieces)
    assert text.locator("b, script").count() == 0


def test_the_keyboard_is_enough(open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading]) -> None:
    page = open_page(saved)
    starts = readings[0].block_starts.unique().tolist()
    length, last = len(readings[0].passage), readings[0].num_layers - 1
    page.locator(".token[aria-selected=true]").first.focus()
    for key, position in (
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("ArrowDown", starts[1]),
        ("ArrowDown", starts[2]),
        ("ArrowRight", starts[2] + 1),
        ("ArrowUp", starts[2]),
        ("ArrowUp", starts[1]),
        ("End", length - 1),
        ("ArrowRight", length - 1),
    ):
        page.keyboard.press(key)
        settled(page, last, None, position)
        focused = page.evaluate("document.activeElement.shadowRoot.activeElement.dataset.position")
        assert int(focused) == position
    check_weights(page, readings[0], last, None, length - 1)
    page.get_by_role("button", name="Previous token").press("Enter")
    settled(page, last, None, length - 2)
    # From cell to cell of the overview.
    page.locator(".heat").first.locator("button[aria-pressed=true]").focus()
    for key, layer, head in (("ArrowUp", 1, None), ("ArrowRight", 1, 0), ("ArrowRight", 1, 1), ("ArrowDown", 2, 1)):
        page.keyboard.press(key)
        check_weights(page, readings[0], layer, head, length - 2)
    # Focus is seen.
    outline = page.evaluate("getComputedStyle(document.activeElement.shadowRoot.activeElement).outlineWidth")
    assert outline == "3px"


def test_hovering_says_the_number(
    open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading]
) -> None:
    page = open_page(saved)
    position, layer = len(readings[0].passage) - 1, readings[0].num_layers - 1
    page.locator(".token").nth(3).hover()
    weight = readings[0].weights(layer, position).mean(0)[3].item()
    tip = page.locator(".tip").first
    sync_api.expect(tip).to_be_visible()
    assert float(re.search(r"([\d.]+) % of the attention", tip.inner_text())[1]) == pytest.approx(
        100 * weight, abs=0.006
    )


def test_who_looks_at_a_token(open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading]) -> None:
    page = open_page(saved)
    last = readings[0].num_layers - 1
    press_tokens(page, 5)
    page.get_by_label("is looked at by", exact=True).check()
    for panel, reading in enumerate(readings):
        check_looked_at(page, reading, last, None, 5, panel)
    page.locator(".panel").first.get_by_role("button", name=re.compile("^Layer 1, head 2: ")).click()
    check_looked_at(page, readings[0], 1, 2, 5)
    page.locator(".token[aria-selected=true]").first.press("ArrowRight")
    check_looked_at(page, readings[0], 1, 2, 6)
    page.get_by_label("is looked at by", exact=True).press("ArrowLeft")  # by the keyboard
    check_weights(page, readings[0], 1, 2, 6)
    assert page.get_by_label("rests on", exact=True).count() == 0
    assert page.get_by_text("is said by the live page: `localist-hf view`").count() == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_of_the_text(
    open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading], tmp_path: Path, width: int
) -> None:
    page = open_page(saved, width)
    press_tokens(page, 11)
    settled(page, readings[0].num_layers - 1, None, 11)
    for kind in ("svg", "png"):
        with page.expect_download() as download:
            page.get_by_role("button", name=kind.upper(), exact=True).first.click()
        assert download.value.suggested_filename == f"attention_first_layer-2_head-mean_dial-0.0_token-11.{kind}"
        download.value.save_as(tmp_path / f"picture.{kind}")
    svg = (tmp_path / "picture.svg").read_text()
    assert not re.search(r"href|url\(|https?:(?!//www\.w3\.org/2000/svg)", svg)  # it needs nothing else
    root = ElementTree.fromstring(svg)
    texts = [each.text or "" for each in root.findall(".//{*}text")]
    letters = "".join(each.text for each in root.findall(".//{*}text") if each.get("textLength"))
    assert re.sub(r"[↵⇥·\s]", "", letters) == re.sub(r"\s", "", "".join(readings[0].passage.pieces))
    said = " ".join(texts)
    for sentence in (
        "first: what token 11, ",
        "in layer 2, mean of all heads; full at 100 %",
        "at dial 0.0",
        "100.00 %",
    ):
        assert sentence in said
    # Each shade is that of a weight, and is drawn so.
    boxes = [box for box in root.findall(".//{*}rect") if box.get("fill") == "#f59e0b"][:-5]  # without the legend's
    weights = readings[0].weights(2, 11).mean(0)
    opacities = {float(box.get("fill-opacity")) for box in boxes}
    assert opacities == {share for share in shades(page) if share > 0}
    assert max(opacities) == pytest.approx(weights.max().item() ** 0.5, abs=0.001)
    image = Image.open(tmp_path / "picture.png").convert("RGB")
    assert image.size == (2 * int(root.get("width")), 2 * int(root.get("height")))
    for box in boxes:
        x, y, wide, share = (float(box.get(name)) for name in ("x", "y", "width", "fill-opacity"))
        if wide >= 6:
            pixel = image.getpixel((int(2 * x + wide), int(2 * y) + 5))
            blends = [
                [ground + share * (full - ground) for ground, full in zip(under, (245, 158, 11), strict=True)]
                for under in ((255, 255, 255), (234, 240, 248))
            ]
            assert any(pixel == pytest.approx(blend, abs=3) for blend in blends), (pixel, blends)


# Text against what is under it, as WCAG 2 has it, of everything that has a text of its own.
CONTRASTS = """
() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(numbers(getComputedStyle(at).backgroundColor));
    const over = (below, [r, g, b, a = 1]) => below.map((v, i) => v + a * ([r, g, b][i] - v));
    return layers.reduce(over, [255, 255, 255]);
  };
  const root = document.querySelector("#page").shadowRoot;
  return [...root.querySelectorAll(".page *")]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .map((element) => {
      const text = luminance(numbers(getComputedStyle(element).color).slice(0, 3));
      const ground = luminance(under(element));
      const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
      return [contrast, `${element.tagName}.${element.className}: ${element.textContent}`];
    });
}
"""


def test_every_text_stands_out_from_its_ground(
    open_page: Callable[..., "sync_api.Page"], saved: str, readings: list[Reading]
) -> None:
    page = open_page(saved)
    press_tokens(page, 9)
    settled(page, readings[0].num_layers - 1, None, 9)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_controls_have_names_and_roles(open_page: Callable[..., "sync_api.Page"], saved: str) -> None:
    page = open_page(saved)
    snapshot = page.locator("body").aria_snapshot()
    assert 'listbox "Tokens of the text, as first looks at them"' in snapshot
    assert 'combobox "Layer"' in snapshot
    assert 'grid "Context fidelity by layer and head"' in snapshot
    assert re.search(r'group "Block 0: tokens 0 to \d+"', snapshot)
    assert re.search(r'option ".*, token 0, [\d.]+ %, sink"', snapshot)
    assert not re.search(r"^\s*- (button|combobox|option|slider)\s*$", snapshot, re.MULTILINE)  # without a name


# --- text that is written from right to left, and a text of one block

HEBREW = "בראשית ברא אלהים את השמים ואת הארץ. והארץ היתה תהו ובהו.\nויאמר אלהים: יהי אור (1:4)! ויהי אור."  # noqa: RUF001
#: Left and right of what is drawn of an element, and of its badge.
BOXES = """
(block) => {
  const range = document.createRange();
  range.selectNodeContents(block);
  return [block.getBoundingClientRect(), range.getBoundingClientRect()].map(({ left, right }) => [left, right]);
}
"""


def save_and_open(open_page: Callable[..., "sync_api.Page"], reading: Reading, folder: Path) -> "sync_api.Page":
    saved_page([reading]).save(folder / "page.html")
    return open_page((folder / "page.html").as_uri())


def test_right_to_left_text(
    open_page: Callable[..., "sync_api.Page"], models: list[PreTrainedModel], tmp_path: Path
) -> None:
    pieces = re.findall(r"\s?\w{1,4}|\s?[^\w\s]|\s", HEBREW)
    passage = Passage(torch.arange(len(pieces)) % 90 + 2, pieces, None)
    starts = torch.arange(len(pieces)) // 6 * 6
    page = save_and_open(open_page, read(models[0], passage, starts, name="a model"), tmp_path)
    press_tokens(page, 7)
    settled(page, models[0].config.num_hidden_layers - 1, None, 7)
    # A block's badge is one piece at its right, where it begins: the first line's first blocks are those that it holds.
    for number in (0, 1):
        (left, right), (first, last) = page.locator(".block").nth(number).evaluate(BOXES)
        badge = right - last
        assert first - left < 2
        assert badge > (30 if number else 5), "the badge is elsewhere"
    first, second = (page.locator(".token").nth(position).bounding_box() for position in (0, 1))
    assert second["x"] < first["x"]
    assert first["x"] + first["width"] > page.locator(".text").bounding_box()["width"] - 40  # at the right margin
    # Keys go where they point.
    page.locator(".token[aria-selected=true]").focus()
    for key, position in (("ArrowLeft", 8), ("ArrowRight", 7), ("ArrowRight", 6), ("Home", 0), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        settled(page, models[0].config.num_hidden_layers - 1, None, position)
    # A sentence around a word keeps its order.
    caption = page.locator(".most caption")
    assert "From token 1, ‘\u2068ית\u2069’, in layer" in caption.inner_text()  # noqa: RUF001


def test_where_all_is_one_block_nothing_is_said_of_other_words(
    open_page: Callable[..., "sync_api.Page"], models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:  # fmt: skip
    passage = Passage.of(tokenizer, "number 3 says more.")
    one_block = torch.zeros(len(passage), dtype=torch.long)
    page = save_and_open(open_page, read(models[0], passage, one_block, name="a model"), tmp_path)
    assert page.get_by_text("Nothing lies outside of a block in this text").count() == 1
    assert page.get_by_role("button", name="Layer 1, head 2: nothing lies outside of a block").count() == 1
    assert page.get_by_text("holds every attention weight, in 0.0 MB").count() == 1
