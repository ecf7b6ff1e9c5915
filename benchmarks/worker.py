# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
A process of its own for some experiments. run.py starts it with a list of jobs as JSON and reads one JSON object from
its standard output: what each job measured, or why it did not.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import peers
import psutil
import torch
from rows import EXPERIMENTS, Experiment, Shape


def main() -> None:
    """Does the jobs of the command line."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not come between
    results = [_run_job(job) for job in json.loads(sys.argv[1])]
    json.dump({"results": results, "machine": _machine()}, answer)
    answer.close()


def _run_job(job: dict) -> dict:
    """The times or the peak memory of the job's tasks, `skipped` with a reason, or `failed`."""
    experiment = EXPERIMENTS[job["experiment"]]
    experiment = experiment.tiny() if job["quick"] else experiment
    tasks = job["tasks"]
    reason = _obstacle(experiment.shape, tasks)
    if reason:
        return {"skipped": reason}
    try:
        if experiment.is_memory:
            return {"measured": {task: [_peak_memory(task, experiment.shape)] for task in tasks}}
        if experiment.shape.device == "cpu":
            peers.check_agreement(tasks)
        return {"measured": _times(experiment, tasks)}
    except Exception as error:  # the other rows go on
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def _obstacle(shape: Shape, tasks: list[str]) -> str | None:
    """Why the tasks cannot run on this machine, or None."""
    if shape.device == "cuda" and not torch.cuda.is_available():
        return "no GPU on this machine"
    available = psutil.virtual_memory().available
    if "eager step" in tasks and available < shape.eager_bytes:
        return f"it needs about {shape.eager_bytes / 2**30:.0f} GiB of memory, {available / 2**30:.0f} are free"
    return None


def _times(experiment: Experiment, names: list[str]) -> dict[str, list[float]]:
    """What each task takes, round by round; every other round goes backwards, so that drift favours none."""
    tasks = {name: peers.TASKS[name](experiment.shape) for name in names}
    for name, task in tasks.items():
        if experiment.warm_up_length:
            task = peers.TASKS[name](replace(experiment.shape, length=experiment.warm_up_length))
        _measure(task, experiment)
    del task

    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    began = time.perf_counter()
    for rounds in range(1, max(experiment.rounds, experiment.max_rounds) + 1):
        round_began = time.perf_counter()
        for name in order:
            times[name].append(_measure(tasks[name], experiment))
        order.reverse()
        now = time.perf_counter()
        if now - round_began > 5:
            print(f"  round {rounds} took {now - round_began:.0f} s", flush=True)
        if rounds >= experiment.rounds and now - began + (now - round_began) > experiment.seconds:
            break
    return times


def _measure(task: peers.Task, experiment: Experiment) -> float:
    """Seconds of one run, on a GPU until it has done all of it; or the number that it gives."""
    if experiment.is_returned:
        return task()
    synchronize = torch.cuda.synchronize if experiment.shape.device == "cuda" else lambda: None
    if experiment.is_prepared:
        task = task()
    gc.collect()
    synchronize()
    began = time.perf_counter()
    task()
    synchronize()
    return time.perf_counter() - began


def _peak_memory(name: str, shape: Shape) -> int:
    """
    Peak memory of this process, in bytes, after two runs of the task, the second of which has AdamW's state: what is
    resident, or what is allocated on the GPU.
    """
    task = peers.TASKS[name](shape)
    for _ in range(2):
        task()
    if shape.device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux hands `ru_maxrss` down from the process that started this one; VmHWM is this program's own.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _machine() -> dict:
    """What only torch knows about the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


if __name__ == "__main__":
    main()
