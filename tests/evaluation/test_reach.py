"""The reach of a prediction: what it says cannot be changed by anything out of it."""

import pytest
import torch
from datasets import Dataset

from localist_hf.evaluation import measure_controls
from localist_hf.evaluation.reach import first_in_reach


@pytest.mark.parametrize("settings", [
    {"block_partition": "window"}, {"block_partition": "window", "num_previous_blocks": 1}, {"num_previous_blocks": 1},
    {"block_partition": "delimiter", "num_previous_blocks": 1},
])  # fmt: skip
@pytest.mark.parametrize("sinks", [0, 2])
def test_gradients_end_where_the_reach_does(make_model, make_text, settings: dict, sinks: int) -> None:
    model = make_model(n_layer=3, locality_schedule="localist", num_sink_tokens=sinks, **settings).eval()
    ids = make_text(2, 60)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    # Blocks stay as they are: delimiters are told by the ids, and semantic ones are given.
    starts = model(ids, locality_dial=1.0, output_fidelity=[2]).block_starts[0]
    outputs = model(inputs_embeds=embeddings, block_starts=starts, locality_dial=1.0, output_fidelity=True)
    first = first_in_reach(outputs, model.config.locality)
    assert (first[:, 0] == 0).all() and first.max() > 10
    for position in (7, 33, 59):
        (gradient,) = torch.autograd.grad(outputs.logits[:, position].sum(), embeddings, retain_graph=True)
        for row in range(2):
            seen = gradient[row].abs().sum(-1).nonzero().flatten().tolist()
            assert min(each for each in seen if each >= sinks) == max(first[row, position].item(), sinks)
            assert all(each < sinks or each >= first[row, position] for each in seen)


def test_controls_say_how_much_of_the_context_is_out_of_reach(make_model, make_text) -> None:
    dataset = Dataset.from_dict({"input_ids": make_text(3, 42).tolist()})
    settings = {"n_layer": 2, "block_partition": "window", "window_length": 7, "num_previous_blocks": 1}
    found = measure_controls(make_model(locality_schedule="localist", **settings), dataset, dials=[0, 1])
    # Two layers, one block before: the own block and two before it.
    expected = [max(0, at // 7 - 2) * 7 / at for at in range(1, 42)]
    assert found.share_out_of_reach == pytest.approx(sum(expected) / len(expected))
    assert (
        measure_controls(make_model(locality_schedule="upper_half", **settings), dataset, dials=[0, 1]).to_dict()[
            "share_out_of_reach"
        ]
        is None
    )
