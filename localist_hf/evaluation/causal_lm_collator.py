"""Batches for causal language modeling."""

from typing import Any

import torch
from transformers import default_data_collator


def causal_lm_collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks sequences of one length; where there are no labels, they are the tokens."""
    batch = default_data_collator(features)
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
    return batch
