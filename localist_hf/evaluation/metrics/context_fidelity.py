"""Context fidelity: of the attention that goes to other words, the part that stays in the block."""

import datasets
import evaluate

from localist_hf.evaluation.metrics import CITATION
from localist_hf.evaluation.share_sums import means_of_lists


_DESCRIPTION = """
Of the attention that queries pay to other words, the part that they pay inside their local set (their block of the
text, with the blocks before it that count):

context fidelity = sum(block) / sum(block + outside)

In [0, 1], higher is more local. It is a ratio of sums: a query that looks at other words ten times as much weighs ten
times as much. Attention moved from other words, in proportion, to a query's own token or to an attention sink changes
nothing, which is why the share that goes to other words at all stands beside it. Of queries that rules or pointers tell
where to look, whose block shares are those on their targets, it is the pointer fidelity.
"""

_KWARGS_DESCRIPTION = """
Args:
    block_shares (list of float): for each counted position, and head, the share of the attention on the other words of
        its local set, in [0, 1]. Positions that see no more than their local set are left out: all is local to them.
    outside_shares (list of float): the share on words outside of it, in [0, 1].
Returns:
    context_fidelity (float): in [0, 1]; nan where no attention goes to other words.
    context_share (float): mean of block + outside, in [0, 1].
Examples:
    >>> metric = load_metric("context_fidelity")
    >>> metric.compute(block_shares=[0.3, 0.1], outside_shares=[0.1, 0.3])
    {'context_fidelity': 0.5, 'context_share': 0.4}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ContextFidelity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Value("float64") for name in ("block_shares", "outside_shares")}
            ),
            reference_urls=["https://arxiv.org/abs/2511.18375"],
        )

    def _compute(self, block_shares: list[float], outside_shares: list[float]) -> dict[str, float]:
        means = means_of_lists({"block_share": block_shares, "outside_share": outside_shares})
        return {name: means[name] for name in ("context_fidelity", "context_share")}
