"""`localist-hf evaluate`: the locality of any causal language model, by layer and head, as numbers and as pictures."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..command_line import evaluate_parser
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation import LocalityReport, measure, measure_controls, plot_heads, plot_shares_over_depth, report_table
from ..evaluation.control_results import ControlResults
from ..evaluation.tables import heads_table, markdown_table, with_interval
from ..experiments.data import check_source, check_token_ids, load_text, some_of, tokenize_and_pack
from ..experiments.folders import MEASURED_FILES, check_own, claim, lock_folder
from ..experiments.python_text import python_text, split_text
from ..hub.loading import check_name, checked_sequence_length, load
from ..modeling import LOCALITY_FIELDS, LocalityFields
from ..whole_file import write_whole
from .arguments import locality_settings


#: Sequences of the text that is measured where none is given.
NUM_DEFAULT = 32
#: So many tokens are measured at a time, but a whole sequence at least.
BATCH_TOKENS = 4096


def load_sequences(files: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Loads the sequences of the files, or of the default text."""
    if files:
        texts = concatenate_datasets([load_text(None, None, file, "text")["train"] for file in files])
    else:
        texts = Dataset.from_dict({"text": split_text(python_text())["held-out"]})
        return some_of(tokenize_and_pack(texts, tokenizer, length), NUM_DEFAULT)
    return tokenize_and_pack(texts, tokenizer, length)


def write_report(
    report: LocalityReport, name: str, locality: LocalityFields, folder: Path, others: dict[str, Any]
) -> list[Path]:
    """Writes numbers and pictures to a folder, which must be there, and gives the files' paths."""
    settings = {field: getattr(locality, field) for field in LOCALITY_FIELDS}
    content = {"model": name, "locality": settings, "lambdas": locality.locality_lambdas, **others, **report.to_dict()}
    paths = [folder / file for file in MEASURED_FILES]
    numbers, shares, heads = paths
    write_whole(numbers, json.dumps(content, indent=2, allow_nan=False) + "\n")
    plot_shares_over_depth({name: [report.metrics]}, name, shares)
    plot_heads(report.profile.context_fidelity, heads, name)
    return paths


def describe(report: LocalityReport, locality: LocalityFields) -> str:
    """Renders the tables, and the settings that they were measured under."""
    last = report.profile.mean_block_length[-1].item()
    parts = [
        f"perplexity {report.metrics['perplexity']:.2f}\n"
        f"{locality.block_partition} blocks, {last:.1f} tokens on average; local beside them: "
        f"{locality.num_previous_blocks} previous blocks, {locality.num_sink_tokens} sinks\n",
        report_table(report, locality.locality_lambdas),
    ]
    parts += ["\ncontext fidelity of each head, in percent\n", heads_table(report.profile.context_fidelity)]
    return "\n".join(parts)


def describe_controls(controls: ControlResults) -> str:
    """Renders what was measured on other blocks, in the last layer, and at other dials."""
    rows = [["previous blocks", "visible keys", "own blocks", "wrong blocks", "windows", "last tokens"]]
    for blocks in controls.blocks:
        figures = (blocks.own, blocks.wrong, blocks.windows, blocks.recency)
        psi = ["-" if figure is None else with_interval([figure.context_fidelity[-1]], 3) for figure in figures]
        rows.append([str(blocks.num_previous_blocks), with_interval([blocks.own.visible_keys[-1]], 1), *psi])
    dials = [["dial", *(f"{dial.dial:g}" for dial in controls.dials), "1, self only", "1, all layers local"]]
    others = (controls.self_only_perplexity, controls.all_local_perplexity)
    perplexities = (*(dial.perplexity for dial in controls.dials), *others)
    dials.append(["perplexity", *(with_interval([value]) for value in perplexities)])
    return (
        f"\ncontext fidelity of the last layer on other local sets, at dial 0\n\n{markdown_table(rows)}\n\n"
        f"{markdown_table(dials)}"
    )


def main(arguments: list[str]) -> None:
    """Runs `localist-hf evaluate` with these arguments."""
    args = evaluate_parser().parse_args(arguments)
    name = Path(args.model).name or Path(args.model).resolve().name
    folder = args.output_dir or Path("runs/evaluate") / name
    with reraised_as(InputError, *INPUT_ERRORS):
        check_name(args.model)  # by which the folder is called
    with lock_folder(folder):
        with reraised_as(InputError, *INPUT_ERRORS):
            check_own(folder, "measurement", MEASURED_FILES)
            for file in args.text_file:
                check_source(None, None, file, "text")
            if args.block_model is not None:
                check_name(args.block_model, "block_model")  # before the first model is loaded
            model, tokenizer = load(args.model, locality_settings(args.locality))
            length = checked_sequence_length(args.sequence_length, model.config)
            block_model = None if args.block_model is None else load(args.block_model, {}, flag="block_model")[0]
            sequences = load_sequences(args.text_file, tokenizer, length)
            check_token_ids(sequences, model.config, tokenizer)
            if block_model is not None:
                check_token_ids(sequences, block_model.config, tokenizer, "block_model")
        device = PartialState().device
        model.to(device)
        if block_model is not None:
            block_model.to(device)
        print(f"{name}: {len(sequences)} sequences of {length} tokens", flush=True)
        batch_size = max(1, BATCH_TOKENS // length)
        report, locality = measure(model, sequences, batch_size, block_model, with_controls=True), model.config.locality
        print(describe(report, locality))
        others: dict[str, Any] = {"sequence_length": length, "num_sequences": len(sequences)}
        if args.controls:
            with reraised_as(InputError, ValueError):
                controls = measure_controls(model, sequences, batch_size, block_model)
            print(describe_controls(controls))
            others["dial_and_blocks"] = controls.to_dict()
        claim(folder, "measurement", MEASURED_FILES)
        paths = write_report(report, name, locality, folder, others)
    print(f"\nWritten: {', '.join(map(str, paths))}")
