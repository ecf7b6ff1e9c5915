"""`measure` over a data set, and on another model's blocks."""

import pytest
import torch
from datasets import Dataset

from localist_hf.evaluation import LocalityMeter, locality_probe, measure, measure_controls


def test_is_what_the_model_says_of_each_batch(make_model) -> None:
    model = make_model()
    input_ids = torch.randint(7, 97, (5, 60))
    meter = LocalityMeter()
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids, output_fidelity=True, output_entropy=True)
    meter.update(outputs, input_ids)
    metrics = measure(model.train(), Dataset.from_dict({"input_ids": input_ids.tolist()}), batch_size=2).metrics
    assert all(abs(metrics[name] - value) < 1e-5 * abs(value) + 1e-7 for name, value in meter.compute().items())


def test_on_the_blocks_of_another_model(make_model) -> None:
    model, base = make_model(seed=1), make_model(seed=2)
    input_ids = torch.randint(7, 97, (2, 60))
    dataset = Dataset.from_dict({"input_ids": input_ids.tolist()})
    with torch.no_grad():
        starts = base(input_ids, output_fidelity=[3]).block_starts[0]
        expected = model(input_ids, output_fidelity=True, block_starts=starts)
    metrics = measure(model, dataset, block_model=base).metrics
    for layer, (fidelity, mask) in enumerate(zip(expected.fidelity, expected.fidelity_mask, strict=True)):
        mean = fidelity.transpose(1, 2)[mask].mean().item()
        assert abs(metrics[f"fidelity_layer_{layer}"] - mean) < 1e-5
    assert metrics["fidelity_layer_1"] != measure(model, dataset).metrics["fidelity_layer_1"]


def ragged() -> tuple[list[list[int]], Dataset]:
    rows = [torch.randint(7, 97, (length,)).tolist() for length in (60, 25, 41)]
    return rows, Dataset.from_dict({"input_ids": rows})


def test_sequences_of_different_lengths_are_measured_as_each_alone(make_model) -> None:
    model = make_model()
    rows, dataset = ragged()
    expected = measure(model, dataset, batch_size=1).metrics
    assert measure(model, dataset, batch_size=3).metrics == pytest.approx(expected, rel=1e-4)
    # The same, padded beforehand.
    padded = {
        "input_ids": [row + [1] * (60 - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (60 - len(row)) for row in rows],
    }
    assert measure(model, Dataset.from_dict(padded), batch_size=2).metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("column", ["attention_mask", "position_ids"])
def test_the_other_model_finds_its_blocks_in_the_same_texts(make_model, column: str) -> None:
    model, base = make_model(seed=1), make_model(seed=2)
    input_ids = torch.randint(7, 97, (2, 60))
    mask = torch.ones_like(input_ids)
    mask[1, :25] = 0
    batch = {"input_ids": input_ids, column: mask if column == "attention_mask" else torch.arange(120).view(2, 60) % 33}
    with torch.no_grad():
        starts = base(**batch, output_fidelity=[3], use_cache=False).block_starts[0]
    dataset = Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})
    explicit = dataset.add_column("block_starts", starts.tolist())
    found, expected = measure(model, dataset, block_model=base), measure(model, explicit)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    with pytest.raises(ValueError, match="`dataset` holds `block_starts` and a `block_model` is given too"):
        measure(model, explicit, block_model=base)
    pointed = explicit.add_column("pointer_blocks", [[-1] * 60] * 2)
    measure(model, pointed)
    for call in (
        lambda: measure(model, pointed, with_controls=True),
        lambda: measure_controls(model, pointed),
        lambda: locality_probe(model, [batch | {"pointer_blocks": torch.full((2, 60), -1)}]),
    ):
        with pytest.raises(ValueError, match="`pointer_blocks` are given, which take the place"):
            call()


def test_a_data_set_without_a_sequence_is_an_error(make_model) -> None:
    with pytest.raises(ValueError, match="there is no batch to take a mean over"):
        measure(make_model(), Dataset.from_dict({"input_ids": []}))


def test_a_model_of_another_class_is_refused_by_name(make_model, gpt2_twin) -> None:
    model = make_model(block_partition="window")
    dataset, plain = Dataset.from_dict({"input_ids": [list(range(7, 67))]}), gpt2_twin(model)
    for name, arguments in (("model", (plain, dataset)), ("block_model", (model, dataset, 8, plain))):
        with pytest.raises(ValueError, match=f"`{name}` is a GPT2LMHeadModel; it must be a localised"):
            measure(*arguments)
    with pytest.raises(ValueError, match=r"`model` is a LocalistGPT2Model; it must be a localised language model"):
        measure(model.transformer, dataset)
    assert measure(model, dataset, block_model=model.transformer).metrics == measure(model, dataset).metrics
