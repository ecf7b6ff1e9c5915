"""`torch.compile` with its default backend, which needs a C++ compiler and a minute: run by `make test-slow`."""

import shutil

import pytest
import torch
from torch.testing import assert_close


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("sinks", [0, 2])
def test_training_gives_the_losses_and_gradients_of_eager_mode(make_model, make_text, sinks: int) -> None:
    model, ids = make_model(num_sink_tokens=sinks), make_text(2, 70)

    def gradients(forward) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        outputs = forward(ids, labels=ids, output_fidelity=True, use_cache=False)
        loss = outputs.loss + sum(fidelity.mean() for fidelity in outputs.fidelity)
        loss.backward()
        return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected_loss, expected = gradients(model)
    loss, actual = gradients(torch.compile(model))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_generation_gives_the_tokens_of_eager_mode(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="localist"), make_text(2, 30)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), expected)
