"""Cost at dial 1: what the dial costs in perplexity."""

import math

import datasets
import evaluate

from localist_hf.evaluation.locality_meter import perplexity


_DESCRIPTION = """
What the dial costs, as a ratio of perplexities:

cost = perplexity at dial 1 / perplexity at dial 0 = exp(mean(losses at dial 1) - mean(losses at dial 0))

1 where it costs nothing; above 1 what the model loses when its local layers attend to their local sets only.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): the loss (negative log-likelihood) of each label at dial 1, in nats.
    references (list of float): the loss of the same labels at dial 0, in nats.
Returns:
    cost_at_dial_1 (float): greater than 0.
    perplexity (float), dialled_perplexity (float): at dial 0 and at dial 1, at least 1.
Examples:
    >>> metric = load_metric("cost_at_dial_1")
    >>> metric.compute(predictions=[0.0, 0.0], references=[0.0, 0.0])
    {'cost_at_dial_1': 1.0, 'perplexity': 1.0, 'dialled_perplexity': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CostAtDial_1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("float64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        dialled, free = (perplexity(math.fsum(losses), len(losses)) for losses in (predictions, references))
        return {"cost_at_dial_1": dialled / free, "perplexity": free, "dialled_perplexity": dialled}
