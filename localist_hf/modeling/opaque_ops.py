# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""What `torch.compile` does not follow: functions that it calls as they are, and warnings."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch


# This folder may be loaded several times, once for each model from the Hub: each copy has its own operators.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


def warn_once(logger: Any, message: str) -> None:
    """
    Warns, but not in a graph: there a warning would be a break, after which torch's compiler can fail on a second dial.

    Args:
        logger (`logging.Logger`):
            One of transformers' loggers.
        message (`str`):
            What is said, once.
    """
    if not torch.compiler.is_compiling():
        logger.warning_once(message)


def opaque_without_gradient(schema: str, fake: Callable) -> Callable:
    """
    Decorator of a function of tensors and numbers whose shapes depend on the length of the text in ways that no single
    graph can follow: traced, it would be compiled anew at every step of a generation. Where no gradient is asked for, a
    compiled graph calls it as one operator, whatever the length; everywhere else it is the function itself.

    Args:
        schema (`str`):
            Arguments and results in the form of [`torch.library.custom_op`].
        fake (`Callable`):
            Takes the same arguments and returns empty contiguous tensors of the shapes and dtypes of the results.
    """

    def decorate(function: Callable) -> Callable:
        def fresh(*args):
            """An operator's results share no memory, and lie in it as `fake` says."""
            results = function(*args)
            if isinstance(results, torch.Tensor):
                return results.clone(memory_format=torch.contiguous_format)
            return tuple(result.clone(memory_format=torch.contiguous_format) for result in results)

        operator = torch.library.custom_op(
            f"{_NAMESPACE}::{function.__name__.strip('_')}", fresh, mutates_args=(), schema=schema
        )
        operator.register_fake(fake)

        @functools.wraps(function)
        def choose(*args, **kwargs):
            # What is exported must do without this package.
            is_compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            return (operator if is_compiling and not torch.is_grad_enabled() else function)(*args, **kwargs)

        return choose

    return decorate
