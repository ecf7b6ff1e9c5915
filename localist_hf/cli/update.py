"""`localist-hf update`: the code of this version for repositories on the Hub."""

import argparse

from ..errors import INPUT_ERRORS
from ..hub import PublishError, update
from ..hub.reachability import check_answers
from .errors import CommandParser, as_command_error


def build_parser() -> argparse.ArgumentParser:
    """The parser of `localist-hf update`."""
    parser = CommandParser(
        prog="localist-hf update",
        description="Give repositories that another version published the code of this one, each in one commit, and "
        "change nothing else of them: on transformers 5.24 the code of 0.1 and 0.2 writes wrong text at a dial. "
        "Models of 0.1 with semantic blocks keep their code, mended, since this version would find other blocks. Only "
        "code of ours is replaced; with somebody else's among it a repository is refused. Log in with `hf auth login` "
        "or set HF_TOKEN.",
    )
    parser.add_argument(
        "repository", nargs="+", help="NAMESPACE/NAME of a model or an adapter, such as my-org/localist-gpt2-quintic"
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and say what would be changed")
    return parser


def main(arguments: list[str]) -> None:
    """Runs `localist-hf update` with these arguments."""
    args = build_parser().parse_args(arguments)
    with as_command_error(2, *INPUT_ERRORS), as_command_error(1, PublishError, TimeoutError):
        check_answers()
        update(args.repository, args.dry_run)
