"""Means of perplexity, fidelity and entropy over many batches."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

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

    @property
    def is_empty(self) -> bool:
        """`bool`: whether there has been no `update` yet."""
        return self._sums is None

    def update(
        self,
        outputs: LocalistCausalLMOutput,
        labels: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        Adds a batch.

        Args:
            outputs ([`LocalistCausalLMOutput`]):
                With logits, and fidelity and entropy of every layer. Its loss is not used: `Trainer` scales it.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The tokens, each of which the position before it predicts; -100 where none counts.
            gather (`Callable`, *optional*):
                Takes one row for each sequence of this process's batch and gives those of all processes, such as
                [`~accelerate.Accelerator.gather_for_metrics`], which leaves out the sequences that fill up the last
                batch. By default there is one process.
        """
        # The sums of every quantity and what to divide them by, for each sequence: (batch_size, 1 + 2 * num_layers, 2).
        sums = [_label_losses(outputs.logits, labels)]
        for fidelity, mask in zip(outputs.fidelity, outputs.fidelity_mask, strict=True):
            sums.append(((fidelity.detach().mean(1) * mask).sum(1), mask.sum(1)))
        for entropy, starts in zip(outputs.entropy, outputs.block_starts, strict=True):
            sums.append((entropy.detach().mean(1).sum(1), (starts >= 0).sum(1)))
        # Layers may lie on different devices, and not every device has float64: rows in float32, their sum on the CPU.
        rows = torch.stack([value.float().to(labels.device) for pair in sums for value in pair], dim=1)
        rows = rows if gather is None else gather(rows)
        batch = rows.cpu().double().sum(0)
        self._sums = batch if self._sums is None else self._sums + batch

    def compute(self) -> dict[str, float]:
        """
        The means over all batches.

        Returns:
            `dict[str, float]`: `loss`, `perplexity`, and `fidelity` and `entropy` (bits) as means over layers and for
            each layer. A layer without counted positions has fidelity 1; the loss is NaN where there is no label, the
            entropy where there is no token.

        Raises:
            ValueError: where there has been no batch.
        """
        if self._sums is None:
            raise ValueError("`compute` was called before any `update`: there is no batch to take a mean over.")
        loss, *layers = [total / count if count else None for total, count in self._sums.view(-1, 2).tolist()]
        num_layers = len(layers) // 2
        loss = math.nan if loss is None else loss
        fidelities = [1.0 if value is None else value for value in layers[:num_layers]]
        entropies = [math.nan if value is None else value for value in layers[num_layers:]]
        # torch's exponential of a large loss is infinite; `math`'s is an error.
        metrics = {"loss": loss, "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}
        for name, values in (("fidelity", fidelities), ("entropy", entropies)):
            metrics[name] = sum(values) / num_layers
            metrics |= {f"{name}_layer_{layer}": value for layer, value in enumerate(values)}
        return metrics


def _label_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross-entropies of each sequence's labels in nats, and their number: `(batch_size,)` both."""
    # Labels are moved instead of logits, which a slice would copy.
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits.detach().float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).sum(1), (targets != -100).sum(1)
