"""`measure` over a data set, and on another model's blocks."""

import torch
from datasets import Dataset

from localist_hf.evaluation import LocalityMeter, measure


def test_is_what_the_model_says_of_each_batch(make_model) -> None:
    model = make_model()
    input_ids = torch.randint(7, 97, (5, 60))
    meter = LocalityMeter()
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids, output_fidelity=True, output_entropy=True)
    meter.update(outputs, input_ids)
    metrics = measure(model.train(), Dataset.from_dict({"input_ids": input_ids.tolist()}), batch_size=2)
    assert all(abs(metrics[name] - value) < 1e-5 * abs(value) + 1e-7 for name, value in meter.compute().items())


def test_on_the_blocks_of_another_model(make_model) -> None:
    model, base = make_model(seed=1), make_model(seed=2)
    input_ids = torch.randint(7, 97, (2, 60))
    dataset = Dataset.from_dict({"input_ids": input_ids.tolist()})
    with torch.no_grad():
        starts = base(input_ids, output_fidelity=[3]).block_starts[0]
        expected = model(input_ids, output_fidelity=True, block_starts=starts)
    metrics = measure(model, dataset, block_model=base)
    for layer, (fidelity, mask) in enumerate(zip(expected.fidelity, expected.fidelity_mask, strict=True)):
        mean = fidelity.transpose(1, 2)[mask].mean().item()
        assert abs(metrics[f"fidelity_layer_{layer}"] - mean) < 1e-5
    assert metrics["fidelity_layer_1"] != measure(model, dataset)["fidelity_layer_1"]
