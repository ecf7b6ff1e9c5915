"""
How long a reader of `localist-hf view` waits, in a browser, and how many plain forward passes of the same text that is.

    python benchmarks/page.py --model localist_hf/base
    python benchmarks/page.py --model runs/smollm2/model --text-file text.txt --num-tokens 512
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from report import machine_name

from localist_hf.cli.view import default_text, load_for_reading
from localist_hf.evaluation import text_prefix
from localist_hf.page import Passage
from localist_hf.page.live_page import live_page


_ROUNDS = 5
_NAME = "the model"

# Chooses a token, or moves the dial, and waits for what the page then shows: milliseconds.
_ACT = """
([position, dial]) => new Promise((done) => {
  const root = document.querySelector(".drawing").shadowRoot;
  const start = performance.now();
  const times = {};
  if (dial === null) root.querySelectorAll(".token")[position].click();
  else {
    const slider = root.querySelector("#dial");
    slider.value = dial;
    slider.dispatchEvent(new Event("input"));
  }
  const look = () => {
    const now = performance.now() - start;
    const caption = root.querySelector(".most caption").textContent;
    if (dial === null && caption.includes(`From token ${position},`)) times.words ??= now;
    const follows = [...root.querySelectorAll(".goes-on")].map((each) => each.textContent);
    if (follows.includes("…")) times.predictions ??= now;
    if (times.predictions && !root.querySelector("[aria-busy]")) {
      times.text = now;
      done(times);
    } else setTimeout(look, 5);
  };
  look();
})
"""
_SETTLED = """
() => {
  const root = document.querySelector(".drawing")?.shadowRoot;
  return root?.querySelector(".goes-on") && !root.querySelector("[aria-busy]");
}
"""


def plain_pass(model: torch.nn.Module, passage: Passage) -> float:
    """Milliseconds of the model's own forward pass, the median of some."""
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        with torch.no_grad():
            model(passage.input_ids[None].to(model.device), use_cache=False, locality_dial=0.0)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def waits(page: Page, length: int) -> dict[str, list[float]]:
    """What a reader waits for, by what it is."""
    found: dict[str, list[float]] = {}
    for round_number in range(_ROUNDS):
        position = length * (round_number + 1) // (_ROUNDS + 2)
        for what, act in (("token", [position, None]), ("dial", [0, 0.9 - 0.1 * round_number])):
            for shown, wait in page.evaluate(_ACT, act).items():
                found.setdefault(f"{what}: {shown}", []).append(wait)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--text-file", type=Path, help="by default the text of `localist-hf view`")
    parser.add_argument("--num-tokens", type=int, help="how much of it; by default all")
    args = parser.parse_args()
    model, tokenizer = load_for_reading(args.model, {"locality_schedule": "quintic"})
    text = default_text() if args.text_file is None else args.text_file.read_text(encoding="utf-8-sig")
    if args.num_tokens is not None:
        # Without the names of the tokens before the text, which would be read as text.
        text = "".join(Passage.of(tokenizer, text).pieces[len(text_prefix(tokenizer)) : args.num_tokens])
    passage = Passage.of(tokenizer, text)
    plain = plain_pass(model, passage)
    server = live_page(lambda *_: (model, tokenizer), [_NAME], text)
    _, address, _ = server.launch(ssr_mode=False, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_function(_SETTLED)
        reads = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            page.evaluate("() => document.querySelector('.drawing').shadowRoot.replaceChildren()")
            page.get_by_role("button", name="Read", exact=True).click()
            page.wait_for_selector(".token[aria-selected=true]")
            reads.append(1000 * (time.perf_counter() - start))
            page.wait_for_function(_SETTLED)
        found = {"text read": reads, **waits(page, len(passage))}
        browser.close()
    server.close()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(machine_name({"threads": torch.get_num_threads(), "gpu": gpu}, model.device.type))
    print(f"{args.model}, {len(passage)} tokens\n")
    print("| a reader waits for | seconds | plain forward passes |\n|---|---|---|")
    for what, times in found.items():
        median = statistics.median(times)
        print(f"| {what} | {median / 1000:.2f} | {median / plain:.1f} |")


if __name__ == "__main__":
    main()
