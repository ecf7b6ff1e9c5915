from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from localist_hf.modeling import fused_attention
from localist_hf.modeling.block_attention import local_shares
from localist_hf.modeling.fused_attention import attention_with_lse
from localist_hf.modeling.local_set import LocalSet


LENGTHS = (1, 2, 31, 32, 33, 64, 100, 200)
LAYOUTS = ("plain", "left", "right", "packed")


def local_fidelity(query, key, lse, starts, documents, max_length: int, num_sinks: int, scale: float) -> torch.Tensor:
    """The share of each query's attention on its local set."""
    return sum(local_shares(query, key, lse, LocalSet(starts, documents, key.shape[2], max_length, num_sinks), scale))


@dataclass
class Case:
    """Random queries, keys and values with blocks, and the random linear functionals that gradients are taken of."""

    key_length: int
    layout: str = "plain"
    query_length: int | None = None
    head_dim: int = 16
    num_heads: int = 2
    batch_size: int = 2
    max_block_length: int = 20
    num_sink_tokens: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self):
        generator = torch.manual_seed(self.seed)
        rows, length = self.batch_size, self.key_length
        self.query_length = self.query_length or length
        self.scale = self.head_dim**-0.5

        position = torch.arange(length)
        self.documents = torch.zeros(rows, length, dtype=torch.long)
        for row in range(rows):  # each row has its own amount of padding, or its own boundaries
            cut = int(torch.randint(0, length, (), generator=generator))
            if self.layout == "left":
                self.documents[row] = torch.where(position < cut, -1, cut)
            elif self.layout == "right":
                self.documents[row, cut + 1 :] = -1
            elif self.layout == "packed":
                self.documents[row, cut // 3 :] = cut // 3
                self.documents[row, cut:] = cut
        candidates = torch.rand(rows, length, generator=generator) < 0.1
        self.block_starts = reference.place_block_starts(candidates, self.documents, 1, self.max_block_length)
        self.visible = reference.visible_keys(self.documents, self.query_length)
        self.local = reference.local_set(self.block_starts, self.documents, self.num_sink_tokens, self.query_length)
        self.counted = reference.counted(self.visible, self.local, self.documents)[:, None]

        def random(length: int, *width: int) -> torch.Tensor:
            # In memory as models have it: heads beside each other in each position, not contiguous.
            shape = (rows, length, self.num_heads, *width)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).transpose(1, 2)

        self.inputs = [random(self.query_length, self.head_dim)] + [random(length, self.head_dim) for _ in range(2)]
        # Queries on padding mean nothing: no functional looks at them.
        is_token = (self.documents >= 0)[:, None, -self.query_length :]
        self.of_output = random(self.query_length, self.head_dim).double() * is_token[..., None]
        self.of_fidelity = random(self.query_length).double() * self.counted

    def measure(self) -> "Measured":
        """What the package says."""
        query, key, value = inputs = [tensor.clone().requires_grad_() for tensor in self.inputs]
        is_plain = self.layout == "plain" and self.query_length in (1, self.key_length)
        mask, is_causal = (None, self.query_length > 1) if is_plain else (self.visible, False)
        output, lse = attention_with_lse(query, key, value, mask, is_causal, self.scale)
        starts, documents = self.block_starts[:, -self.query_length :], self.documents[:, -self.query_length :]
        share = local_fidelity(
            query, key, lse, starts, documents, self.max_block_length, self.num_sink_tokens, self.scale
        )
        # As in the package: what stands on padding, where it may be anything, must not make a nan.
        fidelity = torch.where(self.counted, share.clamp(max=1), 1.0)
        return Measured(self, inputs, output, lse, lse + share.log(), fidelity)

    def expect(self) -> "Measured":
        """What the explicit matrix says, in float64, of the same rounded inputs."""
        query, key, value = inputs = [tensor.double().requires_grad_() for tensor in self.inputs]
        output, weights, lse = reference.attention(query, key, value, self.visible, self.scale)
        _, _, local = reference.attention(query, key, value, self.local, self.scale)
        return Measured(self, inputs, output, lse, local, reference.fidelity(weights, self.local))


@dataclass
class Measured:
    case: Case
    inputs: list[torch.Tensor]
    output: torch.Tensor
    lse: torch.Tensor
    local: torch.Tensor
    fidelity: torch.Tensor

    def functional(self, of_output: float = 1.0, of_fidelity: float = 1.0) -> torch.Tensor:
        output = (self.output.double() * self.case.of_output).sum()
        fidelity = (self.fidelity.double() * self.case.of_fidelity).sum()
        return of_output * output + of_fidelity * fidelity

    def gradients(self, of_output: float = 1.0, of_fidelity: float = 1.0) -> list[torch.Tensor]:
        return torch.autograd.grad(
            self.functional(of_output, of_fidelity), self.inputs, retain_graph=True, materialize_grads=True
        )


def check(case: Case, values: float = 1e-5, gradients: float = 1e-4) -> None:
    """The package's numbers and gradients are those of the explicit matrix, within these absolute tolerances."""
    actual, expected = case.measure(), case.expect()
    seen = case.visible.any(-1).expand_as(expected.lse)
    wide = torch.promote_types(case.dtype, torch.float32)
    assert actual.output.dtype == case.dtype and actual.lse.dtype == actual.fidelity.dtype == wide
    assert_close(actual.output.double(), expected.output, atol=values, rtol=0)
    assert_close(actual.lse.double()[seen], expected.lse[seen], atol=values, rtol=0)
    is_token = case.local.any(-1).expand_as(expected.lse)
    assert_close(actual.local.double()[is_token], expected.local[is_token], atol=values, rtol=0)
    counted = case.counted.expand_as(expected.lse)
    assert_close(actual.fidelity.double()[counted], expected.fidelity[counted], atol=values, rtol=0)
    for name, grad, exact in zip(("query", "key", "value"), actual.gradients(), expected.gradients(), strict=True):
        assert grad.dtype == case.dtype
        assert_close(grad.double(), exact, atol=gradients, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_matrix_at_every_length_and_layout(length: int, layout: str):
    check(Case(length, layout, num_sink_tokens=1, seed=length))


@pytest.mark.parametrize("head_dim", [8, 16, 64, 20])
@pytest.mark.parametrize("length", [33, 100])
def test_equals_the_matrix_at_every_head_size(length: int, head_dim: int):
    check(Case(length, "left", head_dim=head_dim))


@pytest.mark.parametrize("max_block_length", [1, 2, 31, 32, 33, 34, 64, 65, 80, 200])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_equals_the_matrix_at_every_block_length(max_block_length: int, layout: str):
    check(Case(200, layout, max_block_length=max_block_length, batch_size=1))


@pytest.mark.parametrize("num_sink_tokens", range(5))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_matrix_with_any_number_of_sinks(num_sink_tokens: int, layout: str):
    # Short texts too, where a sink is the query itself, in its block, or after it.
    for length in (1, 3, 40):
        check(Case(length, layout, num_sink_tokens=num_sink_tokens, max_block_length=4, seed=length))


@pytest.mark.parametrize("query_length", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("key_length", [71, 96, 160])
@pytest.mark.parametrize("layout", ["plain", "left"])
def test_equals_the_matrix_for_the_queries_after_a_cache(query_length: int, key_length: int, layout: str):
    check(Case(key_length, layout, query_length, max_block_length=40, num_sink_tokens=2, seed=query_length))


def test_a_block_as_long_as_the_text_is_all_there_is():
    case = Case(150, max_block_length=150)
    case.block_starts = torch.zeros_like(case.block_starts)
    query, key, value = case.inputs
    _, lse = attention_with_lse(query, key, value, None, True, case.scale)
    share = local_fidelity(query, key, lse, case.block_starts, case.documents, 150, 0, case.scale)
    assert_close(share, torch.ones_like(share), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("batch_size", "num_heads"), [(1, 1), (3, 5), (7, 1), (1, 12)])
def test_equals_the_matrix_for_any_number_of_rows_and_heads(batch_size: int, num_heads: int):
    check(Case(70, "right", batch_size=batch_size, num_heads=num_heads))


def test_equals_the_matrix_where_the_band_is_walked_in_pieces():
    # More scores than are held at a time, over heads of one row and over rows.
    check(Case(1000, num_heads=12, batch_size=1, head_dim=8, max_block_length=64), gradients=2e-4)
    check(Case(200, "left", num_heads=5, batch_size=9, head_dim=8, max_block_length=64))


@given(st.data())
@settings(max_examples=50)
def test_equals_the_matrix_for_any_combination(data: st.DataObject):
    key_length = data.draw(st.integers(1, 140))
    check(
        Case(
            key_length,
            layout=data.draw(st.sampled_from(LAYOUTS)),
            query_length=data.draw(st.just(key_length) | st.integers(1, key_length)),
            head_dim=data.draw(st.sampled_from([8, 16, 64])),
            num_heads=data.draw(st.integers(1, 3)),
            batch_size=data.draw(st.integers(1, 3)),
            max_block_length=data.draw(st.integers(1, 80)),
            num_sink_tokens=data.draw(st.integers(0, 4)),
            seed=data.draw(st.integers(0, 999)),
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_exact_where_the_kernel_is(layout: str):
    case = Case(100, layout, dtype=torch.float64, num_sink_tokens=1)
    check(case, values=1e-12, gradients=1e-11)
    actual, expected = case.measure(), case.expect()
    assert_close(actual.output, expected.output, atol=1e-12, rtol=0)
    for grad, exact in zip(actual.gradients(of_fidelity=0), expected.gradients(of_fidelity=0), strict=True):
        assert_close(grad, exact, atol=1e-12, rtol=0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_as_exact_as_its_rounding(dtype: torch.dtype, tolerance: float, layout: str):
    case = Case(100, layout, dtype=dtype, num_sink_tokens=1)
    actual, expected = case.measure(), case.expect()
    seen = case.visible.any(-1).expand_as(expected.lse)
    assert relative_error(actual.output, expected.output) < tolerance / 2
    # Sums of scores are float32, whatever the inputs.
    assert_close(actual.lse.double()[seen], expected.lse[seen], atol=1e-3, rtol=0)
    counted = case.counted.expand_as(expected.lse)
    assert_close(actual.fidelity.double()[counted], expected.fidelity[counted], atol=1e-3, rtol=0)
    for of_output, of_fidelity in ((1, 1), (1, 0)):
        grads, exacts = (side.gradients(of_output, of_fidelity) for side in (actual, expected))
        for grad, exact in zip(grads, exacts, strict=True):
            assert relative_error(grad, exact) < tolerance
    # The gradient of the fidelity alone is a difference of two nearly equal ones.
    grads, exacts = (side.gradients(of_output=0)[:2] for side in (actual, expected))
    for grad, exact in zip(grads, exacts, strict=True):
        assert relative_error(grad, exact) < 3 * tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_queries_whose_output_has_none(layout: str):
    case = Case(80, layout, num_sink_tokens=1)
    case.of_output[:, :, ::3] = 0
    check(case)
    case.of_output[:] = 0
    check(case)


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-12])
def test_gradients_reach_queries_whose_output_has_a_tiny_one(size: float):
    case = Case(80, "left")
    case.of_output[:, :, ::2] *= size
    check(case)


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float32, 1.0, 1e-5),
        (torch.float32, 1e-4, 1e-5),
        (torch.float32, 1e-9, 1e-5),
        (torch.float64, 1.0, 1e-5),
        (torch.float64, 1e-4, 1e-5),
        (torch.float64, 1e-9, 1e-5),
        (torch.bfloat16, 1.0, 0.05),
        (torch.bfloat16, 1e-9, 0.05),
        (torch.float16, 1.0, 0.01),
        (torch.float16, 1e-2, 0.02),
    ],
)
def test_a_small_gradient_of_the_log_sum_exp_alone_is_not_lost(dtype: torch.dtype, size: float, tolerance: float):
    # What the last layer gets from a locality loss averaged over thousands of queries.
    case = Case(80, dtype=dtype)
    actual, expected = case.measure(), case.expect()
    weights = torch.randn(expected.lse.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    for position in (0, 1):
        (grad,) = torch.autograd.grad((actual.lse * weights).sum() * size, actual.inputs[position], retain_graph=True)
        (exact,) = torch.autograd.grad((expected.lse * weights).sum(), expected.inputs[position], retain_graph=True)
        assert relative_error(grad.double() / size, exact) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.01)],
)
def test_the_gradient_of_the_log_sum_exp_does_not_leak_into_the_values(dtype: torch.dtype, tolerance: float):
    # The scores do not depend on the values; what leaks adds up over queries, and in a bias over all tokens.
    measured = Case(80, dtype=dtype).measure()
    _, grad_key, grad_value = torch.autograd.grad(measured.lse.sum(), measured.inputs)
    assert grad_value.float().norm() < tolerance * grad_key.float().norm()
    assert grad_value.float().sum((0, 2)).norm() < tolerance * grad_key.float().sum((0, 2)).norm()


def test_gradients_may_come_in_any_memory_layout():
    case = Case(64, num_heads=3, batch_size=2)
    actual, expected = case.measure(), case.expect()

    def functional(side: Measured, weights: torch.Tensor) -> torch.Tensor:
        # Expanded over heads, and transposed.
        fidelity = (side.fidelity.mean(1) * case.of_fidelity[:, 0]).sum() + side.lse.mean(1).sum()
        return fidelity + (side.output.transpose(1, 2).flatten(2) @ weights.to(side.output.dtype)).sum()

    weights = torch.randn(3 * case.head_dim, 5, dtype=torch.float64)
    grads, exacts = (torch.autograd.grad(functional(side, weights), side.inputs) for side in (actual, expected))
    for grad, exact in zip(grads, exacts, strict=True):
        assert_close(grad.double(), exact, atol=1e-4, rtol=0)

    query, key, _ = (tensor.clone().requires_grad_() for tensor in case.inputs)
    lse = actual.lse.detach()
    local = local_fidelity(query, key, lse, case.block_starts, case.documents, case.max_block_length, 0, case.scale)
    layouts = (local.mean(1).sum(), (local.transpose(1, 2).contiguous() / 3).sum())
    first, second = (torch.autograd.grad(each, (query, key), retain_graph=True) for each in layouts)
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, atol=1e-6, rtol=0)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    case = Case(40, "left")
    case.documents[:] = torch.where(torch.arange(40) < 9, -1, 9)
    case.visible = reference.visible_keys(case.documents, 40)
    query, key, value = inputs = [tensor.requires_grad_() for tensor in case.inputs]
    output, lse = attention_with_lse(query, key, value, case.visible, False, case.scale)
    assert (output[:, :, :9] == 0).all()
    grads = torch.autograd.grad(output.sum() + lse[:, :, 9:].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :9] == 0).all() and (grads[1][:, :, :9] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operator makes, forward and backward."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 4)
        return result


def test_no_matrix_of_length_by_length_is_ever_held():
    case = Case(1024, batch_size=1, num_heads=2, head_dim=8, max_block_length=16, num_sink_tokens=2)
    with LargestTensor() as largest:
        measured = case.measure()
        torch.autograd.grad((measured.output * 2).sum() + measured.fidelity.sum(), measured.inputs)
    assert largest.entries < case.num_heads * 1024 * 128


# --- the path without a kernel


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "_choose_kernel", lambda *args, **kwargs: None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 100, 300])  # 300: more than one step
def test_without_a_kernel_it_still_equals_the_matrix(without_kernel, layout: str, length: int):
    check(Case(length, layout, num_sink_tokens=1))


@pytest.mark.parametrize("query_length", [1, 33])
def test_without_a_kernel_it_still_equals_the_matrix_after_a_cache(without_kernel, query_length: int):
    check(Case(100, "left", query_length))
    check(Case(100, "plain", query_length))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_kernel_it_equals_the_kernel(monkeypatch: pytest.MonkeyPatch, layout: str):
    case = Case(280, layout)
    fused = case.measure()
    monkeypatch.setattr(fused_attention, "_choose_kernel", lambda *args, **kwargs: None)
    chunked = case.measure()
    seen = case.visible.any(-1).expand_as(fused.lse)
    assert_close(chunked.output, fused.output, atol=1e-5, rtol=0)
    assert_close(chunked.lse[seen], fused.lse[seen], atol=1e-5, rtol=0)
    for grad, other in zip(chunked.gradients(), fused.gradients(), strict=True):
        assert_close(grad, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_kernel_half_precision_is_as_exact_as_its_rounding(without_kernel, dtype: torch.dtype):
    case = Case(100, "left", dtype=dtype)
    actual, expected = case.measure(), case.expect()
    for grad, exact in zip(actual.gradients(), expected.gradients(), strict=True):
        assert relative_error(grad, exact) < 0.02


# --- dropout


def test_dropout_says_that_it_costs_the_kernel(transformers_warnings):
    case = Case(8)
    attention_with_lse(*case.inputs, None, True, case.scale, dropout=0.1)
    assert any(
        "dropout is 0.1" in message and "attention dropout to 0" in message
        for message in transformers_warnings.messages
    )


def test_without_dropout_there_is_no_warning(transformers_warnings):
    case = Case(8)
    attention_with_lse(*case.inputs, None, True, case.scale)
    assert not transformers_warnings.messages


def test_dropout_is_unbiased_and_leaves_the_log_sum_exp_alone():
    case = Case(6, batch_size=1, head_dim=8)
    expected = case.expect()
    draws = []
    for _ in range(600):
        output, lse = attention_with_lse(*case.inputs, None, True, case.scale, dropout=0.3)
        assert_close(lse.double(), expected.lse, atol=1e-5, rtol=0)
        draws.append(output.double())
    draws = torch.stack(draws)
    assert (draws[0] != draws[1]).any()
    error = (draws.mean(0) - expected.output).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5  # standard errors
    # Inverted dropout of rate p: each weight a is a / (1 - p) or 0, so the variance is sum_j (a v)^2 p / (1 - p).
    _, weights, _ = reference.attention(*[tensor.double() for tensor in case.inputs], case.visible, case.scale)
    variance = weights.square() @ case.inputs[2].double().square() * (0.3 / 0.7)
    assert_close(draws.var(0), variance, rtol=0.4, atol=0)


def test_the_backward_pass_drops_the_weights_that_the_forward_dropped():
    # The output is linear in the values, so <output, g> = <values, its gradient> for the same dropped weights.
    case = Case(300, batch_size=1)  # more than one step
    query, key, value = case.inputs
    value.requires_grad_()
    output, _ = attention_with_lse(query, key, value, None, True, case.scale, dropout=0.5)
    torch.rand(7)  # what happens to the generator in between must not matter
    functional = (output * case.of_output.float()).sum()
    (grad,) = torch.autograd.grad(functional, value)
    assert_close((value * grad).sum(), functional, atol=1e-3, rtol=1e-4)


# --- torch's own operators


FORWARD = "(Tensor query, Tensor key, Tensor value, "
BACKWARD = "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
SCHEMAS = {
    "_scaled_dot_product_flash_attention_for_cpu": FORWARD
    + "float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp)",
    "_scaled_dot_product_flash_attention_for_cpu_backward": BACKWARD
    + "float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "_scaled_dot_product_flash_attention": FORWARD
    + "float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k,"
    " Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_scaled_dot_product_flash_attention_backward": BACKWARD
    + "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal,"
    " Tensor philox_seed, Tensor philox_offset, *, float? scale=None)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "_scaled_dot_product_efficient_attention": FORWARD
    + "Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, float? scale=None)"
    " -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
    "_scaled_dot_product_efficient_attention_backward": "(Tensor grad_out_, Tensor query, Tensor key, Tensor value,"
    " Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p,"
    " bool[4] grad_input_mask, bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_private_operators_of_torch_have_the_signatures_that_we_call(name: str):
    # They carry no promise: a torch that changes one must fail here, by name, before it computes something else.
    assert str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{SCHEMAS[name]}"


def test_no_other_private_operator_is_in_use():
    used = {
        name for forwards in fused_attention._KERNELS.values() for forward in forwards
        for name in (forward, f"{forward}_backward")
    }  # fmt: skip
    assert used == set(SCHEMAS)


# --- the CUDA branches, by stand-ins for torch's operators


class CudaStandIn:
    """
    Torch's operators for CUDA, from the explicit matrix: the same arguments, and results laid out as those of the real
    ones are (see the test below). Like those, the backward pass uses the output for `rowsum(dO * O)` alone.
    """

    @staticmethod
    def scores(query, key, bias, is_causal: bool, scale: float) -> torch.Tensor:
        scores = (query @ key.transpose(-1, -2)).float() * scale
        if bias is not None:
            scores = scores + bias
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        return scores

    def _scaled_dot_product_flash_attention(
        self, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        scores = self.scores(query, key, None, is_causal, scale)
        output = (scores.softmax(-1) @ value.float()).to(query.dtype)
        seed, offset = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        mask = query.new_empty(0)
        return output, scores.logsumexp(-1), None, None, query.shape[2], key.shape[2], seed, offset, mask

    def _scaled_dot_product_efficient_attention(
        self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
    ):
        assert compute_log_sumexp
        assert attn_bias is None or attn_bias.stride(-2) % 16 == 0  # what the kernel can read
        scores = self.scores(query, key, attn_bias, is_causal, scale)
        lse = scores.logsumexp(-1)
        output = (scores - lse.clamp(min=-1e30)[..., None]).exp() @ value.float()
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        return output.to(query.dtype), padded, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)

    def gradients(self, grad, query, key, value, output, lse, bias, is_causal, scale):
        grad, output = grad.float(), output.float()
        weights = (self.scores(query, key, bias, is_causal, scale) - lse.clamp(min=-1e30)[..., None]).exp()
        of_scores = weights * (grad @ value.float().transpose(-1, -2) - (grad * output).sum(-1, keepdim=True)) * scale
        gradients = (
            of_scores @ key.float(),
            of_scores.transpose(-1, -2) @ query.float(),
            weights.transpose(-1, -2) @ grad,
        )
        return [gradient.to(query.dtype) for gradient in gradients]

    def _scaled_dot_product_flash_attention_backward(
        self, grad, query, key, value, output, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, *, scale=None,
    ):  # fmt: skip
        assert cum_seq_q is None and cum_seq_k is None and (max_q, max_k) == (query.shape[2], key.shape[2])
        assert philox_seed.shape == (2,) and philox_offset.dtype == torch.uint64
        return self.gradients(grad, query, key, value, output, lse, None, is_causal, scale)

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, query, key, value, attn_bias, output, lse, philox_seed, philox_offset, dropout_p, grad_input_mask,
        is_causal=False, *, scale=None,
    ):  # fmt: skip
        assert grad_input_mask == [True, True, True, False] and lse.shape[-1] % 32 == 0
        assert philox_seed.dtype == philox_offset.dtype == torch.long
        lse = lse[..., : query.shape[2]]
        return *self.gradients(grad, query, key, value, output, lse, attn_bias, is_causal, scale), None


CUDA_KERNELS = {
    "cuda_flash": "_scaled_dot_product_flash_attention",
    "cuda_efficient": "_scaled_dot_product_efficient_attention",
}


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go to the stand-ins, as they go to torch's operators on a card that has both kernels."""
    monkeypatch.setattr(fused_attention, "_aten", CudaStandIn())
    monkeypatch.setattr(
        fused_attention,
        "_choose_kernel",
        lambda query, mask, dropout: (
            "cuda_flash" if mask is None and query.dtype != torch.float32 else "cuda_efficient"
        ),
    )


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_the_stand_ins_give_what_torchs_operators_give(kernel: str):
    query = torch.empty(2, 3, 40, 16, dtype=torch.float16, device="meta")
    name, rest = CUDA_KERNELS[kernel], () if kernel == "cuda_flash" else (None, True)
    real = getattr(torch.ops.aten, name)(query, query, query, *rest, 0.0, True, scale=0.3)
    query = torch.randn(2, 3, 40, 16, dtype=torch.float16)
    stand_in = getattr(CudaStandIn(), name)(query, query, query, *rest, 0.0, True, scale=0.3)
    assert len(real) == len(stand_in)
    for one, other in zip(real, stand_in, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_it_equals_the_matrix(on_cuda, layout: str):
    for length in (33, 100):
        check(Case(length, layout, num_sink_tokens=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["plain", "left"])
def test_on_cuda_half_precision_is_as_exact_as_its_rounding(on_cuda, dtype: torch.dtype, layout: str):
    case = Case(100, layout, dtype=dtype)
    actual, expected = case.measure(), case.expect()
    assert (actual.fidelity.double() - expected.fidelity)[case.counted.expand_as(actual.lse)].abs().max() < 0.02
    for grad, exact in zip(actual.gradients(), expected.gradients(), strict=True):
        assert relative_error(grad, exact) < 0.02


@pytest.mark.parametrize(
    ("flash", "efficient", "expected"),
    [
        (True, True, {"half": "cuda_flash", "half with a mask": "cuda_efficient", "float": "cuda_efficient"}),
        (False, True, {"half": "cuda_efficient", "half with a mask": "cuda_efficient", "float": "cuda_efficient"}),
        (False, False, {"half": None, "half with a mask": None, "float": None}),
    ],
    ids=["any card", "a card without the flash kernel", "no kernel"],
)
def test_torch_says_which_kernel_a_card_has(monkeypatch, transformers_warnings, flash, efficient, expected):
    class Params:
        def __init__(self, query, key, value, bias, dropout, is_causal, enable_gqa) -> None:
            self.is_half, self.has_mask = query.dtype == torch.float16, bias is not None

    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", Params)
    may_flash = lambda params: flash and params.is_half and not params.has_mask  # noqa: E731
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", may_flash)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda params: efficient)
    chosen = {
        name: fused_attention._cuda_kernel(torch.device("cpu"), dtype, 64, has_mask, True)
        for name, dtype, has_mask in (
            ("half", torch.float16, False),
            ("half with a mask", torch.float16, True),
            ("float", torch.float32, False),
        )
    }
    assert chosen == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_products_round_float32_band_and_kernel_still_agree(monkeypatch: pytest.MonkeyPatch, layout: str):
    """TF32: the band is measured by the kernel then, as everything is, so that no share exceeds 1."""
    monkeypatch.setitem(fused_attention._MATMULS, "cpu", SimpleNamespace(fp32_precision="tf32"))
    assert fused_attention.matmul_rounds_float32("cpu")
    monkeypatch.setattr(torch, "bmm", None)
    check(Case(100, layout, num_sink_tokens=1))


def test_float64_with_attention_dropout_stays_float64():
    case = Case(50, dtype=torch.float64)
    output, lse = attention_with_lse(*case.inputs, None, True, case.scale, dropout=0.1)
    assert output.dtype == lse.dtype == torch.float64
