"""Runs one command, which ends in one line where no traceback helps. The entry point is `localist_hf_main`."""

import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import NoReturn
from warnings import catch_warnings

from localist_hf_main import main

from ..command_line import shortened
from ..errors import InputError, RunError, is_bad_path, is_disk_full, is_out_of_memory, one_line


#: What may help where memory does not suffice.
_SMALLER = {
    "train": "a smaller `--per-device-train-batch-size` with more `--gradient-accumulation-steps`, a smaller "
    "`--per_device_eval_batch_size` or `--sequence-length`, `--gradient_checkpointing`, `--bf16` or `--lora-rank`",
    "family": "fewer `--jobs`, or in the grid a smaller `sequence_length`, `per_device_train_batch_size` or "
    "`per_device_eval_batch_size`",
    "evaluate": "a smaller `--sequence-length`, or shorter text",
    "recruit": "a smaller `--sequence-length`, or shorter text",
    "explain": "a shorter text or a smaller model",
    "view": "a shorter text or a smaller model",
}


def run(command: str, arguments: list[str]) -> None:
    """
    Runs a command with its own arguments.

    Raises:
        SystemExit: see [`localist_hf_main.main`].
    """
    try:
        try:
            # What libraries will do in a later version is of no use to those who type a command.
            with catch_warnings(action="ignore", category=FutureWarning):
                import_module(f".{command}", __package__).main(arguments)
        finally:
            sys.stdout.flush()
    except (InputError, RunError) as error:
        _end(command, f"error: {error}", 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _end(command, "interrupted", 130)
    except RecursionError:  # of JSON and YAML; nothing of ours goes deep
        _end(command, "error: a value or a file is nested too deeply, or holds itself", 2)
    except BrokenProcessPool:
        _end(command, f"error: a process was ended from outside; if memory ran out, try {_SMALLER['family']}", 1)
    except Exception as error:
        if is_disk_full(error):
            _end(command, f"error: no space is left on the disk ({one_line(error)})", 1)
        if is_out_of_memory(error):
            smaller = _SMALLER.get(command, "a machine with more memory")
            _end(command, f"error: memory ran out; try {smaller} ({one_line(error)})", 1)
        if is_bad_path(error):
            _end(command, f"error: {one_line(error)}", 2)
        raise


def _end(command: str, message: str, status: int) -> NoReturn:
    print(f"localist-hf {command}: {shortened(message)}", file=sys.stderr)
    raise SystemExit(status) from None


if __name__ == "__main__":
    main()
