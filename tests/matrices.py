"""
The attention matrices of every architecture: those of transformers' own eager attention in the native class, which
knows of grouped queries, partial rotary positions, sliding windows, soft-capping and learned sinks by itself.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import reference
import torch
from architectures import LAYERS, SETTINGS, SLIDING, WINDOW
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from localist_hf.modeling.fidelity import context_fidelity


@dataclass
class Matrices:
    """
    The attention matrices of one forward pass of the native class, and the dial on them.

    Args:
        windows (`Sequence[int | None]`):
            Keys that each layer sees, where that is a sliding window.
        documents (`torch.LongTensor` of shape `(batch_size, length)`):
            First position of each position's document, -1 on padding.
        block_starts (`tuple(torch.LongTensor)`):
            Those of each layer.
        sinks, previous (`int`):
            `num_sink_tokens` and `num_previous_blocks`.
        factors (`list[float | torch.Tensor]`), floors (`list[float]`):
            For each layer, the factor of the weights outside the local set, of all rows or `(batch_size, 1, 1)`, and
            the least fidelity.
    """

    windows: Sequence[int | None]
    documents: torch.Tensor
    block_starts: tuple[torch.Tensor, ...]
    sinks: int
    previous: int
    factors: list[float | torch.Tensor] = field(default_factory=lambda: [1.0] * LAYERS)
    floors: list[float] = field(default_factory=lambda: [0.0] * LAYERS)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)
    #: The share of a learned sink, which is no token and always local.
    learned: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def visible(self, layer: int) -> torch.Tensor:
        length = self.documents.shape[1]
        visible = reference.visible_keys(self.documents, length)
        if (window := self.windows[layer]) is not None:
            position = torch.arange(length)
            visible = visible & (position[:, None] - position < window)
        return visible

    def local(self, layer: int) -> torch.Tensor:
        """A layer's local set never exceeds what the layer sees."""
        length = self.documents.shape[1]
        local = reference.local_set(self.block_starts[layer], self.documents, self.sinks, length, self.previous)
        return local & self.visible(layer)

    def attend(self, layer: int, weights: torch.Tensor, value: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        """Keeps the weights as the dial makes them, with the share of a learned sink, and the values."""
        local = self.local(layer)
        factor = torch.ones_like(learned) * self.factors[layer]
        if floor := self.floors[layer]:
            free = reference.fidelity(weights, local) + learned
            factor = torch.minimum(factor, free * (1 - floor) / (floor * (1 - free)).clamp(min=1e-30))
        weights = torch.where(local, weights, weights * factor[..., None])
        total = weights.sum(-1) + learned
        total = torch.where(self.documents[:, None] < 0, 1.0, total)
        self.weights[layer], self.learned[layer] = weights / total[..., None], learned / total
        self.values[layer] = value
        groups = weights.shape[1] // value.shape[1]
        return (self.weights[layer] @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous()

    def measurements(self, layer: int) -> dict[str, torch.Tensor]:
        """What the package calls by the same names."""
        weights, learned = self.weights[layer].double(), self.learned[layer].double()
        visible, local, starts = self.visible(layer), self.local(layer), self.block_starts[layer]
        is_token = (self.documents >= 0)[:, None].expand(learned.shape)
        # What is local to a query but not seen by it has no weight.
        shares = reference.shares(weights, local, starts, self.documents, self.sinks)
        shares["sink_share"] = shares["sink_share"] + torch.where(is_token, learned, 0)
        counted = reference.counted(visible, local, self.documents)
        fidelity = reference.fidelity(weights, local) + learned
        has_context = reference.has_context(local, starts, self.documents, self.sinks)
        bits = reference.entropy_bits(torch.cat((weights, learned[..., None]), dim=-1))
        of_blocks = reference.block_shares(weights, starts, self.documents, self.sinks)
        total = of_blocks.sum(-1)
        return {
            **shares,
            "block_shares": of_blocks,
            "blocks_looked_at": reference.blocks_looked_at(of_blocks),
            "top_block_share": torch.where(total > 0, of_blocks.amax(-1) / total.clamp(min=1e-30), 1.0),
            "fidelity": torch.where(counted[:, None], fidelity, 1.0),
            "fidelity_mask": counted,
            "context_mask": counted & has_context,
            "entropy": torch.where(is_token, bits, 0),
        }

    def check_semantic_blocks(self, block_starts: tuple[torch.Tensor, ...]) -> None:
        """The blocks of each layer are those of the values of the band 1..3 up to it, or of its own below the band."""
        limits = (SETTINGS["min_block_length"], SETTINGS["max_block_length"])
        num_checked = 0
        for layer in range(LAYERS):
            band = [layer] if layer < 1 else range(1, layer + 1)
            lengths = torch.stack([reference.value_lengths(self.values[other].detach()) for other in band]).mean(0)
            for row in range(len(lengths)):
                expected, margin = reference.semantic_block_starts(
                    lengths[row, None], self.documents[row, None], 1.25, *limits
                )
                if margin > 3e-4:  # the package leaves ties within 1e-4 to the block before
                    assert torch.equal(block_starts[layer][row, None], expected), f"blocks of layer {layer}"
                    num_checked += 1
        assert num_checked >= LAYERS


@dataclass(kw_only=True)
class PointedMatrices(Matrices):
    """
    Attention matrices under rules.

    Args:
        targets (`torch.BoolTensor` of shape `(batch_size, length, length)`):
            The targets of each query; none of one that no rule names.
    """

    targets: torch.Tensor

    @property
    def named(self) -> torch.Tensor:
        return self.targets.any(-1)

    def parts(self, layer: int) -> dict[str, torch.Tensor]:
        is_token, position = (self.documents >= 0)[..., None], torch.arange(self.documents.shape[1])
        visible = self.visible(layer)[:, 0] & is_token
        own = visible & (position[:, None] == position)
        target = self.targets & visible & ~own
        sink = visible & (position < self.documents[..., None] + self.sinks) & ~own & ~target
        target = torch.where(self.named[..., None], target, visible & ~own & ~sink)
        return {"self": own, "sink": sink, "block": target, "outside": visible & ~own & ~target & ~sink}

    def local(self, layer: int) -> torch.Tensor:
        return ~self.parts(layer)["outside"][:, None] & self.visible(layer)

    def measurements(self, layer: int) -> dict[str, torch.Tensor]:
        weights, learned = self.weights[layer].double(), self.learned[layer].double()
        parts, is_token = self.parts(layer), (self.documents >= 0)[:, None]
        found = {f"{name}_share": (weights * keys[:, None]).sum(-1) for name, keys in parts.items()}
        found["sink_share"] = found["sink_share"] + torch.where(is_token, learned, 0)
        counted = self.named & parts["outside"].any(-1)
        bits = reference.entropy_bits(torch.cat((weights, learned[..., None]), dim=-1))
        return found | {
            "fidelity": torch.where(counted[:, None], 1 - found["outside_share"], 1.0),
            "fidelity_mask": counted,
            "context_mask": counted & parts["block"].any(-1),
            "entropy": torch.where(is_token, bits, 0),
        }


def targets_of(documents: torch.Tensor, said: dict[tuple[int, int], list[tuple[int, int]]]) -> torch.Tensor:
    """What is said, in positions from each row's first token."""
    length = documents.shape[1]
    is_token, place = documents >= 0, torch.arange(length) - documents
    found = torch.zeros(len(documents), length, length, dtype=torch.bool)
    for (first, end), targets in said.items():
        queries = is_token & (place >= first) & (place < end)
        for start, stop in targets:
            keys = is_token & (place >= start) & (place < stop)
            found |= queries[:, :, None] & keys[:, None]
    return found


_current: list[Matrices] = []


def matrix_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.clamp(min=-1e30)  # of float64 the least is no number in float32
    # In double precision, so that a learned sink's share is what is left of 1 even where it is next to nothing.
    softmax = functional.softmax
    # Most make it in float32, whatever they are handed; the reference rounds nowhere.
    functional.softmax = lambda scores, dim, dtype=None, **rest: softmax(scores, dim=dim, **rest)
    try:
        _, weights = eager(module, query.double(), key.double(), value.double(), attention_mask, **kwargs)
    finally:
        functional.softmax = softmax
    learned = weights.new_zeros(weights.shape[:-1])
    if (sinks := kwargs.get("s_aux")) is not None:
        # Some take it out of the weights, others, in float32, out of the output: so from the score of a token itself.
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)  # none on padding
        keys = key.double().repeat_interleave(weights.shape[1] // key.shape[1], dim=1)
        own = kwargs["scaling"] * (query.double() * keys).sum(-1)
        of_own = weights.diagonal(dim1=-2, dim2=-1)
        lse = own - torch.where(of_own > 0, of_own, 1.0).log()
        learned = (sinks.double()[:, None] - lse).sigmoid()
        weights = weights * (1 - learned)[..., None]
    output = _current[-1].attend(module.layer_idx, weights, value.double(), learned)
    return output.to(value.dtype), weights


AttentionInterface.register("explicit_matrix", matrix_attention_forward)
AttentionMaskInterface.register("explicit_matrix", eager_mask)


def native_pass(model: PreTrainedModel, matrices: Matrices, *args, **kwargs):
    """A forward pass of the native class with these matrices."""
    model.set_attn_implementation("explicit_matrix")
    _current.append(matrices)
    try:
        return model(*args, **kwargs, use_cache=False)
    finally:
        _current.pop()


def documents_of(mask: torch.Tensor) -> torch.Tensor:
    first = mask.argmax(1, keepdim=True)
    return torch.where(mask.bool(), first, -1)


def windows_of(architecture: str) -> list[int | None]:
    return [WINDOW if layer in SLIDING.get(architecture, ()) else None for layer in range(LAYERS)]


def matrices_for(architecture: str, model: PreTrainedModel, outputs, mask: torch.Tensor, dial=0.0, floor=0.0):
    """Those that belong to a pass of a localised model under the linear schedule."""
    lambdas = [layer / (LAYERS - 1) for layer in range(LAYERS)]
    return matrices_of(windows_of(architecture), lambdas, model, outputs, mask, dial, floor)


def matrices_of(windows, lambdas: list[float], model: PreTrainedModel, outputs, mask: torch.Tensor, dial, floor):
    """The same with these sliding windows and lambdas of layers."""
    locality = model.config.locality
    return Matrices(
        windows,
        documents_of(mask),
        outputs.block_starts,
        locality.num_sink_tokens,
        locality.num_previous_blocks,
        [1 - dial * value for value in lambdas],
        [floor * value for value in lambdas],
    )


#: What is measured of all blocks, and how it is asked for.
OF_BLOCKS = ("block_shares", "blocks_looked_at", "top_block_share")
EVERYTHING = {
    "output_fidelity": True, "output_entropy": True, "output_block_choice": True, "output_block_shares": True,
}  # fmt: skip


def check_close(name: str, actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    rtol = 0.0
    if name.startswith("entropy"):  # bits, the difference of a log-sum-exp and a mean score: numbers of up to 18 here,
        atol, rtol = 2e-5, 1e-5  # with float32's 1e-6 in each and in what the layers before make of it
    assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")


def check_parts(name: str, actual: torch.Tensor, expected: torch.Tensor, of: torch.Tensor) -> None:
    """Of parts of what may be next to nothing, and then is rounding."""
    is_some = of > 1e-2
    check_close(name, actual * is_some, expected * is_some, atol=1e-3)
    assert (actual[of == 0] == 1).all(), name


def check_measurements(outputs, matrices: Matrices) -> None:
    totals = {"block_share": 0.0, "outside_share": 0.0}
    expected_totals = dict(totals)
    for layer in sorted(matrices.weights):
        expected = matrices.measurements(layer)
        for name, tensor in expected.items():
            actual = getattr(outputs, name)[layer]
            where = f"{name} of layer {layer}"
            if tensor.dtype == torch.bool:
                assert torch.equal(actual, tensor), where
            elif name in OF_BLOCKS[1:]:
                check_parts(where, actual.double(), tensor, expected["block_share"] + expected["outside_share"])
            else:
                check_close(where, actual.double(), tensor)
            if name in totals:
                totals[name] += actual.double().sum((0, 2))
                expected_totals[name] += tensor.sum((0, 2))
    assert_close(context_fidelity(*totals.values()), context_fidelity(*expected_totals.values()), atol=1e-5, rtol=0)
