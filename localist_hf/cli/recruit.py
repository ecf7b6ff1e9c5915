"""`localist-hf recruit`: the separators of a causal language model, found in what it predicts of a text."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..command_line import recruit_parser
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation import Separators, block_lift, recruit_separators
from ..evaluation.separators import check_mean_length, starts_after
from ..evaluation.tables import markdown_table
from ..experiments.data import check_source, check_token_ids, follows_end
from ..experiments.folders import RECRUITED_FILES, check_own, claim, lock_folder
from ..experiments.grid import check_ends
from ..hub.loading import check_name, checked_sequence_length, load
from ..modeling import LOCALITY_FIELDS, LocalityFields
from ..whole_file import write_whole
from .arguments import locality_settings
from .evaluate import BATCH_TOKENS, load_sequences


#: Lines of the table, and tokens of the sample, that are printed; the file has all separators.
_NUM_SHOWN, _SAMPLE_LENGTH = 40, 160
#: What the separators of a text depend on.
_KEPT = ("min_block_length", "max_block_length", "num_sink_tokens")
_DEFAULTS = {each.name: each.default for each in fields(LocalityFields)}


def lifts(
    starts: torch.Tensor,
    tokens: torch.Tensor,
    boundaries: list[str],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> dict[str, float | None]:
    """
    The [`block_lift`] at what follows tokens that end in each of these ways; `None` where there is no number, as where
    a tokenizer has no such token.
    """
    found = {end: block_lift(starts, follows_end(tokens, [end], tokenizer, vocab_size)) for end in boundaries}
    return {end: None if math.isnan(lift) else lift for end, lift in found.items()}


def describe(
    separators: Separators,
    tokenizer: PreTrainedTokenizerBase,
    starts: torch.Tensor,
    sample: list[int],
    lifts_by_end: dict[str, float | None],
) -> str:
    """Renders the separators, the lift at what a reader would take for boundaries, and the blocks of a sample."""
    count = len(separators.token_ids)
    rows = [["separator", "id", "cost", "occurrences"]]
    for token, cost, occurrences in zip(separators.token_ids, separators.cost, separators.occurrences, strict=True):
        text = tokenizer.decode([token])
        if "\ufffd" in text:  # part of a character
            text = tokenizer.convert_ids_to_tokens(token)
        rows.append([f"`{text!r}`".replace("|", "\\|"), str(token), f"{cost:.2f}", str(occurrences)])
    more = f"\n... and {count - _NUM_SHOWN} more" if count > _NUM_SHOWN else ""
    shown = ", ".join(
        f"{end!r} {'not found as the end of a token' if lift is None else f'{lift:.1f}'}"
        for end, lift in lifts_by_end.items()
    )
    edges = [place for place in range(len(sample)) if starts[place] == place]
    pieces = [sample[start:end] for start, end in zip(edges, [*edges[1:], len(sample)], strict=True)]
    blocks = "\n".join(f"  {tokenizer.decode(piece)!r}" for piece in pieces)
    return (
        f"{count} separators among {separators.num_candidates} candidates; blocks of {separators.mean_length:.1f} "
        f"tokens on average\n\n{markdown_table(rows[: _NUM_SHOWN + 1])}{more}\n\n"
        "cost: what the predictions after it lose, in nats, where the upper half of the layers sees nothing of it and "
        "of what is before it\n"
        f"at separators {separators.mean_cost_at_separators:.2f}, at any candidate {separators.mean_cost:.2f}; rank "
        f"correlation of the cost in two halves of the text {separators.reliability:.2f}\n\n"
        f"how many times more often than chance a block starts after (lift): {shown}\n\n"
        f"the blocks of the first {len(sample)} tokens\n{blocks}"
    )


def main(arguments: list[str]) -> None:
    """Runs `localist-hf recruit` with these arguments."""
    args = recruit_parser().parse_args(arguments)
    name = Path(args.model).name or Path(args.model).resolve().name
    folder = args.output_dir or Path("runs/recruit") / name
    with reraised_as(InputError, *INPUT_ERRORS):
        check_name(args.model)  # by which the folder is called
    with lock_folder(folder):
        with reraised_as(InputError, *INPUT_ERRORS):
            check_own(folder, "separators", RECRUITED_FILES)
            for file in args.text_file:
                check_source(None, None, file, "text")
            check_ends("boundaries", args.boundaries)
            given = locality_settings(args.locality)
            if found := sorted(given.keys() & {"block_partition", "delimiter_token_ids", "window_length"}):
                raise ValueError(f"`locality` sets {found[0]!r}, which is what is to be found; leave it out.")
            model, tokenizer = load(args.model, given)
            check_mean_length(args.mean_length, model.config.locality)
            length = checked_sequence_length(args.sequence_length, model.config)
            sequences = load_sequences(args.text_file, tokenizer, length)
            check_token_ids(sequences, model.config, tokenizer)
        model.to(PartialState().device)
        print(f"{name}: {len(sequences)} sequences of {length} tokens", flush=True)
        with reraised_as(InputError, ValueError):
            separators = recruit_separators(model, sequences, args.mean_length, max(1, BATCH_TOKENS // length))
        locality, tokens = model.config.locality, torch.tensor(sequences["input_ids"])
        separates = torch.isin(tokens, torch.tensor(separators.token_ids))
        limits = locality.min_block_length, locality.max_block_length
        starts = starts_after(separates, torch.zeros_like(tokens), *limits)
        by_end = lifts(starts, tokens, args.boundaries, tokenizer, locality.vocab_size)
        print(describe(separators, tokenizer, starts[0], sequences[0]["input_ids"][:_SAMPLE_LENGTH], by_end))
        # What they were found under, where that is not so anyway.
        settings = {name: getattr(locality, name) for name in _KEPT if getattr(locality, name) != _DEFAULTS[name]}
        settings |= {name: value for name, value in given.items() if name in LOCALITY_FIELDS} | separators.settings
        content: dict[str, Any] = {
            "model": name,
            "locality": settings,
            "texts": [tokenizer.decode([token]) for token in separators.token_ids],
            "tokens": tokenizer.convert_ids_to_tokens(separators.token_ids),
            **separators.to_dict(),
            "block_lift": by_end,
            "sequence_length": length,
            "num_sequences": len(sequences),
        }
        adapter = getattr(model, "peft_config", None)  # which no training starts from
        source = args.model if adapter is None else adapter["default"].base_model_name_or_path
        source = str(Path(source).resolve()) if Path(source).exists() else source
        flags = {"model": source, "locality": settings}
        claim(folder, "separators", RECRUITED_FILES)
        numbers, config = (folder / file for file in RECRUITED_FILES)
        write_whole(numbers, json.dumps(content, indent=2, allow_nan=False) + "\n")
        write_whole(config, yaml.safe_dump(flags, default_flow_style=None, sort_keys=False, allow_unicode=True))
    print(f"\nWritten: {numbers}, {config}\nTrain on these blocks: localist-hf train --config {config} --text-file ...")
