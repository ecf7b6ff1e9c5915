"""Measuring models and showing what was measured."""

from .agreement import Agreement, measure_agreement
from .block_lift import block_lift
from .causal_lm_collator import causal_lm_collator
from .controls import measure_controls
from .faithfulness import Faithfulness, measure_faithfulness
from .generation import measure_generation
from .influence import Influence, measure_influence
from .locality_meter import LocalityMeter
from .locality_report import LocalityProfile, LocalityReport
from .measure import locality_probe, measure
from .metrics import load_metric
from .pictures import plot_heads, plot_shares_over_depth
from .pointer_bounds import PointerBounds, pointer_bounds
from .recruited_layers import RecruitedLayers, recruit_layers
from .separators import Separators, recruit_separators
from .tables import layer_table, report_table
from .text_prefix import text_prefix


__all__ = [
    "Agreement",
    "Faithfulness",
    "Influence",
    "LocalityMeter",
    "LocalityProfile",
    "LocalityReport",
    "PointerBounds",
    "RecruitedLayers",
    "Separators",
    "block_lift",
    "causal_lm_collator",
    "layer_table",
    "load_metric",
    "locality_probe",
    "measure",
    "measure_agreement",
    "measure_controls",
    "measure_faithfulness",
    "measure_generation",
    "measure_influence",
    "plot_heads",
    "plot_shares_over_depth",
    "pointer_bounds",
    "recruit_layers",
    "recruit_separators",
    "report_table",
    "text_prefix",
]
