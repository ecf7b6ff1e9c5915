"""`localist-hf family`: one base model, fine-tuned under several locality configurations, and the comparison."""

import argparse
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from ..configuration import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config
from ..evaluation import (
    comparison_table,
    measure,
    measure_controls,
    plot_attention_map,
    plot_over_depth,
    plot_shares_over_depth,
    token_labels,
)
from ..hub import RECORD_FILE, RunRecord, write_card
from ..hub.card_controls import block_controls, dial_controls
from ..hub.card_tables import metrics_of_runs
from ..hub.run_history import find_base
from ..modeling import LocalistGPT2Config, LocalistGPT2LMHeadModel
from ..trainers import LocalistTrainer, LocalistTrainingArguments
from .data import SHARES, python_reference, split_topics, tokenize_and_pack
from .errors import INPUT_ERRORS, CommandError, ending_with
from .folders import held, write_whole
from .models import checked_sequence_length, load_config, load_model, load_tokenizer
from .train import run_training


END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
SEQUENCE_LENGTH = 256
PROMPT = "The function returns"
#: Between these lines of a file stands the table that `--readme` writes.
MARKERS = ("<!-- family -->", "<!-- /family -->")


class Run(NamedTuple):
    """One training: a variant from a seed, and its folder."""

    variant: str
    seed: int
    folder: Path

    @property
    def record(self) -> RunRecord | None:
        """The run's record; `None` before it is finished."""
        record = RunRecord.find(self.folder)
        return record if record is not None and record.controls is not None else None

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


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


def training_arguments(
    folder: Path, steps: int, seed: int, is_small: bool = True, **others: Any
) -> LocalistTrainingArguments:
    """
    The training arguments that the base and all variants share, with `others` in their place; of a large model those of
    one trained already.
    """
    shared = {
        "learning_rate": 1e-3 if is_small else 5e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": is_small,
        "dataloader_pin_memory": False,
    }
    return LocalistTrainingArguments(output_dir=str(folder), max_steps=steps, seed=seed, **(shared | others))


def small_config(tokenizer: PreTrainedTokenizerBase, **others: Any) -> LocalistGPT2Config:
    """The configuration of a small base with free attention."""
    return LocalistGPT2Config(
        n_layer=6,
        n_embd=128,
        n_head=4,
        n_positions=SEQUENCE_LENGTH,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **variant_config("distributed"),
        **others,
    )


def card(parts: dict[str, Dataset], model: str | None) -> dict[str, Any]:
    """What the model cards say about the text."""
    tokens = f"a byte-level BPE of {VOCABULARY_SIZE:,} tokens" if model is None else "the base's tokenizer"
    shares = ", ".join(f"{share:.0%} for {name}" for name, share in SHARES.items())
    return {
        "dataset": "Python language reference",
        "dataset_details": f"It is `pydoc_data.topics` of CPython {platform.python_version()}, whole topics dealt out "
        f"to three parts ({shares}: {', '.join(str(len(part)) for part in parts.values())} sequences), tokenised by "
        f"{tokens}.",
        "evaluation_split": "held-out",
        "language": "en",
    } | ({"license": "apache-2.0"} if model is None else {})


def train_base(
    folder: Path, tokenizer: PreTrainedTokenizerBase, parts: dict[str, Dataset], steps: int, seed: int
) -> None:
    """Trains the common base from random weights, with free attention."""
    set_seed(seed)
    trainer = LocalistTrainer(
        model=LocalistGPT2LMHeadModel(small_config(tokenizer)),
        args=training_arguments(folder, steps, seed),
        train_dataset=parts["base"],
        eval_dataset=parts["held-out"],
        processing_class=tokenizer,
    )
    run_training(trainer, model_name="base", **card(parts, None))


def train_variant(run: Run, base: str, parts: dict[str, Dataset], steps: int, model: str | None) -> None:
    """
    Fine-tunes the base under a locality configuration, and measures it on the base's blocks too. All variants see the
    same batches in the same order, by seed.
    """
    trainer = LocalistTrainer(
        model=load(base, variant_config(run.variant)),
        args=training_arguments(run.folder, steps, run.seed, is_small=model is None),
        train_dataset=parts["variants"],
        eval_dataset=parts["held-out"],
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    run_training(trainer, **card(parts, model))
    held_out = parts["held-out"]
    on_base_blocks = measure(trainer.model, held_out, batch_size=16, block_model=load(base))
    controls = measure_controls(trainer.model, held_out, batch_size=16)
    # By these a run is known to be finished.
    RunRecord.load(run.folder).with_measurements(on_base_blocks, controls).save(run.folder)


def load(name: str | Path, settings: dict[str, Any] | None = None) -> PreTrainedModel:
    """A localised model in float32, as it was saved or under other settings."""
    return load_model(str(name), load_config(str(name), settings or {}), dtype=torch.float32)


def draw_attention(
    folders: dict[str, Path], base: str | Path, sequence: list[int], path: Path, length: int = 32
) -> None:
    """
    Draws the last layer's attention of several models, the mean over heads, on tokens near the end of a sequence: from
    the start of one of the blocks that the base finds there.
    """
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    input_ids = torch.tensor([sequence])
    model = load(base).eval()
    last_layer = model.config.locality.num_hidden_layers - 1
    with torch.no_grad():
        starts = model(input_ids, output_fidelity=[last_layer]).block_starts[0][0]
    first = int(starts[-length])
    shown = slice(first, first + length)
    attentions = {}
    for name, folder in folders.items():
        model = load(folder).eval()
        model.set_attn_implementation("eager")  # the only one that returns the weights
        with torch.no_grad():
            weights = model(input_ids, output_attentions=True).attentions[last_layer][0].mean(0)
        attentions[f"{name}, layer {last_layer} (the last), mean over heads"] = weights[shown, shown]
    tokens = token_labels(tokenizer, sequence)[shown]
    blocks = f"the base's blocks in layer {last_layer}; tokens {first} to {first + length - 1} of {len(sequence)}"
    plot_attention_map(attentions, starts[shown] - first, tokens, path, blocks)


def main(arguments: list[str]) -> None:
    """Runs `localist-hf family` with these arguments."""
    parser = argparse.ArgumentParser(
        prog="localist-hf family",
        description="Train a byte-level BPE tokenizer and a small GPT-2 on the Python language reference that every "
        "CPython ships, or take another model; fine-tune it under several locality configurations on a part of it that "
        "this base has not seen, and compare them on a third part. Needs no network. Started again, it goes on with "
        "the runs that are not finished.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/family"), help="folder of all models and results")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=PAPER_VARIANTS, metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument(
        "--model", help="causal language model to fine-tune in place of a small one made for this: a folder or a Hub id"
    )
    parser.add_argument("--base-steps", type=int, default=360, help="training steps of the base")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps of each variant")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="random seeds: each variant is trained from each, the base "
        "from the first"
    )  # fmt: skip
    parser.add_argument("--model-cards", type=Path, metavar="DIR", help="also write records and cards to DIR/NAME")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"also write the table to FILE, between {' and '.join(MARKERS)}"
    )
    args = parser.parse_args(arguments)
    for name in ("base_steps", "steps"):
        if getattr(args, name) < 1:
            raise CommandError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.model is not None and args.base_steps != parser.get_default("base_steps"):
        raise CommandError(
            f"`base_steps` is {args.base_steps} and `model` {args.model!r}, of which no base is trained."
        )
    if BASELINE_VARIANT not in args.variants:
        raise CommandError(
            f"`variants` are {', '.join(args.variants)}; {BASELINE_VARIANT} must be among them, to compare with."
        )
    for name, values in (("variants", args.variants), ("seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise CommandError(f"`{name}` are {', '.join(map(str, values))}; each may be named once.")
    for seed in args.seeds:
        if not 0 <= seed < 2**32:
            raise CommandError(f"`seeds` holds {seed}; seeds must be between 0 and 2**32 - 1.")
    if args.model_cards is not None and args.model_cards.exists() and not args.model_cards.is_dir():
        raise CommandError(f"`model_cards` is {str(args.model_cards)!r}; there is a file of that name.")
    if args.readme is not None:
        check_readme(args.readme)
    runs = [
        Run(variant, seed, args.output_dir / (variant if seed == args.seeds[0] else f"{variant}-seed{seed}"))
        for seed in args.seeds
        for variant in args.variants
    ]
    with held(args.output_dir):
        with ending_with(2, *INPUT_ERRORS):
            check_settings(args, runs)
        run_family(args, runs)


def check_readme(path: Path) -> None:
    """Refuses a file without the two lines between which the table goes."""
    lines = []
    if path.is_file():
        with ending_with(2, *INPUT_ERRORS, what=f"`readme` is {str(path)!r}, which cannot be read: "):
            lines = path.read_text(encoding="utf-8").splitlines()
    if any(lines.count(marker) != 1 for marker in MARKERS) or lines.index(MARKERS[0]) > lines.index(MARKERS[1]):
        raise CommandError(f"`readme` is {str(path)!r}; the file must have the lines {' and '.join(MARKERS)}.")


def check_settings(args: argparse.Namespace, runs: list[Run]) -> None:
    """
    Refuses a model that cannot be used, and to go on with a folder whose finished runs were trained otherwise, or are
    not whole any more.
    """
    wanted = [(run.folder, args.steps, run.seed) for run in runs]
    if args.model is None:
        wanted.append((args.output_dir / "base", args.base_steps, runs[0].seed))
    else:
        load_config(args.model, {})
    for folder, num_steps, seed in wanted:
        record = RunRecord.find(folder)
        if record is None:
            continue
        record.check_weights(folder)
        if (record.training["steps"], record.seed) != (num_steps, seed):
            raise ValueError(
                f"{folder} holds a run of {record.training['steps']} steps from seed {record.seed}, not of "
                f"{num_steps} from seed {seed}; choose another `--output-dir`, or remove it."
            )
        base = {"base_model": record.base_model, "base_run": record.base_run, "base_weights": record.base_weights}
        if args.model is not None and base != find_base(args.model):
            raise ValueError(
                f"{folder} holds a run from another model than {args.model!r}; choose another `--output-dir`, or "
                "remove it."
            )


def run_family(args: argparse.Namespace, runs: list[Run]) -> None:
    """Trains what is not there yet, then prints and writes the comparison, the cards, the pictures and a sample."""
    start = time.perf_counter()
    stages = len(runs) + 3

    def announce(stage: int, text: str) -> None:
        print(f"\n[{stage}/{stages}] {text} ({time.perf_counter() - start:.0f} s so far)", flush=True)

    announce(1, "Python language reference: tokenizer and sequences")
    texts = split_topics(python_reference())
    base, length = args.output_dir / "base", SEQUENCE_LENGTH
    is_trained = args.model is None and (base / RECORD_FILE).is_file()
    if args.model is not None:
        config = load_config(args.model, {})
        tokenizer = load_tokenizer(args.model, config.vocab_size)
        length = min(length, checked_sequence_length(None, config))
    elif is_trained:
        tokenizer = load_tokenizer(str(base), VOCABULARY_SIZE)
    else:
        tokenizer = train_tokenizer(texts["base"] + texts["variants"])
    parts = {
        name: tokenize_and_pack(Dataset.from_dict({"text": text}), tokenizer, length, name)
        for name, text in texts.items()
    }
    print(", ".join(f"{name}: {len(part)} sequences of {length} tokens" for name, part in parts.items()))

    if args.model is not None:
        announce(2, f"base: {args.model}, as it is")
    else:
        announce(2, f"base: GPT-2 of 6 layers, width 128, {args.base_steps} steps")
        if is_trained:
            print(f"already in {base}")
        else:
            train_base(base, tokenizer, parts, args.base_steps, runs[0].seed)
        if RunRecord.load(base).controls is None:
            controls = measure_controls(load(base), parts["held-out"], batch_size=16)
            RunRecord.load(base).with_measurements(controls=controls).save(base)

    for done, run in enumerate(runs):
        announce(3 + done, f"{run}: {args.steps} steps from the base")
        if run.record is None:
            train_variant(run, args.model or str(base), parts, args.steps, args.model)
        else:
            print(f"already in {run.folder}")

    announce(stages, "comparison on held-out text")
    report(args, runs, parts["held-out"])
    print(f"\nAll of it: {args.output_dir} ({time.perf_counter() - start:.0f} s)")


def report(args: argparse.Namespace, runs: list[Run], held_out: Dataset) -> None:
    """Writes the tables, the pictures and the cards, and prints the tables and a generated sentence."""
    records: dict[str, list[RunRecord]] = {}
    for run in runs:
        records.setdefault(run.variant, []).append(run.record)
    own = metrics_of_runs(records)
    text = tables(records)
    print(f"\n{text}")
    write_whole(args.output_dir / "table.md", text)
    pictures = {name: args.output_dir / f"{name}_over_depth.png" for name in ("context_fidelity", "shares")}
    plot_over_depth(own, "context_fidelity", pictures["context_fidelity"])
    shown = args.variants[-1] if "quintic" not in args.variants else "quintic"
    draw_attention(
        {name: args.output_dir / name for name in dict.fromkeys((BASELINE_VARIANT, shown))},
        args.model or args.output_dir / "base",
        held_out[0]["input_ids"],
        args.output_dir / "attention_map.png",
    )
    pair = {name: own[name] for name in dict.fromkeys((BASELINE_VARIANT, shown))}
    plot_shares_over_depth(pair, BASELINE_VARIANT, pictures["shares"])
    print(f"Pictures: {', '.join(map(str, pictures.values()))}, {args.output_dir / 'attention_map.png'}")

    # Again, now that every sibling is there to be compared with.
    folders = [run.folder for run in runs]
    if args.model is None:
        folders.append(args.output_dir / "base")
    for folder in folders:
        write_card(folder)
    if args.model_cards is not None:
        # With the records, so that the cards can be written anew and checked without the models.
        for folder in folders:
            (args.model_cards / folder.name).mkdir(parents=True, exist_ok=True)
            RunRecord.load(folder).save(args.model_cards / folder.name)
        for variant in args.variants:
            print(f"Model card: {write_card(args.model_cards / variant)}")
    if args.readme is not None:
        write_readme(args.readme, records)
        print(f"Table: {args.readme}")

    folder = args.output_dir / shown
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    print(f"\n{shown}, loaded with AutoModelForCausalLM and trust_remote_code=True, goes on from {PROMPT!r}:")
    print(tokenizer.decode(tokens[0]))


def tables(records: dict[str, list[RunRecord]], every_layer: bool = True) -> str:
    """The comparison on each model's own blocks and on those of the base."""
    own = metrics_of_runs(records)
    shared = {variant: [record.metrics_on_base_blocks for record in group] for variant, group in records.items()}
    layer = len(records[BASELINE_VARIANT][0].lambdas) - 1
    return (
        "On the blocks that each model finds itself:\n\n"
        f"{comparison_table(own, BASELINE_VARIANT, every_layer=every_layer)}\n\n"
        "On the blocks that the base finds:\n\n"
        f"{comparison_table(shared, BASELINE_VARIANT, every_layer=every_layer)}\n\n"
        "The last layer's context fidelity (psi) on other blocks than its own, at dial 0:\n\n"
        f"{block_controls(records, layer)}\n\n"
        "Perplexity at dial 0; as multiples of it those at dial 1, with blocks of one token (self only), and with all "
        "layers local; and how far predictions move from dial 0 to dial 1:\n\n"
        f"{dial_controls(records)}\n"
    )


def write_readme(path: Path, records: dict[str, list[RunRecord]]) -> None:
    """Replaces what stands between the markers of a file with the tables and what they were measured on."""
    group = records[BASELINE_VARIANT]
    record, seeds = group[0], [record.seed for record in group]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    how = f"one run each (seed {seeds[0]})"
    if len(seeds) > 1:
        how = f"{len(seeds)} runs each (seeds {', '.join(map(str, seeds))}): means ± half of the 95 % interval"
    length = record.data["evaluation_lengths"][1]
    what = (
        f"{record.data['evaluation_sequences']} held-out sequences of {length} tokens of the {record.data['name']}; "
        f"{how}; {record.training['steps']} steps of {record.training['batch_size']} sequences "
        f"from a common base of {record.num_parameters / 1e6:.1f} million parameters; {record.hardware}; {versions}."
    )
    before, rest = path.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    text = f"{before}{MARKERS[0]}\n{tables(records, every_layer=False)}\n{what}\n{MARKERS[1]}{after}"
    write_whole(path, text)
