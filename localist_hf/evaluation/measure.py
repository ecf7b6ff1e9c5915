"""Perplexity, fidelity and entropy of a model over a data set."""

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .causal_lm_collator import causal_lm_collator
from .locality_meter import LocalityMeter
from .locality_probe import last_block_starts


@torch.no_grad()
def measure(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 8, block_model: PreTrainedModel | None = None
) -> dict[str, float]:
    """
    Perplexity, fidelity and entropy of every layer over a data set.

    Each model finds its own blocks, so fidelities of several models are comparable only on the same ones: pass their
    common base as `block_model`.

    Args:
        model ([`LocalistGPT2LMHeadModel`]):
            The model to measure; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            Sequences of one length in `"input_ids"`, optionally with `"labels"`.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.
        block_model ([`LocalistGPT2LMHeadModel`], *optional*):
            The model whose blocks count, those of its last layer. By default `model` finds its own.

    Returns:
        `dict[str, float]`: see [`LocalityMeter.compute`].
    """
    meter = LocalityMeter()
    model.eval()
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=causal_lm_collator):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if block_model is not None:
            decoder = block_model.eval().get_decoder()
            batch["block_starts"] = last_block_starts(decoder, {"input_ids": batch["input_ids"]})
        outputs = model(**batch, output_fidelity=True, output_entropy=True, use_cache=False)
        meter.update(outputs, batch["labels"])
    return meter.compute()
