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


def test_the_loss_is_that_of_the_logits_whatever_the_output_says(make_model) -> None:
    """Trainer scales the output's loss for other processes."""
    outputs, labels = outputs_and_labels(make_model(), torch.randint(1, 90, (2, 40)))
    expected = outputs.loss.item()
    outputs.loss *= 7
    meter = LocalityMeter()
    meter.update(outputs, labels)
    assert meter.compute()["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_labels_counts_for_the_locality_only(make_model) -> None:
    model = make_model()
    outputs, labels = outputs_and_labels(model, torch.randint(1, 90, (2, 60)))
    unlabelled, _ = outputs_and_labels(model, torch.randint(1, 90, (1, 60)))
    both, alone, neither = LocalityMeter(), LocalityMeter(), LocalityMeter()
    alone.update(outputs, labels)
    both.update(outputs, labels)
    for meter in (both, neither):
        meter.update(unlabelled, torch.full((1, 60), -100))
    assert both.compute()["loss"] == alone.compute()["loss"]
    assert both.compute()["entropy"] != alone.compute()["entropy"]
    metrics = neither.compute()
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {"loss", "perplexity"}


def test_a_batch_of_padding_has_no_entropy(make_model) -> None:
    mask = torch.zeros(1, 20, dtype=torch.long)
    meter = LocalityMeter()
    meter.update(*outputs_and_labels(make_model(), torch.randint(1, 90, (1, 20)), mask))
    metrics = meter.compute()
    assert math.isnan(metrics["entropy_layer_0"])
    assert metrics["fidelity"] == 1.0


def test_a_hopeless_loss_has_an_infinite_perplexity(make_model) -> None:
    outputs, labels = outputs_and_labels(make_model(), torch.randint(1, 90, (1, 20)))
    outputs.logits = torch.zeros_like(outputs.logits)
    outputs.logits[..., 0] = 1e4
    meter = LocalityMeter()
    meter.update(outputs, labels)
    assert meter.compute()["perplexity"] == math.inf


def test_other_processes_rows_are_gathered_and_repeated_ones_left_out(make_model) -> None:
    """Two processes with two rows each, of which the last repeats the first to fill up the batch."""
    model = make_model()
    input_ids = torch.randint(1, 90, (3, 60))
    mask = torch.ones_like(input_ids)
    mask[1, 20:] = 0
    expected, meter = LocalityMeter(), LocalityMeter()
    expected.update(*outputs_and_labels(model, input_ids, mask))
    other: list[torch.Tensor] = []
    LocalityMeter().update(
        *outputs_and_labels(model, input_ids[[2, 0]], mask[[2, 0]]), gather=lambda rows: other.append(rows) or rows
    )
    first = outputs_and_labels(model, input_ids[:2], mask[:2])
    meter.update(*first, gather=lambda rows: torch.cat([rows, *other])[:3])
    assert meter.compute() == pytest.approx(expected.compute(), rel=1e-5)


def test_a_device_without_float64_will_do(make_model, on_device) -> None:
    outputs, labels = outputs_and_labels(make_model(), torch.randint(1, 90, (2, 60)))
    with pytest.raises(TypeError, match="MPS"):
        on_device(outputs).logits.double()
    there, here = LocalityMeter(), LocalityMeter()
    there.update(on_device(outputs), on_device(labels))
    here.update(outputs, labels)
    assert there.compute() == here.compute()
