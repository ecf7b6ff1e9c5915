"""The file in which a run's record lies, `run.json`, and what of earlier versions is read."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration import LOCALITY_ARGUMENTS
from ..json_text import load_json
from ..whole_file import write_whole


#: The record's file in a run's folder.
RECORD_FILE = "run.json"
#: The fields of a record that hold an evaluation, in which `null` stands for NaN.
METRICS_FIELDS = ("metrics", "metrics_on_base_blocks")


# Those of 0.2 and what they are called now.
_FORMER_NAMES = {"retention": "cost_at_dial_1", "all_local_retention": "all_local_cost_at_dial_1"}


def with_present_names(controls: Mapping[str, Any]) -> dict[str, Any]:
    """The controls of a record of whatever version, by the names that they have in this one."""
    return {_FORMER_NAMES.get(name, name): value for name, value in controls.items()}


def read_values(path: Path) -> dict[str, Any]:
    """
    The fields of the record in a file, by the names that they have in this version.

    Raises:
        ValueError: for a file that holds none.
    """
    values = load_json(path.read_text(encoding="utf-8"), is_strict=True)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object.")
    if isinstance(metrics := values.get("metrics"), dict) and "context_fidelity" not in metrics:
        raise ValueError("it is of localist-hf 0.1, which measured no attention shares; train the run again.")
    earlier = values.get("earlier_parts")
    parts = [part for part in earlier if isinstance(part, dict)] if isinstance(earlier, list) else []
    for part in (values, *parts):
        if isinstance(training := part.get("training"), dict):  # what a version did not know yet is as by default
            part["training"] = LOCALITY_ARGUMENTS | training
    if isinstance(controls := values.get("controls"), dict):
        values["controls"] = with_present_names(controls)
    for name in METRICS_FIELDS:
        if isinstance(metrics := values.get(name), dict):
            values[name] = {key: math.nan if value is None else value for key, value in metrics.items()}
    return values


def write_values(folder: str | Path, values: Mapping[str, Any]) -> None:
    """
    Writes the fields of a record to a run's folder.

    Raises:
        ValueError: as [`check_record`].
    """
    check_record(folder)
    values = dict(values)
    for name in METRICS_FIELDS:
        if (metrics := values[name]) is not None:
            values[name] = {key: None if math.isnan(value) else value for key, value in metrics.items()}
    text = json.dumps(values, indent=2, allow_nan=False)
    # Lists of numbers in one line each; strings have their line ends escaped.
    text = re.sub(r'\[\n([^\[\]{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    write_whole(Path(folder) / RECORD_FILE, f"{text}\n")


def check_record(folder: str | Path) -> None:
    """
    Checks that a record can be written to a folder.

    Raises:
        ValueError: where a file of its name is there that is no record of a run, of whatever version.
    """
    path = Path(folder) / RECORD_FILE
    if not os.path.lexists(path):
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict) or not {"name", "metrics", "weights"} <= values.keys():
        raise ValueError(f"{str(path)!r} is no record of a run, and would be overwritten; move it away.")
