"""Arguments of LocalistTrainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy


@dataclass
class LocalistTrainingArguments(TrainingArguments):
    r"""
    Every argument of [`~transformers.TrainingArguments`], and those of the locality loss. Which layers are how local
    is no matter of training: it stands in the model's configuration (`locality_schedule`).

    Args:
        target_fidelity (`float`, *optional*, defaults to 0.9):
            phi*, the share of its attention that each query of a localised layer should keep in its block, in (0, 1].
        locality_weight (`float`, *optional*, defaults to 5.0):
            gamma, the weight of the locality loss beside the language modeling loss. 0 turns it off.
        locality_exponent (`int`, *optional*, defaults to 1):
            Exponent of the shortfall below the target: 1 or 2.
        locality_warmup_steps (`float`, *optional*, defaults to 0):
            Optimizer steps over which the locality loss grows linearly to its full weight; below 1, as a share of all
            steps.
        hub_strategy (`str` or [`~transformers.trainer_utils.HubStrategy`], *optional*, defaults to `"end"`):
            The only one allowed with `push_to_hub`: the others upload checkpoints.

    Raises:
        ValueError: for a value outside its range, with the name, the value and what is allowed.
    """

    target_fidelity: float = field(
        default=0.9,
        metadata={"help": "Share of its attention that a localised query should keep in its block, in (0, 1]."},
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
        if not 0 < self.target_fidelity <= 1:
            raise ValueError(f"`target_fidelity` is {self.target_fidelity}; it must lie in (0, 1].")
        if self.locality_exponent not in (1, 2):
            raise ValueError(f"`locality_exponent` is {self.locality_exponent}; it must be 1 or 2.")
        for name in ("locality_weight", "locality_warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must not be negative.")
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy` is {self.hub_strategy.value!r}; it must be 'end', because the others upload "
                "checkpoints, with pickles that hold paths of this machine and the optimizer's state."
            )
