"""
Gathers what `docs/results.md` is made of from a folder of runs: a line of JSON for each run, and for each measurement
of the untrained base.

    python study/collect.py runs/study/small study/records/small.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

from localist_hf.experiments.grid_runs import UNTRAINED
from localist_hf.hub import RunRecord


#: The metrics of every layer that the tables show.
_METRICS = (
    "context_fidelity",
    "context_share",
    "self_share",
    "sink_share",
    "block_share",
    "outside_share",
    "fidelity",
    "blocks_looked_at",
    "top_block_share",
)


def of_last_layer(figures: dict[str, list[float]] | None) -> dict[str, float] | None:
    return figures and {name: round_off(values[-1]) for name, values in figures.items()}


def round_off(value: float | None) -> float | None:
    """To more digits than a table shows."""
    return None if value is None else float(f"{value:.6g}")


def controls_of(controls: dict[str, Any]) -> dict[str, Any]:
    """The controls, of the last layer alone."""
    kinds = ("own", "wrong", "windows", "recency")
    numbers = ("num_previous_blocks", "num_counted", "window_lengths", "recency_lengths")
    blocks = [
        {name: entry[name] for name in numbers} | {kind: of_last_layer(entry[kind]) for kind in kinds}
        for entry in controls["blocks"]
    ]
    dials = [
        {"dial": entry["dial"], "perplexity": entry["perplexity"], **of_last_layer(entry["locality"])}
        for entry in controls["dials"]
    ]
    kept = {name: value for name, value in controls.items() if name not in ("layers", "blocks", "dials")}
    kept["block_lift"] = round_off(controls["block_lift"])
    return kept | {"blocks": blocks, "dials": dials}


def line_of(record: RunRecord) -> dict[str, Any]:
    """What is kept of a run."""
    last = record.num_layers - 1
    kept = ("name", "variant", "seed", "num_layers", "num_parameters", "data", "training", "adapter", "versions")
    metrics, on_base = (
        {name: round_off(found[f"{name}_layer_{last}"]) for name in _METRICS if f"{name}_layer_{last}" in found}
        for found in (record.metrics, record.metrics_on_base_blocks)
    )
    return {name: getattr(record, name) for name in (*kept, "hardware")} | {
        "last_layer": metrics,
        "last_layer_on_base_blocks": on_base,
        "controls": controls_of(record.controls),
    }


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    records = [RunRecord.load(path.parent) for path in source.glob("*/plan.json") if RunRecord.find(path.parent)]
    finished = [record for record in records if record.controls is not None]
    lines = sorted(map(line_of, finished), key=lambda line: (line["name"], line["seed"]))
    for path in sorted((source / UNTRAINED).glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines.append({"name": path.stem, "untrained": True, "controls": controls_of(found["controls"])})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines), encoding="utf-8")
    print(f"{target}: {len(lines)} lines, {target.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
