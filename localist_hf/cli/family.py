"""`localist-hf family`: one base, fine-tuned under the configurations of a grid, and the comparison."""

import shlex
import shutil
import sys
from pathlib import Path

from ..command_line import family_parser
from ..errors import INPUT_ERRORS, InputError, reraised_as
from ..experiments import load_grid
from ..experiments.base import BASE_NAME
from ..experiments.comparison import Comparison
from ..experiments.folders import CARD_FILES, GRID_FILES, check_own, claim, lock_folder
from ..experiments.grid_runs import GridWork, do_tasks
from ..experiments.preparation import prepare_grid
from ..experiments.training_checks import MOST_PROCESSES
from ..hub import check_card
from ..hub.formats import how_to_load


PROMPT = "def __init__(self"


def main(arguments: list[str]) -> None:
    """Runs `localist-hf family` with these arguments."""
    args = family_parser().parse_args(arguments)
    if not 1 <= args.jobs <= MOST_PROCESSES:
        raise InputError(f"`jobs` is {args.jobs}; it must be in 1 to {MOST_PROCESSES}.")
    with reraised_as(InputError, *INPUT_ERRORS):
        grid = load_grid(args.grid)
        check_own(args.output_dir, "grid", GRID_FILES)
        work = prepare_grid(grid, args.output_dir, args.model, args.train_text, args.held_out_text)
        tasks = work.tasks
        for task in tasks:
            work.check(task)
        if args.model_cards is not None:
            for folder in {BASE_NAME, *(task.run.folder_name for task in tasks)}:
                check_own(args.model_cards / folder, "card", CARD_FILES)
                check_card(args.model_cards / folder)
    if args.shard is not None:
        index, number = args.shard
        tasks = tasks[index - 1 :: number]
    do_tasks(work, tasks, args.jobs)
    if missing := [task for task in work.tasks if not work.is_done(task)]:
        print(f"{len(missing)} of {len(work.tasks)} are not in {args.output_dir} yet: no comparison.")
        return
    # One process compares; another one's work is not in its way.
    with lock_folder(args.output_dir):
        claim(args.output_dir, "grid", GRID_FILES)
        comparison = report(work, args.model is None, args.model_cards)
    print(f"\n{how_to_load(comparison.records[comparison.shown][0])}")
    print(f"\nAll of it: {args.output_dir}\n\n{what_next(comparison)}")


def report(work: GridWork, has_own_base: bool, model_cards: Path | None) -> Comparison:
    """Writes the tables, the pictures and the cards, and prints the tables and a generated sentence."""
    comparison = Comparison(work)
    print(f"\n{comparison.write_tables()}")
    print(f"Pictures: {', '.join(map(str, comparison.draw()))}")
    for card in comparison.write_cards(has_own_base, model_cards):
        print(f"Model card: {card}")
    print(f"\n{comparison.write_on(PROMPT)}")
    return comparison


def what_next(comparison: Comparison) -> str:
    """The commands to go on with, as this one was called."""
    command = "localist-hf" if shutil.which("localist-hf") else shlex.quote(sys.argv[0])
    pair = " beside ".join(dict.fromkeys((comparison.shown, comparison.baseline)))
    text = "--train-text book.txt --held-out-text other.txt"  # names for the reader's own
    return (
        f"What next:\n"
        f"  read {pair} in a browser, and turn the dial:\n"
        f"    {command} view {shlex.quote(str(comparison.work.folder))}\n"
        f"  measure any model as it is:\n"
        f"    {command} evaluate HuggingFaceTB/SmolLM2-135M --text-file book.txt\n"
        f"  the same comparison of your own model, on your own text:\n"
        f"    {command} family quick --model openai-community/gpt2 {text} --output-dir runs/own\n"
        f"  guides and the meaning of each number: README.md and docs/ of the repository, or `make docs`"
    )
