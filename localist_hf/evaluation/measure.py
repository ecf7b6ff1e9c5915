"""Perplexity, context fidelity, attention shares and entropy of a model over a data set."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .causal_lm_collator import causal_lm_collator
from .check_model import check_model, core_model
from .locality_meter import LocalityMeter
from .locality_probe import last_block_starts
from .progress import progress
from .visible_keys import packed_documents


@torch.no_grad()
def measure(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 8, block_model: PreTrainedModel | None = None
) -> dict[str, float]:
    """
    Perplexity, and fidelity, attention shares and entropy of every layer, over a data set.

    Each model finds its own blocks, so fidelities of several models are comparable only on the same ones: pass their
    common base as `block_model`.

    Args:
        model ([`LocalistGPT2LMHeadModel`]):
            The model to measure; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            What [`causal_lm_collator`] takes: sequences in `"input_ids"`, of any lengths, optionally with `"labels"`,
            `"attention_mask"`, `"position_ids"` and `"block_starts"`. Each begins as the tokenizer begins a text, or
            another kind of text is measured: see [`text_prefix`].
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.
        block_model ([`LocalistGPT2LMHeadModel`] or [`LocalistGPT2Model`], *optional*):
            The model whose blocks count, those of its last layer; it is set to evaluation mode. By default `model`
            finds its own.

    Returns:
        `dict[str, float]`: see [`LocalityMeter.compute`].

    Raises:
        ValueError: for a model of another class, and for a data set without a sequence or with `"block_starts"` where a
            `block_model` is given.
    """
    check_model("model", model)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    meter = LocalityMeter(model.config)
    for inputs, labels in evaluation_batches(model, dataset, batch_size, block_model):
        outputs = model(**inputs, output_fidelity=True, output_entropy=True, use_cache=False)
        meter.update(outputs, labels, documents=packed_documents(inputs))
    return meter.compute()


def evaluation_batches(
    model: PreTrainedModel, dataset: Dataset, batch_size: int, block_model: PreTrainedModel | None
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The model's inputs for each batch, on the blocks that are asked for, and the labels apart, on its device."""
    model.eval()
    block_decoder = None if block_model is None else core_model(block_model.eval()).base_model
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=causal_lm_collator)
    for batch in progress(loader, "Measuring"):
        labels = batch.pop("labels").to(model.device)  # the perplexity is not taken from the model's loss
        if block_decoder is not None:
            if "block_starts" in batch:
                raise ValueError("`dataset` holds `block_starts` and a `block_model` is given too; only one can tell.")
            batch["block_starts"] = last_block_starts(block_decoder, batch)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}, labels
