"""`localist-hf explain`: what one prediction rests on, by attention and by erasure side by side."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..command_line import explain_parser
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..evaluation import measure_influence
from ..evaluation.agreement import LEAST_COMPARED, compare
from ..evaluation.check_model import core_model, num_positions
from ..evaluation.guesses import attention_guesses, check_captum, gradient_guesses
from ..evaluation.measure import last_block_starts
from ..evaluation.pictures import plot_explanation
from ..evaluation.tables import markdown_table
from ..experiments.folders import EXPLAINED_FILES, check_own, claim, lock_folder
from ..hub.loading import check_name
from ..modeling.fidelity import LayerDial
from ..modeling.reach import of_found_blocks
from ..page.passage import Passage
from ..whole_file import write_whole
from .arguments import locality_settings
from .view import beginning, load_for_reading, read_text


#: Words of the table that is printed; the file has all.
_NUM_WORDS = 12
#: Tokens at a time, in all texts of a batch.
_BATCH_TOKENS = 4096
#: The most tokens before a position that can be explained: each takes passes over all of them.
_MOST_BEFORE = 1024
#: Less change, in bits, is none in the table.
_LEAST_SHOWN = 0.0005
#: Letters of a block or a word that are shown.
_LETTERS = 28
#: Tokens of the default text.
_DEFAULT_TOKENS = 96


def main(arguments: list[str]) -> None:
    """Runs `localist-hf explain` with these arguments."""
    args = explain_parser().parse_args(arguments)
    name = Path(args.model).name or Path(args.model).resolve().name
    folder = args.output_dir or Path("runs/explain") / name
    with reraised_as(InputError, *INPUT_ERRORS):
        check_name(args.model)
        if not 0 <= args.dial <= 1:
            raise ValueError(f"`dial` is {args.dial}; it must be in [0, 1].")
        if args.position is not None and args.position < LEAST_COMPARED:
            raise ValueError(f"`position` is {args.position}; {LEAST_COMPARED} tokens must stand before it.")
        if args.draws < 1:
            raise ValueError(f"`draws` is {args.draws}; it must be at least 1.")
        if args.gradients:
            check_captum()
    with lock_folder(folder):
        with reraised_as(InputError, *INPUT_ERRORS):
            check_own(folder, "explanation", EXPLAINED_FILES)
            text = read_text(args.text, args.text_file)
            model, tokenizer = load_for_reading(args.model, locality_settings(args.locality))
            if args.text is None and args.text_file is None:
                text = beginning(text, tokenizer, _DEFAULT_TOKENS)
            passage = Passage.of(tokenizer, text)
            position = len(passage) - 1 if args.position is None else args.position
            if not LEAST_COMPARED <= position < len(passage):
                raise ValueError(
                    f"`position` is {position}, of a text of {len(passage)} tokens; it must be one of them, with "
                    f"{LEAST_COMPARED} before it."
                )
            limit = min(_MOST_BEFORE, num_positions(core_model(model).config) or _MOST_BEFORE)
            if position >= limit:
                raise ValueError(
                    f"`position` is {position}; it must be below {limit}, with all tokens before it. Name one, or pass "
                    "less text."
                )
        with reraised_as(InputError, ValueError):
            found = explain(model, passage, position, args.dial, args.draws, args.gradients)
        print(describe(found, args.dial))
        claim(folder, "explanation", EXPLAINED_FILES)
        numbers, picture = (folder / file for file in EXPLAINED_FILES)
        write_whole(numbers, json.dumps({"model": name} | found, indent=2, allow_nan=False) + "\n")
        plot_explanation(found["blocks"], f"{name}: what comes after {found['after']!r}", picture)
    print(f"\nWritten: {numbers}, {picture}")


@torch.no_grad()
def explain(
    model: Any, passage: Passage, position: int, dial: float, num_draws: int, with_gradients: bool
) -> dict[str, Any]:
    """What the prediction after a position rests on: JSON."""
    core = core_model(model.eval())
    ids = passage.input_ids[: position + 1]
    batch_size = max(1, _BATCH_TOKENS // len(ids))
    tokens, dials = ids[None].to(core.device), {"locality_dial": dial, "min_fidelity": 0.0}
    # All of it is said of one pass: every layer on the blocks of the last one.
    starts = last_block_starts(core.base_model, {"input_ids": tokens}, **dials)
    settings = {"num_draws": num_draws, "batch_size": batch_size, "block_starts": starts[0], **dials}
    found = {
        unit: [measure_influence(model, ids, unit, [position], **settings, method=method)
               for method in ("erasure", "knock_out")]
        for unit in ("block", "token")
    }  # fmt: skip
    of_words = found["token"][0]
    guesses, sights = attention_guesses(model, ids, [position], dial, with_rollout=False)
    last_layer = core.config.locality.num_hidden_layers - 1
    shown = {"last layer": guesses[f"layer {last_layer}"][0], "all layers": guesses["all layers"][0]}
    gradients = gradient_guesses(model, ids, [position], dial) if with_gradients else {}
    gradients = {name: row / max(row.sum(), np.finfo(float).tiny) for name, (row,) in gradients.items()}
    given = {"block_starts": starts, **dials}
    probabilities = model(tokens, **given, use_cache=False).logits[0, -1].float().softmax(-1).cpu()
    best = probabilities.topk(min(5, len(probabilities)))

    def of_units(unit: str) -> list[dict[str, Any]]:
        erased, cut = found[unit]
        return [
            {
                "first": first,
                "end": end,
                "text": "".join(passage.pieces[first:end]),
                "influence": influence,
                "knock_out": knocked,
                "attention": {name: float(values[first:end].sum()) for name, values in shown.items()},
                "gradients": {name: float(values[first:end].sum()) for name, values in gradients.items()},
            }
            for (first, end), influence, knocked in zip(
                erased.units, erased.values[:, 0].tolist(), cut.values[:, 0].tolist(), strict=True
            )
        ]

    # Under a hard mask, over the tokens in sight: on the others both are next to nothing by construction.
    in_sight = LayerDial.of_layer(dial, 0.0, core.config.locality.locality_lambdas[last_layer]).is_hard
    keys = np.flatnonzero(sights[0][:position]) if in_sight else np.arange(position)
    truth, place = of_words.values[:position, 0].numpy()[keys], keys.astype(float)
    agreement = {
        name: compare(guess, truth, place, has_nearness=name != "nearness")
        for name, guess in (
            *((name, guess[keys]) for name, guess in (shown | gradients).items()),
            ("knock-out", found["token"][1].values[:position, 0].numpy()[keys]),
            ("nearness", place),
        )
        if len(keys) >= LEAST_COMPARED
    }
    reach = core.reach(tokens, **given)
    if core.config.locality.block_partition != "window":  # the model has found them, and nobody has given them
        reach = of_found_blocks(reach)
    first = int(reach.first[0, -1])
    return {
        "position": position,
        "dial": dial,
        "in_sight": in_sight,
        "after": passage.pieces[position],
        "predicted": [
            {"token": passage.tokenizer.decode([token]), "probability": value}
            for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        "blocks": of_units("block"),
        "words": of_units("token"),
        "agreement": {
            name: {figure: None if math.isnan(value) else value for figure, value in figures.items()}
            for name, figures in agreement.items()
        },
        "reach": {"is_bounded": reach.is_bounded, "first": first, "statement": reach.statement},
    }  # fmt: skip


def describe(found: dict[str, Any], dial: float) -> str:
    """Renders it for a terminal."""
    predicted = ", ".join(f"{each['token']!r} {100 * each['probability']:.1f} %" for each in found["predicted"])
    shown = [(kind, name) for kind in ("attention", "gradients") for name in found["blocks"][0][kind]]
    head = ["replaced", "cut off", *(name for _, name in shown)]

    def numbers(entry: dict[str, Any]) -> list[str]:
        changes = [f"{entry[way]:.3f}" for way in ("influence", "knock_out")]
        return [*changes, *(f"{100 * entry[kind][name]:.1f}" for kind, name in shown)]

    blocks = [["block", "text", *head]]
    blocks += [[str(at), _shown(entry["text"]), *numbers(entry)] for at, entry in enumerate(found["blocks"])]
    words = [["token", "text", *head]]
    ordered = sorted(found["words"], key=lambda entry: -entry["influence"])[:_NUM_WORDS]
    ordered = [entry for entry in ordered if entry["influence"] >= _LEAST_SHOWN]
    words += [[str(entry["first"]), _shown(entry["text"]), *numbers(entry)] for entry in ordered]
    agreement = "; ".join(
        f"{name} {figures['spearman']:.2f}"
        + (f" (beyond nearness {figures['beyond_nearness']:.2f})" if figures.get("beyond_nearness") is not None else "")
        for name, figures in found["agreement"].items()
        if figures["spearman"] is not None
    )
    reach = found["reach"]
    within = f" This one depends on none before token {reach['first']}." if reach["is_bounded"] else ""
    return (
        f"after token {found['position']}, {found['after']!r}, at dial {dial:g}: {predicted}\n\n"
        "replaced, cut off: bits by which that changes where a unit is another, or no later token attends to it; "
        f"the rest: % of {' and '.join(dict.fromkeys(kind for kind, _ in shown))}\n\n"
        f"{markdown_table(blocks)}\n\nthe {len(words) - 1} words that it rests on most\n\n{markdown_table(words)}\n\n"
        f"rank correlation with what erasure finds, over the words {'in sight' if found['in_sight'] else 'before'}: "
        f"{agreement or 'none, there are too few'}\n{reach['statement']}{within}"
    )


def _shown(text: str) -> str:
    """A piece of text in a table."""
    text = text if len(text) <= _LETTERS else f"{text[: _LETTERS - 12]} ... {text[-8:]}"
    return repr(text).replace("|", "\\|")
