"""Measuring models and showing what was measured."""

from ..modeling.fidelity import context_fidelity
from .block_lift import block_lift
from .causal_lm_collator import causal_lm_collator
from .control_results import BlockControls, ControlResults, DialFigures, DocumentSums, LocalityFigures
from .controls import measure_controls
from .differences import PerplexityDifference, perplexity_differences
from .generation import GenerationFigures, measure_generation
from .locality_meter import LocalityMeter, metric_names
from .locality_report import LocalityProfile, LocalityReport
from .measure import locality_probe, measure
from .metrics import load_metric
from .pictures import (
    plot_frontier,
    plot_heads,
    plot_over_depth,
    plot_over_dial,
    plot_shares_over_depth,
)
from .statistics import Interval, PairedDifference, holm, mean_interval, paired_difference, ratio_values
from .tables import (
    comparison_table,
    differences_table,
    heads_table,
    layer_table,
    markdown_table,
    report_table,
    with_interval,
)
from .text_prefix import text_prefix


__all__ = [
    "BlockControls",
    "ControlResults",
    "DialFigures",
    "DocumentSums",
    "GenerationFigures",
    "Interval",
    "LocalityFigures",
    "LocalityMeter",
    "LocalityProfile",
    "LocalityReport",
    "PairedDifference",
    "PerplexityDifference",
    "block_lift",
    "causal_lm_collator",
    "comparison_table",
    "context_fidelity",
    "differences_table",
    "heads_table",
    "holm",
    "layer_table",
    "load_metric",
    "locality_probe",
    "markdown_table",
    "mean_interval",
    "measure",
    "measure_controls",
    "measure_generation",
    "metric_names",
    "paired_difference",
    "perplexity_differences",
    "plot_frontier",
    "plot_heads",
    "plot_over_depth",
    "plot_over_dial",
    "plot_shares_over_depth",
    "ratio_values",
    "report_table",
    "text_prefix",
    "with_interval",
]
