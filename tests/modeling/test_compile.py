"""
`torch.compile`: with its default backend, which needs a C++ compiler and a minute, run by `make test-slow`; with the
backend that runs graphs as they were traced in every run.
"""

import shutil
from pathlib import Path

import pytest
import torch
from architectures import localised, text
from torch.testing import assert_close
from transformers.utils.import_utils import is_torch_greater_or_equal

from localist_hf.modeling import opaque_ops
from localist_hf.modeling.block_partition import document_starts, window_block_starts
from localist_hf.modeling.local_set import LocalSet


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.slow
@NEEDS_COMPILER
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


@pytest.mark.slow
@NEEDS_COMPILER
def test_generation_gives_the_tokens_of_eager_mode(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="localist"), make_text(2, 30)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "partition", "dial"),
    [
        ("eager", "semantic", 0.5),
        *(
            pytest.param("inductor", partition, dial, marks=[pytest.mark.slow, NEEDS_COMPILER])
            for partition in ("semantic", "window", "delimiter")
            for dial in (0.5, 1.0)
        ),
    ],
)
def test_dialled_generation_needs_no_more_graphs_the_longer_it_gets(
    make_model, make_text, backend: str, partition: str, dial: float
) -> None:
    model = make_model(n_layer=2, locality_schedule="localist", block_partition=partition, num_sink_tokens=1)
    ids = make_text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def generate(max_new_tokens: int):
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            locality_dial=dial,
            output_logits=True,
            return_dict_in_generate=True,
        )

    expected = generate(45)
    model.forward = torch.compile(model.forward, backend=backend)
    generate(4)  # compiles the prompt, a step, and a step of any length
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = generate(45)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


@pytest.mark.skipif(not is_torch_greater_or_equal("2.12"), reason="torch 2.11 makes a graph for each length")
@torch.no_grad()
def test_one_graph_measures_texts_of_all_lengths(make_model, make_text) -> None:
    model = make_model(n_layer=2, locality_schedule=[0.5, 1.0])
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    # Without `min_fidelity` a setting of another test that is still alive would be looked for, outside of the graph.
    request = {"output_fidelity": True, "output_entropy": True, "locality_dial": 1.0, "min_fidelity": 0.0}
    request["use_cache"] = False
    compiled(make_text(2, 19), **request)
    for length in (32, 70):
        ids = make_text(2, length)
        with torch.compiler.set_stance("fail_on_recompile"):
            outputs = compiled(ids, **request)
        expected = model(ids, **request)
        assert_close(outputs.logits, expected.logits)
        for name in ("fidelity", "fidelity_mask", "block_starts", "entropy"):
            assert_close(getattr(outputs, name), getattr(expected, name))


@pytest.mark.parametrize(
    "architecture", ["gemma2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("llama", "gpt_oss"))]
)
@torch.no_grad()
def test_a_graph_takes_another_dial(architecture: str) -> None:
    """Gemma 2's attention is explicit, and warns of it, which is no reason to break a graph."""
    model = localised(architecture, block_partition="window", window_length=5)
    ids, _ = text("none")
    compiled = torch.compile(model, backend="eager", fullgraph=architecture == "gemma2")
    for dial, floor in ((0.5, 0.0), (0.7, 0.3)):
        request = {"locality_dial": dial, "min_fidelity": floor, "output_fidelity": True, "use_cache": False}
        outputs, expected = compiled(ids, **request), model(ids, **request)
        assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)
        assert_close(outputs.fidelity, expected.fidelity, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_warning_breaks_no_graph(make_model, make_text) -> None:
    model = make_model(n_layer=1, locality_schedule="distributed")  # of which the dial is said to change nothing
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = make_text(1, 9)
    request = {"locality_dial": 0.5, "min_fidelity": 0.0, "use_cache": False}
    assert torch.equal(compiled(ids, **request).logits, model(ids, use_cache=False).logits)


def test_warnings_are_given_where_no_graph_is_broken_by_them() -> None:
    """Everywhere else they would be."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(opaque_ops.__file__).parent.glob("*.py")}
    warning = {name for name, source in sources.items() if ".warning_once(" in source}
    assert warning == {"opaque_ops", "configuration_localist_gpt2"}  # the last reads a file


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_of_fixed_size_is_refused_by_name(make_model, make_text, compiled: bool) -> None:
    model = make_model(n_layer=2)
    if compiled:
        model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match=r"do not work with a cache of fixed size \(StaticCache\)"):
        model.generate(make_text(1, 12), max_new_tokens=4, locality_dial=0.5, cache_implementation="static")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("query_length", [1, 21])
def test_operators_are_what_they_promise_to_be(dtype: torch.dtype, query_length: int) -> None:
    """The same shapes, dtypes and strides as their stand-ins for tracing, and results that share no memory."""
    operators = getattr(torch.ops, opaque_ops._NAMESPACE)
    query, key, value = (torch.randn(2, 3, 21, 8, dtype=dtype) for _ in range(3))
    query, lse = query[:, :, -query_length:], torch.randn(2, 3, query_length).abs() + 5
    documents = document_starts(2, 21, torch.arange(21).ge(torch.tensor([[0], [6]])))
    starts = window_block_starts(documents, 7)
    local_set = LocalSet(starts[:, -query_length:], documents[:, -query_length:], 21, 7, 2)
    kept = local_set._replace(sink_keys=key[:, :, :2], sink_values=value[:, :, :2])
    last, kept_last = (each._replace(starts=starts[:, -1:], documents=documents[:, -1:]) for each in (local_set, kept))
    visible = (documents >= 0)[:, None, None]
    sums = torch.ones(2, 3, dtype=torch.float64)
    new, seen = documents[:, -query_length:], 21 - query_length
    before = (starts[:, -query_length] % 2 == 0, torch.stack((starts[:, -query_length], starts[:, 0]), dim=1))
    for name, *args in (
        ("local_shares", query, key, lse, 0.3, *local_set),
        ("local_shares", query, key, lse, 0.3, *kept),
        ("local_attention", query, key, value, 0.3, *local_set),
        ("local_attention", query, key, value, 0.3, *kept),
        ("attend_once", query[:, :, -1:], key[:, :1], value[:, :1], None, 0.3, 0.0, *last),
        ("attend_once", query[:, :, -1:], key[:, :1], value[:, :1], visible, 0.3, 0.5, *last),
        ("attend_once", query[:, :, -1:], key, value, None, 0.3, 0.0, *kept_last._replace(window=9)),
        ("find_separators", torch.randn(2, query_length), new, 1.0, seen, sums),
        ("search_one", [torch.rand(2, 3), torch.rand(2, 1)], documents[:, -1:], 1.0, 3, 12, 20, sums, *before),
        ("place", torch.rand(2, query_length) < 0.3, new, 3, 12, seen, *before),
    ):
        torch.library.opcheck(getattr(operators, name), tuple(args))


MASKS = {"padding between tokens": slice(10, 15), "padding at the start": slice(0, 5)}


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
@torch.no_grad()
def test_what_is_refused_is_refused_in_a_graph_too(make_model, make_text, backend: str, fullgraph: bool) -> None:
    model, ids = make_model(n_layer=1, block_partition="window", locality_schedule="localist"), make_text(2, 30)
    request = {"output_fidelity": True, "locality_dial": 0.5, "min_fidelity": 0.0}
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    for name, padding in MASKS.items():
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        if name == "padding between tokens":
            with pytest.raises((RuntimeError, ValueError), match="`attention_mask` has padding between tokens"):
                compiled(ids, attention_mask=mask, **request)
        else:
            logits = compiled(ids, attention_mask=mask, **request).logits
            expected = model(ids, attention_mask=mask, **request).logits
            assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    packed = torch.cat((torch.arange(12), torch.arange(18)))[None]
    with pytest.raises((RuntimeError, ValueError), match=r"`position_ids` start anew.*`use_cache=False`"):
        compiled(ids, position_ids=packed, use_cache=True, **request)
    outputs = compiled(ids, position_ids=packed, use_cache=False, **request)
    assert_close(outputs.logits, model(ids, position_ids=packed, **request).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("bias", "LlamaAttention adds a bias to its scores", marks=pytest.mark.slow),
        ("documents", "packed in one row see each other"),
    ],
)
@torch.no_grad()
def test_masks_are_looked_at_in_a_graph_too(kind: str, message: str) -> None:
    """A model whose masks say something else than ours count on, as a fork of an architecture may."""
    model = localised("llama", block_partition="window")
    ids, _ = text("none")
    position = torch.cat((torch.arange(30), torch.arange(len(ids[0]) - 30)))[None]

    def other_mask(module, args, kwargs):
        causal = torch.ones(2, 1, len(ids[0]), len(ids[0]), dtype=torch.bool).tril()
        if kind == "bias":
            causal = torch.where(causal, -0.1, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": causal}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(other_mask, with_kwargs=True)
    inputs = {"position_ids": position} if kind == "documents" else {}
    compiled = torch.compile(model, backend="eager")
    for forward in (model, compiled):
        with pytest.raises((RuntimeError, ValueError), match=message):
            forward(ids, **inputs, use_cache=False, output_fidelity=True, locality_dial=0.5, min_fidelity=0.0)
