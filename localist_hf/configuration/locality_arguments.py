"""Arguments of localist training, for the arguments of any trainer."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any


#: What the locality loss may ask for.
LOCALITY_OBJECTIVES = ("context", "fidelity", "contrast", "choice")
# Metrics of an evaluation of which less is better, also of one of several data sets; of losses transformers knows it.
_LOWER_IS_BETTER = re.compile(
    r"(.*_)?(perplexity|(entropy|blocks_looked_at)(_layer_\d+)?|(loss|perplexity)_at_dial_[\d.]+)"
)


@dataclass
class LocalityArguments:
    r"""
    The arguments of localist training, to stand before those of a trainer. Which layers are how local is no matter of
    training: it stands in the model's configuration (`locality_schedule`). [`RECIPES`] has the arguments that are
    recommended.

    Args:
        training_dials (`list[float]`, *optional*):
            The places of the dial at which the model trains, in place of the one that is set. `[1]`: held, nothing
            outside the local sets being in sight, as far as the schedule goes. `[0, 1]`: one set of weights for both
            ends; rows are dealt over them by their index in the global batch, whatever batches and processes it is cut
            into. A guarantee that is set (`min_fidelity`) holds at all of them. An evaluation measures at the dial that
            is set, and the loss and the perplexity at these too.
        distillation_weight (`float`, *optional*, defaults to 0.0):
            alpha in [0, 1]: the model's own free predictions teach it, `(1 - alpha) * loss + alpha * KL(p_teacher ||
            p)`, the KL being of the positions whose labels count. See [`~localist_hf.trainers.Teacher`].
        max_loss_increase (`float`, *optional*):
            epsilon in nats: the locality loss is trained within a budget in place of a weight. Its weight grows while
            the KL from the teacher is below, and shrinks while it is above; `locality_weight` is of no account.
        locality_objective (`str`, *optional*, defaults to `"context"`):
            What the loss asks of a localised layer. `"context"`: of the attention that a query pays to other words, a
            share in its block (psi), which cannot be had by looking at itself or at a sink. `"contrast"`: the same, and
            that psi be less by 0.5 where the blocks are moved along the text, which cannot be had by looking near
            either; it takes a second pass of the attention of the localised layers. `"fidelity"`: of all its attention,
            a share on its own token, its block and the sinks (phi), as we read arXiv:2511.18375. `"choice"`:
            that its attention to other words, as much as that is, make up its mind, and go to no more than
            `target_blocks` blocks of the text, wherever they are; our reading of the group sparsity of
            arXiv:2510.09338.
        target_fidelity (`float`, *optional*, defaults to 0.9):
            The share that is asked for, in (0, 1]; of no account under `"choice"`.
        target_blocks (`float`, *optional*, defaults to 2.0):
            N*, the number of blocks that `"choice"` asks for, at least 1.
        locality_weight (`float`, *optional*, defaults to 5.0):
            gamma, the weight of the locality loss beside the trainer's own loss. 0 turns it off.
        locality_exponent (`int`, *optional*, defaults to 1):
            Exponent of the shortfall below the target: 1 or 2.
        locality_warmup_steps (`float`, *optional*, defaults to 0):
            Optimizer steps over which the locality loss grows linearly to its full weight; below 1, as a share of all
            steps.

    Where `greater_is_better` is not given, it is `False` also for the perplexity, the entropies and the blocks
    looked at as `metric_for_best_model`.

    Raises:
        ValueError: for a value outside its range, with the name, the value and what is allowed.

    Example:

    ```python
    >>> @dataclass
    ... class MyConfig(LocalityArguments, SFTConfig):
    ...     pass
    >>> args = MyConfig(output_dir="runs/sft", packing=True, target_fidelity=0.9)
    ```
    """

    training_dials: list[float] | None = field(
        default=None, metadata={"help": "Places of the dial to train at, over which rows are dealt: 1, or 0 1."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Share of the loss that is KL from the model's own free predictions before training."},
    )
    max_loss_increase: float | None = field(
        default=None,
        metadata={"help": "Nats of KL from those predictions that locality may cost, in place of --locality-weight."},
    )
    locality_objective: str = field(
        default="context",
        metadata={
            "help": "The loss asks for a share in the block 'context': of attention to other words; 'contrast': and "
            "less in moved blocks; 'fidelity': of all attention; or for 'choice': few blocks, whichever they are."
        },
    )
    target_fidelity: float = field(
        default=0.9, metadata={"help": "The share that the locality loss asks for, in (0, 1]."}
    )
    target_blocks: float = field(
        default=2.0, metadata={"help": "Blocks that the objective 'choice' asks a query to look at, at least 1."}
    )
    locality_weight: float = field(
        default=5.0, metadata={"help": "Weight of the locality loss beside the language modeling loss."}
    )
    locality_exponent: int = field(default=1, metadata={"help": "Exponent of the shortfall: 1 or 2."})
    locality_warmup_steps: float = field(
        default=0, metadata={"help": "Steps over which the locality loss grows to its weight; below 1, a share of all."}
    )

    def __post_init__(self):
        if self.locality_objective not in LOCALITY_OBJECTIVES:
            allowed = f"{', '.join(map(repr, LOCALITY_OBJECTIVES[:-1]))} or {LOCALITY_OBJECTIVES[-1]!r}"
            raise ValueError(f"`locality_objective` is {self.locality_objective!r}; it must be {allowed}.")
        if not (_is_finite(self.target_fidelity) and 0 < self.target_fidelity <= 1):
            raise ValueError(f"`target_fidelity` is {self.target_fidelity!r}; it must lie in (0, 1].")
        blocks = self.target_blocks
        if not (_is_finite(blocks) and blocks >= 1):
            raise ValueError(f"`target_blocks` is {blocks!r}; it must be a finite number of at least 1.")
        if isinstance(self.locality_exponent, bool) or self.locality_exponent not in (1, 2):
            raise ValueError(f"`locality_exponent` is {self.locality_exponent!r}; it must be 1 or 2.")
        check_not_negative(self, ("locality_weight", "locality_warmup_steps"))
        self._check_dials()
        alpha, budget = self.distillation_weight, self.max_loss_increase
        if not (_is_finite(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"`distillation_weight` is {alpha!r}; it must lie in [0, 1].")
        if budget is not None and not (_is_finite(budget) and budget > 0):
            raise ValueError(f"`max_loss_increase` is {budget!r}; it must be a finite number above 0, or None.")
        if budget is not None and self.locality_weight == 0:
            raise ValueError(
                f"`max_loss_increase` is {budget!r} and `locality_weight` 0, which turns the locality loss off that it "
                "is a budget for; leave one of them out."
            )
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and _LOWER_IS_BETTER.fullmatch(metric):
            self.greater_is_better = False
        super().__post_init__()

    def _check_dials(self) -> None:
        dials = self.training_dials
        if dials is None:
            return
        is_list = isinstance(dials, Sequence) and not isinstance(dials, str) and dials
        if not is_list or not all(_is_finite(dial) and 0 <= dial <= 1 for dial in dials):
            raise ValueError(f"`training_dials` is {dials!r}; it must be a list of numbers in [0, 1], or None.")
        if len(set(dials)) < len(dials):
            raise ValueError(f"`training_dials` is {dials!r}; no dial may be there twice.")
        self.training_dials = list(dials)  # as a checkpoint gives it back, of which a run's settings are compared


#: Arguments of training that are recommended, by name: `LocalistTrainingArguments(output_dir, **RECIPES["hold"])`.
#: `"hold"`: for attention that is read at dial 1; `"both"`: for one model at either end of the dial.
RECIPES: dict[str, dict[str, Any]] = {
    "hold": {"training_dials": [1], "distillation_weight": 0.9, "locality_weight": 0},
    "both": {"training_dials": [0, 1], "distillation_weight": 0.9, "locality_weight": 0},
}

#: These arguments and what trainers set where nothing else is said.
LOCALITY_ARGUMENTS: dict[str, Any] = {each.name: each.default for each in fields(LocalityArguments)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_not_negative(arguments: Any, names: Sequence[str]) -> None:
    """A `ValueError` for the first of these arguments that is negative or no finite number."""
    for name in names:
        value = getattr(arguments, name)
        if not (_is_finite(value) and value >= 0):
            raise ValueError(f"`{name}` is {value!r}; it must be a finite number and not negative.")
