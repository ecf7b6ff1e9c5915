"""The live page in a browser: what a reader does, and what the page then shows, against the model's own numbers."""

import re
from collections.abc import Callable

import pytest
from browsing import (
    check_blocks,
    check_fits,
    check_looked_at,
    check_predictions,
    check_shares,
    check_weights,
    press_tokens,
    settled,
    shades,
    sync_api,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from localist_hf.page import Passage, Reading, read


pytestmark = pytest.mark.slow


def influences(reading: Reading, position: int, dial: float, unit: str, target: int | None = None) -> list[float]:
    """What a prediction rests on, as the library measures it."""
    end = position + 1 if unit == "token" else reading.block_starts[: position + 1].unique().numel()
    bits: list[float] = []
    while end:
        end, found = reading.dependence.influence(position, dial, unit, end, target)
        bits = found + bits
    return bits


def check_rests(page: "sync_api.Page", reading: Reading, position: int, dial: float, target: int | None = None) -> None:
    """That words and blocks are labelled with what changes without them, and shaded by it."""
    panel = page.locator(".panel").first
    of = re.compile(f"From token {position}, .*dial {dial:.1f}")
    sync_api.expect(panel.locator(".most caption")).to_contain_text(of)
    sync_api.expect(panel.locator(".most thead")).to_contain_text("change")
    sync_api.expect(panel.locator(".measured")).to_be_empty()
    words, blocks = (influences(reading, position, dial, unit, target) for unit in ("token", "block"))
    labels = panel.locator(".token").evaluate_all("all => all.map((token) => token.getAttribute('aria-label'))")
    shown = [re.search(r"%, \w+; (< )?([\d.]+) bits without it$", label) for label in labels[: position + 1]]
    assert [float(match[2]) for match in shown] == pytest.approx(words, abs=0.0011)
    full = max(words[:-1])
    expected = [min(1, each / full) ** 0.5 for each in words]
    assert shades(page)[: position + 1] == pytest.approx(expected, abs=0.02)
    badges = panel.locator(".block").evaluate_all("all => all.map((block) => block.dataset.badge)")
    found = [float(re.search(r"([\d.]+) bits$", badge)[1]) for badge in badges[: len(blocks)]]
    assert found == pytest.approx(blocks, abs=0.011)
    assert not any("bits" in badge for badge in badges[len(blocks) :])
    assert full > 0.01


def check_reach(page: "sync_api.Page", reading: Reading, position: int, dial: float) -> None:
    panel = page.locator(".panel").first
    expected = reading.dependence.reach(dial)
    said = f"Reach at dial {dial:.1f}, on the blocks shown: {expected.statement}"
    sync_api.expect(panel.locator(".reached")).to_contain_text(said)
    framed = panel.locator(".token.reach").evaluate_all("all => all.map((token) => Number(token.dataset.position))")
    first = int(expected.first[0, position])
    sinks = [place for place in (0,) if place < first]  # there is one
    assert framed == ([*sinks, *range(first, position + 1)] if expected.is_bounded else [])


def test_what_a_prediction_rests_on_and_can_depend_on(
    address: str, open_page: Callable[..., "sync_api.Page"], readings: list[Reading]
) -> None:
    page = open_page(address)
    reading, layer = readings[0], readings[0].num_layers - 1
    dial, chosen = page.get_by_label("Dial", exact=True), page.locator(".token[aria-selected=true]")
    position = len(reading.passage) - 1
    check_reach(page, reading, position, 0.0)
    dial.press("End")
    check_weights(page, reading, layer, None, position, dial=1.0)
    check_reach(page, reading, position, 1.0)
    page.get_by_label("rests on", exact=True).check()
    press_tokens(page, 30)  # while another one is measured
    check_rests(page, reading, 30, 1.0)
    check_reach(page, reading, 30, 1.0)
    page.locator(".token").nth(28).hover()
    tip, words = page.locator(".tip").first, influences(reading, 30, 1.0, "token")
    numbers = re.search(r"([\d.]+) % of the attention, .* by ([\d.]+) bits, without its block", tip.inner_text())
    assert float(numbers[1]) == pytest.approx(100 * reading.weights(layer, 30, 1.0).mean(0)[28].item(), abs=0.006)
    assert float(numbers[2]) == pytest.approx(words[28], abs=0.0011)
    for width in (390, 1280):
        check_fits(page, ".drawing", width)
    # The dial, while it is measured, and back.
    chosen.press("ArrowLeft")
    dial.press("ArrowLeft")
    check_rests(page, reading, 29, 0.9)
    check_reach(page, reading, 29, 0.9)
    # Told where to look.
    dial.press("End")
    page.locator(".token").first.click(modifiers=["Shift"])
    sync_api.expect(page.locator(".reached").first).to_contain_text("Reach: no bound. The token is told where to look")
    check_rests(page, reading, 29, 1.0, target=0)
    assert page.locator(".token.reach").count() == 0
    page.locator(".token").first.click(modifiers=["Shift"])
    check_reach(page, reading, 29, 1.0)
    # In the other direction.
    page.get_by_label("is looked at by", exact=True).check()
    check_looked_at(page, reading, layer, None, 29, dial=1.0)
    # Where nothing can be put in the place of a word, it is said.
    page.get_by_label("rests on", exact=True).check()
    press_tokens(page, 0)
    sync_api.expect(page.locator(".measured").first).to_contain_text("there is none to put in its place")
    settled(page, layer, None, 0)
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG", exact=True).click()
    assert download.value.suggested_filename == "rests-on_LlamaForCausalLM_dial-1.0_token-0.png"


def test_the_live_page(
    address: str, open_page: Callable[..., "sync_api.Page"], models: list[PreTrainedModel], readings: list[Reading],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    page = open_page(address)
    layer, length = readings[0].num_layers - 1, len(readings[0].passage)
    check_weights(page, readings[0], layer, None, length - 1)
    check_predictions(page, readings[0], length - 1, 0.0)
    press_tokens(page, 14)
    check_weights(page, readings[0], layer, None, 14)
    check_shares(page, readings[0], 14)
    check_predictions(page, readings[0], 14, 0.0)
    page.get_by_role("button", name=re.compile("^Layer 1, head 2: ")).click()
    check_weights(page, readings[0], 1, 2, 14)
    check_blocks(page, readings[0], 1, 2)
    page.locator(".blocks canvas").click(position={"x": 2, "y": 2})  # the first block's row chooses its last token
    check_weights(page, readings[0], 1, 2, readings[0].block_starts.unique()[1].item() - 1)
    press_tokens(page, 14)
    for width in (390, 1280):
        check_fits(page, ".drawing", width)
    # The dial.
    page.get_by_label("Dial", exact=True).press("End")
    check_weights(page, readings[0], 1, 2, 14, dial=1.0)
    page.get_by_label("Dial", exact=True).press("ArrowLeft")
    page.get_by_label("Dial", exact=True).press("ArrowLeft")
    check_weights(page, readings[0], 1, 2, 14, dial=0.8)
    check_predictions(page, readings[0], 14, 0.8)

    # Told to look at the first block, by the mouse and by the keyboard.
    for press in (
        lambda: page.locator(".token").first.click(modifiers=["Shift"]),
        lambda: page.locator(".token[aria-selected=true]").press("t"),
    ):
        press()
        number = int(page.locator(".block.target").get_attribute("data-number"))
        check_predictions(page, readings[0], 14, 0.8, target=number)
        page.locator(f".block[data-number='{number}'] .token").first.click(modifiers=["Shift"])
        sync_api.expect(page.locator(".block.target")).to_have_count(0)
        check_predictions(page, readings[0], 14, 0.8)

    # A second model beside it.
    page.get_by_label("Second model beside it").fill("second")
    page.get_by_label("Second model beside it").press("Enter")
    page.get_by_role("button", name="Read", exact=True).click()
    sync_api.expect(page.locator(".panel")).to_have_count(2)
    press_tokens(page, 14, panel=1)
    for panel, reading in enumerate(readings):
        check_weights(page, reading, layer, None, 14, panel)
        check_shares(page, reading, 14, panel)
        check_predictions(page, reading, 14, 0.0, panel)

    # What cannot be read is said, and the next text is read.
    for text, sentence in (
        ("", "`text` is empty"),
        ("a " * 3000, "tokens; this page takes 2048 tokens."),
        ("😀" * 1_000_000, "`text` has more than 32768 characters; this page takes 2048 tokens."),
    ):
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Read", exact=True).click()
        sync_api.expect(page.locator(".page > .error")).to_contain_text(sentence)
        assert page.locator(".token").count() == 0
    page.get_by_label("Text", exact=True).fill("number 3 says more.")
    page.get_by_label("Model", exact=True).fill("third")
    page.get_by_label("Model", exact=True).press("Enter")
    page.get_by_role("button", name="Read", exact=True).click()
    sync_api.expect(page.locator(".page > .error")).to_contain_text("`model` is 'third', which cannot be loaded.")
    page.get_by_label("Model", exact=True).fill("second")
    page.get_by_label("Model", exact=True).press("Enter")
    page.get_by_role("button", name="Read", exact=True).click()
    passage = Passage.of(tokenizer, "number 3 says more.")
    sync_api.expect(page.locator(".panel").first.locator(".token")).to_have_count(len(passage))
    check_weights(page, read(models[1], passage), layer, None, len(passage) - 1)
