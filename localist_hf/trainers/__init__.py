"""Training with the scheduled locality loss."""

from ..configuration import LocalityArguments
from .localist_trainer import LocalistTrainer
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss
from .locality_loss_mixin import LocalityLossMixin
from .record_of_trainer import record_of_trainer
from .run_history import RunHistory


__all__ = [
    "LocalistTrainer", "LocalistTrainingArguments", "LocalityArguments", "LocalityLossMixin", "RunHistory",
    "locality_loss", "record_of_trainer",
]  # fmt: skip
