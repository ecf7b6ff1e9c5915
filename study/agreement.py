"""
Does attention say what a prediction rests on? The runs of agreement.yaml, as Markdown: the agreement of attention with
influence at dial 0 and, of held models, at dial 1; means over texts of 128 tokens, with 95 % intervals.

    localist-hf family study/agreement.yaml --output-dir runs/study/agreement
    python study/agreement.py runs/study/agreement
"""

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import Dataset

from localist_hf.evaluation import measure_agreement
from localist_hf.evaluation.statistics import mean_interval
from localist_hf.evaluation.tables import markdown_table
from localist_hf.experiments.data import some_of, tokenize_and_pack
from localist_hf.experiments.preparation import load_texts
from localist_hf.hub import RunRecord
from localist_hf.hub.loading import load


LENGTH, SHOWN = 128, ("layer 5", "all layers", "localised layers, by value length", "rollout", "nearness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--output", type=Path, help="a file for all figures, as JSON")
    args = parser.parse_args()
    texts, _ = load_texts(None, None)
    rows = [["model", "dial", "guess", "Spearman", "beyond nearness", "top 1", "top 5"]]
    kept = []
    for path in sorted(args.folder.glob("*/run.json")):
        model, tokenizer = load(str(path.parent), {})
        held_out = tokenize_and_pack(Dataset.from_dict({"text": texts["held-out"]}), tokenizer, LENGTH)
        training = RunRecord.load(path.parent).training
        dials = [0.0, 1.0] if training.get("training_dials") == [1] else [0.0]
        for dial in dials:
            for in_sight in [False, True] if dial else [False]:
                found = measure_agreement(
                    model.float(), some_of(held_out, args.texts), locality_dial=dial, in_sight=in_sight, batch_size=32
                )
                shown = f"{dial:g}, in sight" if in_sight else f"{dial:g}"
                kept.append({"model": path.parent.name, "dial": dial, "in_sight": in_sight, **vars(found)})
                for guess in SHOWN:
                    if guess in found.spearman:
                        numbers = [_number(getattr(found, name).get(guess)) for name in
                                   ("spearman", "beyond_nearness", "top_1", "top_5")]  # fmt: skip
                        rows.append([path.parent.name, shown, guess, *numbers])
                        print(*rows[-1], sep="  ", flush=True)
    if args.output:
        args.output.write_text("".join(f"{json.dumps(each)}\n" for each in kept), encoding="utf-8")
    print(markdown_table(rows))


def _number(values: list[float] | None) -> str:
    values = [value for value in values or () if not math.isnan(value)]
    if not values:
        return "-"
    interval = mean_interval(values)
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
