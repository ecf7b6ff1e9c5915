"""Measuring models and showing what was measured."""

from .block_lift import block_lift
from .causal_lm_collator import causal_lm_collator
from .locality_meter import LocalityMeter
from .locality_probe import LocalityProfile, locality_probe
from .measure import measure
from .report import comparison_table, layer_table, plot_attention_map, plot_fidelity_over_depth, spread


__all__ = [
    "LocalityMeter",
    "LocalityProfile",
    "block_lift",
    "causal_lm_collator",
    "comparison_table",
    "layer_table",
    "locality_probe",
    "measure",
    "plot_attention_map",
    "plot_fidelity_over_depth",
    "spread",
]
