"""The named locality configurations."""

from .variants import BASELINE_VARIANT, VARIANTS, variant_config


__all__ = ["BASELINE_VARIANT", "VARIANTS", "variant_config"]
