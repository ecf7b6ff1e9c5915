"""Measuring trained models and showing what was measured."""

from .locality_probe import LocalityProfile, locality_probe
from .measure import measure
from .report import comparison_table, layer_table, plot_attention_map, plot_fidelity_over_depth, spread


__all__ = [
    "LocalityProfile",
    "comparison_table",
    "layer_table",
    "locality_probe",
    "measure",
    "plot_attention_map",
    "plot_fidelity_over_depth",
    "spread",
]
