# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Measures localist-hf against its peers: `python benchmarks/run.py [--quick] [--rows PATTERN] [--write]`.

README.md beside this file says what is measured and how. This process only starts others and reads their answers; it
imports no torch, so that it takes neither memory nor time from what is measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import report
from rows import EXPERIMENTS, Experiment, Row


_HERE = Path(__file__).resolve().parent
# Where memory is measured, what is freed goes back to the system at once: how much glibc's heap keeps is chance.
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class _Selection:
    """An experiment and those of its rows that are wanted."""

    index: int
    experiment: Experiment
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    def jobs(self, quick: bool) -> list[list[dict]]:
        """The jobs, a list for each process: a peer whose memory is measured has one for itself, in every round."""
        job = {"experiment": self.index, "tasks": self.tasks, "quick": quick}
        if self.experiment.is_memory:
            rounds = (self.experiment.tiny() if quick else self.experiment).rounds
            return [[{**job, "tasks": [task]}] for _ in range(rounds) for task in self.tasks]
        return [[job]]


def main(arguments: list[str] | None = None) -> int:
    """Runs the selected rows; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that every row runs")
    parser.add_argument("--rows", metavar="PATTERN", default="", help="only rows whose name matches this expression")
    parser.add_argument("--write", action="store_true", help="write the figures to results.json and into README.md")
    parser.add_argument("--list", action="store_true", help="list the rows and do nothing")
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--write with --quick: the figures of tiny shapes say nothing")

    selections = _select(options.rows)
    if not selections:
        parser.error(f"--rows {options.rows!r} matches no row; --list shows them")
    if options.list:
        for selection in selections:
            for row in selection.rows:
                print(f"{row.name:28} {row.title} ({row.target})")
        return 0

    began = time.monotonic()
    results: list[report.Result] = []
    for number, (selection, answers, machine) in enumerate(_answers(selections, options.quick), start=1):
        print(f"[{number}/{len(selections)}, {time.monotonic() - began:.0f} s]", flush=True)
        for row in selection.rows:
            results.append(report.evaluate(row, selection.experiment, answers, machine))
            print(f"  {report.line(results[-1], judge=not options.quick)}", flush=True)
        if options.write:  # each time: whoever stops it later keeps these
            report.write(results, _HERE)
    return int(any(result.failed for result in results))


def _select(pattern: str) -> list[_Selection]:
    selections = []
    for index, experiment in enumerate(EXPERIMENTS):
        rows = tuple(row for row in experiment.rows if re.search(pattern, row.name))
        if rows:
            selections.append(_Selection(index, experiment, rows))
    return selections


def _answers(selections: list[_Selection], quick: bool):
    """Each selection with what its processes measured, merged, and what they know about the machine."""
    # Tiny runs share one process, whose start would else take most of the time.
    shared = [selection for selection in selections if quick and not selection.experiment.is_memory]
    if shared:
        results, machine = _run([job for selection in shared for [job] in selection.jobs(quick)])
        for selection, result in zip(shared, results, strict=True):
            yield selection, result, machine
    for selection in selections:
        if selection in shared:
            continue
        print(f"running {', '.join(row.name for row in selection.rows)} ...", flush=True)
        merged: dict = {"measured": {}}
        for jobs in selection.jobs(quick):
            [result], machine = _run(jobs, _RETURNED if selection.experiment.is_memory else None)
            for task, values in result.get("measured", {}).items():
                merged["measured"].setdefault(task, []).extend(values)
            merged |= {key: value for key, value in result.items() if key != "measured"}
        yield selection, merged, machine


def _run(jobs: list[dict], environment: Mapping[str, str] | None = None) -> tuple[list[dict], dict]:
    """What a new process answers to these jobs."""
    path = os.pathsep.join(filter(None, (str(_HERE.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, str(_HERE / "worker.py"), json.dumps(jobs)],
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
        check=False,
    )
    if process.returncode:
        killed = f"the process ended with {process.returncode}" + " (out of memory?)" * (process.returncode == -9)
        return [{"failed": killed} for _ in jobs], {"threads": 0, "gpu": None}
    answer = json.loads(process.stdout)
    return answer["results"], answer["machine"]


if __name__ == "__main__":
    sys.exit(main())
