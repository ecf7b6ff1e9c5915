"""Runs in one folder: which a card speaks of, and which is shown first."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging

from ..configuration import BASELINE_VARIANT
from .example import shown_layer
from .record_file import RECORD_FILE
from .run_record import RunRecord


logger = logging.get_logger(__name__)

Key = TypeVar("Key")

#: The configuration that is looked at first, where there is one: the steepest of the paper's schedules.
_FIRST_VARIANT = "quintic"


def records_in(folder: Path, but: Path | None = None) -> dict[Path, RunRecord]:
    """The records of the finished runs in a folder, by path. What is no record is passed over with a warning."""
    records = {}
    for path in sorted(folder.glob(f"*/{RECORD_FILE}")):
        if path.parent == but:
            continue
        try:
            records[path.parent] = RunRecord.load(path.parent)
        except (ValueError, OSError) as error:
            logger.warning(f"A folder in {str(folder)!r} is passed over: {error}")
    return records


def load_siblings(folder: str | Path) -> list[RunRecord]:
    """
    The record of a run, then those of the finished runs beside it that are its [`siblings`]. What is no record is
    passed over with a warning.
    """
    record = RunRecord.load(folder)
    folder = Path(folder).resolve()
    return [record, *siblings(record, records_in(folder.parent, but=folder).values())]


def siblings(record: RunRecord, others: Iterable[RunRecord]) -> list[RunRecord]:
    """
    The runs that the card of another one speaks of: those that differ from it in their locality and seed only, the run
    that they all started from, or, of such a base, the runs that started from it.
    """
    return [
        other for other in others if other.is_comparable(record) or other.is_base_of(record) or record.is_base_of(other)
    ]


def pair_to_show(runs: Mapping[Key, RunRecord]) -> tuple[Key, Key | None]:
    """
    The two of several runs that show what the method does: one that was trained for locality, of the quintic schedule
    where there is one and the one that keeps most of its attention to other words in its blocks; and the comparable
    baseline, of the same seed if possible, or `None`.
    """

    def rank(key: Key) -> tuple[bool, bool, bool, float]:
        record = runs[key]
        psi = record.metrics[f"context_fidelity_layer_{shown_layer(record.lambdas)}"]
        return (
            not any(record.lambdas),
            record.variant != _FIRST_VARIANT,
            bool(record.dial),  # which forces its psi
            -psi if psi == psi else 0.0,
        )

    first = min(runs, key=rank)
    free = [
        key
        for key, record in runs.items()
        if key != first and record.variant == BASELINE_VARIANT and record.is_comparable(runs[first])
    ]
    return first, min(free, key=lambda key: runs[key].seed != runs[first].seed, default=None)


def pair_to_open(runs: Mapping[Key, RunRecord]) -> tuple[Key, Key | None]:
    """
    The two of several runs that a page opens with: [`pair_to_show`], or where there is no baseline the base that the
    first one started from, or else another that can be compared with it: all of them read the same tokens.
    """
    first, beside = pair_to_show(runs)
    others = [key for key in runs if key != first]
    for is_akin in (RunRecord.is_base_of, RunRecord.is_comparable):
        beside = beside or next((key for key in others if is_akin(runs[key], runs[first])), None)
    return first, beside
