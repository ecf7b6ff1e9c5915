"""`localist-hf family`: one base, fine-tuned under the configurations of a grid, and the comparison."""

import argparse
import filecmp
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration import BASELINE_VARIANT, Grid, GridRun, load_grid
from ..evaluation import plot_shares_over_depth, text_prefix
from ..evaluation.controls import check_dials
from ..evaluation.differences import are_of_documents
from ..evaluation.generation import generate_as_told
from ..evaluation.pictures import plot_frontier, plot_over_depth, plot_over_dial
from ..evaluation.tables import comparison_table, differences_table
from ..evaluation.text_prefix import known_text
from ..hub import RunRecord, check_card, write_card
from ..hub.card_controls import block_controls, dial_controls
from ..hub.card_tables import metrics_by_seed, metrics_of_runs
from ..whole_file import write_whole
from .base import BASE, copy_base
from .data import check_source, check_token_ids, load_text, some_of, tokenize_and_pack
from .errors import INPUT_ERRORS, CommandError, CommandParser, as_command_error
from .folders import CARD_FILES, GRID_FILES, check_own, claim, lock_folder
from .grid_runs import GridWork, Task, do_tasks, training_arguments
from .models import checked_sequence_length, load_config, load_tokenizer, without_weights
from .python_text import python_card, python_text, split_text
from .training_checks import (
    MOST_PROCESSES,
    check_metric,
    check_optimizer,
    check_rank,
    check_reporting,
    check_schedule,
    check_types,
)


#: What the base that comes with this package is called among the runs that start from it.
BASE_NAME = "base"
PROMPT = "def __init__(self"


def main(arguments: list[str]) -> None:
    """Runs `localist-hf family` with these arguments."""
    parser = CommandParser(
        prog="localist-hf family",
        description="Fine-tune a base under the locality configurations of a grid and compare them on held-out text. "
        "The base is the small GPT-2 that comes with this package, and the text what every CPython ships, so it needs "
        "no network. Stopped and started again, it goes on with what is left.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "grid", nargs="?", default="paper", help="what to compare: paper, quick, or a YAML file with the fields of Grid"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/family"), help="folder of all models and results")
    parser.add_argument("--model", help="another base: a causal language model's folder or Hub id")
    parser.add_argument("--train-text", metavar="FILE", help="text to train on, with --held-out-text")
    parser.add_argument("--held-out-text", metavar="FILE", help="text to measure on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument(
        "--shard", type=shard_of, metavar="I/N",
        help="do the I-th of N parts only, such as 1/4: put the parts' folders together afterwards and start once more "
        "without this",
    )  # fmt: skip
    parser.add_argument("--model-cards", type=Path, metavar="DIR", help="also write records and cards to DIR/NAME")
    args = parser.parse_args(arguments)
    if not 1 <= args.jobs <= MOST_PROCESSES:
        raise CommandError(f"`jobs` is {args.jobs}; it must be in 1 to {MOST_PROCESSES}.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise CommandError(
            f"`output_dir` is {str(args.output_dir)!r}, which cannot be used: there is a file of that name."
        )
    if args.model_cards is not None and args.model_cards.exists() and not args.model_cards.is_dir():
        raise CommandError(f"`model_cards` is {str(args.model_cards)!r}; there is a file of that name.")
    with as_command_error(2, *INPUT_ERRORS):
        grid = load_grid(args.grid)
        check_own(args.output_dir, "grid", GRID_FILES)
        work = prepare(grid, args)
        tasks = work.tasks
        for task in tasks:
            work.check(task)
        if args.model_cards is not None:
            for folder in {BASE_NAME, *(task.run.folder_name for task in tasks)}:
                check_own(args.model_cards / folder, "card", CARD_FILES)
                check_card(args.model_cards / folder)
    if args.shard is not None:
        index, number = args.shard
        tasks = tasks[index - 1 :: number]
    do_tasks(work, tasks, args.jobs)
    if missing := [task for task in work.tasks if not work.is_done(task)]:
        print(f"{len(missing)} of {len(work.tasks)} are not in {args.output_dir} yet: no comparison.")
        return
    # One process compares; another one's work is not in its way.
    with lock_folder(args.output_dir):
        claim(args.output_dir, "grid", GRID_FILES)
        report(args, work)
    print(f"\nAll of it: {args.output_dir}")


def shard_of(text: str) -> tuple[int, int]:
    """Reads `"2/3"` as its numbers."""
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be I/N with I from 1 to N, such as 1/4")
    return int(index), int(number)


def prepare(grid: Grid, args: argparse.Namespace) -> GridWork:
    """
    Everything that the runs of a grid share, once it is known that all of them can be trained.

    Raises:
        CommandError, ValueError: where one of them cannot.
    """
    base = str(BASE) if args.model is None else args.model
    runs = list(grid)
    for settings in {str(run.settings): run.settings for run in runs}.values():
        # The ids are not known yet; any will do here.
        ids = {"delimiter_token_ids": [0]} if settings.get("block_partition") == "delimiter" else {}
        config = load_config(base, ids | settings)
    with as_command_error(2, TypeError, ValueError, what="`controls` cannot be used: "):
        check_dials(grid.controls.get("dials", (0, 1)))
        for number in grid.controls.get("num_previous_blocks", ()):
            if type(number) is not int or not 0 <= number <= grid.sequence_length:
                allowed = f"whole numbers from 0 to `sequence_length`, {grid.sequence_length}"
                raise ValueError(f"`num_previous_blocks` holds {number!r}; it must hold {allowed}.")
    skeleton = without_weights(base, config)
    for run in runs:
        args_of_run = training_arguments(args.output_dir / run.folder_name, **run.training, seed=run.seed)
        check_schedule(args_of_run)
        check_metric(args_of_run, config.locality.num_hidden_layers)
        check_reporting(args_of_run)
        check_optimizer(args_of_run, skeleton)
    if grid.lora is not None:
        check_types("lora", grid.lora, LoraConfig)
        # Whatever PEFT says; some initial values need weights, and all are of no account here.
        with as_command_error(2, Exception, what="`lora` cannot be used: "), torch.device("meta"):
            lora = LoraConfig(**grid.lora)
            lora.init_lora_weights = True
            check_rank("r", get_peft_model(skeleton, lora), lora.r)
    check_texts(args)
    length = checked_sequence_length(grid.sequence_length, config)
    tokenizer = load_tokenizer(base)
    texts, card = load_texts(args)
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
    if args.train_text is None:
        tokens = "the base's tokenizer"
        card = python_card({"training": len(train), "measuring": len(held_out)}, tokens)
    if args.model is None:
        card["license"] = "apache-2.0"
        base = str(args.output_dir / BASE_NAME)
    work = GridWork(grid, args.output_dir, base, tokenizer, train, held_out, card, delimiters(grid, tokenizer, config))
    for run in runs:
        size = work.arguments(run).train_batch_size
        if len(train) < size:
            raise ValueError(
                f"The text to train on has {len(train)} sequences of {length} tokens; one step needs {size}."
            )
    with lock_folder(args.output_dir, timeout=60):  # where another process begins, too
        claim(args.output_dir, "grid", GRID_FILES)
    if args.model is None:
        copy_base(Path(base))
    return work


def check_texts(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for one text without the other, one that is missing, empty or no UTF-8, and for the same text twice.
    """
    names = {flag: getattr(args, flag) for flag in ("train_text", "held_out_text")}
    if list(names.values()) == [None, None]:
        return
    if None in names.values():
        raise ValueError(
            f"`train_text` is {args.train_text!r} and `held_out_text` {args.held_out_text!r}; give both or neither."
        )
    for flag, name in names.items():
        check_source(None, None, name, "text", flag)
    if filecmp.cmp(*names.values(), shallow=False):
        raise ValueError(
            f"`train_text` is {args.train_text!r} and `held_out_text` {args.held_out_text!r}, which hold the same: "
            "what a model was trained on is no held-out text."
        )


def load_texts(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The texts to train on and to measure on, and what cards say about them."""
    if args.train_text is None:
        parts = split_text(python_text())
        return {"training": parts["variants"], "held-out": parts["held-out"]}, {}
    texts = {}
    for part, flag in (("training", "train_text"), ("held-out", "held_out_text")):
        texts[part] = load_text(None, None, getattr(args, flag), "text", flag)["train"]["text"]
    name = f"`{Path(args.train_text).name}`"
    details = f"It was measured on `{Path(args.held_out_text).name}`."
    return texts, {"dataset": name, "dataset_details": details, "evaluation_split": "held-out"}


def delimiters(grid: Grid, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[int]:
    """The tokens of the model that end as the grid says, spaces after that left out."""
    if not grid.delimiters:
        return []
    ends = tuple(grid.delimiters)
    # Of the ids some may be left out, and some tokenizers know more than their model.
    known = sorted(token for token in tokenizer.get_vocab().values() if token < config.get_text_config().vocab_size)
    texts = {token: tokenizer.decode([token]) for token in known}
    ids = [token for token, text in texts.items() if text.rstrip(" ").endswith(ends)]
    if not ids:
        raise ValueError(f"`delimiters` are {grid.delimiters}; no token of the tokenizer ends so.")
    return ids


def report(args: argparse.Namespace, work: GridWork) -> None:
    """Writes the tables, the pictures and the cards, and prints the tables and a generated sentence."""
    runs: dict[str, list[GridRun]] = {}
    for run in work.grid:
        runs.setdefault(run.name, []).append(run)
    folders = {name: [work.path(Task(run)) for run in group] for name, group in runs.items()}
    records = {name: [RunRecord.load(folder) for folder in group] for name, group in folders.items()}
    baseline = next(name for name, group in runs.items() if group[0].variant == BASELINE_VARIANT)
    shown = "quintic" if "quintic" in runs else list(runs)[-1]
    own = metrics_of_runs(records)
    text = tables(records, baseline)
    print(f"\n{text}")
    write_whole(args.output_dir / "table.md", text)
    pair = dict.fromkeys((baseline, shown))
    names = ("context_fidelity_over_depth", "shares_over_depth", "frontier", "perplexity_over_dial")
    pictures = {name: args.output_dir / f"{name}.png" for name in names}
    plot_over_depth(own, "context_fidelity", pictures["context_fidelity_over_depth"])
    plot_shares_over_depth({name: own[name] for name in pair}, baseline, pictures["shares_over_depth"])
    plot_frontier(own, baseline, pictures["frontier"])
    dials = {name: [record.controls["dials"] for record in group] for name, group in records.items()}
    plot_over_dial(dials, pictures["perplexity_over_dial"])
    print(f"Pictures: {', '.join(map(str, pictures.values()))}")

    # Again, now that every sibling is there to be compared with.
    of_cards = [*chain(*folders.values()), *([Path(work.base)] if args.model is None else [])]
    for folder in of_cards:
        write_card(folder)
    if args.model_cards is not None:
        # With the records, so that the cards can be written anew and checked without the models.
        for folder in of_cards:
            (args.model_cards / folder.name).mkdir(parents=True, exist_ok=True)
            claim(args.model_cards / folder.name, "card", CARD_FILES)
            RunRecord.load(folder).save(args.model_cards / folder.name)
        for name in runs:
            print(f"Model card: {write_card(args.model_cards / name)}")

    if work.grid.lora is not None:
        model, how = work.load_run(runs[shown][0]).eval(), ""
    else:
        model = AutoModelForCausalLM.from_pretrained(folders[shown][0], trust_remote_code=True)
        how = ", loaded with AutoModelForCausalLM and trust_remote_code=True,"
    print(f"\n{shown}{how} goes on from {PROMPT!r}:")
    print(continued(model, work.tokenizer, PROMPT))


def continued(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt and the likeliest words after it, up to the end of the text."""
    # Some tokenizers end every text, this one too.
    tokens = text_prefix(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    likeliest = GenerationConfig(
        max_new_tokens=40, do_sample=False, repetition_penalty=1.2, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    written = generate_as_told(model, torch.tensor([tokens]), likeliest)[0]
    return tokenizer.decode(written, clean_up_tokenization_spaces=False)


def tables(records: dict[str, list[RunRecord]], baseline: str) -> str:
    """The comparison on each model's own blocks and on those of the base, with the controls."""
    own = metrics_of_runs(records)
    shared = {name: [record.metrics_on_base_blocks for record in group] for name, group in records.items()}
    layer = len(records[baseline][0].lambdas) - 1
    parts = [f"On the blocks that each model finds itself:\n\n{comparison_table(own, baseline)}"]
    by_seed = metrics_by_seed(records)
    if differences := differences_table(by_seed, baseline):
        number = len(differences.splitlines()) - 2
        others = "and other text" if are_of_documents(by_seed) else "on this text"
        parts.append(
            f"Perplexity against {baseline}, paired by seed, for other seeds {others} (p by Holm for {number} "
            f"comparisons):\n\n{differences}"
        )
    parts += [
        f"On the blocks that the base finds:\n\n{comparison_table(shared, baseline)}",
        "The last layer's context fidelity (psi) on other blocks than its own, at dial 0:\n\n"
        f"{block_controls(records, layer)}",
        "Perplexity at dial 0; as multiples of it those at dial 1, with blocks of one token (self only), and with all "
        f"layers local; and how far predictions move from dial 0 to dial 1:\n\n{dial_controls(records)}",
    ]
    if len(records[baseline]) > 1:
        parts.append("± is half of the 95 % interval over seeds, by Student's t.")
    return "\n\n".join(parts) + "\n"
