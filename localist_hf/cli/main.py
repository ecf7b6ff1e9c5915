"""Entry point of the command `localist-hf`."""

import argparse
import os
import sys
from importlib import import_module
from typing import NoReturn

from ..version import __version__
from .errors import CommandError, is_disk_full, one_line


_DESCRIPTION = """\
Fine-tune any causal language model so that its attention can be read: free in the early layers, held inside semantic
blocks of the text in the late ones (progressive localisation, arXiv:2511.18375).
"""

_EXAMPLES = """\
examples:
  localist-hf train --variant quintic --text-file book.txt --output-dir runs/quintic
  localist-hf train --variant linear --model ./my-gpt2 --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1
  localist-hf train --config quintic.yaml --learning_rate 5e-5
  localist-hf family quick --output-dir runs/family --jobs 2
  localist-hf evaluate HuggingFaceTB/SmolLM2-135M --text-file book.txt --sequence-length 16384
  localist-hf view runs/quintic --compare runs/distributed --text "Some text. And some more of it."
  localist-hf publish runs/family --namespace my-org --dry-run
  localist-hf export runs/quintic --to gpt2 my-gpt2

`localist-hf COMMAND --help` explains a command.
"""

_COMMANDS = {
    "train": "fine-tune one model under one locality configuration",
    "base": "train a small base on the text that Python ships",
    "family": "compare locality configurations: a grid of runs from one base",
    "evaluate": "measure and draw where the attention of any causal language model goes",
    "view": "read a model's attention on a page, with the dial",
    "publish": "publish runs as repositories on the Hub",
    "update": "give published repositories the code of this version",
    "export": "write a run as a plain GPT-2 folder",
}


def main(arguments: list[str] | None = None) -> None:
    """
    Runs the command with these arguments, by default those of the process.

    Raises:
        SystemExit: with status 2 for input that cannot be used, 1 for a failure and 130 after Ctrl-C; in one line on
            standard error stands why. What nobody expected keeps its traceback.
    """
    command = ""
    try:
        try:
            command, rest = _parse(sys.argv[1:] if arguments is None else arguments)
            # Imported here, because each takes seconds to import what it needs.
            import_module(f".{command}", __package__).main(rest)
        finally:
            sys.stdout.flush()  # here, and not at the interpreter's end, where nothing can be done about a broken pipe
    except CommandError as error:
        _end(command, f"error: {error}", error.status)
    except KeyboardInterrupt:
        _end(command, "interrupted", 130)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `localist-hf publish ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if not is_disk_full(error):
            raise
        _end(command, f"error: no space is left on the disk ({one_line(error)})", 1)


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, and its own arguments."""
    parser = argparse.ArgumentParser(
        prog="localist-hf",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"localist-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Each command reads its own arguments, so that --help of one does not import and list those of all.
    for name, text in _COMMANDS.items():
        commands.add_parser(name, add_help=False, help=text)
    return parser.parse_args(arguments[:1]).command, arguments[1:]


def _end(command: str, message: str, status: int) -> NoReturn:
    print(f"{f'localist-hf {command}'.strip()}: {message}", file=sys.stderr)
    raise SystemExit(status) from None


if __name__ == "__main__":
    main()
