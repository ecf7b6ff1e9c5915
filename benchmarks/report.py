# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What the rows' measurements come to, in one line each and as the README's table."""

import datetime
import json
import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rows import EXPERIMENTS, Experiment, Row


_MARKER = "<!-- results -->"


@dataclass(frozen=True)
class Result:
    """
    What came of a row.

    Args:
        name (`str`), title (`str`), target (`str`):
            The row's.
        figure (`str`):
            Median of the rounds' ratios, or why there is none.
        spread (`str`):
            The least and the greatest of the rounds' ratios.
        rounds (`int`):
            How many rounds; 0 if it was not measured.
        is_met (`bool`, *optional*):
            Whether the target is met; None without a target or a measurement.
        failed (`bool`):
            Whether an error kept it from being measured.
        machine (`str`):
            What it was measured on, and when.
        raw (`dict[str, list[float]]`):
            Seconds, or bytes, of each task, round by round.
    """

    name: str
    title: str
    target: str
    figure: str
    spread: str
    rounds: int
    is_met: bool | None
    failed: bool
    machine: str
    raw: dict[str, list[float]]


def evaluate(row: Row, experiment: Experiment, answer: dict, machine: dict) -> Result:
    """A row's result from what the processes of its experiment answered."""
    where = machine_name(machine, experiment.shape.device)
    for key, text in (("failed", "failed"), ("skipped", "not measured")):
        if key in answer:
            figure = f"{text}: {answer[key]}"
            return Result(row.name, row.title, row.target, figure, "", 0, None, key == "failed", where, {})
    ratios = row.ratios(answer["measured"])
    ratio = statistics.median(ratios)
    spread = f"{row.format(min(ratios))} to {row.format(max(ratios))}"
    raw = {task: answer["measured"][task] for task in row.tasks}
    figure = row.format(ratio)
    return Result(row.name, row.title, row.target, figure, spread, len(ratios), row.is_met(ratio), False, where, raw)


def line(result: Result, judge: bool = True) -> str:
    """A result in one line; without `judge` the target is left out."""
    spread = f" ({result.spread}, {result.rounds} round{'s' * (result.rounds > 1)})" if result.rounds else ""
    target = f"; target {result.target}{_verdict(result)}" if judge and result.target != "none" else ""
    return f"{result.name}: {result.title}: {result.figure}{spread}{target}"


def write(results: list[Result], folder: Path) -> None:
    """
    Puts the results in the place of those that results.json held for the same rows, and all of them into the README.
    What could not be measured here is not written.
    """
    path = folder / "results.json"
    known = {entry["name"]: Result(**entry) for entry in json.loads(path.read_text())} if path.exists() else {}
    for result in results:
        if result.rounds:
            known[result.name] = result
    order = [row.name for experiment in EXPERIMENTS for row in experiment.rows]
    kept = [known[name] for name in order if name in known]
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(result)) for result in kept) + "\n]\n")

    readme = folder / "README.md"
    text, _, _ = readme.read_text().partition(_MARKER)
    readme.write_text(f"{text}{_MARKER}\n\n{_tables(kept)}")


def _verdict(result: Result) -> str:
    return {True: ", met", False: ", NOT met", None: ""}[result.is_met]


def _tables(results: list[Result]) -> str:
    """A Markdown table for each machine."""
    tables = []
    for machine in dict.fromkeys(result.machine for result in results):
        rows = [
            f"| {result.title} | {result.figure} | {result.spread} | {result.rounds or ''} "
            f"| {'' if result.target == 'none' else result.target + _verdict(result)} |"
            for result in results
            if result.machine == machine
        ]
        head = ["| measured | median ratio | least to greatest | rounds | target |", "|---|---|---|---|---|"]
        tables.append("\n".join([f"**{machine}**", "", *head, *rows]))
    return "\n\n".join(tables) + "\n"


def machine_name(machine: dict, device: str) -> str:
    """The processor, its cores, the versions and the day."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{processor}, {cores} cores, {machine['threads']} threads"
    if device == "cuda" and machine["gpu"]:
        hardware = f"{machine['gpu']}, {hardware}"
    software = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{hardware}; {software}, Python {platform.python_version()}; {datetime.date.today()}"
