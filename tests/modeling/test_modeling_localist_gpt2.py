import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import localist_hf.modeling
from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model
from localist_hf.modeling import block_search, locality, locality_request
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION


PARTITIONS = ("semantic", "delimiter", "window")
LAYOUTS = ("plain", "left", "right", "packed")


def batch(layout: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Model inputs for two rows of tokens, each with its own padding, or packed with documents of its own."""
    length = ids.shape[1]
    position = torch.arange(length)
    if layout == "packed":
        cuts = torch.tensor([[length // 3, length // 2], [length // 5, length - 2]])
        start = torch.where(position < cuts[:, :1], 0, torch.where(position < cuts[:, 1:], cuts[:, :1], cuts[:, 1:]))
        return {"input_ids": ids, "position_ids": position - start}
    if layout == "plain":
        return {"input_ids": ids}
    padding = torch.tensor([[length // 3], [0]])
    mask = position >= padding if layout == "left" else position < length - padding
    return {
        "input_ids": torch.where(mask, ids, 0),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def documents_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """First position of each token's document, -1 on padding, by going along each row."""
    ids = inputs["input_ids"]
    documents = torch.full_like(ids, -1)
    for row in range(ids.shape[0]):
        first = None
        for i in range(ids.shape[1]):
            if "attention_mask" in inputs and not inputs["attention_mask"][row, i]:
                continue
            is_packed = "attention_mask" not in inputs and "position_ids" in inputs
            if first is None or (is_packed and inputs["position_ids"][row, i] == 0):
                first = i
            documents[row, i] = first
    return documents


@dataclass
class Reference:
    logits: torch.Tensor
    fidelity: list[torch.Tensor]
    counted: list[torch.Tensor]
    entropy: list[torch.Tensor]
    shares: list[dict[str, torch.Tensor]]
    has_context: list[torch.Tensor]
    block_starts: list[torch.Tensor]
    is_token: torch.Tensor
    margin: float  # how near the decision on a semantic block came to its threshold


def measure_by_matrix(gpt2: GPT2LMHeadModel, config: LocalistGPT2Config, inputs: dict[str, torch.Tensor]) -> Reference:
    """Everything from the attention matrices that GPT-2 returns with `"eager"` attention, differentiably."""
    documents = documents_of(inputs)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]

    values = []  # the last third of what each layer's projection returns
    hooks = [
        block.attn.c_attn.register_forward_hook(
            lambda module, args, result: values.append(
                result.detach().split(config.n_embd, dim=2)[2].unflatten(2, (config.n_head, -1)).transpose(1, 2)
            )
        )
        for block in gpt2.transformer.h
    ]
    outputs = gpt2(**inputs, use_cache=False, output_attentions=True)
    for hook in hooks:
        hook.remove()

    lengths = (config.min_block_length, config.max_block_length)
    m = 3 * config.n_layer // 4 if config.semantic_layer is None else config.semantic_layer
    nu = [reference.value_lengths(each) for each in values]
    starts, margin = [], math.inf
    for layer in range(config.n_layer):
        if config.block_partition == "semantic":
            last = min(layer, m)
            band = nu[min(3 * config.n_layer // 8, m, last) : last + 1]
            found, near = reference.semantic_block_starts(
                torch.stack(band).mean(0), documents, config.semantic_threshold, *lengths
            )
            margin = min(margin, near)
        elif config.block_partition == "delimiter":
            before = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), dim=1)
            ends = torch.isin(before, torch.tensor(config.delimiter_token_ids))
            found = reference.place_block_starts(ends, documents, *lengths)
        else:
            nowhere = torch.zeros_like(ids, dtype=torch.bool)
            found = reference.place_block_starts(nowhere, documents, config.window_length, config.window_length)
        starts.append(found)

    visible = reference.visible_keys(documents, length)
    sinks, previous = config.num_sink_tokens, config.num_previous_blocks
    local = [reference.local_set(each, documents, sinks, length, previous) for each in starts]
    counted = [reference.counted(visible, each, documents) for each in local]
    return Reference(
        outputs.logits,
        [
            torch.where(is_counted[:, None], reference.fidelity(weights, each), 1.0)
            for weights, each, is_counted in zip(outputs.attentions, local, counted, strict=True)
        ],
        counted,
        [reference.entropy_bits(weights) for weights in outputs.attentions],
        [
            reference.shares(weights, each, found, documents, sinks)
            for weights, each, found in zip(outputs.attentions, local, starts, strict=True)
        ],
        [reference.has_context(each, found, documents, sinks) for each, found in zip(local, starts, strict=True)],
        starts,
        documents >= 0,
        margin,
    )


def check_measurements(outputs, expected: Reference, fidelity: float = 1e-5, entropy: float = 3e-5) -> None:
    """
    The blocks are those of the reference, and the numbers, within these absolute tolerances.

    The entropy is a difference of numbers as large as the scores, and as exact as their rounding.
    """
    is_token = expected.is_token
    assert_close(outputs.logits[is_token], expected.logits[is_token], atol=1e-4, rtol=1e-4)
    for layer, starts in enumerate(expected.block_starts):
        assert torch.equal(outputs.block_starts[layer], starts)
        assert torch.equal(outputs.fidelity_mask[layer], expected.counted[layer])
        assert outputs.fidelity[layer].dtype == outputs.entropy[layer].dtype == torch.float32
        assert_close(outputs.fidelity[layer], expected.fidelity[layer], atol=fidelity, rtol=0)
        bits, expected_bits = (each.transpose(1, 2) for each in (outputs.entropy[layer], expected.entropy[layer]))
        assert_close(bits[is_token], expected_bits[is_token], atol=entropy, rtol=0)
        assert (bits[~is_token] == 0).all()
        assert torch.equal(outputs.context_mask[layer], expected.counted[layer] & expected.has_context[layer])
        for name, share in expected.shares[layer].items():
            measured = getattr(outputs, name)[layer].transpose(1, 2)
            assert_close(
                measured[is_token], share.transpose(1, 2)[is_token], atol=fidelity, rtol=0,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
            assert (measured[~is_token] == 0).all()
        total = sum(getattr(outputs, name)[layer] for name in expected.shares[layer]).transpose(1, 2)
        assert_close(total[is_token], torch.ones_like(total[is_token]), atol=fidelity, rtol=0)


# --- measurements against the explicit matrix


@pytest.mark.parametrize(("num_sink_tokens", "num_previous_blocks"), [(0, 0), (2, 0), (0, 1), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_fidelity_shares_entropy_and_blocks_equal_those_of_the_matrix(
    make_model, gpt2_twin, make_text, partition: str, layout: str, num_sink_tokens: int, num_previous_blocks: int
):
    model = make_model(
        block_partition=partition, num_sink_tokens=num_sink_tokens, num_previous_blocks=num_previous_blocks
    )
    inputs = batch(layout, make_text(2, 64, seed=5))
    with torch.no_grad():
        outputs = model(**inputs, output_fidelity=True, output_entropy=True)
        expected = measure_by_matrix(gpt2_twin(model, "eager"), model.config, inputs)
    assert expected.margin > 1e-4
    check_measurements(outputs, expected)
    if not num_previous_blocks:
        assert all(counted.float().mean() > 0.3 for counted in expected.counted)
    assert min(float(phi.min()) for phi in outputs.fidelity) < 0.1


@given(st.data())
@settings(max_examples=40)
def test_any_tiny_model_equals_the_matrix(make_model, gpt2_twin, make_text, data):
    num_layers = data.draw(st.integers(1, 4))
    shortest = data.draw(st.integers(1, 6))
    model = make_model(
        seed=data.draw(st.integers(0, 99)),
        n_layer=num_layers,
        n_head=data.draw(st.sampled_from([1, 2, 4])),
        locality_schedule=data.draw(st.sampled_from(["distributed", "linear", "quintic", "localist"])),
        block_partition=data.draw(st.sampled_from(PARTITIONS)),
        min_block_length=shortest,
        max_block_length=shortest + data.draw(st.integers(0, 40)),
        semantic_layer=data.draw(st.none() | st.integers(0, num_layers - 1)),
        num_previous_blocks=data.draw(st.integers(0, 3)),
        semantic_threshold=data.draw(st.sampled_from([0.3, 1.0])),
        num_sink_tokens=data.draw(st.integers(0, 4)),
        scale_attn_weights=data.draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=data.draw(st.booleans()),
    )
    inputs = batch(data.draw(st.sampled_from(LAYOUTS)), make_text(2, data.draw(st.integers(5, 90))))
    with torch.no_grad():
        outputs = model(**inputs, output_fidelity=True, output_entropy=True)
        expected = measure_by_matrix(gpt2_twin(model, "eager"), model.config, inputs)
    assume(expected.margin > 3e-4)
    # Without GPT-2's scale the scores are several times larger, and so is their rounding.
    check_measurements(outputs, expected, fidelity=5e-5, entropy=2e-4)


def locality_and_language_functional(fidelity: list[torch.Tensor], logits: torch.Tensor, is_token: torch.Tensor):
    """A fixed random linear function of everything that a loss can see."""
    generator = torch.manual_seed(3)
    total = (logits * torch.randn(logits.shape, generator=generator) * is_token[..., None]).mean()
    for phi in fidelity:
        total = total + (phi * torch.randn(phi.shape, generator=generator)).mean()
    return total


def check_gradients(model: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-4) -> None:
    others = dict(expected.named_parameters())
    assert others.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, others[name].grad, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_gradients_of_every_parameter_equal_those_of_the_matrix(
    make_model, gpt2_twin, make_text, partition: str, layout: str
):
    model = make_model(block_partition=partition, num_sink_tokens=1)
    gpt2 = gpt2_twin(model, "eager")
    inputs = batch(layout, make_text(2, 50))
    outputs = model(**inputs, output_fidelity=True)
    expected = measure_by_matrix(gpt2, model.config, inputs)
    locality_and_language_functional(outputs.fidelity, outputs.logits, expected.is_token).backward()
    locality_and_language_functional(expected.fidelity, expected.logits, expected.is_token).backward()
    check_gradients(model, gpt2)


@pytest.mark.parametrize("num_previous_blocks", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_context_fidelity_equal_those_of_the_matrix(
    make_model, gpt2_twin, make_text, layout: str, num_previous_blocks: int
):
    model = make_model(num_sink_tokens=1, num_previous_blocks=num_previous_blocks)
    gpt2 = gpt2_twin(model, "eager")
    inputs = batch(layout, make_text(2, 50))
    outputs = model(**inputs, output_fidelity=True)
    expected = measure_by_matrix(gpt2, model.config, inputs)
    for blocks, outsides in (
        (outputs.block_share, outputs.outside_share),
        ([each["block_share"] for each in expected.shares], [each["outside_share"] for each in expected.shares]),
    ):
        psi = [
            context_fidelity(block, outside, 1e-3) * mask[:, None]
            for block, outside, mask in zip(blocks, outsides, outputs.context_mask, strict=True)
        ]
        locality_and_language_functional(psi, outputs.logits.detach(), expected.is_token).backward()
    check_gradients(model, gpt2)
    assert model.transformer.h[-1].attn.c_attn.weight.grad.abs().max() > 1e-3


def test_the_gradient_of_the_fidelity_alone_equals_that_of_the_matrix(make_model, gpt2_twin, make_text):
    # The last layer's attention output gets no gradient at all.
    model = make_model()
    gpt2 = gpt2_twin(model, "eager")
    inputs = batch("left", make_text(2, 50))
    outputs = model(**inputs, output_fidelity=True)
    expected = measure_by_matrix(gpt2, model.config, inputs)
    none = torch.zeros_like(expected.is_token)
    locality_and_language_functional(outputs.fidelity, outputs.logits, none).backward()
    locality_and_language_functional(expected.fidelity, expected.logits, none).backward()
    check_gradients(model, gpt2, 1e-5)
    assert model.transformer.h[-1].attn.c_attn.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["plain", "left", "packed"])
def test_explicit_block_starts_serve_all_layers(make_model, gpt2_twin, make_text, layout: str):
    model = make_model(num_sink_tokens=1)
    inputs = batch(layout, make_text(2, 70))
    documents = documents_of(inputs)
    # One block may be as long as the text, whatever the limits of the configuration.
    starts = reference.place_block_starts(torch.rand(2, 70) < 0.03, documents, 1, 70)
    outputs = model(**inputs, output_fidelity=True, output_entropy=True, block_starts=starts)
    expected = measure_by_matrix(gpt2_twin(model, "eager"), model.config, inputs)
    attentions = gpt2_twin(model, "eager")(**inputs, use_cache=False, output_attentions=True).attentions
    local = reference.local_set(starts, documents, 1, 70)
    counted = reference.counted(reference.visible_keys(documents, 70), local, documents)
    for layer in range(4):
        expected.block_starts[layer], expected.counted[layer] = starts, counted
        phi = reference.fidelity(attentions[layer], local)
        expected.fidelity[layer] = torch.where(counted[:, None], phi, 1.0)
        expected.shares[layer] = reference.shares(attentions[layer], local, starts, documents, 1)
        expected.has_context[layer] = reference.has_context(local, starts, documents, 1)
    check_measurements(outputs, expected)


def test_a_window_may_be_longer_than_the_longest_block_of_the_other_partitions(make_model, gpt2_twin, make_text):
    model = make_model(block_partition="window", window_length=100, max_block_length=12)
    inputs = batch("plain", make_text(2, 250))
    with torch.no_grad():
        outputs = model(**inputs, output_fidelity=True, output_entropy=True)
        check_measurements(outputs, measure_by_matrix(gpt2_twin(model, "eager"), model.config, inputs))


def test_embeddings_in_place_of_tokens_give_the_same_measurements(make_model, make_text):
    model = make_model()
    ids = make_text(2, 40)
    embeddings = model.transformer.wte(ids)
    expected = model(ids, output_fidelity=True, output_entropy=True)
    outputs = model(inputs_embeds=embeddings, output_fidelity=True, output_entropy=True)
    for name in ("logits", "fidelity", "entropy", "block_starts"):
        assert_close(getattr(outputs, name), getattr(expected, name), atol=0, rtol=0)


def test_padded_rows_measure_what_they_measure_alone(make_model, make_text):
    model = make_model()
    ids = make_text(2, 60)
    for layout, text in (("left", slice(20, 60)), ("right", slice(0, 40))):
        inputs = batch(layout, ids)
        padded = model(**inputs, output_fidelity=True, output_entropy=True)
        alone = model(inputs["input_ids"][:1, text], output_fidelity=True, output_entropy=True)
        assert_close(padded.logits[:1, text], alone.logits, atol=1e-4, rtol=1e-4)
        for layer in range(4):
            assert torch.equal(padded.block_starts[layer][:1, text] - text.start, alone.block_starts[layer])
            assert torch.equal(padded.fidelity_mask[layer][:1, text], alone.fidelity_mask[layer])
            for name in ("fidelity", "entropy"):
                one, other = getattr(padded, name)[layer], getattr(alone, name)[layer]
                assert_close(one[:1, :, text], other, atol=1e-5, rtol=0)


def test_packed_documents_measure_what_they_measure_alone(make_model, make_text):
    model = make_model()
    inputs = batch("packed", make_text(2, 60))
    packed = model(**inputs, output_fidelity=True)
    for text in (slice(0, 20), slice(20, 30), slice(30, 60)):
        alone = model(inputs["input_ids"][:1, text], output_fidelity=True)
        assert_close(packed.logits[:1, text], alone.logits, atol=1e-4, rtol=1e-4)
        for layer in range(4):
            assert torch.equal(packed.block_starts[layer][:1, text] - text.start, alone.block_starts[layer])
            assert_close(packed.fidelity[layer][:1, :, text], alone.fidelity[layer], atol=1e-5, rtol=0)


# --- without a request it is GPT-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_request_the_logits_are_exactly_those_of_gpt2(make_model, gpt2_twin, make_text, layout: str):
    model = make_model()
    inputs = batch(layout, make_text(2, 70))
    outputs, expected = (each(**inputs, use_cache=False) for each in (model, gpt2_twin(model)))
    assert torch.equal(outputs.logits, expected.logits)
    assert outputs.fidelity is outputs.fidelity_mask is outputs.block_starts is outputs.entropy is None
    assert set(outputs) == set(expected)


def test_without_a_request_a_cache_gives_exactly_the_logits_of_gpt2(make_model, gpt2_twin, make_text):
    model = make_model()
    inputs = batch("left", make_text(2, 40))
    results = []
    for each in (model, gpt2_twin(model)):
        cache, logits = DynamicCache(), []
        for end, start in ((30, 0), (31, 30), (40, 31)):
            logits.append(
                each(
                    inputs["input_ids"][:, start:end],
                    attention_mask=inputs["attention_mask"][:, :end],
                    position_ids=inputs["position_ids"][:, start:end],
                    past_key_values=cache,
                ).logits
            )
        results.append(torch.cat(logits, dim=1))
    assert torch.equal(*results)


def test_without_a_request_gradients_and_loss_are_exactly_those_of_gpt2(make_model, gpt2_twin, make_text):
    model = make_model().train()
    gpt2 = gpt2_twin(model)
    ids = make_text(2, 40)
    losses = [each(ids, labels=ids).loss for each in (model, gpt2)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    check_gradients(model, gpt2, 0.0)


def test_without_a_request_no_block_is_computed(make_model, make_text, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a block was computed")

    monkeypatch.setattr(locality, "document_starts", refuse)
    searches = ("semantic_blocks", "semantic_step", "delimiter_blocks", "window_block_starts")
    for name in ("value_lengths", "value_norms", *searches):
        monkeypatch.setattr(block_search, name, refuse)
    for partition in PARTITIONS:
        make_model(block_partition=partition)(make_text(1, 9), output_fidelity=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measuring_does_not_change_the_logits(make_model, make_text, layout: str):
    model = make_model()
    inputs = batch(layout, make_text(2, 70))
    free = model(**inputs, use_cache=False)
    measured = model(**inputs, use_cache=False, output_fidelity=True, output_entropy=True)
    is_token = documents_of(inputs) >= 0
    assert_close(measured.logits[is_token], free.logits[is_token], atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_gpt2_while_measuring(make_model, gpt2_twin, make_text):
    model = make_model()
    ids = make_text(2, 40)
    labels = ids.clone()
    labels[:, :7] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(123)}):
        loss = model(ids, labels=labels, output_fidelity=True, **extra).loss
        assert_close(loss, gpt2_twin(model)(ids, labels=labels, **extra).loss)


def test_hidden_states_and_logits_to_keep_work_as_in_gpt2(make_model, gpt2_twin, make_text):
    model = make_model()
    ids = make_text(2, 40)
    outputs = model(ids, output_hidden_states=True, logits_to_keep=3, output_fidelity=True)
    expected = gpt2_twin(model)(ids, output_hidden_states=True, logits_to_keep=3)
    assert outputs.logits.shape == (2, 3, 97)
    assert_close(outputs.logits, expected.logits)
    assert_close(outputs.hidden_states, expected.hidden_states)
    assert outputs.fidelity[0].shape == (2, 4, 40)


def test_a_tuple_in_place_of_the_output_holds_the_same(make_model, make_text):
    model = make_model()
    ids = make_text(1, 30)
    for part in (model, model.transformer):
        for arguments in ({"output_fidelity": [1], "output_entropy": True}, {}):
            outputs = part(ids, **arguments)
            values = part(ids, return_dict=False, **arguments)
            assert isinstance(values, tuple)
            assert len(values) == len(outputs)
            assert torch.equal(values[0], outputs[0])


# --- what can be asked for


def test_a_subset_of_layers_gives_their_measurements_only(make_model, make_text):
    model = make_model()
    ids = make_text(2, 60)
    everything = model(ids, output_fidelity=True, output_entropy=True)
    assert model(ids, output_fidelity=[]).fidelity is None
    for layers in ([3], [0, 2], (2, 1)):
        some = model(ids, output_fidelity=layers, output_entropy=True)
        for name in ("fidelity", "fidelity_mask", "block_starts", "entropy"):
            expected = tuple(getattr(everything, name)[layer] for layer in sorted(layers))
            assert_close(getattr(some, name), expected, atol=1e-5, rtol=0)


def test_the_entropy_comes_only_when_asked_for(make_model, make_text):
    outputs = make_model()(make_text(1, 30), output_fidelity=True)
    assert outputs.entropy is None
    assert len(outputs.fidelity) == 4


def test_the_base_model_measures_what_the_language_model_measures(make_model, make_text):
    model = make_model()
    inputs = batch("left", make_text(2, 50))
    expected = model(**inputs, output_fidelity=True, output_entropy=True)
    outputs = model.transformer(**inputs, output_fidelity=True, output_entropy=True)
    for name in ("fidelity", "fidelity_mask", "block_starts", "entropy"):
        assert_close(getattr(outputs, name), getattr(expected, name), atol=0, rtol=0)


@pytest.mark.parametrize("part", ["language model", "base model"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_entropy": True}, "`output_entropy=True` needs `output_fidelity`"),
        ({"output_fidelity": [4]}, r"`output_fidelity` asks for layers \[4\]"),
        ({"output_fidelity": True, "attention_mask": torch.ones(2, 29)}, "`attention_mask` has the shape"),
        ({"output_fidelity": True, "block_starts": torch.full((2, 30), 9)}, r"`block_starts\[0, 0\]` is 9"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_model, make_text, part: str, arguments: dict, message: str):
    model = make_model()
    model = model.transformer if part == "base model" else model
    with pytest.raises(ValueError, match=message):
        model(make_text(2, 30), **arguments)


def test_another_attention_implementation_is_refused_until_it_is_set_back(make_model, make_text):
    model = make_model(attn_implementation="sdpa")
    ids = make_text(1, 30)
    with pytest.raises(ValueError, match=r"'localist'.*'sdpa'.*set_attn_implementation"):
        model(ids, output_fidelity=True)
    model.set_attn_implementation("localist")
    assert_close(model(ids, output_fidelity=True).fidelity, make_model()(ids, output_fidelity=True).fidelity)


def test_packed_documents_with_a_cache_are_measured_as_they_are_attended(make_model, gpt2_twin, make_text):
    # With a cache transformers does not separate packed documents; whatever attention does, the fidelity is its share.
    model = make_model(block_partition="window", num_sink_tokens=1)
    inputs = batch("packed", make_text(2, 60))
    outputs = model(**inputs, past_key_values=DynamicCache(), output_fidelity=True)
    gpt2 = gpt2_twin(model, "eager")
    attentions = gpt2(**inputs, past_key_values=DynamicCache(), output_attentions=True).attentions
    one_document = torch.zeros(2, 60, dtype=torch.long)
    for layer in range(4):
        local = reference.local_set(outputs.block_starts[layer], one_document, 1, 60)
        counted = reference.counted(reference.visible_keys(one_document, 60), local, one_document)
        assert torch.equal(outputs.fidelity_mask[layer], counted)
        phi = torch.where(counted[:, None], reference.fidelity(attentions[layer], local), 1.0)
        assert_close(outputs.fidelity[layer], phi, atol=1e-5, rtol=0)


# --- generation


@pytest.mark.parametrize("layout", ["plain", "left", "positions"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_forward_step_by_step_measures_what_the_full_forward_does(make_model, make_text, partition: str, layout: str):
    model = make_model(block_partition=partition, num_sink_tokens=1, num_previous_blocks=1)
    inputs = batch("plain" if layout == "positions" else layout, make_text(2, 48))
    if layout == "positions":  # those of a step do not begin at 0, which makes it no document of its own
        inputs["position_ids"] = torch.arange(48)[None].expand(2, -1)
    full = model(**inputs, output_fidelity=True, output_entropy=True)
    cache, steps = DynamicCache(), []
    ends = [20, 21, 22, 29, *range(30, 49)]
    for start, end in zip([0, *ends], ends, strict=False):
        step = {name: tensor[:, start:end] for name, tensor in inputs.items()}
        if "attention_mask" in inputs:
            step["attention_mask"] = inputs["attention_mask"][:, :end]
        steps.append(model(**step, past_key_values=cache, output_fidelity=True, output_entropy=True))
    is_token = documents_of(inputs) >= 0
    for layer in range(4):
        for name, dim in (("block_starts", 1), ("fidelity_mask", 1), ("context_mask", 1)):
            together = torch.cat([getattr(step, name)[layer] for step in steps], dim=dim)
            assert torch.equal(together, getattr(full, name)[layer])
        for name in ("fidelity", "entropy", "self_share", "sink_share", "block_share", "outside_share"):
            together = torch.cat([getattr(step, name)[layer] for step in steps], dim=2)
            assert_close(together, getattr(full, name)[layer], atol=2e-5, rtol=0)
    together = torch.cat([step.logits for step in steps], dim=1)
    assert_close(together[is_token], full.logits[is_token], atol=1e-4, rtol=1e-4)


def test_delimiter_blocks_go_on_from_a_cache_that_knows_where_the_search_stands(make_model, make_text):
    model = make_model(block_partition="delimiter")
    ids = make_text(2, 40)
    full = model(ids, output_fidelity=True)
    cache = DynamicCache()
    model(ids[:, :30], past_key_values=cache, output_fidelity=True)
    step = model(ids[:, 30:], past_key_values=cache, output_fidelity=True)
    unaware = DynamicCache()
    model(ids[:, :30], past_key_values=unaware)
    with pytest.raises(ValueError, match=r"`input_ids` of all tokens.*`block_starts`"):
        model(ids[:, 30:], past_key_values=unaware, output_fidelity=True)
    explicit = model(ids[:, 30:], past_key_values=unaware, output_fidelity=True, block_starts=full.block_starts[0])
    for outputs in (step, explicit):
        for layer in range(4):
            assert torch.equal(outputs.block_starts[layer], full.block_starts[layer][:, 30:])
            assert_close(outputs.fidelity[layer], full.fidelity[layer][:, :, 30:], atol=1e-5, rtol=0)


def generate(model: LocalistGPT2LMHeadModel, ids: torch.Tensor, **arguments) -> torch.Tensor:
    """25 greedy tokens after a prompt, without the prompt."""
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    tokens = model.generate(ids, max_new_tokens=25, min_new_tokens=25, do_sample=False, pad_token_id=0, **arguments)
    return tokens[:, ids.shape[1] :]


def test_greedy_generation_is_the_same_with_and_without_a_cache_and_as_gpt2(make_model, gpt2_twin, make_text):
    model = make_model()
    ids = make_text(2, 12)
    expected = generate(gpt2_twin(model), ids)
    assert len(expected.unique()) > 5
    for arguments in ({"use_cache": True}, {"use_cache": False}, {"output_fidelity": True}):
        assert torch.equal(generate(model, ids, **arguments), expected)


def test_a_left_padded_batch_generates_what_its_rows_generate_alone(make_model, make_text):
    model = make_model()
    inputs = batch("left", make_text(2, 18))
    together = generate(model, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for row, start in ((0, 6), (1, 0)):
        assert torch.equal(together[row], generate(model, inputs["input_ids"][row : row + 1, start:])[0])


# --- training and precision


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("attn_pdrop", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_fidelity_and_gradients(make_model, make_text, attn_pdrop: float):
    ids = make_text(2, 40)
    models = []
    for is_checkpointed in (False, True):
        model = make_model(attn_pdrop=attn_pdrop, resid_pdrop=attn_pdrop).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        outputs = model(ids, output_fidelity=True, use_cache=False)
        locality_and_language_functional(outputs.fidelity, outputs.logits, torch.ones_like(ids)).backward()
        models.append((model, outputs))
    (model, outputs), (checkpointed, others) = models
    assert_close(outputs.fidelity, others.fidelity, atol=0, rtol=0)
    check_gradients(checkpointed, model, 1e-6)


def test_two_forward_passes_keep_their_measurements_apart(make_model, make_text):
    # Nothing is kept on modules: the gradients of the first are right after the second.
    model, other = make_model(), make_model()
    first = model(make_text(2, 40), output_fidelity=True)
    model(make_text(1, 60, seed=9), output_fidelity=[3], output_entropy=True)
    expected = other(make_text(2, 40), output_fidelity=True)
    for outputs in (first, expected):
        locality_and_language_functional(outputs.fidelity, outputs.logits, torch.ones(2, 40)).backward()
    check_gradients(model, other, 0.0)


def test_gradients_that_torch_would_compile_wrongly_are_refused(make_model, make_text, monkeypatch):
    monkeypatch.setattr(locality_request, "_COMPILES_GRADIENTS", False)
    model, ids = make_model(n_layer=1), make_text(1, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for request in ({"output_fidelity": True}, {"locality_dial": 0.5}):
        with pytest.raises(ValueError, match=r"wrong gradients where torch .* compiles them; it needs 2\.12"):
            compiled(ids, use_cache=False, **request)
    with torch.no_grad():
        compiled(ids, use_cache=False, output_fidelity=True)


@pytest.mark.skipif(not locality_request._COMPILES_GRADIENTS, reason="refused on this torch")
@pytest.mark.parametrize("layout", [pytest.param("plain", marks=pytest.mark.slow), "left"])
def test_a_compiled_model_gives_the_same_outputs_and_gradients(make_model, make_text, layout: str):
    model, other = make_model(n_layer=2), make_model(n_layer=2)
    inputs = batch(layout, make_text(2, 40))
    is_token = documents_of(inputs) >= 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    outputs, expected = (
        each(**inputs, use_cache=False, output_fidelity=True, output_entropy=True) for each in (compiled, other)
    )
    for layer in range(2):
        assert torch.equal(outputs.block_starts[layer], expected.block_starts[layer])
        assert_close(outputs.fidelity[layer], expected.fidelity[layer], atol=1e-5, rtol=0)
        assert_close(outputs.entropy[layer], expected.entropy[layer], atol=1e-5, rtol=0)
    for result in (outputs, expected):
        locality_and_language_functional(result.fidelity, result.logits, is_token).backward()
    check_gradients(model, other, 1e-5)


@pytest.mark.parametrize("layout", ["plain", "left"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_measures_the_same_within_its_rounding(make_model, make_text, how: str, layout: str):
    # The same blocks for both, since rounding may move one.
    inputs = batch(layout, make_text(2, 60))
    documents = documents_of(inputs)
    starts = reference.place_block_starts(torch.rand(2, 60) < 0.2, documents, 3, 12)
    arguments = {**inputs, "output_fidelity": True, "output_entropy": True, "block_starts": starts}
    settings = {"n_layer": 2, "initializer_range": 0.1}
    model, other = make_model(**settings), make_model(**settings)
    expected = other(**arguments)
    if how == "weights":
        outputs = model.bfloat16()(**arguments)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(**arguments)
    assert outputs.logits.dtype == torch.bfloat16
    for layer in range(2):
        assert outputs.fidelity[layer].dtype == outputs.entropy[layer].dtype == torch.float32
        assert_close(outputs.fidelity[layer], expected.fidelity[layer], atol=0.03, rtol=0)
        assert_close(outputs.entropy[layer], expected.entropy[layer], atol=0.1, rtol=0)
    for result in (outputs, expected):
        locality_and_language_functional(result.fidelity, result.logits.float() * 0, documents >= 0).backward()
    grad, exact = (each.transformer.h[1].attn.c_attn.weight.grad.float() for each in (model, other))
    assert (grad - exact).norm() < 0.1 * exact.norm()


def test_semantic_blocks_are_found_under_autocast(make_model, make_text):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = make_model()(make_text(2, 60), output_fidelity=True, output_entropy=True)
    for starts in outputs.block_starts:
        assert torch.equal(starts.gather(1, starts), starts)
        assert len(starts[0].unique()) > 4


def test_attention_dropout_while_measuring_warns_and_trains(make_model, make_text, transformers_warnings):
    model = make_model(attn_pdrop=0.3).train()
    ids = make_text(2, 40)
    first, second = (model(ids, output_fidelity=True, use_cache=False) for _ in range(2))
    assert any("attention dropout to 0" in message for message in transformers_warnings.messages)
    assert (first.logits != second.logits).any()
    # The first layer's scores have seen no dropout yet, and the fidelity is that of the scores.
    assert_close(first.fidelity[0], make_model()(ids, output_fidelity=True).fidelity[0], atol=1e-5, rtol=0)
    first.fidelity[3].sum().backward()
    assert model.transformer.h[3].attn.c_attn.weight.grad.abs().max() > 0


# --- checkpoints


def test_a_gpt2_checkpoint_loads_with_no_key_missing_or_left_over(make_model, gpt2_twin, make_text, tmp_path: Path):
    gpt2 = gpt2_twin(make_model())
    gpt2.save_pretrained(tmp_path)
    loaded, info = LocalistGPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]
    ids = make_text(2, 30)
    assert torch.equal(loaded(ids).logits, gpt2(ids).logits)
    assert len(loaded(ids, output_fidelity=True).fidelity) == 4

    base, info = LocalistGPT2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(base(ids).last_hidden_state, gpt2.transformer(ids).last_hidden_state)


def test_a_localist_checkpoint_loads_into_plain_gpt2(make_model, make_text, tmp_path: Path):
    model = make_model()
    model.save_pretrained(tmp_path)
    fields = {name: getattr(model.config, name) for name in GPT2Config().to_diff_dict() if hasattr(model.config, name)}
    fields.update({name: getattr(model.config, name) for name in ("n_embd", "n_layer", "n_head", "vocab_size")})
    config = GPT2Config(n_positions=300, **{k: v for k, v in fields.items() if k not in ("model_type", "n_positions")})
    gpt2, info = GPT2LMHeadModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = make_text(2, 30)
    assert torch.equal(gpt2(ids).logits, model(ids).logits)


def test_saving_and_loading_changes_nothing(make_model, make_text, tmp_path: Path):
    model = make_model(num_sink_tokens=2, locality_schedule=[0.0, 0.5, 0.5, 1.0])
    model.save_pretrained(tmp_path)
    ids = make_text(2, 40)
    expected = model(ids, output_fidelity=True)
    for auto in (LocalistGPT2LMHeadModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, LocalistGPT2LMHeadModel)
        outputs = loaded(ids, output_fidelity=True)
        assert torch.equal(outputs.logits, expected.logits)
        assert_close(outputs.fidelity, expected.fidelity, atol=0, rtol=0)


def test_the_auto_classes_know_the_package_once_it_is_imported(make_model, tmp_path: Path):
    make_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LocalistGPT2Config
    assert type(AutoModel.from_pretrained(tmp_path)) is LocalistGPT2Model
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LocalistGPT2LMHeadModel


def test_overrides_reach_a_model_loaded_from_gpt2(make_model, gpt2_twin, tmp_path: Path):
    gpt2_twin(make_model()).save_pretrained(tmp_path)
    model = LocalistGPT2LMHeadModel.from_pretrained(
        tmp_path, locality_schedule="cubic", window_length=5, attn_implementation="eager"
    )
    assert (model.config.locality_schedule, model.config.window_length) == ("cubic", 5)
    assert model.config._attn_implementation == "eager"


# --- on a machine without this package

# Those of any other model stay at home.
NOT_GPT2 = {"__init__.py", "modeling_localist.py"}
CODE_FILES = {path.name for path in Path(localist_hf.modeling.__file__).parent.glob("*.py")} - NOT_GPT2

# Runs in a process that cannot import localist_hf; writes what it saw to results.pt.
FRESH_PROCESS = """
import pickle
import sys
sys.modules["localist_hf"] = None  # even where it is installed

import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import pipeline

saved, base, again, results = sys.argv[1:]
ids = torch.load(f"{saved}/ids.pt")
seen = {}
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(saved)
        seen[f"refused {auto.__name__}"] = "no"
    except Exception as error:
        seen[f"refused {auto.__name__}"] = f"{type(error).__name__}: {error}"

with torch.no_grad():
    config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    outputs = model(ids, output_fidelity=True, output_entropy=True)
    seen["config"] = config.to_dict()
    seen["modules"] = [type(config).__module__, type(model).__module__]
    seen["logits"] = model(ids).logits
    seen["fidelity"], seen["entropy"] = outputs.fidelity, outputs.entropy
    seen["hidden"] = AutoModel.from_pretrained(saved, trust_remote_code=True)(ids).last_hidden_state
    of_base = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    seen["logits of base"] = of_base(ids).logits
    other = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    seen["is one class"] = type(model) is type(other)
    seen["logits of pickled"] = pickle.loads(pickle.dumps(model))(ids).logits
    for name, make in (
        ("start", lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=True)),
        ("start of gpt2", lambda: GPT2LMHeadModel(GPT2Config(**config.to_dict() | {"model_type": "gpt2"}))),
    ):
        torch.manual_seed(0)
        seen[name] = make().state_dict()
    generator = pipeline("text-generation", model=saved, trust_remote_code=True)
    seen["pipeline model"] = type(generator.model).__name__
    seen["pipeline logits"] = generator.model(ids).logits
    arguments = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, return_full_text=False)
    seen["pipeline text"] = generator("w5 w6 w7 w8", **arguments)[0]["generated_text"]

    model.save_pretrained(again)
    seen["logits again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits
seen["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "localist_hf")
torch.save(seen, results)
"""


@dataclass
class FreshProcess:
    model: LocalistGPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    ids: torch.Tensor
    saved: Path
    base: Path
    again: Path
    seen: dict


@pytest.fixture(scope="module")
def fresh_process(make_model, make_text, tmp_path_factory: pytest.TempPathFactory) -> FreshProcess:
    """A model saved here, and what a process without the package saw of it."""
    folder = tmp_path_factory.mktemp("fresh")
    saved, base, again, results = (folder / name for name in ("saved", "base", "again", "results.pt"))
    model, ids = make_model(), make_text(2, 40)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0", unk_token="w0")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    model.transformer.save_pretrained(base)
    torch.save(ids, saved / "ids.pt")
    (folder / "script.py").write_text(FRESH_PROCESS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    process = subprocess.run(
        [sys.executable, "-I", str(folder / "script.py"), *map(str, (saved, base, again, results))],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,  # nobody answers when transformers asks whether to trust the code
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return FreshProcess(model, tokenizer, ids, saved, base, again, torch.load(results))


def test_elsewhere_the_package_was_not_imported(fresh_process: FreshProcess):
    assert fresh_process.seen["imported"] == ["localist_hf"]  # the entry that forbids it
    assert all(name.startswith("transformers_modules.") for name in fresh_process.seen["modules"])


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"])
def test_elsewhere_nothing_runs_without_trust(fresh_process: FreshProcess, name: str):
    assert "trust_remote_code=True" in fresh_process.seen[f"refused {name}"]


def test_elsewhere_the_configuration_is_the_same(fresh_process: FreshProcess):
    expected = fresh_process.model.config.to_dict()
    for name in ("_name_or_path", "architectures"):  # where it lies, and which class saved it last
        del expected[name]
    assert {name: fresh_process.seen["config"][name] for name in expected} == expected


def test_elsewhere_the_logits_are_identical(fresh_process: FreshProcess):
    with torch.no_grad():
        expected = fresh_process.model(fresh_process.ids).logits
        hidden = fresh_process.model.transformer(fresh_process.ids).last_hidden_state
    assert torch.equal(fresh_process.seen["logits"], expected)
    assert torch.equal(fresh_process.seen["hidden"], hidden)


def test_elsewhere_the_measurements_are_identical(fresh_process: FreshProcess):
    with torch.no_grad():
        expected = fresh_process.model(fresh_process.ids, output_fidelity=True, output_entropy=True)
    assert_close(fresh_process.seen["fidelity"], expected.fidelity, atol=0, rtol=0)
    assert_close(fresh_process.seen["entropy"], expected.entropy, atol=0, rtol=0)


def test_elsewhere_a_base_model_loads_as_a_language_model(fresh_process: FreshProcess):
    assert torch.equal(fresh_process.seen["logits of base"], fresh_process.seen["logits"])


def test_elsewhere_it_is_pickled_is_one_class_and_starts_as_gpt2(fresh_process: FreshProcess):
    assert fresh_process.seen["is one class"]
    assert torch.equal(fresh_process.seen["logits of pickled"], fresh_process.seen["logits"])
    assert_close(fresh_process.seen["start"], fresh_process.seen["start of gpt2"], atol=0, rtol=0)
    assert len(fresh_process.seen["start"]) > 40


def test_elsewhere_the_pipeline_generates_the_same_text(fresh_process: FreshProcess):
    assert fresh_process.seen["pipeline model"] == "LocalistGPT2LMHeadModel"
    assert torch.equal(fresh_process.seen["pipeline logits"], fresh_process.seen["logits"])
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = fresh_process.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    expected = fresh_process.tokenizer.decode(tokens[0, 4:])
    assert fresh_process.seen["pipeline text"].split() == expected.split()


@pytest.mark.parametrize("folder", ["saved", "base", "again"])
def test_every_code_file_travels_with_the_weights(fresh_process: FreshProcess, folder: str):
    path = getattr(fresh_process, folder)
    assert {file.name for file in path.glob("*.py")} == CODE_FILES
    package = Path(localist_hf.modeling.__file__).parent
    assert all((path / name).read_bytes() == (package / name).read_bytes() for name in CODE_FILES)
    auto_map = json.loads((path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all(reference.split(".")[0] + ".py" in CODE_FILES for reference in auto_map.values())


def test_saved_again_elsewhere_it_is_still_the_same_model(fresh_process: FreshProcess):
    assert torch.equal(fresh_process.seen["logits again"], fresh_process.seen["logits"])
