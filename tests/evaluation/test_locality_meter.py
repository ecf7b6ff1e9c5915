"""LocalityMeter: means over many batches are those of all of them at once."""

import math

import pytest
import torch

from localist_hf.evaluation import LocalityMeter


def outputs_and_labels(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
    labels = input_ids.clone()
    if attention_mask is not None:
        labels[attention_mask == 0] = -100
    with torch.no_grad():
        outputs = model(
            input_ids, attention_mask=attention_mask, labels=labels, output_fidelity=True, output_entropy=True
        )
    return outputs, labels


def test_batches_of_different_size_and_padding_weigh_by_what_they_hold(make_model) -> None:
    model = make_model()
    input_ids = torch.randint(1, model.config.vocab_size, (3, 60))
    mask = torch.ones_like(input_ids)
    mask[0, 25:] = 0
    together, apart = LocalityMeter(), LocalityMeter()
    together.update(*outputs_and_labels(model, input_ids, mask))
    apart.update(*outputs_and_labels(model, input_ids[:1, :25]))
    apart.update(*outputs_and_labels(model, input_ids[1:]))
    expected = together.compute()
    assert apart.compute() == pytest.approx(expected, rel=1e-5)
    assert expected["perplexity"] == pytest.approx(math.exp(expected["loss"]))


def test_means_are_over_counted_positions_only(make_model) -> None:
    model = make_model()
    input_ids = torch.randint(1, model.config.vocab_size, (2, 70))
    outputs, labels = outputs_and_labels(model, input_ids)
    meter = LocalityMeter()
    meter.update(outputs, labels)
    metrics = meter.compute()
    for layer, (fidelity, mask) in enumerate(zip(outputs.fidelity, outputs.fidelity_mask, strict=True)):
        counted = fidelity.transpose(1, 2)[mask]
        assert metrics[f"fidelity_layer_{layer}"] == pytest.approx(counted.mean().item(), rel=1e-5)
        assert metrics[f"entropy_layer_{layer}"] == pytest.approx(outputs.entropy[layer].mean().item(), rel=1e-5)
    num_layers = len(outputs.fidelity)
    mean = sum(metrics[f"fidelity_layer_{layer}"] for layer in range(num_layers)) / num_layers
    assert metrics["fidelity"] == pytest.approx(mean)


def test_text_within_one_block_has_fidelity_one(make_model) -> None:
    model = make_model()
    meter = LocalityMeter()
    meter.update(*outputs_and_labels(model, torch.randint(1, 90, (1, 6))))
    assert meter.compute()["fidelity"] == 1.0


def test_computing_without_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="before any `update`"):
        LocalityMeter().compute()
