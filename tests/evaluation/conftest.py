"""
Metrics from explicit attention matrices and from given shares, and a stand-in for a device without float64, such as
Apple's MPS.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import reference
import torch
from architectures import positions

from localist_hf.modeling.block_partition import document_starts


@pytest.fixture(scope="session")
def metrics_of() -> Callable[..., dict[str, float]]:
    """Metrics from a perplexity and self, sink, block and outside of each layer."""

    def make(perplexity: float, *shares: Sequence[float]) -> dict[str, float]:
        metrics = {"perplexity": perplexity}
        for layer, parts in enumerate(shares):
            names = ("self_share", "sink_share", "block_share", "outside_share")
            of_layer = dict(zip(names, parts, strict=True))
            of_layer |= {"context_share": parts[2] + parts[3], "fidelity": 1 - parts[3], "entropy": 2.5 + layer}
            psi = parts[2] / of_layer["context_share"] if of_layer["context_share"] else math.nan
            metrics |= {
                f"{name}_layer_{layer}": value for name, value in (of_layer | {"context_fidelity": psi}).items()
            }
        return metrics

    return make


@pytest.fixture(scope="session")
def layer_metrics_by_matrix(gpt2_twin) -> Callable:
    """The locality of each layer over some batches, from the explicit attention matrices of the native model."""

    @torch.no_grad()
    def by_matrix(
        model, batches: Sequence[Mapping[str, torch.Tensor]], block_starts: Sequence[Sequence[torch.Tensor]]
    ) -> dict[str, float]:
        sinks, previous = model.config.num_sink_tokens, model.config.num_previous_blocks
        native, metrics = gpt2_twin(model, "eager"), {}
        shares, num_keys, of_blocks = ([[] for _ in range(model.config.n_layer)] for _ in range(3))
        for batch, batch_starts in zip(batches, block_starts, strict=True):
            names = {"input_ids", "attention_mask", "position_ids"} & batch.keys()
            inputs = {name: batch[name] for name in names}
            batch_size, length = inputs["input_ids"].shape
            documents = document_starts(batch_size, length, inputs.get("attention_mask"), inputs.get("position_ids"))
            if "attention_mask" in inputs and "position_ids" not in inputs:
                inputs["position_ids"] = positions(inputs["attention_mask"])
            outputs = native(**inputs, use_cache=False, output_attentions=True)
            for layer, (weights, starts) in enumerate(zip(outputs.attentions, batch_starts, strict=True)):
                local = reference.local_set(starts, documents, sinks, length, previous)
                counted = reference.counted(reference.visible_keys(documents, length), local, documents)
                of = reference.shares(weights, local, starts, documents, sinks)
                shares[layer].append(torch.stack([share.double().transpose(1, 2)[counted] for share in of.values()]))
                blocks = reference.block_shares(weights, starts, documents, sinks)
                top = blocks.amax(-1) / blocks.sum(-1).clamp(min=1e-30)
                each = (reference.blocks_looked_at(blocks), top, blocks.sum(-1))
                of_blocks[layer].append([values.double().transpose(1, 2)[counted] for values in each])
                num_keys[layer].append(local.sum(-1)[:, 0][counted])
        for layer in range(model.config.n_layer):
            own, sink, block, outside = (share.mean().item() for share in torch.cat(shares[layer], dim=1))
            of_layer = {"self_share": own, "sink_share": sink, "block_share": block, "outside_share": outside}
            of_layer["context_share"] = block + outside
            of_layer["context_fidelity"] = block / (block + outside)
            of_layer["fidelity"] = own + sink + block
            of_layer["visible_keys"] = torch.cat(num_keys[layer]).double().mean().item()
            looked_at, top, others = (torch.cat(values) for values in zip(*of_blocks[layer], strict=True))
            looked_at, top = ((values * others).sum().item() / others.sum().item() for values in (looked_at, top))
            of_layer |= {"blocks_looked_at": looked_at, "top_block_share": top}
            metrics |= {f"{name}_layer_{layer}": value for name, value in of_layer.items()}
        return metrics

    return by_matrix


class OnDevice(torch.Tensor):
    """A tensor on a device without float64: what would make one there fails; `.cpu()` leaves the device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, OnDevice) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.fixture(scope="session")
def on_device() -> Callable:
    """Puts a model's output, or a tensor, on the device without float64."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.as_subclass(OnDevice)
        if isinstance(value, tuple):
            return tuple(move(entry) for entry in value)
        if isinstance(value, Mapping):
            return type(value)(**{name: move(entry) for name, entry in value.items()})
        return value

    return move
