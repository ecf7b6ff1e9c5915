"""The named locality configurations, and the arguments of localist training."""

from .locality_arguments import LOCALITY_ARGUMENTS, RECIPES, LocalityArguments
from .variants import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config, variant_name


__all__ = [
    "BASELINE_VARIANT",
    "LOCALITY_ARGUMENTS",
    "PAPER_VARIANTS",
    "RECIPES",
    "VARIANTS",
    "LocalityArguments",
    "variant_config",
    "variant_name",
]
