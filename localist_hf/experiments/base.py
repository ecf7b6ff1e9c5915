"""
The small base that comes with this package, trained on the text that Python ships:

    python -m localist_hf.experiments.base --output-dir runs/base
"""

import argparse
import dataclasses
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, TrainerCallback, set_seed

from ..command_line import CommandParser
from ..configuration import variant_config
from ..errors import INPUT_ERRORS, InputError, RunError, reraised_as
from ..evaluation import measure_controls
from ..hub import RunRecord, check_card, write_card
from ..hub.loading import load_config, load_model, load_tokenizer
from ..hub.weights import weight_hashes
from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer
from ..whole_file import write_whole
from .data import some_of, tokenize_and_pack
from .folders import CARD_FILES, RUN_FILES, check_own, claim, lock_folder, replacing
from .grid_runs import training_arguments
from .python_text import python_card, python_text, split_text
from .training_run import run_training, start_anew


#: The small trained base that comes with this package.
BASE = resources.files("localist_hf") / "base"
#: What it is called among the runs that start from it.
BASE_NAME = "base"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
SEQUENCE_LENGTH = 256
#: Held-out sequences that it is measured on.
NUM_HELD_OUT = 96


class RoundToBfloat16(TrainerCallback):
    """Rounds the weights at the end of the training, before anything is measured, to what will be saved."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """See [`~transformers.TrainerCallback`]."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY_SIZE` tokens."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY_SIZE, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=SEQUENCE_LENGTH,
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the script with these arguments, by default those of the process."""
    parser = CommandParser(
        prog="python -m localist_hf.experiments.base",
        description="Train a byte-level BPE tokenizer and a small GPT-2 with free attention on Python's standard "
        "library and language reference, which every CPython ships: weights in bfloat16, tokenizer, record and card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/base"), help="folder of the base")
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--overwrite-output-dir", action="store_true", help="replace the model that is in the folder, or other files"
    )
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except InputError as error:
        parser.error(str(error))
    except RunError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _run(args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"`seed` is {args.seed}; it must be between 0 and 2**32 - 1.")
    with lock_folder(args.output_dir), tempfile.TemporaryDirectory() as training:
        with reraised_as(InputError, *INPUT_ERRORS):
            check_folder(args.output_dir, args.overwrite_output_dir)
        if args.overwrite_output_dir:
            start_anew(args.output_dir)
        train_base(Path(training), args.output_dir, args.steps, args.batch_size, args.seed)


def check_folder(folder: Path, replaces: bool) -> None:
    """
    Raises:
        ValueError: for an output folder that holds a model or somebody else's files, where these are not replaced.
    """
    if (folder / "config.json").exists() and not replaces:
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, which already holds a model. Choose another folder, or pass "
            "`--overwrite-output-dir`."
        )
    check_own(folder, "run", RUN_FILES, replaces, ", or pass `--overwrite-output-dir`, which says what it replaces")


def train_base(training: Path, folder: Path, steps: int, batch_size: int, seed: int) -> None:
    """Trains the base from random weights in one folder and writes it, in bfloat16, to another."""
    texts = split_text(python_text())
    tokenizer = train_tokenizer(texts["base"])
    parts = {}
    for part in ("base", "held-out"):
        ended = Dataset.from_dict({"text": [text + END_OF_TEXT for text in texts[part]]})
        parts[part] = tokenize_and_pack(ended, tokenizer, SEQUENCE_LENGTH, part)
    parts["held-out"] = some_of(parts["held-out"], NUM_HELD_OUT)
    set_seed(seed)
    config = LocalistGPT2Config(
        n_layer=6,
        n_embd=128,
        n_head=4,
        n_positions=SEQUENCE_LENGTH,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **variant_config("distributed"),
    )
    trainer = LocalistTrainer(
        model=LocalistGPT2LMHeadModel(config),
        args=training_arguments(
            training,
            max_steps=steps,
            seed=seed,
            learning_rate=3e-3,
            warmup_steps=0.04,
            per_device_train_batch_size=batch_size,
        ),
        train_dataset=parts["base"],
        eval_dataset=parts["held-out"],
        processing_class=tokenizer,
        callbacks=[RoundToBfloat16()],
    )
    card = python_card(
        {name: len(part) for name, part in parts.items()}, f"a byte-level BPE of {VOCABULARY_SIZE:,} tokens"
    )
    run_training(trainer, model_name=BASE_NAME, license="apache-2.0", **card)
    controls = measure_controls(trainer.model, parts["held-out"], batch_size=16)
    record = RunRecord.load(training).with_measurements(controls=controls)
    with replacing(folder) as saving:
        trainer.model.to(torch.bfloat16).save_pretrained(saving)
        tokenizer.save_pretrained(saving)
        leave_out_code(saving)
        dataclasses.replace(record, weights=weight_hashes(saving)).save(saving)
    claim(folder, "run", CARD_FILES)
    write_card(folder)
    print(f"The base: {folder}")


def leave_out_code(folder: Path) -> None:
    """Removes the code from where a model was just saved; this package holds the same. See [`copy_base`]."""
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    write_whole(folder / "config.json", f"{json.dumps(config, indent=2, sort_keys=True)}\n")


def copy_base(folder: Path) -> None:
    """
    Puts the package's base, its code with it, into a folder beside the runs that start from it.

    Raises:
        ValueError: where another base stands there, another model's weights, or what is not ours.
    """
    record = RunRecord.load(BASE)
    with lock_folder(folder, timeout=60):  # where another process copies it too
        if (found := RunRecord.find(folder)) is not None:
            found.check_weights(folder)
            check_card(folder)
            if found.weights != record.weights:
                raise ValueError(f"{folder} holds another base than this package has; choose another `--output-dir`.")
            return
        check_own(folder, "run", RUN_FILES)
        with replacing(folder) as saving:
            load_model(str(BASE), load_config(str(BASE), {})).save_pretrained(saving)
            load_tokenizer(str(BASE)).save_pretrained(saving)
            record.check_weights(saving)
            record.save(saving)
        claim(folder, "run", CARD_FILES)
        write_card(folder)


if __name__ == "__main__":
    main()
