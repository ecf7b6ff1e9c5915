"""Records of runs, model cards, publishing and updates of what is published, and export to plain GPT-2."""

from .export import export_gpt2
from .model_card import (
    CARD_FILE,
    EVAL_RESULTS_FILE,
    PICTURE_FILE,
    card_files,
    check_card,
    own_text_in,
    write_card,
)
from .publish import Publication, prepare, publish
from .push_to_hub import push_to_hub
from .record_file import RECORD_FILE, check_record
from .repositories import PublishError, card_on_hub, find_model, full_repository_id, upload, with_own_text_of
from .repository_files import repository_files
from .run_record import RunRecord
from .space import find_bases, find_space
from .update import update


__all__ = [
    "CARD_FILE",
    "EVAL_RESULTS_FILE",
    "PICTURE_FILE",
    "RECORD_FILE",
    "Publication",
    "PublishError",
    "RunRecord",
    "card_files",
    "card_on_hub",
    "check_card",
    "check_record",
    "export_gpt2",
    "find_bases",
    "find_model",
    "find_space",
    "full_repository_id",
    "own_text_in",
    "prepare",
    "publish",
    "push_to_hub",
    "repository_files",
    "update",
    "upload",
    "with_own_text_of",
    "write_card",
]
