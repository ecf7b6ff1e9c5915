"""The fused path on a CUDA device against the explicit matrix; run by `make test-gpu`."""

import pytest
import reference
import torch
from torch.testing import assert_close

from localist_hf.modeling.block_attention import local_attention, local_shares
from localist_hf.modeling.block_partition import document_starts, place_block_starts
from localist_hf.modeling.fused_attention import attention_with_lse
from localist_hf.modeling.local_set import LocalSet


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH, SCALE = 300, 0.2


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("layout", ["plain", "left", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_the_matrix(dtype: torch.dtype, layout: str, sinks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, LENGTH, 64, generator=generator).to(dtype) for _ in range(3)]
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : 40 if layout == "left" else 0] = 0
    packed = torch.cat((torch.arange(120), torch.arange(LENGTH - 120)))[None].expand(2, -1)
    documents = document_starts(2, LENGTH, *((None, packed) if layout == "packed" else (mask, None)))
    starts = place_block_starts(torch.rand(2, LENGTH, generator=generator) < 0.1, documents, 4, 64)
    visible = reference.visible_keys(documents, LENGTH)
    local = reference.local_set(starts, documents, sinks, LENGTH)
    is_token = (documents >= 0)[:, None]
    of_output = torch.randn(2, 3, LENGTH, 64, generator=generator) * is_token[..., None]
    of_fidelity = torch.randn(2, 3, LENGTH, generator=generator) * is_token

    leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
    is_causal = layout == "plain"
    output, lse = attention_with_lse(*leaves, None if is_causal else visible.cuda(), is_causal, SCALE)
    where = (LocalSet(starts.cuda(), documents.cuda(), LENGTH, 64, sinks), SCALE)
    fidelity = sum(local_shares(*leaves[:2], lse, *where))
    functional = (output.float() * of_output.cuda()).sum() + (fidelity * of_fidelity.cuda()).sum()
    grads = torch.autograd.grad(functional, leaves)
    local_output, _ = local_attention(*leaves, *where)

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected, weights, _ = reference.attention(*exact, visible, SCALE)
    expected_fidelity = reference.fidelity(weights, local)
    functional = (expected * of_output).sum() + (expected_fidelity * of_fidelity).sum()
    exacts = torch.autograd.grad(functional, exact)
    expected_local, _, _ = reference.attention(*exact, local, SCALE)

    fine = dtype == torch.float32
    tokens = is_token.expand(-1, 3, -1)
    for actual, other, atol in (
        (output, expected, 1e-5 if fine else 2e-2),
        (fidelity, expected_fidelity, 1e-5 if fine else 5e-3),
        (local_output, expected_local, 1e-5 if fine else 2e-2),
    ):
        assert_close(actual.detach().cpu().double()[tokens], other.detach()[tokens], atol=atol, rtol=0)
    for grad, other in zip(grads, exacts, strict=True):
        assert_close(grad.cpu().double(), other, atol=1e-4 if fine else 5e-2, rtol=0)
