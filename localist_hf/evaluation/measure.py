"""Perplexity, context fidelity, attention shares and entropy of a model over a data set."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..modeling.block_partition import document_starts
from ..modeling.locality_request import check_attention_mask
from .block_controls import on_blocks
from .causal_lm_collator import causal_lm_collator
from .check_model import check_model, core_model
from .locality_meter import LocalityMeter
from .locality_report import LocalityProfile, LocalityReport
from .progress import progress, progress_of_passes
from .share_sums import add_rows, share_sums
from .texts import Texts


def everything(inputs: Mapping[str, Any]) -> dict[str, bool]:
    """What is asked of a model that is measured on these inputs: where they have pointers, nothing of all blocks."""
    return {"output_fidelity": True, "output_entropy": True, "output_block_choice": "pointer_blocks" not in inputs}


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    dataset: Dataset,
    batch_size: int = 8,
    block_model: PreTrainedModel | None = None,
    with_controls: bool = False,
) -> LocalityReport:
    """
    Perplexity, and context fidelity, attention shares, fidelity and entropy of every layer and head, over a data set,
    in memory that grows linearly with the length of a sequence: no attention matrix is ever made.

    Each model finds its own blocks, so fidelities of several models are comparable only on the same ones: pass their
    common base as `block_model`.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model to measure, trained for locality or not; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            What [`causal_lm_collator`] takes: sequences in `"input_ids"`, of any lengths, optionally with `"labels"`,
            `"attention_mask"`, `"position_ids"` and `"block_starts"`. Each begins as the tokenizer begins a text, or
            another kind of text is measured: see [`text_prefix`]. With `"pointer_blocks"` beside `"block_starts"`, the
            blocks that tokens are to look at take the place of their own ones, and the context fidelity is the
            *pointer fidelity*, over the tokens that are told where to look.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.
        block_model (a localised model, with or without a language modeling head, *optional*):
            The model whose blocks count, those of its last layer; it is set to evaluation mode. By default `model`
            finds its own.
        with_controls (`bool`, *optional*, defaults to `False`):
            Whether to measure every layer on the blocks of another text too, without which no fidelity should be
            reported. It costs up to two more passes over the data, which is read into memory. [`measure_controls`] has
            the other controls.

    Returns:
        [`LocalityReport`]: every label, counted position and token weighs the same, whatever batch it came in.

    Raises:
        ValueError: for a model of another class, and for a data set without a sequence or with `"block_starts"` where a
            `block_model` is given.

    Example:

    ```python
    >>> report = measure(localize(model, num_sink_tokens=1), dataset, with_controls=True)
    >>> report.metrics["perplexity"], report.profile.context_fidelity[-1]  # of the last layer's heads
    >>> report.controls.own.context_fidelity[-1], report.controls.wrong.context_fidelity[-1]
    (0.34, 0.33)
    ```
    """
    check_model("model", model)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    batches, bar = evaluation_batches(model, dataset, batch_size, block_model), nullcontext()
    if with_controls:
        batches = list(batches)
        bar = progress_of_passes(model, 2 * len(batches), "Measuring")
    meter, totals, last_starts = LocalityMeter(), None, []
    with bar:
        for inputs, labels in batches:
            if with_controls:
                check_own_blocks(inputs)
            outputs = model(**inputs, **everything(inputs), use_cache=False)
            meter.update(outputs, labels)
            totals = add_rows(share_sums(outputs, by_head=True), totals)
            if with_controls:
                last_starts.append(outputs.block_starts[-1].cpu())
            del outputs  # before the next batch makes others
        metrics, controls = meter.compute(), None
        if with_controls and (texts := Texts([inputs for inputs, _ in batches])).number > 1:
            locality, own = model.config.locality, texts.line(last_starts)
            layers = list(range(locality.num_hidden_layers))
            controls, *_ = on_blocks(model, batches, texts, layers, own, locality.num_previous_blocks, is_brief=True)
    return LocalityReport(metrics, LocalityProfile.of(totals), controls)


def check_own_blocks(inputs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: for inputs that say where to look, of what is about blocks that tokens have.
    """
    if "pointer_blocks" in inputs:
        raise ValueError(
            "`pointer_blocks` are given, which take the place of the tokens' own blocks; leave the column out."
        )


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


@torch.no_grad()
def locality_probe(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    block_model: PreTrainedModel | None = None,
) -> LocalityProfile:
    """
    Measures fidelity, attention shares and entropy of every layer and head over a corpus, in memory that grows linearly
    with the length of a batch and not at all with their number.

    The transformer runs without its language modeling head, and every text without its padding and apart from the
    others packed into its row: what fused attention would need a length x length mask for. The means are those of the
    model's outputs for the batches as they come.

    Args:
        model ([`LocalistGPT2LMHeadModel`], [`LocalistGPT2Model`] or a [`~peft.PeftModel`] around one):
            The model to measure; it is set to evaluation mode.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            For each batch `"input_ids"` and optionally `"attention_mask"`, `"position_ids"` and `"block_starts"`, each
            of shape `(batch_size, sequence_length)` and read as by [`LocalistGPT2LMHeadModel.forward`]. Other entries
            are left alone. Each text begins as the tokenizer begins one: see [`text_prefix`]. Gone through once, so a
            generator or a `DataLoader` will do.
        block_model ([`LocalistGPT2LMHeadModel`] or [`LocalistGPT2Model`], *optional*):
            The model whose blocks count, those of its last layer; it is set to evaluation mode. Each model finds its
            own blocks by default, and fidelities of several are comparable only on the same ones: those of their
            common base.

    Returns:
        [`LocalityProfile`]: every counted position and token weighs the same, whatever batch it came in.

    Raises:
        ValueError: for a model of another class, and for batches without a token, with padding between tokens, or with
            `"block_starts"` where a `block_model` is given.

    Example:

    ```python
    >>> profile = locality_probe(model, DataLoader(dataset, batch_size=8, collate_fn=causal_lm_collator))
    >>> profile.context_fidelity.argmax(dim=1)  # the most local head of each layer
    tensor([3, 0, 7, 7, 1, 10])
    ```
    """
    check_model("model", model, needs_head=False)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    decoder = core_model(model.eval()).base_model
    block_decoder = None if block_model is None else core_model(block_model.eval()).base_model
    totals = None
    for batch in progress(batches, "Measuring"):
        if block_decoder is not None and "block_starts" in batch:
            raise ValueError("`batches` hold `block_starts` and a `block_model` is given too; only one can tell.")
        check_own_blocks(batch)
        for texts in _texts(batch):
            if block_decoder is not None:
                texts["block_starts"] = last_block_starts(block_decoder, texts)
            outputs = decoder(**_on(decoder, texts), use_cache=False, **everything(texts))
            totals = add_rows(share_sums(outputs, by_head=True), totals)
    if totals is None:
        raise ValueError("`batches` hold no token: there is nothing to take a mean over.")
    return LocalityProfile.of(totals)


def last_block_starts(decoder: PreTrainedModel, texts: Mapping[str, torch.Tensor], **dials: Any) -> torch.Tensor:
    """The blocks that a transformer's last layer has on these inputs, under the dial and guarantee set, or these."""
    last_layer = decoder.config.locality.num_hidden_layers - 1
    return decoder(**_on(decoder, texts), **dials, use_cache=False, output_fidelity=[last_layer]).block_starts[0]


def _on(decoder: PreTrainedModel, texts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(decoder.device) for name, tensor in texts.items()}


def _texts(batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """
    The model's arguments for the texts of a batch, those of one length together: a row without its padding, or each
    document of a packed row. Given positions stay as they are; block starts count from the start of the text.
    """
    input_ids = batch["input_ids"]
    position_ids = batch.get("position_ids")
    if batch.get("attention_mask") is not None:
        check_attention_mask(batch["attention_mask"], *input_ids.shape)
    documents = document_starts(*input_ids.shape, batch.get("attention_mask"), position_ids, device=input_ids.device)

    places = defaultdict(list)
    for row, row_documents in enumerate(documents):
        firsts, lengths = row_documents[row_documents >= 0].unique_consecutive(return_counts=True)
        for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
            places[length].append((row, first))
    for length, texts in places.items():
        rows, firsts = torch.tensor(texts, device=input_ids.device).T[:, :, None]
        index = rows, firsts + torch.arange(length, device=input_ids.device)
        arguments = {"input_ids": input_ids[index]}
        if position_ids is not None:
            arguments["position_ids"] = position_ids.expand_as(input_ids)[index]
        # With a mask, the positions of what is one text say nothing of packed documents.
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        if "block_starts" in batch:
            arguments["block_starts"] = batch["block_starts"].to(input_ids.device)[index] - firsts
        yield arguments
