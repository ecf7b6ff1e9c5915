"""The named locality configurations."""

from .variants import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config, variant_name


__all__ = ["BASELINE_VARIANT", "PAPER_VARIANTS", "VARIANTS", "variant_config", "variant_name"]
