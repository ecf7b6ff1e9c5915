"""What stands on the pages in a browser, against the model's own numbers."""

import re

import pytest

from localist_hf.page import Reading


sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
WIDTHS = (1280, 390)


def settled(
    page: "sync_api.Page", layer: int, head: int | None, position: int, panel: int = 0, way: str = "From"
) -> None:
    """Waits until a panel shows what was chosen."""
    heads = "mean of all heads" if head is None else f"head {head}"
    caption = page.locator(".panel").nth(panel).locator(".most caption")
    sync_api.expect(caption).to_contain_text(f"in layer {layer}, {heads}")
    sync_api.expect(caption).to_contain_text(f"{way} token {position},")


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


def check_weights(
    page: "sync_api.Page",
    reading: Reading,
    layer: int,
    head: int | None,
    position: int,
    panel: int = 0,
    dial: float = 0.0,
) -> None:
    settled(page, layer, head, position, panel)
    caption = page.locator(".panel").nth(panel).locator(".most caption")
    sync_api.expect(caption).to_contain_text(f"at dial {dial:.1f}")
    weights = reading.weights(layer, position, dial)
    row = weights.mean(0) if head is None else weights[head]
    rounding = 0.00006 + (0 if head is None else 0.002 * row.max().item())
    assert shown_weights(page, panel) == pytest.approx(row.tolist(), abs=rounding)


def shades(page: "sync_api.Page", panel: int = 0) -> list[float]:
    """How far each token is shaded, of 1."""
    tokens = page.locator(".panel").nth(panel).locator(".token")
    return tokens.evaluate_all("tokens => tokens.map((token) => Number(token.style.getPropertyValue('--w')))")


def check_looked_at(
    page: "sync_api.Page",
    reading: Reading,
    layer: int,
    head: int | None,
    position: int,
    panel: int = 0,
    dial: float = 0.0,
) -> None:
    """That each token is labelled with what it gives to the chosen one, and shaded by it."""
    settled(page, layer, head, position, panel, way="On")
    rows = [reading.weights(layer, query, dial) for query in range(position, len(reading.passage))]
    rows = [row.mean(0) if head is None else row[head] for row in rows]
    weights = [row[position].item() for row in rows]
    rounding = 0.00006 + (0 if head is None else 0.002 * max(row.max().item() for row in rows))
    tokens = page.locator(".panel").nth(panel).locator(".token")
    labels = tokens.evaluate_all("tokens => tokens.map((token) => token.getAttribute('aria-label'))")
    assert all(label.endswith("before the chosen token") for label in labels[:position])
    shown = [float(re.search(r"(< )?([\d.]+) %, \w+$", label)[2]) / 100 for label in labels[position:]]
    assert shown == pytest.approx(weights, abs=rounding)
    full = max(weights[1:])
    expected = [0.0] * position + [min(1, weight / full) for weight in weights]
    assert [share**2 for share in shades(page, panel)] == pytest.approx(expected, abs=0.002 + 2 * rounding / full)


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
    profile = reading.profile
    kept = slice(None) if head is None else slice(head, head + 1)
    others = profile.context_share[layer, kept]
    expected = [
        ((getattr(profile, name)[layer, kept] * others).sum() / others.sum()).item()
        for name in ("blocks_looked_at", "top_block_share")
    ]
    figures = matrix.locator(".figures").inner_text()
    looked, top = re.search(r"looks at ([\d.]+) blocks on average; .* has ([\d.]+) %", figures).groups()
    assert [float(looked), float(top)] == pytest.approx([expected[0], 100 * expected[1]], abs=0.06)
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


def check_predictions(
    page: "sync_api.Page", reading: Reading, position: int, dial: float, panel: int = 0, target: int | None = None
) -> None:
    predictions = page.locator(".panel").nth(panel).locator(".predictions")
    sync_api.expect(predictions.locator("h4").nth(1 if dial else 0)).to_have_text(
        f"dial {dial:.1f}" if dial else "dial 0"
    )
    sync_api.expect(predictions).not_to_have_attribute("aria-busy", "true")
    columns = predictions.locator("> div")
    settings = [(0.0, None), *([(dial, None)] if dial else []), *([] if target is None else [(dial, target)])]
    sync_api.expect(columns).to_have_count(len(settings))
    for column, (setting, told) in zip(columns.all(), settings, strict=True):
        expected = reading.predict(position, setting, target=told)
        probabilities = [float(row.split()[-2]) / 100 for row in column.locator("tbody tr").all_inner_texts()]
        assert probabilities == pytest.approx(expected.probabilities, abs=0.0006)
        assert column.locator(".goes-on").text_content() == reading.go_on(position, setting, target=told)
    sentence = predictions.locator(".between").inner_text()
    if not dial:
        assert "Turn the dial up" in sentence
        return
    divergence = float(re.search(r"([\d.]+) bits \(Kull", sentence)[1])
    assert divergence == pytest.approx(reading.predict(position, dial).divergence, abs=0.0011)
    assert divergence > 0.01
