# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""How local each layer is: the schedule `lambda_l` over depth."""

from collections.abc import Sequence


#: Exponent p of each polynomial schedule, `lambda_l = (l / (L - 1)) ** p`.
POLYNOMIAL_DEGREES = {"linear": 1, "quadratic": 2, "cubic": 3, "quartic": 4, "quintic": 5}

#: Wholly local from layer `num_layers // 2` on, free below: this project's own, to compare ways of finding blocks by.
_UPPER_HALF = "upper_half"
#: A polynomial schedule from the last layer to the first, as `"reverse_quintic"`: early layers local, late ones free.
_REVERSE = "reverse_"

#: Every schedule that has a name. Any list of `num_layers` numbers in [0, 1] is a schedule too.
SCHEDULE_NAMES = (
    "distributed", *POLYNOMIAL_DEGREES, "localist", _UPPER_HALF, *(f"{_REVERSE}{name}" for name in POLYNOMIAL_DEGREES)
)  # fmt: skip


def schedule_lambdas(schedule: str | Sequence[float], num_layers: int) -> list[float]:
    """
    The locality `lambda_l` of every layer, from 0 (free) to 1 (fully localised).

    The polynomial schedules are `(l / (num_layers - 1)) ** p` with p from 1 (`"linear"`) to 5 (`"quintic"`), so that
    the first layer is free and the last fully localised; `"distributed"` is 0 and `"localist"` 1 in every layer
    (arXiv:2511.18375). A model of one layer has `lambda = 1` under every polynomial schedule. With `"reverse_"` before
    its name a polynomial schedule runs from the last layer to the first, which is the control of the paper's argument
    that late layers are the ones to localise. `"upper_half"` is 1 in the layers from `num_layers // 2` on and 0 below,
    where the blocks matter most (this project's own).

    Args:
        schedule (`str` or `Sequence[float]`):
            One of `SCHEDULE_NAMES`, or `num_layers` numbers in [0, 1].
        num_layers (`int`):
            Number of layers of the model.

    Returns:
        `list[float]`: `num_layers` numbers in [0, 1].

    Raises:
        ValueError: for an unknown name, a list of the wrong length, or a value outside [0, 1].

    Example:

    ```python
    >>> schedule_lambdas("quadratic", 3)
    [0.0, 0.25, 1.0]
    ```
    """
    if isinstance(schedule, str):
        if schedule == "distributed":
            return [0.0] * num_layers
        if schedule == _UPPER_HALF:
            return [float(layer >= num_layers // 2) for layer in range(num_layers)]
        degree = POLYNOMIAL_DEGREES.get(schedule.removeprefix(_REVERSE))
        if schedule == "localist" or (degree is not None and num_layers == 1):
            return [1.0] * num_layers
        if degree is not None:
            rising = [(layer / (num_layers - 1)) ** degree for layer in range(num_layers)]
            return rising[::-1] if schedule.startswith(_REVERSE) else rising
        raise ValueError(
            f"`locality_schedule` is {schedule!r}; allowed are {', '.join(map(repr, SCHEDULE_NAMES))} "
            f"or a list of {num_layers} numbers in [0, 1]."
        )
    lambdas = [float(value) for value in schedule]
    if len(lambdas) != num_layers:
        raise ValueError(
            f"`locality_schedule` is a list of {len(lambdas)} numbers; the model has {num_layers} layers and needs one "
            "number for each."
        )
    outside = [value for value in lambdas if not 0.0 <= value <= 1.0]
    if outside:
        raise ValueError(f"`locality_schedule` holds {outside[0]}; every number must lie in [0, 1].")
    return lambdas
