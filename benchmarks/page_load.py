"""
How the page of `localist-hf view` bears several readers: how long they wait, what fails, and what memory it takes.

    python benchmarks/page_load.py --clients 20 --seconds 120

Every client reads one text after the other, some the same as others do, some its own, some too long; and asks, of each,
for attention weights and for what comes next at both ends of the dial. It waits for each answer, and no longer.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localist_hf.cli.view import default_text
from localist_hf.experiments.base import BASE
from localist_hf.experiments.python_text import python_reference


class Client:
    """One reader's browser, as far as the server sees it."""

    def __init__(self, address: str, model: str, number: int, texts: str) -> None:
        self._address, self._model, self._random, self._texts = address, model, random.Random(number), texts
        with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
            components = json.load(answer)["components"]
        self._drawing = next(each["id"] for each in components if each["props"].get("server_fns"))
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failures: list[str] = []

    def visit(self) -> None:
        """Reads a text, and asks about it."""
        kind = self._random.random()
        start = self._random.randrange(len(self._texts) - 400)
        text = default_text() if kind < 0.4 else self._texts[start : start + self._random.randrange(20, 400)] + "."
        if kind > 0.95:
            self._ask("a text too long", self._read, self._texts[: self._random.choice((3_000, 100_000))], "problem")
            return
        page = self._ask("read", self._read, text, "answer")
        for _ in range(2 if page else 0):
            asked = page["about"] | {"reading": 0, "position": self._random.randrange(len(page["page"]["tokens"]))}
            self._ask("weights", self._serve, "weights", "answer", {**asked, "layer": 1, "head": None})
            for dial in (0, 1):
                self._ask("prediction", self._serve, "predict", "answer", {**asked, "dial": dial})
            for dial in (0, 1):
                self._ask("continuation", self._serve, "go_on", "answer", {**asked, "dial": dial})

    def _ask(self, kind: str, ask: Callable[..., dict[str, Any]], what: str, wanted: str, *asked: Any) -> Any:
        start = time.perf_counter()
        try:
            found = ask(what, *asked)
            if wanted not in found:
                raise ValueError(f"{found}"[:200])
        except (OSError, ValueError) as error:
            self.failures.append(f"{kind}: {error}")
            return None
        finally:
            self.seconds[kind].append(time.perf_counter() - start)
        return found[wanted]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}gradio_api/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def _read(self, text: str) -> dict[str, Any]:
        event = self._post("call/read", {"data": [text, self._model, ""]})["event_id"]
        with urllib.request.urlopen(f"{self._address}gradio_api/call/read/{event}", timeout=120) as answer:
            events = answer.read().decode()
        return json.loads(re.findall(r"event: complete\ndata: (.*)", events)[0])[0]

    def _serve(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        return self._post(
            "component_server", {"component_id": self._drawing, "fn_name": name, "session_hash": "", "data": asked}
        )


def memory(process: int) -> float:
    """Megabytes that a process holds; Linux."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default the base of the package")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    command = [sys.executable, "-u", "-m", "localist_hf.cli.main", "view"]
    if args.model is not None:
        command.append(args.model)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[1] for line in server.stdout if (found := re.search(r"(http://\S+)", line))) + "/"
        texts = "".join(python_reference().values())
        clients = [Client(address, args.model or str(BASE), number, texts) for number in range(args.clients)]
        clients[0].visit()  # the model is timed before its first text
        end = time.monotonic() + args.seconds

        def stay(client: Client) -> None:
            while time.monotonic() < end:
                client.visit()

        held = [memory(server.pid)]
        threads = [threading.Thread(target=stay, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            held.append(memory(server.pid))
    finally:
        server.terminate()
        server.wait()
    failures = [failure for client in clients for failure in client.failures]
    print("| | requests | median, seconds | 99 of 100 | longest |\n|---|---|---|---|---|")
    for kind in clients[0].seconds.keys() | clients[1].seconds.keys():
        times = sorted(second for client in clients for second in client.seconds[kind])
        print(
            f"| {kind} | {len(times)} | {statistics.median(times):.2f} | {times[int(0.99 * (len(times) - 1))]:.2f} | "
            f"{times[-1]:.2f} |"
        )
    print(f"\n{len(failures)} requests failed: {sorted(set(failures))[:5]}")
    quarters = [max(held[len(held) * number // 4 :][: len(held) // 4 + 1]) for number in range(4)]
    print(
        f"Memory: {held[0]:.0f} MB at first; at most in each quarter {', '.join(f'{each:.0f}' for each in quarters)}."
    )


if __name__ == "__main__":
    main()
