"""Entry point of the command `localist-hf`."""

import argparse
import sys

from ..version import __version__


_DESCRIPTION = """\
Fine-tune GPT-2 so that its attention can be read: free in the early layers, held inside semantic blocks of the text in
the late ones (progressive localisation, arXiv:2511.18375).
"""

_EXAMPLES = """\
examples:
  localist-hf train --variant quintic --text-file book.txt --output-dir runs/quintic
  localist-hf train --variant linear --model ./my-gpt2 --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1
  localist-hf train --config quintic.yaml --learning_rate 5e-5
  localist-hf family --output-dir runs/demo

`localist-hf COMMAND --help` explains a command.
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with these arguments, by default those of the process."""
    parser = argparse.ArgumentParser(
        prog="localist-hf",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"localist-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Each command reads its own arguments, so that --help of one does not import and list those of all.
    commands.add_parser("train", add_help=False, help="fine-tune one model under one locality configuration")
    commands.add_parser(
        "family", add_help=False, help="train a base and compare variants of it on text that Python ships"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    command = parser.parse_args(arguments[:1]).command
    if command == "train":
        from .train import main as run
    else:
        from .family import main as run
    run(arguments[1:])
