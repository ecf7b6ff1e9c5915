"""`localist-hf publish`: runs to repositories on the Hub."""

import argparse
from pathlib import Path

from huggingface_hub import constants

from ..hub import CARD_FILE, PublishError, prepare, publish
from .errors import INPUT_ERRORS, ending_with


def build_parser() -> argparse.ArgumentParser:
    """The parser of `localist-hf publish`."""
    parser = argparse.ArgumentParser(
        prog="localist-hf publish",
        description="Publish a run, or every run in a folder, as NAMESPACE/localist-gpt2-NAME, each in one commit: "
        "weights, configuration, code, tokenizer, card, picture and record. What only training needs (checkpoints, "
        "pickles, optimizer states, logs) stays behind. Run again, it changes nothing or adds one commit with what has "
        "changed. Log in with `hf auth login` or set HF_TOKEN.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of several, such as runs/family")
    parser.add_argument("--namespace", required=True, help="user or organisation on the Hub")
    parser.add_argument("--private", action="store_true", help="make new repositories (and the collection) private")
    parser.add_argument(
        "--collection", metavar="TITLE", help="add all of them to this collection of the namespace, made if need be"
    )
    parser.add_argument(
        "--base-model", metavar="ID", help="Hub id of the base, where the run started from a folder of this machine"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="upload nothing: show every file with its size, and the card"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Runs `localist-hf publish` with these arguments."""
    args = build_parser().parse_args(arguments)
    with ending_with(2, *INPUT_ERRORS), ending_with(1, PublishError):
        if args.dry_run:
            show(prepare(args.run, args.namespace, args.base_model))
        else:
            publish(args.run, args.namespace, args.private, args.collection, args.base_model)


def show(repositories: dict[str, dict[str, Path | bytes]]) -> None:
    """Prints what would be published."""
    for repo_id, files in repositories.items():
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in files.items()
        }
        print(f"{constants.ENDPOINT}/{repo_id}\n")
        for name, size in sorted(sizes.items()):
            print(f"  {size:>12,}  {name}")
        print(f"  {sum(sizes.values()):>12,}  bytes in {len(sizes)} files\n")
        print("\n".join(f"  | {line}".rstrip() for line in files[CARD_FILE].decode().splitlines()))
        print()
    print(f"Dry run: nothing was uploaded; it would go to {len(repositories)} repositories.")
