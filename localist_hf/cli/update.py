"""`localist-hf update`: the code of this version for repositories on the Hub."""

from ..command_line import update_parser
from ..errors import INPUT_ERRORS
from ..hub import PublishError, update
from ..hub.reachability import check_answers
from .errors import as_command_error


def main(arguments: list[str]) -> None:
    """Runs `localist-hf update` with these arguments."""
    args = update_parser().parse_args(arguments)
    with as_command_error(2, *INPUT_ERRORS), as_command_error(1, PublishError, TimeoutError):
        check_answers()
        update(args.repository, args.dry_run)
