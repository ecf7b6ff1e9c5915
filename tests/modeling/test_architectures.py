"""
Every architecture against its explicit matrix: that of transformers' own eager attention in the native class, which
knows of grouped queries, partial rotary positions, sliding windows, soft-capping and learned sinks by itself.
"""

import copy
import gc
import itertools
import weakref

import pytest
import reference
import torch
from architectures import (
    ARCHITECTURES,
    LAYERS,
    LENGTH,
    PADDING,
    WINDOW,
    every_architecture,
    localised,
    positions,
    text,
    untouched,
)
from matrices import (
    EVERYTHING,
    OF_BLOCKS,
    check_close,
    check_measurements,
    check_parts,
    matrices_for,
    native_pass,
)
from torch.testing import assert_close
from transformers import (
    DynamicCache,
)

from localist_hf.modeling import delocalize
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.measurements import SHARES


# --- measurements


@every_architecture
@pytest.mark.parametrize(
    ("layout", "sinks", "previous"), [("none", 0, 0), ("none", 2, 1), ("left", 1, 1), ("right", 2, 0)]
)
def test_measurements_equal_the_matrix(architecture: str, layout: str, sinks: int, previous: int) -> None:
    model = localised(architecture, num_sink_tokens=sinks, num_previous_blocks=previous)
    ids, mask = text(layout)
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, **EVERYTHING)
        matrices = matrices_for(architecture, model, outputs, mask)
        native = native_pass(
            copy.deepcopy(untouched(architecture)), matrices, ids, attention_mask=mask, position_ids=positions(mask)
        )
    is_token = mask.bool()
    assert_close(outputs.logits[is_token], native.logits[is_token], atol=1e-5, rtol=0)
    for layer in range(LAYERS):  # the test can fail: attention is far from even, and windows are where it says
        weights, visible = matrices.weights[layer], matrices.visible(layer)
        rows = is_token[:, None, :, None].expand_as(weights)
        assert torch.equal((weights > 0) & rows, visible & rows)
        assert (weights.log().masked_fill(~visible, 0).std(-1))[rows[..., 0]].mean() > 1
    check_measurements(outputs, matrices)


# --- the dial


@every_architecture
@pytest.mark.parametrize(("dial", "floor"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.8)])
def test_the_dial_multiplies_the_weights_of_the_matrix(architecture: str, dial: float, floor: float) -> None:
    model = localised(architecture)
    ids, mask = text("left")
    request = {**EVERYTHING, "locality_dial": dial, "min_fidelity": floor}
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, **request)
        matrices = matrices_for(architecture, model, outputs, mask, dial, floor)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        native = native_pass(copy.deepcopy(untouched(architecture)), matrices, **inputs)
        unmeasured = model(ids, attention_mask=mask, locality_dial=dial, min_fidelity=floor)
        free = untouched(architecture)(**inputs)
    is_token = mask.bool()
    assert_close(outputs.logits[is_token], native.logits[is_token], atol=1e-5, rtol=0)
    assert_close(unmeasured.logits[is_token], outputs.logits[is_token], atol=1e-5, rtol=0)
    assert (free.logits - native.logits)[is_token].abs().max() > 0.1
    check_measurements(outputs, matrices)


# --- gradients


@every_architecture
@pytest.mark.parametrize("layout", ["left", "none"])
def test_gradients_of_psi_and_of_the_choice_are_those_of_the_matrix(architecture: str, layout: str) -> None:
    model, native = localised(architecture), copy.deepcopy(untouched(architecture))
    ids, mask = text(layout)
    outputs = model.train()(ids, attention_mask=mask, output_fidelity=True, output_block_choice=True)
    matrices = matrices_for(architecture, model, outputs, mask)
    native_pass(native.train(), matrices, ids, attention_mask=mask, position_ids=positions(mask))

    coefficients = torch.randn(2, 4, LENGTH)
    loss = expected_loss = 0.0
    for layer in range(LAYERS):
        counted = outputs.context_mask[layer][:, None]
        psi = context_fidelity(outputs.block_share[layer], outputs.outside_share[layer], eps=1e-3)
        # As the loss has it: of next to nothing the parts are rounding, and so would be their gradients.
        others = (outputs.block_share[layer] + outputs.outside_share[layer]).detach()
        choice = outputs.blocks_looked_at[layer].log() * others
        loss = loss + ((psi + choice) * coefficients * counted).sum() / 20
        shares = reference.shares(
            matrices.weights[layer], matrices.local(layer), matrices.block_starts[layer], matrices.documents, 1
        )
        psi = context_fidelity(shares["block_share"], shares["outside_share"], eps=1e-3)
        of_blocks = reference.block_shares(matrices.weights[layer], matrices.block_starts[layer], matrices.documents, 1)
        looked_at = reference.blocks_looked_at(of_blocks)
        expected_loss = expected_loss + ((psi + looked_at.log() * others) * coefficients * counted).sum() / 20
    loss.backward()
    expected_loss.backward()
    largest = 0.0
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in native.named_parameters():
        actual = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        check_close(name, actual, expected, atol=1e-4)
        largest = max(largest, expected.abs().max().item())
    assert largest > 0.1


@pytest.mark.parametrize("layout", ["left", "none"])
def test_no_query_looks_at_more_blocks_than_there_are(layout: str) -> None:
    """However little goes to other words: what is left of that is the rounding of the rest."""
    model = localised("gpt2", min_block_length=2, max_block_length=4).train()
    ids, mask = text(layout)
    for sharpness in (4, 8, 12, 16):
        sharp = copy.deepcopy(model)
        with torch.no_grad():
            for block in sharp.transformer.h:
                block.attn.c_attn.weight[:, 32:64] = block.attn.c_attn.weight[
                    :, :32
                ]  # keys like queries: on themselves
                block.attn.c_attn.weight[:, :64] *= sharpness
        outputs = sharp(ids, attention_mask=mask, output_fidelity=True, output_block_choice=True)
        for layer in range(LAYERS):
            others = outputs.block_share[layer] + outputs.outside_share[layer]
            assert sharpness < 8 or (others.detach() < 1e-5).float().mean() > 0.05
            assert outputs.blocks_looked_at[layer].max() <= LENGTH // 2
            assert outputs.blocks_looked_at[layer].min() >= 1
        sum(each.log().sum() for each in outputs.blocks_looked_at).backward()
        for parameter in sharp.parameters():
            assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.abs().max() < 1e6)


@pytest.mark.parametrize("layout", ["left", "none"])
def test_what_is_measured_of_blocks_is_freed_with_its_outputs(layout: str) -> None:
    """Without the collector of cycles, which comes too late for tensors."""
    model = localised("llama").train()
    ids, mask = text(layout)
    gc.collect()
    gc.disable()
    try:
        outputs = model(ids, attention_mask=mask, output_fidelity=True, output_block_choice=True)
        sum(looked_at.sum() for looked_at in outputs.blocks_looked_at).backward()
        left = weakref.ref(outputs.blocks_looked_at[1])
        del outputs
        assert left() is None
    finally:
        gc.enable()


# --- locality off


@every_architecture
@pytest.mark.parametrize("layout", PADDING)
@torch.no_grad()
def test_at_dial_0_every_bit_is_the_untouched_model_s(architecture: str, layout: str) -> None:
    model, native = localised(architecture), untouched(architecture)
    ids, mask = text(layout)
    expected = native(ids, attention_mask=mask)
    for dial in (None, 0.0):
        assert torch.equal(model(ids, attention_mask=mask, locality_dial=dial).logits, expected.logits)
    if layout == "none":
        assert torch.equal(model(ids).logits, native(ids).logits)


@every_architecture
@pytest.mark.parametrize("search", [{"do_sample": True}, {"num_beams": 3}])
@torch.no_grad()
def test_at_dial_0_generation_is_the_untouched_model_s(architecture: str, search: dict[str, int | bool]) -> None:
    ids, mask = text("left")
    generated = []
    for model in (localised(architecture), untouched(architecture)):
        torch.manual_seed(0)
        generated.append(
            model.generate(
                ids[:, :40],
                attention_mask=mask[:, :40],
                max_new_tokens=6,
                output_logits=True,
                return_dict_in_generate=True,
                **{"do_sample": False, **search},
            )
        )
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    assert torch.equal(torch.stack(generated[0].logits), torch.stack(generated[1].logits))


# --- caches


@every_architecture
@pytest.mark.parametrize(("dial", "floor"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.8)])
@torch.no_grad()
def test_cached_equals_uncached_at_every_dial(architecture: str, dial: float, floor: float) -> None:
    """The prompt, a chunk, and single steps, of which the last are beyond every window and block of the prompt."""
    model = localised(architecture)
    ids, mask = text("left")
    setting = {"locality_dial": dial, "min_fidelity": floor}
    whole = model(ids, attention_mask=mask, use_cache=False, **setting)
    cache, parts = DynamicCache(config=model.config), []
    for start, end in itertools.pairwise([0, 30, 58, *range(59, LENGTH + 1)]):
        outputs = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **setting)
        parts.append(outputs.logits)
    is_token = mask.bool()
    assert_close(torch.cat(parts, dim=1)[is_token], whole.logits[is_token], atol=1e-5, rtol=0)


@every_architecture
@torch.no_grad()
def test_measurements_in_steps_are_those_of_the_whole_text(architecture: str) -> None:
    model = localised(architecture)
    ids, mask = text("left")
    whole = model(ids, attention_mask=mask, use_cache=False, **EVERYTHING)
    cache = DynamicCache(config=model.config)
    for start, end in itertools.pairwise((0, 30, 43, 44, 45, LENGTH)):
        part = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **EVERYTHING)
        for one, other in zip(part.block_shares, whole.block_shares, strict=True):
            assert not other[:, :, start:end, one.shape[-1] :].any()  # of the blocks so far
            check_close("block_shares", one, other[:, :, start:end, : one.shape[-1]])
        for name in OF_BLOCKS[1:]:
            shares = zip(part.block_share, part.outside_share, strict=True)
            for one, other, of in zip(getattr(part, name), getattr(whole, name), map(sum, shares), strict=True):
                check_parts(name, one, other[..., start:end], of)
        for name in (*SHARES, "fidelity", "fidelity_mask", "context_mask", "block_starts", "entropy"):
            for one, other in zip(getattr(part, name), getattr(whole, name), strict=True):
                check_close(name, one, other[..., start:end])


# More sinks than a block, or a sliding window, holds keys.
MANY_SINKS = {"num_sink_tokens": WINDOW + 5, "max_block_length": 6, "locality_schedule": "localist"}


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    ("layout", "filled_at", "dial"),
    [
        ("left", 1.0, 1.0),
        ("right", 1.0, 1.0),
        ("none", 0.0, 1.0),
        pytest.param("left", 0.5, 0.5, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_sinks_beyond_what_a_cache_keeps(architecture: str, layout: str, filled_at: float, dial: float) -> None:
    model = localised(architecture, **MANY_SINKS)
    ids, mask = text(layout)
    request = {"output_fidelity": True, "locality_dial": dial}
    whole = model(ids, attention_mask=mask, use_cache=False, **request)
    if filled_at != dial:  # what the cache holds of the upper layers then depends on that
        model.config.locality.locality_schedule = [1.0, 0.0, 0.0, 0.0]
        whole = model(ids, attention_mask=mask, use_cache=False, **request)
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache, **{**request, "locality_dial": filled_at})
    for start, end in itertools.pairwise([30, 58, *range(59, LENGTH + 1)]):
        arguments = {"attention_mask": mask[:, :end], "past_key_values": cache}
        if end == LENGTH:  # a step that measures nothing takes another way
            part = model(ids[:, start:end], **arguments, locality_dial=dial)
        else:
            part = model(ids[:, start:end], **arguments, **request)
            layers = [0] if filled_at != dial else range(LAYERS)
            for name in SHARES:
                for layer in layers:
                    check_close(name, getattr(part, name)[layer], getattr(whole, name)[layer][..., start:end])
        if filled_at == dial:
            is_token = mask[:, start:end].bool()
            assert_close(part.logits[is_token], whole.logits[:, start:end][is_token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dial", [0.5, 1.0])
@torch.no_grad()
def test_as_many_sinks_measure_what_the_matrix_does(architecture: str, dial: float) -> None:
    model = localised(architecture, **{**MANY_SINKS, "locality_schedule": "linear"})
    ids, mask = text("left")
    request = {**EVERYTHING, "locality_dial": dial}
    outputs = model(ids, attention_mask=mask, **request)
    matrices = matrices_for(architecture, model, outputs, mask, dial)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    native = native_pass(copy.deepcopy(untouched(architecture)), matrices, **inputs)
    is_token = mask.bool()
    assert_close(outputs.logits[is_token], native.logits[is_token], atol=1e-5, rtol=0)
    check_measurements(outputs, matrices)


# --- documents in one row

# Transformers makes their masks without regard to `position_ids`.
UNSEPARATED = ("opt", "gpt_oss")


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in UNSEPARATED])
@torch.no_grad()
def test_packed_documents_are_measured_as_if_each_stood_alone(architecture: str) -> None:
    model = localised(architecture)
    ids, _ = text()
    position_ids = torch.cat([torch.arange(length) for length in (25, 25, LENGTH - 50)])[None].expand(2, -1)
    for dial in (0.0, 1.0):
        request = {"output_fidelity": True, "output_block_choice": True, "locality_dial": dial, "use_cache": False}
        packed = model(ids, position_ids=position_ids, **request)
        for start, end in ((0, 25), (25, 50), (50, LENGTH)):
            alone = model(ids[:, start:end], **request)
            assert_close(packed.logits[:, start:end], alone.logits, atol=1e-5, rtol=0)
            for name in (*SHARES, "fidelity", "fidelity_mask", "context_mask"):
                for one, other in zip(getattr(packed, name), getattr(alone, name), strict=True):
                    check_close(name, one[..., start:end], other)
            for name in OF_BLOCKS[1:]:
                shares = map(sum, zip(alone.block_share, alone.outside_share, strict=True))
                for one, other, of in zip(getattr(packed, name), getattr(alone, name), shares, strict=True):
                    check_parts(name, one[..., start:end], other, of)


@pytest.mark.parametrize("architecture", UNSEPARATED)
@torch.no_grad()
def test_packed_documents_are_refused_where_the_model_lets_them_see_each_other(architecture: str) -> None:
    model, (ids, _) = localised(architecture), text()
    position_ids = torch.arange(LENGTH)[None] % 30
    request = {"position_ids": position_ids, "use_cache": False}
    for asked in ({"output_fidelity": True}, {"locality_dial": 0.5}):
        with pytest.raises(ValueError, match=r"lets documents that are packed in one row see each other"):
            model(ids, **request, **asked)
    assert torch.equal(model(ids, **request).logits, untouched(architecture)(ids, **request).logits)
    one = {**request, "position_ids": torch.arange(LENGTH)[None]}  # nothing is packed here
    assert model(ids, **one, output_fidelity=True).fidelity[0].shape == (2, 4, LENGTH)


# --- and back


@every_architecture
@torch.no_grad()
def test_delocalize_gives_back_the_class_and_the_configuration(architecture: str) -> None:
    native, model = untouched(architecture), localised(architecture)
    assert type(model) is not type(native)
    assert model.config.to_dict() != native.config.to_dict()
    ids, mask = text("left")
    model(ids, attention_mask=mask, locality_dial=1.0)
    assert delocalize(model) is model
    for part, before in zip(model.modules(), native.modules(), strict=True):
        assert type(part) is type(before)
        assert vars(part).keys() == vars(before).keys()
    assert model.config.to_dict() == native.config.to_dict()
    assert vars(model.config).keys() == vars(native.config).keys()
    assert model.config._attn_implementation == native.config._attn_implementation
    assert torch.equal(model(ids, attention_mask=mask).logits, native(ids, attention_mask=mask).logits)
