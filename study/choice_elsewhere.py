"""
The grid choice_elsewhere.yaml, each sequence with the blocks that the base finds in the next one: does a model that is
asked to make up its mind choose *blocks*, or places?

    python study/choice_elsewhere.py runs/study/choice_elsewhere --jobs 2
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from localist_hf.experiments import load_grid
from localist_hf.experiments.grid_runs import GridWork, do_tasks
from localist_hf.experiments.preparation import prepare_grid


@torch.no_grad()
def moved(work: GridWork) -> GridWork:
    """The same work, its sequences for training on the blocks of the next one."""
    base = work.load(work.grid.locality).eval()
    last_layer, starts = base.config.num_hidden_layers - 1, []
    for batch in torch.tensor(work.train["input_ids"]).split(8):
        starts.append(base.transformer(batch, output_fidelity=[last_layer], use_cache=False).block_starts[0])
    rows = torch.cat(starts).roll(1, dims=0).tolist()
    return dataclasses.replace(work, train=work.train.add_column("block_starts", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    grid = load_grid("study/choice_elsewhere.yaml")
    work = moved(prepare_grid(grid, args.output_dir, None, None, None))
    do_tasks(work, work.tasks, args.jobs)


if __name__ == "__main__":
    main()
