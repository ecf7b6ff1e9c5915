"""Means of perplexity, fidelity and entropy over many batches."""

import math
from collections.abc import Callable

import torch

from ..modeling import LocalistCausalLMOutput


class LocalityMeter:
    """
    Adds up what a model measures, batch by batch, and gives the means: nothing but sums is kept.

    Every label counts the same for the perplexity, every counted position and head for the fidelity, and every token
    and head for the entropy, whatever batch they came in.

    Example:

    ```python
    >>> meter = LocalityMeter()
    >>> for batch in batches:
    ...     meter.update(model(**batch, output_fidelity=True, output_entropy=True), batch["labels"])
    >>> meter.compute()
    {'loss': 3.2, 'perplexity': 24.5, 'fidelity': 0.41, 'fidelity_layer_0': 0.19, ..., 'entropy_layer_5': 2.9}
    ```
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self.num_batches = 0

    def update(self, outputs: LocalistCausalLMOutput, labels: torch.Tensor) -> None:
        """
        Adds a batch.

        Args:
            outputs ([`LocalistCausalLMOutput`]):
                With fidelity and entropy of every layer, and the mean loss over the labels.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                -100 where none counts.
        """
        self.num_batches += 1
        # The sums of every quantity and what to divide them by, in one tensor, so that processes add them up in one go.
        num_labels = (labels[:, 1:] != -100).sum()
        sums = [outputs.loss.detach().float().mean() * num_labels, num_labels]
        for fidelity, mask in zip(outputs.fidelity, outputs.fidelity_mask, strict=True):
            sums += [(fidelity.detach().mean(1) * mask).sum(), mask.sum()]
        for entropy, starts in zip(outputs.entropy, outputs.block_starts, strict=True):
            sums += [entropy.detach().mean(1).sum(), (starts >= 0).sum()]
        batch = torch.stack([value.double().to(labels.device) for value in sums])
        self._sums = batch if self._sums is None else self._sums + batch

    def compute(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """
        The means over all batches.

        Args:
            reduce (`Callable`, *optional*):
                Adds up a tensor over processes.

        Returns:
            `dict[str, float]`: `loss`, `perplexity`, and `fidelity` and `entropy` (bits) as means over layers and for
            each layer. A layer without counted positions has fidelity 1.
        """
        if self._sums is None:
            raise ValueError("`compute` was called before any `update`: there is no batch to take a mean over.")
        sums = self._sums if reduce is None else reduce(self._sums)
        pairs = sums.view(-1, 2).tolist()
        loss, *layers = [total / count if count else None for total, count in pairs]
        num_layers = len(layers) // 2
        fidelities = [1.0 if value is None else value for value in layers[:num_layers]]
        entropies = layers[num_layers:]
        metrics = {"loss": loss, "perplexity": math.exp(loss)}
        for name, values in (("fidelity", fidelities), ("entropy", entropies)):
            metrics[name] = sum(values) / num_layers
            metrics |= {f"{name}_layer_{layer}": value for layer, value in enumerate(values)}
        return metrics
