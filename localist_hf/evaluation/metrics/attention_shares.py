"""Attention shares: where the attention goes."""

import datasets
import evaluate

from localist_hf.evaluation.metrics import CITATION
from localist_hf.evaluation.share_sums import means_of_lists
from localist_hf.modeling.measurements import SHARES


_DESCRIPTION = """
Where the attention of queries goes, as means of four shares that sum to 1:

self: to the query's own token; sink: to the first tokens of the text, where they count as attention sinks and lie
outside the query's block; block: to the other words of its local set; outside: to everything else.

fidelity = self + sink + block = 1 - outside

Each is in [0, 1]. A high fidelity alone says little: a query that looks at itself, or at a sink, is local for nothing.
"""

_KWARGS_DESCRIPTION = """
Args:
    self_shares, sink_shares, block_shares, outside_shares (lists of float): one number each for each counted position,
        and head. Padding, whose shares are 0, and positions that see no more than their local set are left out.
Returns:
    self_share, sink_share, block_share, outside_share (float): their means, in [0, 1].
    fidelity (float): 1 - outside_share.
Examples:
    >>> metric = load_metric("attention_shares")
    >>> metric.compute(
    ...     self_shares=[0.5, 0.25], sink_shares=[0.0, 0.0], block_shares=[0.25, 0.25], outside_shares=[0.25, 0.5]
    ... )
    {'self_share': 0.375, 'sink_share': 0.0, 'block_share': 0.25, 'outside_share': 0.375, 'fidelity': 0.625}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AttentionShares(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({f"{name}s": datasets.Value("float64") for name in SHARES}),
            reference_urls=["https://arxiv.org/abs/2511.18375", "https://arxiv.org/abs/2309.17453"],
        )

    def _compute(self, **shares: list[float]) -> dict[str, float]:
        for place, each in enumerate(zip(*shares.values(), strict=True)):
            if abs(sum(each) - 1) > 1e-3:
                raise ValueError(f"The shares at {place} sum to {sum(each):.4f}; they must sum to 1.")
        means = means_of_lists({name: shares[f"{name}s"] for name in SHARES})
        return {name: means[name] for name in (*SHARES, "fidelity")}
