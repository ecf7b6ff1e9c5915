"""
Entry point of the command `localist-hf`. It lies beside the package, which takes seconds to import: help needs nothing
of it, and Ctrl-C ends in one line meanwhile too.
"""

import atexit
import os
import signal
import sys
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn


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
  localist-hf recruit HuggingFaceTB/SmolLM2-135M --text-file book.txt --mean-length 20
  localist-hf explain runs/quintic --text "Some text. And some more of" --dial 1
  localist-hf view runs/quintic --compare runs/distributed --text "Some text. And some more of it."
  localist-hf publish runs/family --namespace my-org --dry-run
  localist-hf export runs/quintic my-gpt2

`localist-hf COMMAND --help` explains a command.
"""

#: The commands, each a module in `localist_hf.cli`.
COMMANDS = {
    "train": "fine-tune one model under one locality configuration",
    "family": "compare locality configurations: a grid of runs from one base",
    "evaluate": "measure and draw where the attention of any causal language model goes",
    "recruit": "find the tokens after which a model can best do without what was before",
    "explain": "say what one prediction rests on, by attention and by erasure",
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
    try:
        try:
            _main(arguments)
        finally:
            sys.stdout.flush()  # here, and not at the interpreter's end, where nothing can be done about a broken pipe
    except BrokenPipeError:  # whoever read the output has seen enough, as in `localist-hf publish ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _main(arguments: list[str] | None) -> None:
    is_process = arguments is None
    if is_process:
        end_when_interrupted()
        # When all is done; the interpreter would fall back on what ends it without a word.
        atexit.register(_listen, signal.SIG_IGN)
    command, rest = _parse(sys.argv[1:] if arguments is None else arguments)
    command_line = _module("command_line")
    if command == "train":
        command_line.check_train_flags(rest, command_line.CommandParser(prog="localist-hf train"))
    else:
        command_line.PARSERS[command]().parse_args(rest)  # for help and what is wrong; the command reads them once more
    line = f"localist-hf {command}: interrupted"
    if is_process:
        end_when_interrupted(line)
    # What is done in less than a second, perhaps to no avail, needs no progress bar.
    os.environ.setdefault("TQDM_DELAY", "1")
    try:
        run = import_module("localist_hf.cli.main").run
        import_module(f"localist_hf.cli.{command}")  # each takes seconds to import what it needs
    except Exception as error:  # of any type: libraries say in many ways that they cannot be read, or lack memory
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        line = f"the program could not be loaded: memory ran out, or the installation is broken ({reason[:400]})"
        print(f"localist-hf {command}: error: {line}", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        if is_process:
            _listen(signal.default_int_handler)  # what is at work has something to put in order
        run(command, rest)
    except KeyboardInterrupt:  # before it was at work, or after
        print(line, file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if is_process:  # the interpreter may take a while to end
            end_when_interrupted("")


def end_when_interrupted(line: str = "localist-hf: interrupted") -> None:
    """
    Has Ctrl-C end the process at once, where nothing is at work that would have to be put in order. An exception would
    come out of whatever is being imported, or be taken for a failure of it.

    Args:
        line (`str`, *optional*, defaults to `"localist-hf: interrupted"`):
            What is said then; nothing where all has been said.
    """

    def end(*_: Any) -> NoReturn:
        if line:
            os.write(2, f"{line}\n".encode())
        os._exit(130)

    _listen(end)


def _listen(handler: Any) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for what runs in a shell's background
        signal.signal(signal.SIGINT, handler)


@cache
def _module(name: str) -> Any:
    """A module of the package that imports nothing of it, without the package."""
    spec = spec_from_file_location(f"_localist_hf_{name}", Path(__file__).parent / "localist_hf" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, and its own arguments."""
    import argparse  # once Ctrl-C is listened to

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog}: error: {message}\n")

    parser = Parser(
        prog="localist-hf",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"localist-hf {_module('version').__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Each command reads its own arguments, so that --help of one does not import and list those of all.
    for name, text in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=text)
    return parser.parse_args(arguments[:1]).command, arguments[1:]


if __name__ == "__main__":
    main()
