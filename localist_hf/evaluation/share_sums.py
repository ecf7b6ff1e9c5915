"""Attention shares, added up over the positions that count: every mean of them is made of these sums."""

from collections.abc import Mapping, Sequence

import torch

from ..modeling import LocalityMeasurements
from ..modeling.fidelity import context_fidelity
from ..modeling.measurements import OF_BLOCKS, SHARES


#: What is added up: over the counted positions the attention shares, the keys of the local sets and the positions; over
#: all tokens the entropy (in bits), the tokens and the starts of blocks. What is measured of all blocks counts by the
#: attention that it is a part of, that to other words.
SUMS = (*SHARES, "visible_keys", *OF_BLOCKS, "num_counted", "entropy", "num_tokens", "num_blocks")


def share_sums(
    measured: LocalityMeasurements, masks: Sequence[torch.Tensor] | None = None, by_head: bool = False
) -> dict[str, torch.Tensor]:
    """
    The sums of each row of a batch.

    Args:
        measured ([`LocalityMeasurements`]):
            What a model has measured of the batch.
        masks (`Sequence[torch.BoolTensor]` of shape `(batch_size, sequence_length)`, *optional*):
            For each measured layer, the positions that count. By default its `fidelity_mask`.
        by_head (`bool`, *optional*, defaults to `False`):
            Whether to keep heads apart. By default shares and entropy are the means over them.

    Returns:
        `dict[str, torch.Tensor]`: for each of `SUMS`, as far as it was measured, a tensor of shape
        `(batch_size, num_layers, num_heads)`, in which `num_heads` is 1 for what heads do not differ in; on the device
        of the first layer, without gradients.
    """

    def of_heads(values: torch.Tensor) -> torch.Tensor:
        return values.detach() if by_head else values.detach().mean(1, keepdim=True)

    layers: dict[str, list[torch.Tensor]] = {name: [] for name in SUMS}
    for layer, mask in enumerate(measured.fidelity_mask if masks is None else masks):
        starts = measured.block_starts[layer]
        mask = mask.to(measured.visible_keys[layer].device)
        for name in SHARES:
            layers[name].append((of_heads(getattr(measured, name)[layer]) * mask[:, None]).sum(-1))
        others = measured.block_share[layer] + measured.outside_share[layer]
        for name in OF_BLOCKS:
            if (values := getattr(measured, name)) is not None:
                layers[name].append((of_heads(values[layer] * others) * mask[:, None]).sum(-1))
        if measured.entropy is not None:
            layers["entropy"].append(of_heads(measured.entropy[layer]).sum(-1))  # 0 on padding
        counts = {
            "visible_keys": measured.visible_keys[layer] * mask,
            "num_counted": mask,
            "num_tokens": starts >= 0,
            "num_blocks": starts == torch.arange(starts.shape[1], device=starts.device),
        }
        for name, each in counts.items():
            layers[name].append(each.sum(1, keepdim=True))
    # Layers may lie on different devices.
    device = layers[SHARES[0]][0].device
    return {name: torch.stack([each.to(device) for each in sums], 1) for name, sums in layers.items() if sums}


def add_rows(
    sums: Mapping[str, torch.Tensor], totals: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The sums over all rows, `(num_layers, num_heads)`, added to the totals so far: float64, on the CPU."""
    # Not every device has float64.
    rows = {name: each.cpu().double().sum(0) for name, each in sums.items()}
    return rows if totals is None else {name: totals[name] + each for name, each in rows.items()}


def share_means(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The means that can be had of such totals, of any shape: of the shares, and, where they were added up, of
    `visible_keys` and of the entropy of a token; of what is measured of all blocks, the mean over the attention to
    other words; `context_share` and `context_fidelity`; `fidelity`, which is 1 where no position counts. All else is
    NaN there.
    """
    num_counted = totals["num_counted"]
    means = {name: totals[name] / num_counted for name in (*SHARES, "visible_keys") if name in totals}
    block, outside = means["block_share"], means["outside_share"]
    others = totals["block_share"] + totals["outside_share"]
    means |= {name: totals[name] / others for name in OF_BLOCKS if name in totals}
    means |= {"context_share": block + outside, "context_fidelity": context_fidelity(block, outside)}
    means["fidelity"] = torch.where(num_counted > 0, 1 - outside, 1.0)
    if "entropy" in totals:
        means["entropy"] = totals["entropy"] / totals["num_tokens"]
    return means


def means_of_lists(shares: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """[`share_means`] of shares that are given one by one, for each counted position and head."""
    totals = {name: torch.tensor(values, dtype=torch.float64).sum() for name, values in shares.items()}
    totals["num_counted"] = torch.tensor(len(shares["outside_share"]))
    return {name: mean.item() for name, mean in share_means(totals).items()}
