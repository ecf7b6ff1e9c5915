"""LocalityMeter: means over many batches are those of all of them at once."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from localist_hf.evaluation import LocalityMeter
from localist_hf.evaluation.locality_meter import metric_names
from localist_hf.evaluation.measure import everything
from localist_hf.modeling import LocalistCausalLMOutput


SHARES = ("self_share", "sink_share", "block_share", "outside_share")


def outputs_and_labels(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs):
    labels = input_ids.clone()
    if attention_mask is not None:
        labels[attention_mask == 0] = -100
    with torch.no_grad():
        inputs |= {"attention_mask": attention_mask, "labels": labels}
        outputs = model(input_ids, **inputs, **everything({}))
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


@pytest.mark.parametrize("previous", [0, 1, 2])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("partition", ["semantic", "window"])
def test_shares_are_those_of_the_attention_matrix(
    make_model, make_text, layer_metrics_by_matrix, partition: str, sinks: int, previous: int
) -> None:
    model = make_model(block_partition=partition, num_sink_tokens=sinks, num_previous_blocks=previous)
    mask = torch.ones(3, 90, dtype=torch.long)
    mask[0, 70:], mask[1, :9] = 0, 0
    packed = {"input_ids": make_text(1, 90, seed=3), "position_ids": torch.arange(90)[None] % 47}
    batches = [{"input_ids": make_text(3, 90), "attention_mask": mask}, {"input_ids": make_text(1, 60, seed=2)}, packed]
    meter, starts = LocalityMeter(), []
    for batch in batches:
        outputs, labels = outputs_and_labels(model, **batch)
        meter.update(outputs, labels)
        starts.append(outputs.block_starts)
    metrics = meter.compute()
    expected = layer_metrics_by_matrix(model, batches, starts)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=3e-5, abs=1e-5)
    assert list(metrics) == metric_names(4)
    for layer in range(4):
        assert sum(metrics[f"{name}_layer_{layer}"] for name in SHARES) == pytest.approx(1, abs=1e-5)
    for name in (*SHARES, "context_share", "fidelity", "visible_keys"):
        assert metrics[name] == pytest.approx(sum(metrics[f"{name}_layer_{layer}"] for layer in range(4)) / 4)
    assert metrics["context_fidelity"] == pytest.approx(metrics["block_share"] / metrics["context_share"])


def outputs_of(**shares: torch.Tensor) -> LocalistCausalLMOutput:
    """An output of one layer with these shares `(batch_size, num_heads, length)`, all of it counted."""
    mask = torch.ones(shares["self_share"][:, 0].shape, dtype=torch.bool)
    fidelity = 1 - shares["outside_share"]
    return LocalistCausalLMOutput(
        logits=torch.zeros(*mask.shape, 5),
        fidelity=(fidelity,),
        fidelity_mask=(mask,),
        entropy=(torch.zeros_like(fidelity),),
        visible_keys=(torch.ones_like(mask, dtype=torch.long),),
        block_starts=(torch.zeros_like(mask, dtype=torch.long),),
        **{name: (share,) for name, share in shares.items()},
    )


def measured(**shares: torch.Tensor) -> dict[str, float]:
    meter = LocalityMeter()
    outputs = outputs_of(**shares)
    meter.update(outputs, torch.zeros(outputs.logits.shape[:2], dtype=torch.long))
    return meter.compute()


@given(seed=st.integers(0, 2**31), kept=st.floats(0.01, 0.99), taker=st.sampled_from(["self_share", "sink_share"]))
def test_attention_moved_to_self_or_sink_in_proportion_raises_fidelity_and_not_context_fidelity(
    seed: int, kept: float, taker: str
) -> None:
    """What every query takes away from the other words, from each alike, it gives to itself or the sink."""
    generator = torch.Generator().manual_seed(seed)
    shares = dict(zip(SHARES, torch.rand(4, 2, 3, 11, generator=generator, dtype=torch.float64) + 0.05, strict=True))
    total = sum(shares.values())
    shares = {name: share / total for name, share in shares.items()}
    context = shares["block_share"] + shares["outside_share"]
    moved = shares | {name: kept * shares[name] for name in ("block_share", "outside_share")}
    moved[taker] = shares[taker] + (1 - kept) * context
    before, after = measured(**shares), measured(**moved)
    assert after["context_fidelity_layer_0"] == pytest.approx(before["context_fidelity_layer_0"], abs=1e-6)
    assert after["fidelity_layer_0"] > before["fidelity_layer_0"]
    assert after["context_share_layer_0"] == pytest.approx(kept * before["context_share_layer_0"], abs=1e-6)


def test_context_fidelity_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
    """A query that looks at other words ten times as much weighs ten times as much."""
    block, outside = torch.tensor([[[0.8, 0.0]]]), torch.tensor([[[0.0, 0.08]]])
    metrics = measured(
        self_share=1 - block - outside, sink_share=torch.zeros(1, 1, 2), block_share=block, outside_share=outside
    )
    assert metrics["context_fidelity"] == pytest.approx(0.8 / 0.88)
    assert metrics["context_share"] == pytest.approx(0.44)


def test_without_attention_to_other_words_the_context_fidelity_is_undefined() -> None:
    nothing = torch.zeros(1, 1, 3)
    metrics = measured(self_share=nothing + 1, sink_share=nothing, block_share=nothing, outside_share=nothing)
    assert math.isnan(metrics["context_fidelity"])
    assert metrics["context_share"] == 0.0
    assert metrics["fidelity"] == 1.0


def test_text_within_one_block_has_fidelity_one_and_no_shares(make_model) -> None:
    model = make_model()
    meter = LocalityMeter()
    meter.update(*outputs_and_labels(model, torch.randint(1, 90, (1, 6))))
    metrics = meter.compute()
    assert metrics["fidelity"] == 1.0
    for name in (*SHARES, "context_share", "context_fidelity", "visible_keys"):
        assert math.isnan(metrics[name])
        assert math.isnan(metrics[f"{name}_layer_3"])


def test_layers_without_counted_positions_do_not_blur_the_shares_of_the_others(make_model, make_text) -> None:
    """As where a layer's sliding window is shorter than the blocks."""
    outputs, labels = outputs_and_labels(make_model(), make_text(2, 60))
    outputs.fidelity_mask = (torch.zeros_like(outputs.fidelity_mask[0]), *outputs.fidelity_mask[1:])
    meter = LocalityMeter()
    meter.update(outputs, labels)
    metrics = meter.compute()
    for name in SHARES:
        assert math.isnan(metrics[f"{name}_layer_0"])
        assert metrics[name] == pytest.approx(sum(metrics[f"{name}_layer_{layer}"] for layer in (1, 2, 3)) / 3)


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
    there, here = (LocalityMeter() for _ in range(2))
    there.update(on_device(outputs), on_device(labels))
    here.update(outputs, labels)
    assert there.compute() == here.compute()
