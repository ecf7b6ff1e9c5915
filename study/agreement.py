"""
Does attention say what a prediction rests on? Of each run of agreement.yaml, as lines of JSON: how attention, gradients
and nearness agree with influence, by erasure and by knock-out, and how faithful they are, at dial 0 and, of held
models, at dial 1 over the tokens in sight. What is there already is not measured again.

    localist-hf family study/agreement.yaml --output-dir runs/study/agreement
    python study/agreement.py runs/study/agreement study/figures/agreement.jsonl
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from localist_hf.evaluation import measure_agreement, measure_faithfulness
from localist_hf.experiments.data import some_of, tokenize_and_pack
from localist_hf.experiments.preparation import load_texts
from localist_hf.hub import RunRecord
from localist_hf.hub.loading import load


LENGTH, TEXTS, BATCH = 128, 6, 32
#: Faithfulness and gradients, which cost most, are measured of this seed alone.
FIRST_SEED = 0
#: What is kept beside the last layer.
GUESSES = (
    "all layers", "localised layers, by value length", "rollout", "gradient x input", "integrated gradients",
    "nearness", "random", "erasure",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    texts, _ = load_texts(None, None)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    done = {(each["name"], each["seed"]) for each in map(json.loads, lines)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.folder.glob("*/run.json")):
        record = RunRecord.load(path.parent)
        if record.controls is None or (record.name, record.seed) in done:
            continue
        model, tokenizer = load(str(path.parent), {})
        dataset = tokenize_and_pack(Dataset.from_dict({"text": texts["held-out"]}), tokenizer, LENGTH)
        held = record.training.get("training_dials") == [1]
        found = measured(model.float(), some_of(dataset, TEXTS), [0.0, 1.0] if held else [0.0], record.seed)
        lines.append(json.dumps({"name": record.name, "seed": record.seed, "found": found}, separators=(",", ":")))
        args.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(record.name, record.seed, flush=True)


def measured(model: Any, dataset: Dataset, dials: list[float], seed: int) -> list[dict[str, Any]]:
    """All figures of one model, each of every text."""
    found = []
    for dial in dials:
        settings = {"num_draws": 2, "locality_dial": dial, "batch_size": BATCH}
        with_gradients = seed == FIRST_SEED and dial == 0
        for method in ("erasure", "knock_out"):
            agreement = measure_agreement(
                model, dataset, in_sight=dial > 0, method=method, with_gradients=with_gradients, **settings
            )
            found.append({"dial": dial, "method": method, **_kept(model, vars(agreement))})
        if seed == FIRST_SEED:
            faithfulness = measure_faithfulness(model, dataset, 3, with_gradients=with_gradients, **settings)
            found.append({"dial": dial, "method": "taken away", **_kept(model, vars(faithfulness))})
    return found


def _kept(model: Any, figures: dict[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    last = f"layer {model.config.locality.num_hidden_layers - 1}"
    names = {last: "last layer"} | {name: name for name in GUESSES}
    return {
        figure: {
            shown: [None if math.isnan(value) else round(value, 4) for value in by_guess[name]]
            for name, shown in names.items()
            if name in by_guess
        }
        for figure, by_guess in figures.items()
        if isinstance(by_guess, dict)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
