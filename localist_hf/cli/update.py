"""`localist-hf update`: the code of this version for repositories on the Hub."""

from ..command_line import update_parser
from ..errors import INPUT_ERRORS, InputError, RunError, reraised_as
from ..hub import PublishError, update
from ..hub.reachability import check_answers


def main(arguments: list[str]) -> None:
    """Runs `localist-hf update` with these arguments."""
    args = update_parser().parse_args(arguments)
    with reraised_as(InputError, *INPUT_ERRORS), reraised_as(RunError, PublishError, TimeoutError):
        check_answers()
        update(args.repository, args.dry_run)
