"""`localist-hf base`: trains a small base on the text that Python ships."""

import argparse
import dataclasses
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..evaluation import measure_controls
from ..hub import RunRecord, write_card
from ..hub.run_history import weight_hashes
from ..modeling import LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer
from .data import tokenize_and_pack
from .errors import CommandError
from .family import (
    END_OF_TEXT,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    small_config,
    train_tokenizer,
    training_arguments,
)
from .folders import held
from .python_text import SHARES, python_text, split_text
from .train import run_training


#: Held-out sequences that models are measured on.
NUM_HELD_OUT = 96


class RoundToBfloat16(TrainerCallback):
    """Rounds the weights at the end of the training, before anything is measured, to what will be saved."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """See [`~transformers.TrainerCallback`]."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())


def sequences(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """The sequences of each part, of the held-out one `NUM_HELD_OUT` of them."""
    parts = {}
    for part, files in texts.items():
        ended = Dataset.from_dict({"text": [text + END_OF_TEXT for text in files]})
        parts[part] = tokenize_and_pack(ended, tokenizer, SEQUENCE_LENGTH, part)
    held_out = parts["held-out"]
    parts["held-out"] = held_out.shuffle(seed=0).select(range(min(NUM_HELD_OUT, len(held_out))))
    return parts


def card(parts: dict[str, Dataset]) -> dict[str, Any]:
    """What the model cards say about the text."""
    shares = ", ".join(f"{share} % for {name}" for name, share in SHARES.items())
    counts = ", ".join(str(len(part)) for part in parts.values())
    return {
        "dataset": "Python's standard library and language reference",
        "dataset_details": f"It is what CPython {platform.python_version()} ships of both, whole files dealt out by "
        f"their names to three parts ({shares}: {counts} sequences, of the held-out ones {NUM_HELD_OUT} at most), "
        f"tokenised by a byte-level BPE of {VOCABULARY_SIZE:,} tokens.",
        "evaluation_split": "held-out",
        "language": "en",
        "license": "apache-2.0",
    }


def main(arguments: list[str]) -> None:
    """Runs `localist-hf base` with these arguments."""
    parser = argparse.ArgumentParser(
        prog="localist-hf base",
        description="Train a byte-level BPE tokenizer and a small GPT-2 with free attention on Python's standard "
        "library and language reference, which every CPython ships: weights in bfloat16, tokenizer, record and card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/base"), help="folder of the base")
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            raise CommandError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    if not 0 <= args.seed < 2**32:
        raise CommandError(f"`seed` is {args.seed}; it must be between 0 and 2**32 - 1.")
    with held(args.output_dir), tempfile.TemporaryDirectory() as training:
        train_base(Path(training), args.output_dir, args.steps, args.batch_size, args.seed)


def train_base(training: Path, folder: Path, steps: int, batch_size: int, seed: int) -> None:
    """Trains the base from random weights in one folder and writes it, in bfloat16, to another."""
    texts = split_text(python_text())
    tokenizer = train_tokenizer(texts["base"])
    parts = sequences(texts, tokenizer)
    set_seed(seed)
    trainer = LocalistTrainer(
        model=LocalistGPT2LMHeadModel(small_config(tokenizer, resid_pdrop=0.0, embd_pdrop=0.0)),
        args=training_arguments(
            training, steps, seed, learning_rate=3e-3, warmup_steps=0.04, per_device_train_batch_size=batch_size
        ),
        train_dataset=parts["base"],
        eval_dataset=parts["held-out"],
        processing_class=tokenizer,
        callbacks=[RoundToBfloat16()],
    )
    run_training(trainer, model_name="base", **card(parts))
    controls = measure_controls(trainer.model, parts["held-out"], batch_size=16)
    record = RunRecord.load(training).with_measurements(controls=controls)
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dataclasses.replace(record, weights=weight_hashes(folder)).save(folder)
    write_card(folder)
    print(f"The base: {folder}")
