"""Arguments of LocalistTrainer."""

from dataclasses import dataclass, field
from numbers import Integral

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..configuration import LocalityArguments
from ..configuration.locality_arguments import check_not_negative


# Numbers that transformers takes as they come, to fail or to go astray once training has begun.
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "num_train_epochs")
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


@dataclass
class LocalistTrainingArguments(LocalityArguments, TrainingArguments):
    r"""
    Every argument of [`~transformers.TrainingArguments`], those of the locality loss ([`LocalityArguments`]), and:

    Args:
        greater_is_better (`bool`, *optional*):
            Whether the model with the greatest `metric_for_best_model` is the best. By default `False` for a loss, the
            perplexity and the entropies, and `True` for fidelities and other metrics.
        hub_strategy (`str` or [`~transformers.trainer_utils.HubStrategy`], *optional*, defaults to `"end"`):
            The only one allowed with `push_to_hub`: the others upload checkpoints.

    Raises:
        ValueError: for a value outside its range, with the name, the value and what is allowed.
    """

    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "When to push to the Hub: only 'end', when the model is saved at the end."}
    )

    def __post_init__(self):
        check_not_negative(self, _NOT_NEGATIVE)
        if self.max_grad_norm is not None:  # no clipping, as with 0
            check_not_negative(self, ["max_grad_norm"])
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= 1):
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy` is {self.hub_strategy.value!r}; it must be 'end', because the others upload "
                "checkpoints, with pickles that hold paths of this machine and the optimizer's state."
            )
