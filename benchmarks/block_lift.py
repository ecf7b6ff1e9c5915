# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Where semantic blocks start: lift at boundaries that a reader would mark, and mean block length, for some thresholds and
bands of layers.

`python benchmarks/block_lift.py --model FOLDER --text FILE --boundaries joins sentences`

Works with every causal language model whose attention goes through transformers' interface. README.md beside this file
says what was measured.
"""

import argparse
import random
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import localist_hf  # noqa: F401 (makes LocalistGPT2 known to AutoModel, and registers the attention function)
from localist_hf.evaluation import block_lift, text_prefix
from localist_hf.modeling.block_partition import BlockState, document_starts, semantic_blocks, value_lengths
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION


#: First and last layer as shares of the depth.
BANDS = {
    "3/8 to 1/2": (3 / 8, 1 / 2),
    "1/4 to 1/2": (1 / 4, 1 / 2),
    "3/8 to 5/8": (3 / 8, 5 / 8),
    "3/8 to 3/4": (3 / 8, 3 / 4),
    "1/2 alone": (1 / 2, 1 / 2),
}
#: The limits that a configuration sets by default.
MIN_BLOCK_LENGTH, MAX_BLOCK_LENGTH = 8, 64
#: What ends before a boundary; the next token begins the new part.
_ENDS = {
    "sentences": re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?\s?[A-Z])"""),
    "lines": re.compile(r"(?:[ \t]*\n)+"),
}
_BOUNDARIES = """'sentences' of prose; 'lines'; 'joins': the text is made of 150 of the file's paragraphs run together,
neighbours never from one article if it can be helped, and other boundaries are those of this text"""


def main(arguments: list[str] | None = None) -> None:
    """Prints a table for each kind of boundary: a row for each band, a column for each threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model, with a tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="a text file; for 'joins' in WikiText's form")
    parser.add_argument("--boundaries", nargs="+", choices=["joins", *_ENDS], default=["sentences"], help=_BOUNDARIES)
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.75, 1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--length", type=int, default=512, help="tokens of a text that the model reads at a time")
    parser.add_argument("--max_texts", type=int, default=100, help="no more texts than these")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    attention = LOCALIST_ATTENTION["sdpa"]  # by which the values come here
    model = AutoModel.from_pretrained(options.model, attn_implementation=attention, dtype=torch.float32).eval()
    text, joins = options.text.read_text(encoding="utf-8-sig"), []
    if "joins" in options.boundaries:
        text, joins = join_paragraphs(text, num_paragraphs=150)
    ends = {kind: [match.end() for match in pattern.finditer(text)] for kind, pattern in _ENDS.items()}
    input_ids, boundaries = tokenize(tokenizer, text, ends | {"joins": joins}, options.length)
    input_ids = input_ids[: options.max_texts]

    lengths = layer_value_lengths(model, input_ids)
    print(f"{len(input_ids)} texts of {input_ids.shape[1]} tokens; lift (mean block length)")
    for kind in options.boundaries:
        marks = boundaries[kind][: options.max_texts]
        print(f"\n{kind}: {int(marks.sum())} boundaries\n")
        print("| layers | " + " | ".join(f"k = {threshold}" for threshold in options.thresholds) + " |")
        print("|---" * (1 + len(options.thresholds)) + "|")
        for name, (first, last) in BANDS.items():
            band = slice(int(first * len(lengths)), int(last * len(lengths)) + 1)
            cells = (lift_cell(lengths[band].mean(dim=0), threshold, marks) for threshold in options.thresholds)
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def join_paragraphs(text: str, num_paragraphs: int) -> tuple[str, list[int]]:
    """Paragraphs of WikiText's articles, in turn one of each, and at which characters all but the first begin."""
    articles = re.split(r"^ = [^=].*= $", text, flags=re.MULTILINE)
    shuffle = random.Random(0).shuffle
    paragraphs = [[line for line in map(str.strip, body.split("\n")) if len(line) > 200] for body in articles]
    for article in paragraphs:
        shuffle(article)
    rounds: list[str] = []
    while len(rounds) < num_paragraphs and any(paragraphs):
        rounds += [article.pop() for article in paragraphs if article]
    text, joins = "", []
    for paragraph in rounds[:num_paragraphs]:
        text = f"{text} {paragraph}" if text else paragraph
        joins.append(len(text) - len(paragraph))
    return text, joins[1:]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, places: dict[str, list[int]], length: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The text's tokens in rows of `length`, each begun as the tokenizer begins a text, and which of them are the first at
    or after these characters.
    """
    prefix = text_prefix(tokenizer)
    room = length - len(prefix)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    # The character that a token begins with, not the space before it.
    first_characters = torch.tensor(
        [
            start + len(piece) - len(piece.lstrip(" "))
            for start, end in encoded["offset_mapping"]
            for piece in [text[start:end]]
        ]
    )
    num_rows = len(first_characters) // room if room > 0 else 0
    if not num_rows:
        raise SystemExit(f"--text has {len(first_characters)} tokens; --length {length} needs at least as many.")

    def in_rows(tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return torch.cat([before.expand(num_rows, -1), tokens[: num_rows * room].view(num_rows, room)], dim=1)

    boundaries = {}
    for kind, characters in places.items():
        marks = torch.zeros(len(first_characters) + 1, dtype=torch.bool)
        marks[torch.searchsorted(first_characters, torch.tensor(characters, dtype=torch.long))] = True
        boundaries[kind] = in_rows(marks, torch.zeros(len(prefix), dtype=torch.bool))
    return in_rows(torch.tensor(encoded["input_ids"]), torch.tensor(prefix, dtype=torch.long)), boundaries


@torch.no_grad()
def layer_value_lengths(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """nu of every layer's values, `(num_layers, num_rows, length)`."""
    batches = []
    for rows in input_ids.split(4):
        of_layer: dict[int, torch.Tensor] = {}

        def keep(module: nn.Module, query, key, value: torch.Tensor, *_, of_layer=of_layer, **__) -> None:
            of_layer[module.layer_idx] = value_lengths(value)

        model(input_ids=rows, use_cache=False, observer=keep)
        batches.append(torch.stack([of_layer[layer] for layer in sorted(of_layer)]))
    return torch.cat(batches, dim=1)


def lift_cell(lengths: torch.Tensor, threshold: float, boundaries: torch.Tensor) -> str:
    """Lift and mean length of the blocks that these value lengths give."""
    documents = document_starts(*lengths.shape)
    limits = MIN_BLOCK_LENGTH, MAX_BLOCK_LENGTH
    blocks, _ = semantic_blocks(lengths, documents, threshold, *limits, BlockState.at_first(documents, 0))
    num_blocks = (blocks.starts == torch.arange(lengths.shape[1])).sum().item()
    return f"{block_lift(blocks.starts, boundaries):.1f} ({blocks.starts.numel() / num_blocks:.0f})"


if __name__ == "__main__":
    main()
