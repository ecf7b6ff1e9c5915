"""Training with the scheduled locality loss, at dials, under a teacher and within a budget."""

from ..configuration import LocalityArguments
from .distillation import Teacher
from .localist_trainer import LocalistTrainer
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss
from .locality_loss_mixin import LocalityLossMixin
from .record_of_trainer import record_of_trainer
from .run_history import RunHistory


__all__ = [
    "LocalistTrainer", "LocalistTrainingArguments", "LocalityArguments", "LocalityLossMixin", "RunHistory",
    "Teacher", "locality_loss", "record_of_trainer",
]  # fmt: skip
