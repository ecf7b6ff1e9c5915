"""The `evaluate` modules: loaded by path without a network, documented, and right."""

import doctest
import math
import socket

import evaluate
import pytest
import torch

from localist_hf.evaluation import LocalityMeter, load_metric
from localist_hf.evaluation.metrics import METRICS


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))


@pytest.fixture
def load(tmp_path):
    def metric(name: str, **kwargs) -> evaluate.Metric:
        if name == "block_lift":
            pytest.importorskip("localist_hf.evaluation.block_lift")
        return load_metric(name, cache_dir=str(tmp_path), **kwargs)

    return metric


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is_and_its_example_is_true(load, name: str) -> None:
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    for said in (metric.description, metric.inputs_description):
        assert len(said) > 100
    for part in ("Args:", "Returns:", "Examples:"):
        assert part in metric.inputs_description
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {"load_metric": load}, name, None, 0)
    assert len(example.examples) == 2
    failures = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_loads_as_any_local_metric_does_and_adds_batches(load) -> None:
    metric = load("context_fidelity")
    generator = torch.manual_seed(0)
    block, outside = torch.rand(2, 30, generator=generator) / 2
    for start in range(0, 30, 7):
        metric.add_batch(block_shares=block[start : start + 7], outside_shares=outside[start : start + 7])
    found = metric.compute()
    assert found["context_fidelity"] == pytest.approx((block.sum() / (block + outside).sum()).item())
    assert found["context_share"] == pytest.approx((block + outside).mean().item())
    assert math.isnan(metric.compute(block_shares=[0.0], outside_shares=[0.0])["context_fidelity"])


@torch.no_grad()
def test_shares_are_what_the_meter_gives(load, make_model, make_text) -> None:
    model, ids = make_model(num_sink_tokens=1), make_text(2, 60)
    outputs = model(ids, output_fidelity=True, output_entropy=True)
    meter = LocalityMeter()
    meter.update(outputs, ids)
    metrics = meter.compute()
    counted = outputs.fidelity_mask[-1]
    shares = {
        f"{name}s": outputs[name][-1].transpose(1, 2)[counted].flatten()
        for name in ("self_share", "sink_share", "block_share", "outside_share")
    }
    found = load("attention_shares").compute(**shares)
    shares.pop("self_shares"), shares.pop("sink_shares")
    found |= load("context_fidelity").compute(**shares)
    assert found == pytest.approx({name: metrics[f"{name}_layer_3"] for name in found}, rel=1e-5)
    assert len(found) == 7


def test_shares_that_are_none_are_refused(load) -> None:
    with pytest.raises(ValueError, match=r"The shares at 1 sum to 0\.0000; they must sum to 1"):
        load("attention_shares").compute(
            self_shares=[1.0, 0.0], sink_shares=[0.0, 0.0], block_shares=[0.0, 0.0], outside_shares=[0.0, 0.0]
        )


def test_the_divergence_is_in_bits(load) -> None:
    free, dialled = torch.randn(2, 9, 17, generator=torch.manual_seed(0))
    p, q = free.double().softmax(-1), dialled.double().softmax(-1)
    expected = (p * (p / q).log2()).sum(-1).mean().item()
    metric = load("divergence")
    assert metric.compute(predictions=dialled, references=free)["divergence"] == pytest.approx(expected, rel=1e-5)
    assert metric.compute(predictions=free, references=free)["divergence"] == pytest.approx(0, abs=1e-6)


def test_the_cost_at_dial_1_is_the_ratio_of_perplexities(load) -> None:
    free, dialled = torch.rand(2, 50, generator=torch.manual_seed(0)) * 5
    found = load("cost_at_dial_1").compute(predictions=dialled, references=free)
    assert found["perplexity"] == pytest.approx(free.mean().exp().item(), rel=1e-5)
    assert found["dialled_perplexity"] == pytest.approx(dialled.mean().exp().item(), rel=1e-5)
    assert found["cost_at_dial_1"] == pytest.approx(found["dialled_perplexity"] / found["perplexity"])


def test_block_lift_takes_texts_of_different_lengths(load) -> None:
    metric = load("block_lift")
    block_lift = pytest.importorskip("localist_hf.evaluation.block_lift").block_lift
    starts = [[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 2, 2, 2]]
    boundaries = [[i in (3, 6) for i in range(8)], [i == 4 for i in range(5)]]
    padded = torch.tensor([starts[0], [*starts[1], -1, -1, -1]])
    marks = torch.tensor([boundaries[0], [*boundaries[1], False, False, False]])
    for tolerance in (0, 1):
        found = metric.compute(predictions=starts, references=boundaries, tolerance=tolerance)
        assert found["block_lift"] == pytest.approx(block_lift(padded, marks, tolerance))
    with pytest.raises(ValueError, match=r"`predictions\[0\]` is of 2 tokens and `references\[0\]` of 1"):
        metric.compute(predictions=[[0, 0]], references=[[True]])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="`name` is 'psi'; allowed are 'attention_shares', 'block_lift', 'context_fid"):
        load_metric("psi")


@pytest.mark.parametrize(("former", "name"), [("retention", "cost_at_dial_1"), ("faithfulness", "divergence")])
def test_former_names_load_with_a_warning(load, former: str, name: str) -> None:
    with pytest.warns(FutureWarning, match=f"The metric '{former}' is called '{name}' now"):
        metric = load(former)
    assert metric.inputs_description == load(name).inputs_description
