"""Training with the scheduled locality loss."""

from .localist_trainer import LocalistTrainer, causal_lm_collator
from .localist_training_arguments import LocalistTrainingArguments
from .locality_loss import locality_loss
from .locality_meter import LocalityMeter


__all__ = ["LocalistTrainer", "LocalistTrainingArguments", "LocalityMeter", "causal_lm_collator", "locality_loss"]
