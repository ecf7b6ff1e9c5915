"""Fidelity, attention shares and entropy of every head over a whole corpus."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..modeling import LocalityFields, LocalityMeasurements
from ..modeling.block_partition import document_starts
from ..modeling.fidelity import context_fidelity
from ..modeling.locality_mixin import SHARES
from ..modeling.locality_request import check_attention_mask
from .check_model import check_model, core_model
from .progress import progress
from .visible_keys import visible_keys


@dataclass(frozen=True, eq=False)
class LocalityProfile:
    """
    What [`locality_probe`] found: means over a corpus, for each layer and head. All tensors are on the CPU.

    Args:
        fidelity (`torch.DoubleTensor` of shape `(num_layers, num_heads)`):
            Mean share of a query's attention that stays in its local set, in [0, 1], over the counted positions; 1 in
            a layer that has none.
        self_share, sink_share, block_share, outside_share (`torch.DoubleTensor` of shape `(num_layers, num_heads)`):
            Mean shares of a query's attention over the same positions: on its own token, on sinks, on the rest of its
            local set, outside of it. They sum to 1; NaN in a layer that has no counted position.
        entropy (`torch.DoubleTensor` of shape `(num_layers, num_heads)`):
            Mean entropy of a query's attention in bits, over all tokens.
        mean_block_length (`torch.DoubleTensor` of shape `(num_layers,)`):
            Mean length of a block in tokens.
        visible_keys (`torch.DoubleTensor` of shape `(num_layers,)`):
            Mean number of keys in the local set of a counted position; NaN where there is none.
        num_counted (`torch.LongTensor` of shape `(num_layers,)`):
            Counted positions: the tokens that see more than their local set. Layers differ where their blocks do.
        num_tokens (`int`):
            Tokens of the corpus, without padding.
    """

    fidelity: torch.Tensor
    self_share: torch.Tensor
    sink_share: torch.Tensor
    block_share: torch.Tensor
    outside_share: torch.Tensor
    entropy: torch.Tensor
    mean_block_length: torch.Tensor
    visible_keys: torch.Tensor
    num_counted: torch.Tensor
    num_tokens: int

    @property
    def context_fidelity(self) -> torch.Tensor:
        """
        `torch.DoubleTensor` of shape `(num_layers, num_heads)`: of the attention that goes to other words, the part
        that stays in the local set, block / (block + outside); NaN where none goes to other words.
        """
        return context_fidelity(self.block_share, self.outside_share)

    @property
    def context_share(self) -> torch.Tensor:
        """
        `torch.DoubleTensor` of shape `(num_layers, num_heads)`: the share of the attention that goes to other words,
        block + outside.
        """
        return self.block_share + self.outside_share


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
    sums = ProfileSums()
    for batch in progress(batches, "Measuring"):
        if block_decoder is not None and "block_starts" in batch:
            raise ValueError("`batches` hold `block_starts` and a `block_model` is given too; only one can tell.")
        for texts in _texts(batch):
            if block_decoder is not None:
                texts["block_starts"] = last_block_starts(block_decoder, texts)
            outputs = decoder(**_on(decoder, texts), use_cache=False, output_fidelity=True, output_entropy=True)
            sums.add(outputs, decoder.config.locality)
    return sums.profile()


class ProfileSums:
    """Adds up what a [`LocalityProfile`] holds the means of, batch by batch."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] | None = None

    def add(
        self, outputs: LocalityMeasurements, locality: LocalityFields, documents: torch.Tensor | None = None
    ) -> None:
        """Adds a batch, of which fidelity and entropy of every layer were measured; for `documents` see the meter."""
        sums = _sums(outputs, locality, documents)
        totals = self._totals
        self._totals = sums if totals is None else {name: totals[name] + sums[name] for name in totals}

    def profile(self) -> LocalityProfile:
        """
        The means over all batches.

        Raises:
            ValueError: where there has been none.
        """
        if (totals := self._totals) is None:
            raise ValueError("`batches` hold no token: there is nothing to take a mean over.")
        num_counted, num_tokens = totals["num_counted"], totals["num_tokens"]
        shares = {name: totals[name] / num_counted[:, None] for name in SHARES}
        return LocalityProfile(
            fidelity=torch.where(num_counted[:, None] > 0, totals["fidelity"] / num_counted[:, None], 1.0),
            **shares,
            entropy=totals["entropy"] / num_tokens[:, None],
            mean_block_length=num_tokens / totals["num_blocks"].double(),
            visible_keys=totals["visible_keys"].double() / num_counted,
            num_counted=num_counted,
            num_tokens=int(num_tokens[0]),
        )


def last_block_starts(decoder: PreTrainedModel, texts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The blocks that a transformer's last layer has on these inputs."""
    last_layer = decoder.config.locality.num_hidden_layers - 1
    return decoder(**_on(decoder, texts), use_cache=False, output_fidelity=[last_layer]).block_starts[0]


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


def _sums(
    outputs: LocalityMeasurements, locality: LocalityFields, documents: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Sums of a batch, for each layer and head `(num_layers, num_heads)` or for each layer `(num_layers,)`."""
    layers = zip(outputs.fidelity_mask, outputs.entropy, outputs.block_starts, strict=True)
    sums = defaultdict(list)
    for layer, (mask, entropy, starts) in enumerate(layers):
        for name in ("fidelity", *SHARES):
            sums[name].append((getattr(outputs, name)[layer] * mask[:, None]).sum(2))
        sums["visible_keys"].append((visible_keys(starts, locality, layer, documents) * mask).sum(1))
        sums["num_counted"].append(mask.sum(1))
        sums["entropy"].append(entropy.sum(2))  # 0 on padding
        sums["num_tokens"].append((starts >= 0).sum(1))
        sums["num_blocks"].append((starts == torch.arange(starts.shape[1], device=starts.device)).sum(1))
    # Layers may lie on different devices, and not every device has float64: the rows are added up on the CPU.
    rows = {name: torch.stack([tensor.cpu() for tensor in tensors]) for name, tensors in sums.items()}
    return {name: (tensor.double() if tensor.is_floating_point() else tensor).sum(1) for name, tensor in rows.items()}
