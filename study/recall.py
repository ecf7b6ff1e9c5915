"""
Where attention is when far words matter: a name of three words stands in one sentence of a text, and its first two at
the end; the prediction of the third rests on that sentence. Of the model as it is and of each run of
smollm2_recall.yaml, as lines of JSON: how often the most attended of the sentences before the own one is the one with
the most influence. Texts are kept of which the model as it is has the name right.

    localist-hf family study/smollm2_recall.yaml --output-dir runs/study/smollm2_recall --model runs/smollm2/model ...
    python study/recall.py runs/smollm2/model runs/study/smollm2_recall study/figures/recall.jsonl \
        --text-file ../shared/data/wikitext-2-raw/test.txt
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from localist_hf.evaluation import measure_influence
from localist_hf.evaluation.guesses import attention_guesses
from localist_hf.experiments.data import tokenize_and_pack, tokens_ending
from localist_hf.hub import RunRecord
from localist_hf.hub.loading import load


LENGTH, NAME, DRAWS, BATCH, SEED = 160, 3, 2, 8, 0
ENDS = [".", "!", "?", "\n"]
#: Sentences before the own one in which the name may stand: of all, and of those that two previous blocks show.
SETS = {"anywhere": 99, "in the last two": 2}


class Recall(NamedTuple):
    """A text whose last token is the second of a name, its sentences, and the one that the whole name stands in."""

    ids: torch.Tensor
    sentences: list[tuple[int, int]]
    answer: int


@torch.no_grad()
def recalls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, most_back: int, number: int
) -> list[Recall]:
    """
    Texts that the model recalls a name in: made of pieces of a real text, in which words of a sentence, any of the last
    so many before the own one, are the name.
    """
    generator = torch.Generator().manual_seed(SEED)
    words = torch.tensor([
        token for token in range(len(tokenizer)) if (word := tokenizer.decode([token])).startswith(" ")
        and word.strip().isalpha() and len(word) > 3
    ])  # fmt: skip
    found: list[Recall] = []
    for tokens in dataset["input_ids"]:
        name = words[torch.randint(len(words), (NAME,), generator=generator)]
        ids = torch.cat((torch.tensor(tokens), name[:-1]))
        before = sentences_of(model, ids)[:-1]
        if len(before) < 2:
            continue
        back = int(torch.randint(1, min(most_back, len(before)) + 1, (1,), generator=generator))
        first, end = before[-back]
        if first == 0 or end - first < NAME + 3:  # the sink stands in the first
            continue
        place = first + 1 + int(torch.randint(end - first - NAME - 1, (1,), generator=generator))
        ids[place : place + NAME] = name
        sentences = sentences_of(model, ids)
        right = model(ids[None], locality_dial=0.0, use_cache=False).logits[0, -1].argmax() == name[-1]
        if right and (first, end) in sentences[:-1]:
            found.append(Recall(ids, sentences, sentences.index((first, end))))
        if len(found) == number:
            break
    return found


def sentences_of(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[int, int]]:
    """The blocks of the reference model, which end where sentences do."""
    starts = model(ids[None], output_fidelity=[0], locality_dial=0.0, use_cache=False).block_starts[0][0]
    edges = [*starts.unique().tolist(), len(ids)]
    return list(itertools.pairwise(edges))


@torch.no_grad()
def hits(model: PreTrainedModel, texts: list[Recall], dial: float, in_sight: bool) -> dict[str, Any]:
    """
    Of each text whether a guess's first sentence is the one with the most influence, among those before the own one;
    among those that two previous blocks show, at dial 1 or where the others are compared with it.
    """
    found: dict[str, list[float]] = {}
    for text in texts:
        place, before = len(text.ids) - 1, text.sentences[:-1]
        before = before[-2:] if in_sight else before
        settings = {"batch_size": BATCH, "locality_dial": dial, "min_fidelity": 0.0}
        influence = [
            measure_influence(model, text.ids, before, [place], DRAWS, **settings, method=method).values[:, 0]
            for method in ("erasure", "knock_out")
        ]
        guesses, _ = attention_guesses(model, text.ids, [place], dial, with_rollout=False)
        last = f"layer {model.config.locality.num_hidden_layers - 1}"
        names = {last: "last layer"} | {name: name for name in guesses if not name.startswith("layer ")}
        sinks = model.config.locality.num_sink_tokens  # what is attended to there says nothing of words
        sums = {
            shown: torch.tensor([guesses[name][0][max(first, sinks) : end].sum() for first, end in before])
            for name, shown in names.items()
        }
        sums |= {"nearness": torch.arange(len(before)), "knock-out": influence[1]}
        best = int(influence[0].argmax())
        for name, each in sums.items():  # of equal ones any may come first
            is_first = each == each.max()
            found.setdefault(name, []).append(float(is_first[best] / is_first.sum()))
        found.setdefault("it is the name's", []).append(float(before[best] == text.sentences[text.answer]))
    return found


def models(args: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel, bool]]:
    """The model as it is, and each run: its name, and whether it has two previous blocks."""
    yield "the model as it is", load(args.model, {"num_sink_tokens": 1})[0], False
    for path in sorted(args.folder.glob("*/run.json")):
        model, _ = load(str(path.parent), {})
        yield RunRecord.load(path.parent).name, model, model.config.locality.num_previous_blocks == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--number", type=int, default=24)
    args = parser.parse_args()
    _, tokenizer = load(args.model, {})
    ends = tokens_ending(ENDS, tokenizer, len(tokenizer))
    settings = {"block_partition": "delimiter", "delimiter_token_ids": ends, "num_sink_tokens": 1}
    reference = load(args.model, settings)[0].float()
    text = args.text_file.read_text(encoding="utf-8")
    dataset = tokenize_and_pack(Dataset.from_dict({"text": [text]}), tokenizer, LENGTH)
    of_sets = {name: recalls(reference, tokenizer, dataset, most_back, args.number) for name, most_back in SETS.items()}
    lines = []
    for name, model, has_two in models(args):
        for of_set, texts in of_sets.items():
            in_sight = of_set != "anywhere"
            for dial in [0.0, 1.0] if has_two and in_sight else [0.0]:
                found = hits(model.float(), texts, dial, in_sight)
                lines.append({"name": name, "texts": of_set, "dial": dial, "hits": found})
                print(
                    name, of_set, dial, {guess: f"{sum(of) / len(of):.2f}" for guess, of in found.items()}, flush=True
                )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines), encoding="utf-8"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
