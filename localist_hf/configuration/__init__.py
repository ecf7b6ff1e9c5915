"""The named locality configurations, the arguments of the locality loss, and grids of both."""

from .grid import Grid, GridRun, load_grid
from .locality_arguments import LOCALITY_ARGUMENTS, LocalityArguments
from .variants import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config, variant_name


__all__ = [
    "BASELINE_VARIANT",
    "LOCALITY_ARGUMENTS",
    "PAPER_VARIANTS",
    "VARIANTS",
    "Grid",
    "GridRun",
    "LocalityArguments",
    "load_grid",
    "variant_config",
    "variant_name",
]
