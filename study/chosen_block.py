"""
Which block do heads choose? Of each run of choice_seeds.yaml, as lines of JSON: how much of the attention to other
words of the last layer belongs to queries whose top block is their own, the one before, and so on, on the base's
blocks. The control for recency: is the block that attention makes up its mind for just the nearest?

    localist-hf family study/choice_seeds.yaml --output-dir runs/study/choice_seeds
    python study/chosen_block.py runs/study/choice_seeds study/figures/chosen.jsonl
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from localist_hf.experiments.data import some_of, tokenize_and_pack
from localist_hf.experiments.preparation import load_texts
from localist_hf.hub import RunRecord
from localist_hf.hub.loading import load


LENGTH, TEXTS, BATCH = 256, 48, 8
#: Own block, the one before, and the one before that; all others are *further*.
DISTANCES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    base, tokenizer = load(str(args.folder / "base"), {})
    texts, _ = load_texts(None, None)
    held_out = tokenize_and_pack(Dataset.from_dict({"text": texts["held-out"]}), tokenizer, LENGTH)
    batches = torch.tensor(some_of(held_out, TEXTS)["input_ids"]).split(BATCH)
    lines = []
    for path in sorted(args.folder.glob("*/run.json")):
        record = RunRecord.load(path.parent)
        if record.name != "base":
            shares = distances(load(str(path.parent), {})[0].float().eval(), base.float().eval(), batches)
            lines.append({"name": record.name, "seed": record.seed, "distances": [round(each, 5) for each in shares]})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


@torch.no_grad()
def distances(model: PreTrainedModel, base: PreTrainedModel, batches: tuple[torch.Tensor, ...]) -> list[float]:
    """Of each distance in blocks, the part of the attention to other words whose query's top block it is."""
    last = model.config.num_hidden_layers - 1
    sums = torch.zeros(DISTANCES + 1, dtype=torch.float64)
    for ids in batches:
        starts = base.transformer(ids, output_fidelity=[last], use_cache=False).block_starts[0]
        outputs = model.transformer(
            ids, block_starts=starts, output_fidelity=[last], output_block_shares=True, use_cache=False
        )
        shares = outputs.block_shares[0].double()
        number = (starts == torch.arange(starts.shape[1])).cumsum(1) - 1
        distance = (number[:, None] - shares.argmax(-1)).clamp(max=DISTANCES)
        others = shares.sum(-1) * outputs.fidelity_mask[0][:, None]
        sums.scatter_add_(0, distance.flatten(), others.flatten())
    return (sums / sums.sum()).tolist()


if __name__ == "__main__":
    main()
