"""`localist-hf family`: one small base model, fine-tuned under several locality configurations, and the comparison."""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed

from ..configuration import BASELINE_VARIANT, VARIANTS, variant_config
from ..evaluation import comparison_table, measure, plot_attention_map, plot_fidelity_over_depth
from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from .data import python_reference, tokenize_and_pack
from .train import run_training


END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
SEQUENCE_LENGTH = 256
#: Shares of the text: the base trains on the first part, the variants on the second, and all are measured on the third.
SHARES = {"base": 0.6, "variants": 0.3, "held-out": 0.1}
PROMPT = "The function returns"


def split_topics(topics: dict[str, str]) -> dict[str, list[str]]:
    """Deals whole topics out to the parts of `SHARES`, the longest first, each to the part that is furthest behind."""
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    total = sum(map(len, topics.values()))
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        missing = {name: share - sum(map(len, parts[name])) / total for name, share in SHARES.items()}
        parts[max(missing, key=missing.__getitem__)].append(text)
    return parts


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


def training_arguments(folder: Path, steps: int, seed: int) -> LocalistTrainingArguments:
    """The training arguments that the base and all variants share."""
    return LocalistTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        adam_beta2=0.95,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )


def train_base(
    folder: Path, tokenizer: PreTrainedTokenizerBase, parts: dict[str, Dataset], steps: int, seed: int
) -> dict[str, float]:
    """Trains the common base from random weights, with free attention."""
    set_seed(seed)
    config = LocalistGPT2Config(
        n_layer=6,
        n_embd=128,
        n_head=4,
        n_positions=SEQUENCE_LENGTH,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **variant_config("distributed"),
    )
    trainer = LocalistTrainer(
        model=LocalistGPT2LMHeadModel(config),
        args=training_arguments(folder, steps, seed),
        train_dataset=parts["base"],
        eval_dataset=parts["held-out"],
        processing_class=tokenizer,
    )
    return run_training(trainer)


def train_variant(
    variant: str, base: Path, folder: Path, parts: dict[str, Dataset], steps: int, seed: int
) -> dict[str, float]:
    """Fine-tunes the base under a locality configuration; all variants see the same batches in the same order."""
    trainer = LocalistTrainer(
        model=LocalistGPT2LMHeadModel.from_pretrained(base, **variant_config(variant)),
        args=training_arguments(folder, steps, seed),
        train_dataset=parts["variants"],
        eval_dataset=parts["held-out"],
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    return run_training(trainer)


def draw_attention(folders: dict[str, Path], sequence: list[int], path: Path, length: int = 48) -> None:
    """Draws the last layer's attention of several models on the start of a sequence, the mean over heads."""
    attentions, starts = {}, {}
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    input_ids = torch.tensor([sequence])
    for name, folder in folders.items():
        model = LocalistGPT2LMHeadModel.from_pretrained(folder).eval()
        last_layer = model.config.num_hidden_layers - 1
        title = f"{name}, last layer"
        with torch.no_grad():
            starts[title] = model(input_ids, output_fidelity=[last_layer]).block_starts[0][0, -length:]
            model.set_attn_implementation("eager")  # the only one that returns the weights
            weights = model(input_ids, output_attentions=True).attentions[last_layer][0].mean(0)
        attentions[title] = weights[-length:, -length:]
        starts[title] = (starts[title] - (len(sequence) - length)).clamp(min=0)
    tokens = [tokenizer.decode([token]).replace("\n", "\\n") for token in sequence[-length:]]
    plot_attention_map(attentions, starts, tokens, path)


def main(arguments: list[str]) -> None:
    """Runs `localist-hf family` with these arguments."""
    parser = argparse.ArgumentParser(
        prog="localist-hf family",
        description="Train a byte-level BPE tokenizer and a small GPT-2 on the Python language reference that every "
        "CPython ships, fine-tune it under several locality configurations on a part of it that the base has not "
        "seen, and compare them on a third part. Needs no network. Variants already trained in the folder are kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/family"), help="folder of all models and results")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--base-steps", type=int, default=360, help="training steps of the base")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps of each variant")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the base and of every variant")
    args = parser.parse_args(arguments)
    for name in ("base_steps", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    if BASELINE_VARIANT not in args.variants:
        parser.error(
            f"`variants` are {', '.join(args.variants)}; {BASELINE_VARIANT} must be among them, to compare with."
        )
    run_family(args.output_dir, args.variants, args.base_steps, args.steps, args.seed)


def run_family(output_dir: Path, variants: list[str], base_steps: int, steps: int, seed: int) -> None:
    """Trains what is not there yet, then prints and writes the comparison, the pictures and a sample."""
    start = time.perf_counter()
    stages = len(variants) + 3

    def announce(stage: int, text: str) -> None:
        print(f"\n[{stage}/{stages}] {text} ({time.perf_counter() - start:.0f} s so far)", flush=True)

    announce(1, "Python language reference: tokenizer and sequences")
    texts = split_topics(python_reference())
    base = output_dir / "base"
    is_trained = (base / "eval_results.json").exists()
    tokenizer = (
        AutoTokenizer.from_pretrained(base) if is_trained else train_tokenizer(texts["base"] + texts["variants"])
    )
    parts = {
        name: tokenize_and_pack(Dataset.from_dict({"text": text}), tokenizer, SEQUENCE_LENGTH, name)
        for name, text in texts.items()
    }
    print(", ".join(f"{name}: {len(part)} sequences of {SEQUENCE_LENGTH} tokens" for name, part in parts.items()))

    announce(2, f"base: GPT-2 of 6 layers, width 128, {base_steps} steps")
    if is_trained:
        print(f"already in {base}")
    else:
        train_base(base, tokenizer, parts, base_steps, seed)

    for stage, variant in enumerate(variants, start=3):
        announce(stage, f"{variant}: {steps} steps from the base")
        if (output_dir / variant / "eval_results.json").exists():
            print(f"already in {output_dir / variant}")
        else:
            train_variant(variant, base, output_dir / variant, parts, steps, seed)

    announce(stages, "comparison on held-out text")
    report(output_dir, variants, parts["held-out"])
    print(f"\nAll of it: {output_dir} ({time.perf_counter() - start:.0f} s)")


def report(output_dir: Path, variants: list[str], held_out: Dataset) -> None:
    """Writes `results.json`, `table.md` and the pictures, and prints the tables and a generated sentence."""
    results = {}
    on_base_blocks = {}
    base = LocalistGPT2LMHeadModel.from_pretrained(output_dir / "base")
    for variant in variants:
        metrics = json.loads((output_dir / variant / "eval_results.json").read_text())
        results[variant] = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        model = LocalistGPT2LMHeadModel.from_pretrained(output_dir / variant)
        on_base_blocks[variant] = measure(model, held_out, batch_size=16, block_model=base)
    own = comparison_table(results, BASELINE_VARIANT)
    shared = comparison_table(on_base_blocks, BASELINE_VARIANT)
    text = f"On the blocks that each model finds itself:\n\n{own}\n\nOn the blocks that the base finds:\n\n{shared}\n"
    print(f"\n{text}")
    (output_dir / "table.md").write_text(text)
    (output_dir / "results.json").write_text(
        json.dumps({"own_blocks": results, "base_blocks": on_base_blocks}, indent=2) + "\n"
    )
    plot_fidelity_over_depth(results, output_dir / "fidelity_over_depth.png")
    shown = variants[-1] if "quintic" not in variants else "quintic"
    draw_attention(
        {name: output_dir / name for name in dict.fromkeys((BASELINE_VARIANT, shown))},
        held_out[0]["input_ids"],
        output_dir / "attention_map.png",
    )
    print(f"Pictures: {output_dir / 'fidelity_over_depth.png'}, {output_dir / 'attention_map.png'}")

    folder = output_dir / shown
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    print(f"\n{shown}, loaded with AutoModelForCausalLM and trust_remote_code=True, goes on from {PROMPT!r}:")
    print(tokenizer.decode(tokens[0]))
