"""Measuring trained models and showing what was measured."""

from .measure import measure
from .report import comparison_table, layer_table, plot_attention_map, plot_fidelity_over_depth


__all__ = ["comparison_table", "layer_table", "measure", "plot_attention_map", "plot_fidelity_over_depth"]
