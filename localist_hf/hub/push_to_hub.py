"""What `push_to_hub` of a localised model uploads."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel
from transformers.utils import logging

from .model_card import CARD_FILE
from .own_text import own_text, with_own_text
from .record_file import RECORD_FILE
from .repositories import full_repository_id, upload
from .repository_files import repository_files
from .run_record import RunRecord
from .weights import weight_hashes


logger = logging.get_logger(__name__)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """
    `model.push_to_hub`: what [`publish`] uploads, where the model is that of a run's folder, which it was loaded from
    or which its trainer saved it to. For other weights there are no numbers, so that they get transformers' draft of a
    card, and a warning says so.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, [`LocalistGPT2LMHeadModel`] or one that [`localize`] has made.
        repo_id (`str`), commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), \
        revision (`str`, *optional*), kwargs:
            As in [`~transformers.PreTrainedModel.push_to_hub`].
    """
    folder = Path(model.name_or_path)
    try:
        record = RunRecord.find(folder)
    except (ValueError, OSError) as error:
        record = None
        logger.warning(f"The model is pushed without a model card of ours: {error}")
    if record is not None:
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            is_measured = weight_hashes(saved) == record.weights
        if is_measured:
            api = HfApi(token=token)
            repo_id = full_repository_id(api, repo_id)
            files = repository_files(folder, repo_id)
            if tags := kwargs.pop("tags", None):
                card = ModelCard(files[CARD_FILE].decode())
                card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
                files[CARD_FILE] = with_own_text(str(card), own_text(files[CARD_FILE].decode(), "The card")).encode()
            kwargs.pop("max_shard_size", None)  # the shards are those of the folder
            message = commit_message or "Upload model"
            return upload(api, repo_id, files, private, commit_message=message, revision=revision, **kwargs)
        logger.warning(
            f"The weights are not those that {folder / RECORD_FILE} was measured on, so they are pushed without its "
            "model card and its tokenizer."
        )
    options = {"commit_message": commit_message, "private": private, "token": token, "revision": revision, **kwargs}
    return PreTrainedModel.push_to_hub(model, repo_id, **options)
