# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What belongs into a model's repository beside the model: tokenizer, card, picture and record of its run."""

import filecmp
import json
import re
from pathlib import Path

from huggingface_hub import ModelCard


CARD_FILE = "README.md"
RECORD_FILE = "run.json"
PICTURE_FILE = "fidelity_over_depth.png"
EVAL_RESULTS_FILE = ".eval_results/localist-hf.yaml"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What transformers notes about the machine that saved a tokenizer.
_MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder, without what they say about this machine; none where there is none."""
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer_config.json" in files:
        settings = json.loads(files["tokenizer_config.json"])
        settings = {key: value for key, value in settings.items() if key not in _MACHINE_KEYS}
        files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def companion_files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """
    The files in a run's folder that go with its model into the repository `repo_id`.

    The card names the repository that it was written for, in its metadata and in its examples: here it gets the new
    one, and its siblings the new namespace.
    """
    files = tokenizer_files(folder)
    for name in (RECORD_FILE, PICTURE_FILE, EVAL_RESULTS_FILE):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    if (folder / CARD_FILE).is_file():
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        if name := ModelCard(card).data.get("model_name"):
            card = re.sub(rf"\b{re.escape(name)}(?![\w-])", repo_id, card)
            before, after = (value.rpartition("/")[0] for value in (name, repo_id))
            card = re.sub(rf"\b{re.escape(before)}/(?=localist-gpt2-)", f"{after}/", card)
        files[CARD_FILE] = card.encode()
    return files


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, byte for byte."""
    names = {path.name for path in folder.glob("*.safetensors")}
    return (
        bool(names)
        and names == {path.name for path in other.glob("*.safetensors")}
        and all(filecmp.cmp(folder / name, other / name, shallow=False) for name in names)
    )
