"""What is found of a model's locality over some texts, by layer and by head."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..modeling.fidelity import context_fidelity
from ..modeling.measurements import OF_BLOCKS, SHARES
from .control_results import BlockControls, as_json
from .share_sums import share_means


@dataclass(frozen=True, eq=False)
class LocalityProfile:
    """
    Means over a corpus, for each layer and head, as [`locality_probe`] finds them. All tensors are on the CPU.

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
        blocks_looked_at, top_block_share (`torch.DoubleTensor` of shape `(num_layers, num_heads)`, *optional*):
            Over how many blocks a query's attention to other words is spread, and the largest part of it that goes to
            one: means over that attention, of the counted positions; NaN in a layer where none goes to other words.
            `None` where they were not measured.
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
    blocks_looked_at: torch.Tensor | None = None
    top_block_share: torch.Tensor | None = None

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

    @classmethod
    def of(cls, totals: Mapping[str, torch.Tensor]) -> "LocalityProfile":
        """The profile that these totals (see [`add_rows`]), by head, come to."""
        means = share_means(totals)
        num_counted, num_tokens = totals["num_counted"][:, 0], totals["num_tokens"][:, 0]
        return cls(
            **{name: means[name] for name in ("fidelity", *SHARES, "entropy")},
            **{name: means.get(name) for name in OF_BLOCKS},
            mean_block_length=num_tokens / totals["num_blocks"][:, 0],
            visible_keys=means["visible_keys"][:, 0],
            num_counted=num_counted.long(),
            num_tokens=int(num_tokens[0]),
        )


@dataclass(frozen=True, eq=False)
class LocalityReport:
    """
    What [`measure`] found.

    Args:
        metrics (`dict[str, float]`):
            Perplexity, and the means of every layer: see [`LocalityMeter.compute`].
        profile ([`LocalityProfile`]):
            The same of every head.
        controls ([`BlockControls`], *optional*):
            Every layer on the blocks that the last one has, and on those of another text. `None` where they were not
            asked for, and for a single text.
    """

    metrics: dict[str, float]
    profile: LocalityProfile
    controls: BlockControls | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: `None` for what is undefined. Of heads a list for each layer."""
        names = ("context_fidelity", "context_share", *SHARES, "fidelity", "entropy", *OF_BLOCKS)
        found = {name: getattr(self.profile, name) for name in names}
        heads = {name: values.tolist() for name, values in found.items() if values is not None}
        controls = None
        if self.controls is not None:
            values = asdict(self.controls)
            controls = {name: values[name] for name in ("num_previous_blocks", "num_counted", "own", "wrong")}
        lengths = self.profile.mean_block_length.tolist()
        return as_json({"metrics": self.metrics, "heads": heads, "mean_block_length": lengths, "controls": controls})
