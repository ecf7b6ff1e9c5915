"""Divergence: how much the dial changes what a model predicts."""

import datasets
import evaluate
import torch

from localist_hf.evaluation.divergence import divergence_bits


_DESCRIPTION = """
How much the dial changes what a model predicts, as the mean Kullback-Leibler divergence of its predictions, in bits:

divergence = mean over positions of sum_v p_v log2(p_v / q_v)

with p the prediction at dial 0 and q that under the dial (at 1, as a rule). At least 0, and 0 where the dial changes
nothing: what the model attends to in its blocks is then all that its predictions depend on.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): for each position, the logits or log-probabilities under the dial.
    references (list of list of float): the same at dial 0.
Returns:
    divergence (float): in bits for each prediction, at least 0.
Examples:
    >>> metric = load_metric("divergence")
    >>> metric.compute(predictions=[[0.0, 0.0]], references=[[0.0, -100.0]])
    {'divergence': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Divergence(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        logits = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": logits, "references": logits}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        # One at a time: logits are large.
        rows = zip(references, predictions, strict=True)
        bits = [divergence_bits(torch.tensor(free), torch.tensor(dialled)).item() for free, dialled in rows]
        return {"divergence": sum(bits) / len(bits)}
