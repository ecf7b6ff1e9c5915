"""The pages in a browser: what a reader does, and what the page then shows, against the model's own numbers."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from localist_hf import localize
from localist_hf.page import Passage, Reading, read, read_beside, saved_page


sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: on Debian, apt-get install chromium"),
    pytest.mark.slow,
]

TEXT = (
    "Sentence number 12 says something.\n\tsome <b>more</b> of the words here 😀\n"
    "number 3 says <script>alert(1)</script>."
)
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
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


# --- what stands on the page


def settled(page: "sync_api.Page", layer: int, head: int | None, position: int, panel: int = 0) -> None:
    """Waits until a panel shows what was chosen."""
    of = f"in layer {layer}, {'mean of all heads' if head is None else f'head {head}'}"
    caption = page.locator(".panel").nth(panel).locator(".most caption")
    sync_api.expect(caption).to_contain_text(of)
    sync_api.expect(caption).to_contain_text(f"From token {position},")


def shown_weights(page: "sync_api.Page", panel: int = 0) -> list[float]:
    """What the tokens up to the chosen one are labelled with."""
    labels = page.locator(".panel").nth(panel).locator(".token").evaluate_all(
        "tokens => tokens.map((token) => token.getAttribute('aria-label'))"
    )  # fmt: skip
    found = [re.search(r"(< )?([\d.]+) %, (self|sink|block|outside)$", label) for label in labels]
    assert all(
        label.endswith("after the chosen token") for label, match in zip(labels, found, strict=True) if not match
    )
    return [float(match[2]) / 100 for match in found if match]


def check_weights(page: "sync_api.Page", reading: Reading, layer: int, head: int | None, position: int, panel: int = 0):
    settled(page, layer, head, position, panel)
    weights = reading.weights(layer, position)
    row = weights.mean(0) if head is None else weights[head]
    rounding = 0.00006 + (0 if head is None else 0.002 * row.max().item())
    assert shown_weights(page, panel) == pytest.approx(row.tolist(), abs=rounding)


def check_shares(page: "sync_api.Page", reading: Reading, position: int, panel: int = 0) -> None:
    rows = page.locator(".panel").nth(panel).locator(".shares tbody tr").all_inner_texts()
    assert len(rows) == reading.num_layers
    for row, shares in zip(rows, reading.shares[:, position], strict=True):
        numbers = [float(number) for number in row.split()[-4:]]
        assert numbers == pytest.approx((100 * shares).tolist(), abs=0.06)


def check_blocks(page: "sync_api.Page", reading: Reading, layer: int, head: int | None, panel: int = 0) -> None:
    """That rows and cells of the matrix under the mouse are said as they are, and that they are coloured so."""
    matrix = page.locator(".panel").nth(panel).locator(".blocks")
    canvas, said = matrix.locator("canvas"), matrix.locator(".said")
    sync_api.expect(canvas).to_have_attribute(
        "aria-label", re.compile(f"in layer {layer}, {'mean of all heads' if head is None else f'head {head}'}")
    )
    shares = reading.block_attention(layer)
    parts = (shares.mean(0) if head is None else shares[head]).double()
    parts = parts / parts.sum(1, keepdim=True)
    size = canvas.bounding_box()["width"] - 2  # of the border
    cell = size / len(parts)
    for row, column in ((len(parts) - 1, 0), (len(parts) - 1, len(parts) - 1), (2, 1)):
        canvas.hover(position={"x": 1 + (column + 0.5) * cell, "y": 1 + (row + 0.5) * cell})
        other = "itself" if row == column else f"block {column}, "
        sync_api.expect(said).to_contain_text(re.compile(f"^Block {row}, .*, looks at {other}"))
        shown = float(re.search(r": ([\d.]+) %\.$", said.inner_text())[1])
        assert shown == pytest.approx(100 * parts[row, column].item(), abs=0.06)
    brightness = canvas.evaluate(
        """(canvas, number) => {
          const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const middle = (place) => Math.floor((place + 0.5) * (width / number));
          const at = (row, column) => 4 * (middle(row) * width + middle(column));
          const brightness = (place) => data[place] + data[place + 1] + data[place + 2];
          return Array.from({ length: number }, (_, row) =>
            Array.from({ length: row + 1 }, (_, column) => brightness(at(row, column))));
        }""",
        len(parts),
    )
    for row in range(1, len(parts)):
        assert max(range(row + 1), key=brightness[row].__getitem__) == parts[row].argmax()


def press_tokens(page: "sync_api.Page", position: int, panel: int = 0) -> None:
    page.locator(".panel").nth(panel).locator(".token").nth(position).click()


# What sticks out at the side of what it stands in, other than what can be scrolled there.
STICKS_OUT = """
(host) => [...document.querySelector(host).shadowRoot.querySelectorAll(".page, .page *")]
  .filter((element) => !element.closest(".scroll, .tip") && element.scrollWidth > element.clientWidth + 1)
  .filter((element) => getComputedStyle(element).display !== "inline" && element.clientWidth > 0)
  .map((element) => `${element.tagName}.${element.className}: ${element.scrollWidth} in ${element.clientWidth}`)
"""


def check_fits(page: "sync_api.Page", host: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate(STICKS_OUT, host) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# --- the saved page


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
    assert re.sub("[↵⇥·]", "", text.text_content()) == TEXT
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


# --- the live page


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

    page = live_page(load, ["first", "second"], TEXT)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_settings("127.0.0.1"))
    yield address
    page.close()


def check_predictions(
    page: "sync_api.Page", reading: Reading, position: int, dial: float, panel: int = 0, target: int | None = None
) -> None:
    predictions = page.locator(".panel").nth(panel).locator(".predictions")
    sync_api.expect(predictions.locator("h4").nth(1)).to_have_text(f"dial {dial:.1f}")
    sync_api.expect(predictions).not_to_have_attribute("aria-busy", "true")
    columns = predictions.locator("> div")
    settings = [(0.0, None), (dial, None), *([] if target is None else [(dial, target)])]
    sync_api.expect(columns).to_have_count(len(settings))
    for column, (setting, told) in zip(columns.all(), settings, strict=True):
        expected = reading.predict(position, setting, target=told)
        probabilities = [float(row.split()[-2]) / 100 for row in column.locator("tbody tr").all_inner_texts()]
        assert probabilities == pytest.approx(expected.probabilities, abs=0.0006)
        assert column.locator(".goes-on").text_content() == reading.go_on(position, setting, target=told)
    sentence = predictions.locator(".between").inner_text()
    divergence = float(re.search(r"([\d.]+) bits \(Kull", sentence)[1])
    assert divergence == pytest.approx(reading.predict(position, dial).divergence, abs=0.0011)
    assert divergence > 0.01


def test_the_live_page(
    address: str, open_page: Callable[..., "sync_api.Page"], models: list[PreTrainedModel], readings: list[Reading],
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    page = open_page(address)
    layer, length = readings[0].num_layers - 1, len(readings[0].passage)
    check_weights(page, readings[0], layer, None, length - 1)
    check_predictions(page, readings[0], length - 1, 1.0)
    press_tokens(page, 14)
    check_weights(page, readings[0], layer, None, 14)
    check_shares(page, readings[0], 14)
    check_predictions(page, readings[0], 14, 1.0)
    page.get_by_role("button", name=re.compile("^Layer 1, head 2: ")).click()
    check_weights(page, readings[0], 1, 2, 14)
    check_blocks(page, readings[0], 1, 2)
    page.locator(".blocks canvas").click(position={"x": 2, "y": 2})  # the first block's row chooses its last token
    check_weights(page, readings[0], 1, 2, readings[0].block_starts.unique()[1].item() - 1)
    press_tokens(page, 14)
    for width in (390, 1280):
        check_fits(page, ".drawing", width)
    # The dial.
    page.get_by_label("Dial", exact=True).press("ArrowLeft")
    page.get_by_label("Dial", exact=True).press("ArrowLeft")
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
        check_predictions(page, reading, 14, 1.0, panel)

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
