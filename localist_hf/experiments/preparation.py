"""What the runs of a grid share, and whether all of them can be trained, before the first of them is."""

import filecmp
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation.controls import check_dials
from ..evaluation.text_prefix import known_text
from ..hub.loading import checked_sequence_length, load_config, load_tokenizer, without_weights
from ..json_text import load_json
from .base import BASE, BASE_NAME, copy_base
from .data import check_source, check_token_ids, load_text, some_of, tokenize_and_pack, tokens_ending
from .folders import GRID_FILES, claim, lock_folder
from .grid import Grid
from .grid_runs import GridWork, training_arguments
from .python_text import python_card, python_text, split_text
from .text_files import file_fault
from .training_checks import (
    check_adapter,
    check_metric,
    check_optimizer,
    check_rank,
    check_reporting,
    check_schedule,
    check_types,
)


def prepare_grid(
    grid: Grid,
    folder: Path,
    model: str | None = None,
    train_text: str | None = None,
    held_out_text: str | None = None,
) -> GridWork:
    """
    Prepares what the runs of a grid share, once it is known that all of them can be trained.

    Args:
        grid ([`Grid`]):
            The grid.
        folder (`Path`):
            Where the runs are put, each in a folder of its own.
        model (`str`, *optional*):
            The base, by its folder or Hub id; by default the small one that comes with this package.
        train_text (`str`, *optional*), held_out_text (`str`, *optional*):
            Files of the texts to train on and to measure on; by default what every CPython ships.

    Raises:
        ValueError: where one of them cannot.
    """
    base = str(BASE) if model is None else model
    runs = list(grid)
    for settings in {str(run.settings): run.settings for run in runs}.values():
        # The ids are not known yet; any will do here.
        ids = {"delimiter_token_ids": [0]} if settings.get("block_partition") == "delimiter" else {}
        config = load_config(base, ids | settings)
    with reraised_as(InputError, TypeError, ValueError, what="`controls` cannot be used: "):
        check_dials(grid.controls.get("dials", (0, 1)))
        for number in grid.controls.get("num_previous_blocks", ()):
            if type(number) is not int or not 0 <= number <= grid.sequence_length:
                allowed = f"whole numbers from 0 to `sequence_length`, {grid.sequence_length}"
                raise ValueError(f"`num_previous_blocks` holds {number!r}; it must hold {allowed}.")
    skeleton = without_weights(base, config)
    for run in runs:
        args_of_run = training_arguments(folder / run.folder_name, **run.training, seed=run.seed)
        check_schedule(args_of_run)
        check_metric(args_of_run, config.locality)
        check_reporting(args_of_run)
        check_optimizer(args_of_run, skeleton)
    if grid.lora is not None:
        check_types("lora", grid.lora, LoraConfig)
        check_adapter(grid.lora)
        # Whatever PEFT says; some initial values need weights, and all are of no account here.
        with reraised_as(InputError, Exception, what="`lora` cannot be used: "), torch.device("meta"):
            lora = LoraConfig(**grid.lora)
            lora.init_lora_weights = True
            check_rank("r", get_peft_model(skeleton, lora), lora.r)
    check_texts(train_text, held_out_text)
    length = checked_sequence_length(grid.sequence_length, config)
    tokenizer = load_tokenizer(base)
    ends_of_blocks = delimiters(grid, tokenizer, config)
    texts, card = load_texts(train_text, held_out_text)
    # Ends of text are a token of every causal model that has one; some tokenizers put it there themselves.
    is_ended = tokenizer(known_text(tokenizer))["input_ids"][-1] == tokenizer.eos_token_id
    end = "" if is_ended else tokenizer.eos_token or ""
    ended = {part: Dataset.from_dict({"text": [(text or "") + end for text in texts[part]]}) for part in texts}
    train, held_out = (tokenize_and_pack(ended[part], tokenizer, length, part) for part in ("training", "held-out"))
    for part in (train, held_out):
        check_token_ids(part, config, tokenizer)
    held_out = some_of(held_out, grid.measured_sequences)
    if len(held_out) < 2:
        raise ValueError(
            f"The held-out text has {len(held_out)} sequence of {length} tokens; two are needed, so that one can be "
            "measured on the blocks of the other."
        )
    if train_text is None:
        tokens = "the base's tokenizer"
        card = python_card({"training": len(train), "measuring": len(held_out)}, tokens)
    if model is None:
        card["license"] = "apache-2.0"
        base = str(folder / BASE_NAME)
    work = GridWork(grid, folder, base, tokenizer, train, held_out, card, ends_of_blocks)
    for run in runs:
        size = work.arguments(run).train_batch_size
        if len(train) < size:
            raise ValueError(
                f"The text to train on has {len(train)} sequences of {length} tokens; one step needs {size}."
            )
    with lock_folder(folder, timeout=60):  # where another process begins, too
        claim(folder, "grid", GRID_FILES)
    if model is None:
        copy_base(Path(base))
    return work


def check_texts(train_text: str | None, held_out_text: str | None) -> None:
    """
    Raises:
        ValueError: for one text without the other, one that is missing, empty or no UTF-8, and for the same text twice.
    """
    if train_text is None and held_out_text is None:
        return
    if train_text is None or held_out_text is None:
        raise ValueError(f"`train_text` is {train_text!r} and `held_out_text` {held_out_text!r}; give both or neither.")
    check_source(None, None, train_text, "text", "train_text")
    check_source(None, None, held_out_text, "text", "held_out_text")
    if filecmp.cmp(train_text, held_out_text, shallow=False):
        raise ValueError(
            f"`train_text` is {train_text!r} and `held_out_text` {held_out_text!r}, which hold the same: "
            "what a model was trained on is no held-out text."
        )


def load_texts(train_text: str | None, held_out_text: str | None) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Loads the texts to train on and to measure on, and what cards say about them."""
    if train_text is None or held_out_text is None:
        parts = split_text(python_text())
        return {"training": parts["variants"], "held-out": parts["held-out"]}, {}
    texts = {
        "training": load_text(None, None, train_text, "text", "train_text")["train"]["text"],
        "held-out": load_text(None, None, held_out_text, "text", "held_out_text")["train"]["text"],
    }
    name = f"`{Path(train_text).name}`"
    details = f"It was measured on `{Path(held_out_text).name}`."
    return texts, {"dataset": name, "dataset_details": details, "evaluation_split": "held-out"}


def delimiters(grid: Grid, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str | None, list[int]]:
    """Finds the tokens of the model that end a block, as the grid says; `None` stands for its `delimiters`."""
    vocab_size, found = config.get_text_config().vocab_size, {}
    if (ends := grid.controls.get("boundaries")) and not tokens_ending(ends, tokenizer, vocab_size):
        raise ValueError(f"`boundaries` are {ends}; no token of the tokenizer ends so.")
    for name, ends in {None: grid.delimiters, **grid.separators}.items():
        if isinstance(ends, str):
            found[name] = _recruited(name, ends, tokenizer, vocab_size)
        elif ends:
            found[name] = tokens_ending(ends, tokenizer, vocab_size)
            if not found[name]:
                raise ValueError(f"`{name or 'delimiters'}` are {ends}; no token of the tokenizer ends so.")
    return found


def _recruited(name: str, file: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Reads separators that `localist-hf recruit` has found, of a model with these tokens."""
    what = f"`separators` sets {name!r} to {file!r}, "
    if (fault := file_fault(Path(file))) is not None:
        raise ValueError(f"{what}which cannot be read: {fault}.")
    with reraised_as(InputError, *INPUT_ERRORS, what=f"{what}which cannot be read: "):
        content = load_json(Path(file).read_text(encoding="utf-8"))
    ids, tokens = (content.get(key) if isinstance(content, dict) else None for key in ("token_ids", "tokens"))
    if not (isinstance(ids, list) and isinstance(tokens, list) and ids and all(type(token) is int for token in ids)):
        raise ValueError(f"{what}which is no file that `localist-hf recruit` has written.")
    if max(ids) >= vocab_size or min(ids) < 0 or tokenizer.convert_ids_to_tokens(ids) != tokens:
        raise ValueError(f"{what}whose separators are of a model with other tokens.")
    return ids
