"""Records of runs, model cards, publishing, and export to plain GPT-2."""

from .export import export_gpt2
from .model_card import card_files, write_card
from .publish import PublishError, prepare, publish, repository_files, upload
from .run_record import RunRecord


__all__ = [
    "PublishError",
    "RunRecord",
    "card_files",
    "export_gpt2",
    "prepare",
    "publish",
    "repository_files",
    "upload",
    "write_card",
]
