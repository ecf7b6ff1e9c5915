"""The runs beside a run, which its card speaks of."""

from collections.abc import Iterable
from pathlib import Path

from transformers.utils import logging

from .record_file import RECORD_FILE
from .run_record import RunRecord


logger = logging.get_logger(__name__)


def load_siblings(folder: str | Path) -> list[RunRecord]:
    """
    The record of a run, then those of the finished runs beside it that are its [`siblings`]. What is no record is
    passed over with a warning.
    """
    record = RunRecord.load(folder)
    folder = Path(folder).resolve()
    others = []
    for path in sorted(folder.parent.glob(f"*/{RECORD_FILE}")):
        if path.parent == folder:
            continue
        try:
            others.append(RunRecord.load(path.parent))
        except (ValueError, OSError) as error:
            logger.warning(f"A folder beside {folder.name!r} is passed over: {error}")
    return [record, *siblings(record, others)]


def siblings(record: RunRecord, others: Iterable[RunRecord]) -> list[RunRecord]:
    """
    The runs that the card of another one speaks of: those that differ from it in their locality and seed only, the run
    that they all started from, or, of such a base, the runs that started from it.
    """
    return [
        other for other in others if other.is_comparable(record) or other.is_base_of(record) or record.is_base_of(other)
    ]
