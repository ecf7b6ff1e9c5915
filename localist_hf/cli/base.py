"""`localist-hf base`: trains the small base that ships with the library."""

import argparse
import dataclasses
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback, set_seed

from ..configuration import variant_config
from ..evaluation import measure_controls
from ..hub import RunRecord, write_card
from ..hub.run_history import weight_hashes
from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from .data import tokenize_and_pack
from .errors import CommandError
from .folders import held
from .python_text import SHARES, python_text, split_text
from .train import run_training


END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
SEQUENCE_LENGTH = 256
#: Held-out sequences that models are measured on.
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


def sequences(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """The sequences of each part, of the held-out one `NUM_HELD_OUT` of them."""
    parts = {}
    for part, files in texts.items():
        rows = tokenize_and_pack(
            Dataset.from_dict({"text": [text + END_OF_TEXT for text in files]}), tokenizer, SEQUENCE_LENGTH, part
        )
        parts[part] = rows
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
        "library and language reference, which every CPython ships, and write them as the base that the family starts "
        "from: weights in bfloat16, tokenizer, record and card.",
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
    """Trains the base from random weights in one folder and writes what ships to another."""
    texts = split_text(python_text())
    tokenizer = train_tokenizer(texts["base"])
    parts = sequences(texts, tokenizer)
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
        args=LocalistTrainingArguments(
            output_dir=str(training),
            max_steps=steps,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.04,
            weight_decay=0.1,
            adam_beta2=0.95,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=16,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
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
