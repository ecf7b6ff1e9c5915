"""Means of perplexity, fidelity, attention shares and entropy over many batches."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..modeling import LocalityMeasurements
from ..modeling.fidelity import context_fidelity
from ..modeling.measurements import OF_BLOCKS, SHARES
from .share_sums import SUMS, share_means, share_sums


#: What is always measured of each layer, and overall; [`OF_BLOCKS`] comes to it where it is asked for.
QUANTITIES = ("context_fidelity", "context_share", *SHARES, "visible_keys", "fidelity", "entropy")


def metric_names(num_layers: int) -> list[str]:
    """
    The names of the metrics of a model with so many layers, in order: the keys of [`LocalityMeter.compute`], where all
    is measured.
    """
    names = ["loss", "perplexity"]
    for quantity in (*QUANTITIES, *OF_BLOCKS):
        names += [quantity, *(f"{quantity}_layer_{layer}" for layer in range(num_layers))]
    return names


class LocalityMeter:
    """
    Adds up what a model measures, batch by batch, and gives the means: nothing but sums is kept.

    Every label counts the same for the perplexity, every counted position and head for the fidelity and the shares, and
    every token and head for the entropy, whatever batch they came in.

    Example:

    ```python
    >>> meter = LocalityMeter()
    >>> for batch in batches:
    ...     meter.update(model(**batch, output_fidelity=True, output_entropy=True), batch["labels"])
    >>> meter.compute()
    {'loss': 3.2, 'perplexity': 24.5, 'context_fidelity': 0.38, ..., 'fidelity': 0.41, ..., 'entropy_layer_5': 2.9}
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
        outputs: LocalityMeasurements,
        labels: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        Adds a batch.

        Args:
            outputs ([`LocalityMeasurements`]):
                With logits, and fidelity and entropy of every layer, and perhaps `blocks_looked_at` and
                `top_block_share`. Its loss is not used: `Trainer` scales it.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The tokens, each of which the position before it predicts; -100 where none counts.
            gather (`Callable`, *optional*):
                Takes one row for each sequence of this process's batch and gives those of all processes, such as
                [`~accelerate.Accelerator.gather_for_metrics`], which leaves out the sequences that fill up the last
                batch. By default there is one process.
        """
        self.add(outputs, *label_losses(outputs.logits, labels), gather)

    def add(
        self,
        measured: LocalityMeasurements,
        losses: torch.Tensor,
        num_labels: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        As `update`, where there are no logits.

        Args:
            measured ([`LocalityMeasurements`]):
                With fidelity and entropy of every layer, and perhaps what is measured of all blocks.
            losses (`torch.Tensor` of shape `(batch_size,)`), num_labels (`torch.Tensor` of shape `(batch_size,)`):
                The sum of the cross-entropies of each sequence's labels in nats, and their number.
            gather (`Callable`, *optional*):
                See `update`.
        """
        sums = share_sums(measured)
        unmeasured = torch.full_like(sums["entropy"], math.nan)
        rows = [losses[:, None], num_labels[:, None], *(sums.get(name, unmeasured).flatten(1) for name in SUMS)]
        # Layers may lie on different devices, and not every device has float64: that is for the sum, on the CPU.
        rows = torch.cat([each.to(losses.device) for each in rows], dim=1)
        rows = rows if gather is None else gather(rows)
        batch = rows.cpu().double().sum(0)
        self._sums = batch if self._sums is None else self._sums + batch

    def compute(self) -> dict[str, float]:
        """
        The means over all batches.

        Returns:
            `dict[str, float]`: `loss` (nats), `perplexity`, and for each quantity its value of each layer, as
            `context_fidelity_layer_3`, and overall, as `context_fidelity`:

            - `context_fidelity`: of the attention that goes to other words, the part that stays in the local set:
              block / (block + outside), the ratio of their sums; overall that of their means over layers.
            - `context_share`: block + outside, the attention that goes to other words at all.
            - `self_share`, `sink_share`, `block_share`, `outside_share`: where the attention goes; they sum to 1.
            - `fidelity`: 1 - outside.
            - `visible_keys`: the number of keys in a counted query's local set.
            - `entropy`: in bits.
            - `blocks_looked_at`, `top_block_share`: where they were measured, over how many blocks a query's attention
              to other words is spread, and the largest part of it that goes to one; means over the attention to other
              words, so that a query counts by how much of it it has.

            Overall means are over layers; those of the shares, and of the visible keys, over the layers that have
            counted positions. One without has fidelity 1 by construction, and NaN as its shares, context fidelity and
            visible keys. The context fidelity and what is measured of blocks are NaN too where no attention goes to
            other words, the loss where there is no label, the entropy where there is no token.

        Raises:
            ValueError: where there has been no batch.
        """
        if self._sums is None:
            raise ValueError("`compute` was called before any `update`: there is no batch to take a mean over.")
        total_loss, num_labels = self._sums[:2].tolist()
        loss = total_loss / num_labels if num_labels else math.nan
        metrics = {"loss": loss, "perplexity": perplexity(total_loss, num_labels)}

        totals = dict(zip(SUMS, self._sums[2:].view(len(SUMS), -1), strict=True))
        means = share_means(totals)
        overall = {name: values.nanmean() for name, values in means.items()}
        overall["context_fidelity"] = context_fidelity(overall["block_share"], overall["outside_share"])
        overall["entropy"] = means["entropy"].mean()
        measured = [name for name in OF_BLOCKS if not totals[name].isnan().any()]
        for name in (*QUANTITIES, *measured):
            metrics[name] = overall[name].item()
            metrics |= {f"{name}_layer_{layer}": value for layer, value in enumerate(means[name].tolist())}
        return metrics


#: So many tokens' cross-entropies are taken at a time.
_TOKENS = 1024


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross-entropies of each sequence's labels in nats, and their number: `(batch_size,)` both."""
    return token_losses(logits, labels).sum(1), (labels[:, 1:] != -100).sum(1).to(logits.device)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The cross-entropy in nats of the label that follows each position, 0 where none does or it does not count:
    `(batch_size, length)`, float32.
    """
    # Labels are moved instead of logits, which a slice would copy.
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
    # A part at a time: of a long text, logits are the largest thing there is, and each step would make them again.
    parts = zip(logits.detach().flatten(0, 1).split(_TOKENS), targets.flatten().split(_TOKENS), strict=True)
    losses = torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in parts])
    return losses.view_as(targets)


def perplexity(total_loss: float, num_labels: float) -> float:
    """The exponential of the mean loss of so many labels, in nats; NaN without any, infinite of a hopeless one."""
    # torch's exponential of a large loss is infinite; `math`'s is an error.
    mean = torch.tensor(total_loss, dtype=torch.float64) / num_labels
    return mean.exp().item()
