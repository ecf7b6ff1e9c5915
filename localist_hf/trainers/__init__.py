"""Training with the scheduled locality loss."""

from .localist_trainer import LocalistTrainer
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss


__all__ = ["LocalistTrainer", "LocalistTrainingArguments", "locality_loss"]
