"""The named locality configurations, and grids of them."""

from .grid import Grid, GridRun, load_grid
from .variants import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config, variant_name


__all__ = [
    "BASELINE_VARIANT",
    "PAPER_VARIANTS",
    "VARIANTS",
    "Grid",
    "GridRun",
    "load_grid",
    "variant_config",
    "variant_name",
]
