"""Measuring models and showing what was measured."""

from ..modeling.locality import context_fidelity
from .block_lift import block_lift
from .causal_lm_collator import causal_lm_collator
from .controls import BlockControls, ControlResults, DialFigures, DocumentSums, LocalityFigures, measure_controls
from .generation import GenerationFigures, measure_generation
from .locality_meter import LocalityMeter, metric_names
from .locality_probe import LocalityProfile, locality_probe
from .locality_report import LocalityReport, locality_report
from .measure import measure
from .metrics import load_metric
from .report import (
    comparison_table,
    heads_table,
    layer_table,
    markdown_table,
    plot_attention_map,
    plot_heads,
    plot_over_depth,
    plot_shares_over_depth,
    report_table,
    spread,
)


__all__ = [
    "BlockControls",
    "ControlResults",
    "DialFigures",
    "DocumentSums",
    "GenerationFigures",
    "LocalityFigures",
    "LocalityMeter",
    "LocalityProfile",
    "LocalityReport",
    "block_lift",
    "causal_lm_collator",
    "comparison_table",
    "context_fidelity",
    "heads_table",
    "layer_table",
    "load_metric",
    "locality_probe",
    "locality_report",
    "markdown_table",
    "measure",
    "measure_controls",
    "measure_generation",
    "metric_names",
    "plot_attention_map",
    "plot_heads",
    "plot_over_depth",
    "plot_shares_over_depth",
    "report_table",
    "spread",
]
