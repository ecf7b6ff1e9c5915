"""
Other ways to find where blocks start, on the small base without training: perplexity at dial 1 under `upper_half`, as a
multiple of that on windows with as many visible keys. The table in docs/method.md#recruited-separators comes from here.

    python study/other_boundaries.py          # minutes on one core
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from localist_hf.evaluation.kept_attention import KeptAttention
from localist_hf.evaluation.locality_meter import token_losses
from localist_hf.evaluation.separators import starts_after
from localist_hf.evaluation.tables import markdown_table
from localist_hf.experiments.base import BASE
from localist_hf.experiments.data import some_of, tokenize_and_pack, tokens_ending
from localist_hf.experiments.python_text import python_text, split_text
from localist_hf.hub.loading import load


LENGTH, NUM_MEASURED, NUM_ASKED, BATCH = 256, 48, 640, 16
#: Visible keys that every way is set to.
WANTED_KEYS = 9.0
OFFSETS = range(2, 9)
#: Tokens of the blocks that are moved along the text.
PERIOD = 16
#: So many times more a token is taken to have been asked with the mean result, and a pair with that of its token.
DRAWN = 20.0


def batches(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(rows.split(BATCH))


def visible_keys(starts: torch.Tensor) -> float:
    return (torch.arange(LENGTH) - starts + 1).double().mean().item()


def begin_with(separates: torch.Tensor) -> torch.Tensor:
    """After which tokens blocks start that are to begin with these."""
    return separates.roll(-1, dims=1)


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: torch.Tensor, name: str, starts: torch.Tensor) -> float:
    """At dial 1, with `block_starts` or `local_starts`."""
    total = 0.0
    for ids, of_rows in zip(batches(rows), batches(starts), strict=True):
        logits = model(ids, use_cache=False, locality_dial=1.0, **{name: of_rows}).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows[:, 1:].numel())


@torch.no_grad()
def needs(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """The need at each place itself, `(number, LENGTH)`; nan where no query is left to ask."""
    layers, position, found = range(model.config.n_layer // 2, model.config.n_layer), torch.arange(LENGTH), []
    for ids in batches(rows):
        attended = KeptAttention(model.config)
        attended.run(model.base_model, {"input_ids": ids})
        total = torch.zeros(ids.shape, dtype=torch.float64)
        for offset in OFFSETS:
            starts = (position - offset + 1).clamp(min=0).expand_as(ids)
            measured = attended.measure({"input_ids": ids}, layers, local_starts=starts)
            block, outside = (
                torch.stack([share.mean(1) for share in shares])
                for shares in (measured.block_share, measured.outside_share)
            )
            reaching = (outside / (block + outside).clamp(min=1e-9)).mean(0).double()
            total[:, :-offset] += reaching[:, offset:] / len(OFFSETS)
        total[:, -OFFSETS[-1] :] = math.nan
        found.append(total)
    return torch.cat(found)


@torch.no_grad()
def costs(model: PreTrainedModel, rows: torch.Tensor, num_moves: int = 16) -> torch.Tensor:
    """
    What a boundary after each place costs at dial 1, as in [`recruit_separators`], `(number, LENGTH)`: after as many of
    each 16 places as blocks are moved, nan elsewhere.
    """
    position, lost = torch.arange(LENGTH), []
    moves = [move * PERIOD // num_moves for move in range(num_moves)]
    for move in moves:
        starts = torch.where(position < move, 0, position - (position - move) % PERIOD)
        of_move = [
            token_losses(model(ids, use_cache=False, locality_dial=1.0, block_starts=starts.expand_as(ids)).logits, ids)
            for ids in batches(rows)
        ]
        lost.append(torch.cat(of_move).double())
    losses = torch.stack(lost)
    after = (losses - losses.mean(0)).unfold(-1, PERIOD // 2, 1).sum(-1)[..., :-1]
    found = torch.full(rows.shape, math.nan, dtype=torch.float64)
    for move, of_move in zip(moves, after, strict=True):
        begins = position[: after.shape[-1]][(position[: after.shape[-1]] % PERIOD == move)]
        begins = begins[begins > 0]
        found[:, begins - 1] = of_move[:, begins]
    return found


@torch.no_grad()
def of_the_text(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of a boundary after each token that need no corpus, low where there should be one."""
    entropies, keys, states = [], [], []
    middle = model.config.n_layer // 2
    for ids in batches(rows):
        attended = KeptAttention(model.config)
        outputs = model(ids, use_cache=False, locality_dial=0.0, output_hidden_states=True, observer=attended.keep)
        log_p = outputs.logits.log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        keys.append(attended._layers[middle].key.transpose(1, 2).flatten(2))
        states.append(outputs.hidden_states[middle])
    entropy = torch.cat(entropies)

    def similarity(of: list[torch.Tensor]) -> torch.Tensor:
        vectors = torch.cat(of)
        return F.pad(F.cosine_similarity(vectors[:, 1:], vectors[:, :-1], dim=-1), (0, 1), value=1.0)

    return {
        "surprise: the next token's entropy is high (BLT)": -entropy,
        "surprise: that entropy rises (BLT)": F.pad(entropy[:, :-1], (1, 0)) - entropy,
        "neighbouring keys differ (H-Net's router, untrained)": similarity(keys),
        "neighbouring hidden states differ": similarity(states),
    }


def of_tokens(need: torch.Tensor, asked: torch.Tensor, rows: torch.Tensor, of_pairs: bool) -> torch.Tensor:
    """The mean need of each place's token, or of it and its neighbour, drawn to the mean of all, or of the token."""
    known = ~need.isnan()
    sums: dict[int | tuple[int, int], float] = {}
    counts: dict[int | tuple[int, int], int] = {}
    for of_row, of_known, of_need in zip(asked.tolist(), known.tolist(), need.tolist(), strict=True):
        for place in range(LENGTH - 1):
            if of_known[place]:
                for key in (of_row[place], (of_row[place], of_row[place + 1])):
                    sums[key] = sums.get(key, 0.0) + of_need[place]
                    counts[key] = counts.get(key, 0) + 1
    mean = need[known].mean().item()

    def drawn(key: int | tuple[int, int], to: float) -> float:
        return (sums.get(key, 0.0) + DRAWN * to) / (counts.get(key, 0) + DRAWN)

    def score(token: int, neighbour: int) -> float:
        alone = drawn(token, mean)
        return drawn((token, neighbour), alone) if of_pairs else alone

    return torch.tensor([[score(*pair) for pair in zip(row, [*row[1:], -1], strict=True)] for row in rows.tolist()])


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load(str(BASE), {"locality_schedule": "upper_half"})
    model = model.float()
    texts = {part: Dataset.from_dict({"text": text}) for part, text in split_text(python_text()).items()}
    packed = {part: tokenize_and_pack(texts[part], tokenizer, LENGTH) for part in ("variants", "held-out")}
    asked = torch.tensor(some_of(packed["variants"], NUM_ASKED)["input_ids"])
    rows = torch.tensor(some_of(packed["held-out"], NUM_MEASURED)["input_ids"])
    position, documents = torch.arange(LENGTH).expand_as(rows), torch.zeros_like(rows)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, starts_of in (
        ("block_starts", lambda length: position - position % length),
        ("local_starts", lambda length: (position - length // 2 + 1).clamp(min=0)),
    ):
        tried = [starts_of(length) for length in (10, 14, 18, 22, 28)]
        curves[name] = [*map(visible_keys, tried)], [perplexity(model, rows, name, starts) for starts in tried]
    lines = [["blocks", "fewest tokens", "visible keys", "/ windows", "/ last tokens"]]

    def add(title: str, least: int, starts: torch.Tensor) -> None:
        keys, found = visible_keys(starts), perplexity(model, rows, "block_starts", starts)
        ratios = (found / float(np.interp(keys, *curve)) for curve in curves.values())
        lines.append([title, str(least), f"{keys:.1f}", *(f"{ratio:.3f}" for ratio in ratios)])
        print(*lines[-1], sep="  ", flush=True)

    def add_by_score(title: str, score: torch.Tensor, limits: tuple[int, ...] = (8,), *, with_it: bool = False) -> None:
        def place(bound: float) -> torch.Tensor:
            separates = begin_with(score < bound) if with_it else score < bound
            return starts_after(separates, documents, least, 64)

        for least in limits:
            bounds = score.double().flatten().nanquantile(torch.linspace(0.01, 0.99, 99, dtype=torch.double)).tolist()
            add(title, least, place(min(bounds, key=lambda bound: abs(visible_keys(place(bound)) - WANTED_KEYS))))

    ends = torch.tensor(tokens_ending(["\n"], tokenizer, len(tokenizer)))
    for least in (1, 4, 8):
        add("ends of lines, given", least, starts_after(torch.isin(rows, ends), documents, least, 64))
    with_ends = starts_after(begin_with(torch.isin(rows, ends)), documents, 8, 64)
    add("ends of lines, given, each the first token of its block", 8, with_ends)
    need = needs(model, asked)
    add_by_score("need, by token", of_tokens(need, asked, rows, of_pairs=False), (1, 4, 8))
    add_by_score("need, by token and its neighbour", of_tokens(need, asked, rows, of_pairs=True))
    add_by_score("need at the place itself (not causal)", needs(model, rows).nan_to_num(9.0))
    for num_moves in (4, 16):
        cost, title = costs(model, asked, num_moves), f"cost of a boundary, {num_moves} moves, by token"
        add_by_score(title, of_tokens(cost, asked, rows, of_pairs=False), (1, 4, 8))
        add_by_score(f"{title} and its neighbour", of_tokens(cost, asked, rows, of_pairs=True))
        of_first = cost.roll(1, dims=1)
        of_first[:, 0] = math.nan
        title = f"cost of a boundary, {num_moves} moves, by the first token after it"
        add_by_score(title, of_tokens(of_first, asked, rows, of_pairs=False), with_it=True)
    for title, score in of_the_text(model, rows).items():
        add_by_score(title, score)
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
