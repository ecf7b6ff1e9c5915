"""Training with the scheduled locality loss."""

from ..configuration import LocalityArguments
from .localist_trainer import LocalistTrainer
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss
from .locality_loss_mixin import LocalityLossMixin


__all__ = [
    "LocalistTrainer", "LocalistTrainingArguments", "LocalityArguments", "LocalityLossMixin", "locality_loss",
]  # fmt: skip
