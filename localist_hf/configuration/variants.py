"""
The locality configurations by name: the seven of arXiv:2511.18375, the paper's losing baseline, fixed windows, the
control of its argument, the quintic schedule upside down, and the upper half.

A variant is what it sets of [`LocalityFields`]; everything else keeps its default there, so all seven share one way of
finding blocks and differ in their schedule alone.
"""

from typing import Any

from ..modeling import LocalityFields


#: The fields of [`LocalityFields`] that each named configuration sets.
VARIANTS: dict[str, dict[str, Any]] = {
    "distributed": {"locality_schedule": "distributed"},  # no layer is local: plain fine-tuning
    "linear": {"locality_schedule": "linear"},
    "quadratic": {"locality_schedule": "quadratic"},
    "cubic": {"locality_schedule": "cubic"},
    "quartic": {"locality_schedule": "quartic"},
    "quintic": {"locality_schedule": "quintic"},
    "localist": {"locality_schedule": "localist"},  # every layer is local
    # The layers of the upper half wholly local: where it matters most how blocks are found.
    "upper_half": {"locality_schedule": "upper_half"},
    # The quintic schedule on blocks that ignore the text, so that the partition is all that differs from `quintic`.
    "window": {"locality_schedule": "quintic", "block_partition": "window"},
    # Early layers local and late ones free: worse, if the paper is right about which layers to localise.
    "reverse_quintic": {"locality_schedule": "reverse_quintic"},
}

#: The seven configurations of the paper.
PAPER_VARIANTS = ("distributed", "linear", "quadratic", "cubic", "quartic", "quintic", "localist")
#: The variant that the others are compared with.
BASELINE_VARIANT = "distributed"


def variant_config(variant: str) -> dict[str, Any]:
    """
    The fields of [`LocalityFields`] that a variant sets.

    Args:
        variant (`str`):
            A name in `VARIANTS`.

    Raises:
        ValueError: for a name that is not there.

    Example:

    ```python
    >>> localize(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"), **variant_config("quintic"))
    >>> LocalistGPT2LMHeadModel.from_pretrained("openai-community/gpt2", **variant_config("quintic"))
    ```
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant` is {variant!r}; allowed are {', '.join(map(repr, VARIANTS))}.")
    return dict(VARIANTS[variant])


def variant_name(locality: LocalityFields) -> str | None:
    """
    The name of the variant that a configuration is of, whatever else it sets; `None` for a schedule without a name.

    Args:
        locality ([`LocalityFields`]):
            The `locality` of a localised model's configuration; that of LocalistGPT2 is the configuration itself.
    """
    matches = [
        name
        for name, fields in VARIANTS.items()
        if all(getattr(locality, field) == value for field, value in fields.items())
    ]
    # `window` sets what `quintic` sets, and the partition.
    return max(matches, key=lambda name: len(VARIANTS[name]), default=None)
