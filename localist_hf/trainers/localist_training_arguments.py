"""Arguments of LocalistTrainer."""

import math
import re
from dataclasses import dataclass, field
from numbers import Integral, Real

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy


#: What the locality loss may ask for.
LOCALITY_OBJECTIVES = ("context", "fidelity")
# Numbers that transformers takes as they come, to fail or to go astray once training has begun.
_NOT_NEGATIVE = (
    "locality_weight", "locality_warmup_steps", "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm",
    "warmup_steps", "num_train_epochs",
)  # fmt: skip
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Metrics of an evaluation of which less is better, also of one of several data sets; of losses transformers knows it.
_LOWER_IS_BETTER = re.compile(r"(.*_)?(perplexity|entropy(_layer_\d+)?)")


@dataclass
class LocalistTrainingArguments(TrainingArguments):
    r"""
    Every argument of [`~transformers.TrainingArguments`], and those of the locality loss. Which layers are how local
    is no matter of training: it stands in the model's configuration (`locality_schedule`).

    Args:
        locality_objective (`str`, *optional*, defaults to `"context"`):
            What the loss asks of a localised layer. `"context"`: of the attention that a query pays to other words, a
            share in its block (psi), which cannot be had by looking at itself or at a sink. `"fidelity"`: of all its
            attention, a share on its own token, its block and the sinks (phi), as we read arXiv:2511.18375.
        target_fidelity (`float`, *optional*, defaults to 0.9):
            The share that is asked for, in (0, 1].
        locality_weight (`float`, *optional*, defaults to 5.0):
            gamma, the weight of the locality loss beside the language modeling loss. 0 turns it off.
        locality_exponent (`int`, *optional*, defaults to 1):
            Exponent of the shortfall below the target: 1 or 2.
        locality_warmup_steps (`float`, *optional*, defaults to 0):
            Optimizer steps over which the locality loss grows linearly to its full weight; below 1, as a share of all
            steps.
        greater_is_better (`bool`, *optional*):
            Whether the model with the greatest `metric_for_best_model` is the best. By default `False` for a loss, the
            perplexity and the entropies, and `True` for fidelities and other metrics.
        hub_strategy (`str` or [`~transformers.trainer_utils.HubStrategy`], *optional*, defaults to `"end"`):
            The only one allowed with `push_to_hub`: the others upload checkpoints.

    Raises:
        ValueError: for a value outside its range, with the name, the value and what is allowed.
    """

    locality_objective: str = field(
        default="context",
        metadata={
            "help": "The locality loss asks for a share in the block 'context': of the attention to other words; "
            "'fidelity': of all attention, the word itself and sinks included."
        },
    )
    target_fidelity: float = field(
        default=0.9, metadata={"help": "The share that the locality loss asks for, in (0, 1]."}
    )
    locality_weight: float = field(
        default=5.0, metadata={"help": "Weight of the locality loss beside the language modeling loss."}
    )
    locality_exponent: int = field(default=1, metadata={"help": "Exponent of the shortfall: 1 or 2."})
    locality_warmup_steps: float = field(
        default=0, metadata={"help": "Steps over which the locality loss grows to its weight; below 1, a share of all."}
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "When to push to the Hub: only 'end', when the model is saved at the end."}
    )

    def __post_init__(self):
        if self.locality_objective not in LOCALITY_OBJECTIVES:
            allowed = " or ".join(map(repr, LOCALITY_OBJECTIVES))
            raise ValueError(f"`locality_objective` is {self.locality_objective!r}; it must be {allowed}.")
        if not (isinstance(self.target_fidelity, Real) and 0 < self.target_fidelity <= 1):
            raise ValueError(f"`target_fidelity` is {self.target_fidelity!r}; it must lie in (0, 1].")
        if self.locality_exponent not in (1, 2):
            raise ValueError(f"`locality_exponent` is {self.locality_exponent!r}; it must be 1 or 2.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if name == "max_grad_norm" and value is None:
                continue  # no clipping, as with 0
            if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` is {value!r}; it must be a finite number and not negative.")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= 1):
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and _LOWER_IS_BETTER.fullmatch(metric):
            self.greater_is_better = False
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy` is {self.hub_strategy.value!r}; it must be 'end', because the others upload "
                "checkpoints, with pickles that hold paths of this machine and the optimizer's state."
            )
