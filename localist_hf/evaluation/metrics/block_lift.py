"""Block lift: how many times more often than chance blocks start where a reader would start them."""

import datasets
import evaluate
import torch
from torch.nn.utils.rnn import pad_sequence

from localist_hf.evaluation.block_lift import block_lift


_DESCRIPTION = """
How many times more often than chance a block starts at a boundary that a reader would mark, as a sentence or a topic:

lift = P(a block starts near i | i is a boundary) / P(a block starts near i)

where near is at most `tolerance` tokens away. 1 is chance, 0: no block starts at a boundary; the most that can be had
grows with the length of the blocks, so compare partitions of like mean length. The first token of a text starts a block
whatever the partition and does not count.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int): for each text, the position at which each token's block starts.
    references (list of list of bool): for each text, True on each token that a reader would begin a part with.
    tolerance (int, defaults to 1): tokens between a boundary and a start that still count as the same place.
Returns:
    block_lift (float): at least 0; nan where there is no boundary, or no block but the texts' first ones.
Examples:
    >>> metric = load_metric("block_lift")
    >>> metric.compute(
    ...     predictions=[[0, 0, 0, 0, 4, 4, 4, 4]],
    ...     references=[[False, False, False, False, True, False, False, False]],
    ...     tolerance=0,
    ... )
    {'block_lift': 7.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BlockLift(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("bool")),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[bool]], tolerance: int = 1
    ) -> dict[str, float]:
        for row, (starts, boundaries) in enumerate(zip(predictions, references, strict=True)):
            if len(starts) != len(boundaries):
                raise ValueError(
                    f"`predictions[{row}]` is of {len(starts)} tokens and `references[{row}]` of {len(boundaries)}; "
                    "both must be of the same."
                )
        starts = pad_sequence([torch.tensor(row) for row in predictions], batch_first=True, padding_value=-1)
        boundaries = pad_sequence([torch.tensor(row, dtype=torch.bool) for row in references], batch_first=True)
        return {"block_lift": block_lift(starts, boundaries, tolerance)}
