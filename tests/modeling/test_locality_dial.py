"""The dial: weights outside the local set multiplied by `1 - d * lambda` and renormalised, exactly; the guarantee."""

import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given
from torch.testing import assert_close
from transformers import DynamicCache

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.modeling import block_search, locality
from localist_hf.modeling.block_attention import local_attention
from localist_hf.modeling.block_partition import (
    document_starts,
    place_block_starts,
    semantic_blocks,
    with_previous_blocks,
)
from localist_hf.modeling.block_step import semantic_step
from localist_hf.modeling.dialled_attention import Wanted, attend
from localist_hf.modeling.fidelity import LayerDial
from localist_hf.modeling.fused_attention import Scoring
from localist_hf.modeling.local_set import LocalSet
from localist_hf.modeling.measurements import SHARES


LENGTH, HEADS, HEAD_DIM, SCALE = 75, 3, 16, 0.4


def random_inputs(layout: str, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Query, key and value of two rows, their documents and block starts."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, HEADS, LENGTH, HEAD_DIM, generator=generator) for _ in range(3)]
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if layout == "left":
        mask[0, :20] = 0
    if layout == "right":
        mask[0, -20:] = 0
    packed = torch.cat((torch.arange(30), torch.arange(LENGTH - 30)))[None].expand(2, -1)
    is_packed = layout == "packed"
    documents = document_starts(2, LENGTH, None if is_packed else mask, packed if is_packed else None)
    candidates = torch.rand(2, LENGTH, generator=generator) < 0.15
    return inputs, documents, place_block_starts(candidates, documents, 2, 20)


def dialled_reference(
    inputs, documents, starts, sinks: int, weight: float, floor: float, query_length: int = LENGTH, previous: int = 0
):
    """Output, fidelity, entropy and shares from the explicit matrix, its weights multiplied and renormalised."""
    query, key, value = (tensor.double() for tensor in inputs)
    query = query[:, :, -query_length:]
    visible = reference.visible_keys(documents, query_length)
    local = reference.local_set(starts, documents, sinks, query_length, previous)
    _, weights, _ = reference.attention(query, key, value, visible, SCALE)
    factor = torch.full_like(weights, weight)
    free = reference.fidelity(weights, local)[..., None]
    if floor:  # w_i = min(1, phi_i (1 - phi*) / (phi* (1 - phi_i))), and no more than the dial's
        factor = torch.minimum(factor, free * (1 - floor) / (floor * (1 - free)).clamp(min=1e-300))
    dialled = weights * torch.where(local, 1.0, factor)
    dialled = dialled / dialled.sum(-1, keepdim=True).clamp(min=1e-300)
    shares = reference.shares(dialled, local, starts, documents, sinks)
    return dialled @ value, reference.fidelity(dialled, local), reference.entropy_bits(dialled), *shares.values()


def attended(
    inputs,
    documents,
    starts,
    sinks: int,
    dial: float,
    floor: float,
    query_length: int = LENGTH,
    previous: int = 0,
):
    """What the package says, as layer 3 with lambda = 1."""
    blocks = with_previous_blocks(starts, documents, previous).last(query_length, torch.device("cpu"))
    first = documents[:, -query_length:]
    local_set = LocalSet.of_blocks(blocks, first, LENGTH, 20 * (1 + previous), sinks)
    query, key, value = inputs
    query = query[:, :, -query_length:]
    is_causal = bool((documents == 0).all()) and query_length == LENGTH
    mask = None if is_causal else reference.visible_keys(documents, query_length)
    layer_dial, wanted = LayerDial.of_layer(dial, floor, 1.0), Wanted(shares=True, entropy=True)
    output, shares, entropy, _ = attend(query, key, value, mask, Scoring(SCALE), local_set, layer_dial, wanted)
    return output, shares.fidelity, entropy, *shares


@pytest.mark.parametrize(("sinks", "previous"), [(0, 0), (3, 0), (2, 1)])
@pytest.mark.parametrize("layout", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize(("dial", "floor"), [(0.3, 0.0), (0.97, 0.0), (1.0, 0.0), (0.0, 0.6), (0.5, 0.9), (0.0, 1.0)])
def test_equals_the_matrix_with_weights_multiplied_and_renormalised(
    dial: float, floor: float, layout: str, sinks: int, previous: int
) -> None:
    inputs, documents, starts = random_inputs(layout)
    actual = attended(inputs, documents, starts, sinks, dial, floor, previous=previous)
    weight, least = (0.0, 0.0) if floor == 1 else (1 - dial, floor)
    expected = dialled_reference(inputs, documents, starts, sinks, weight, least, previous=previous)
    is_token = (documents >= 0)[:, None].expand(-1, HEADS, -1)
    for name, one, other, atol in zip(
        ("output", "fidelity", "entropy", *SHARES), actual, expected, (1e-5, 1e-5, 5e-5, *[1e-5] * 4), strict=True
    ):
        assert_close(
            one[is_token].double(), other[is_token], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("query_length", [1, 5, 33])
@pytest.mark.parametrize("dial", [0.4, 1.0])
def test_equals_the_matrix_for_the_queries_after_a_cache(dial: float, query_length: int) -> None:
    inputs, documents, starts = random_inputs("left")
    actual = attended(inputs, documents, starts, 1, dial, 0.0, query_length)
    expected = dialled_reference(inputs, documents, starts, 1, 1 - dial, 0.0, query_length)
    assert_close(actual[0].double(), expected[0], atol=1e-5, rtol=0)
    assert_close(actual[1].double(), expected[1], atol=1e-5, rtol=0)


def test_local_attention_has_the_gradients_of_the_matrix() -> None:
    inputs, documents, starts = random_inputs("plain")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output, lse = local_attention(*leaves, LocalSet(starts, documents, LENGTH, 20, 2), SCALE)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    local = reference.local_set(starts, documents, 2, LENGTH)
    expected, _, expected_lse = reference.attention(*exact, local, SCALE)
    assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    of_output, of_lse = torch.randn(output.shape), torch.randn(lse.shape)
    grads = torch.autograd.grad((output * of_output).sum() + (lse * of_lse).sum(), leaves)
    exacts = torch.autograd.grad((expected * of_output).sum() + (expected_lse * of_lse).sum(), exact)
    for grad, other in zip(grads, exacts, strict=True):
        assert_close(grad.double(), other, atol=1e-4, rtol=0)


@given(st.floats(0, 1), st.floats(0.001, 1), st.floats(0, 0.999))
def test_the_guarantee_holds_for_any_fidelity(fidelity: float, weight: float, floor: float) -> None:
    dialled, share = LayerDial(weight, floor).turn(torch.tensor(fidelity, dtype=torch.float64))
    assert dialled >= floor
    assert dialled >= fidelity - 1e-12
    assert 0 <= share <= 1 + 1e-12
    assert math.isclose(dialled, fidelity + share * (1 - fidelity), abs_tol=1e-9)


def last_layer_local(make_model, **overrides) -> LocalistGPT2LMHeadModel:
    """Only the last layer is local, so that what it sees does not depend on the dial."""
    return make_model(locality_schedule=[0.0, 0.0, 0.0, 1.0], **overrides)


@torch.no_grad()
def test_measured_fidelity_is_the_closed_form_and_grows_with_the_dial(make_model, make_text) -> None:
    model, ids = last_layer_local(make_model), make_text(2, 90)
    free = model(ids, output_fidelity=[3])
    before = free.fidelity[0]
    for dial in (0.2, 0.5, 0.9, 1.0):
        outputs = model(ids, output_fidelity=[3], locality_dial=dial)
        phi = free.fidelity[0]
        assert_close(outputs.fidelity[0], phi / (phi + (1 - dial) * (1 - phi)), atol=1e-5, rtol=0)
        counted = free.fidelity_mask[0][:, None].expand_as(phi)
        assert (outputs.fidelity[0] > before)[counted].all()
        before = outputs.fidelity[0]


@torch.no_grad()
def test_the_guarantee_follows_the_schedule(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="linear"), make_text(2, 90)
    outputs = model(ids, output_fidelity=True, min_fidelity=0.9)
    for value, fidelity in zip(model.config.locality_lambdas, outputs.fidelity, strict=True):
        assert fidelity.min() >= 0.9 * value - 1e-6


@torch.no_grad()
def test_layers_without_locality_and_a_dial_at_zero_change_nothing(make_model, make_text, gpt2_twin) -> None:
    ids = make_text(2, 60)
    free, local = make_model(locality_schedule="distributed"), make_model(locality_schedule="linear")
    assert torch.equal(free(ids, locality_dial=1.0).logits, gpt2_twin(free)(ids).logits)
    assert torch.equal(local(ids, locality_dial=0.0, min_fidelity=0.0).logits, gpt2_twin(local)(ids).logits)
    assert not torch.equal(local(ids, locality_dial=0.5).logits, local(ids).logits)


def test_setting_the_dial_for_good_and_for_a_while(make_model, make_text, tmp_path) -> None:
    model, ids = make_model(locality_schedule="linear"), make_text(1, 60)
    dialled = model(ids, locality_dial=0.7).logits
    plain = model(ids).logits
    with model.set_locality_dial(0.7):
        assert torch.equal(model(ids).logits, dialled)
        with model.set_locality_dial(min_fidelity=0.5):
            assert torch.equal(model(ids).logits, model(ids, locality_dial=0.0, min_fidelity=0.5).logits)
        assert torch.equal(model(ids).logits, dialled)
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(RuntimeError), model.set_locality_dial(0.7):
        raise RuntimeError
    assert torch.equal(model(ids).logits, plain)

    with model.set_locality_dial(0.3):
        model.set_locality_dial(0.7)
        assert torch.equal(model(ids).logits, dialled)
    assert torch.equal(model(ids).logits, plain)

    model.config.locality_dial = 0.7
    assert torch.equal(model(ids).logits, dialled)
    model.save_pretrained(tmp_path)
    assert torch.equal(LocalistGPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits, dialled)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_values_outside_the_range_are_refused_by_name(make_model, make_text, make_config, value: float) -> None:
    model, ids = make_model(), make_text(1, 20)
    for name in ("locality_dial", "min_fidelity"):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}; it must lie in \[0, 1\]"):
            model(ids, **{name: value})
        with pytest.raises(ValueError, match=rf"`{name}` is {value}"):
            model.generate(ids, **{name: value}, max_new_tokens=2)
        with pytest.raises(Exception, match=rf"`{name}` is {value}"):
            make_config(**{name: value})
    with pytest.raises(ValueError, match=rf"`dial` is {value}"):
        model.set_locality_dial(value)
    assert model.config.locality_dial == 0


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("partition", ["semantic", "delimiter", "window"])
@pytest.mark.parametrize("setting", [{"locality_dial": 0.6}, {"locality_dial": 1.0}, {"min_fidelity": 0.8}])
@pytest.mark.parametrize("mode", ["greedy", "beams", pytest.param("sampling", marks=pytest.mark.slow)])
def test_generation_with_a_cache_equals_generation_without(make_model, make_text, mode, setting, partition) -> None:
    model = make_model(n_layer=2, block_partition=partition, locality_schedule="localist", num_sink_tokens=1)
    ids = make_text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=16,  # more than a block
                use_cache=use_cache,
                pad_token_id=0,
                **GENERATION[mode],
                **setting,
            )
        )
    assert torch.equal(*texts)
    torch.manual_seed(3)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=16, pad_token_id=0, **GENERATION[mode])
    assert not torch.equal(plain, texts[0])


@torch.no_grad()
def test_a_padded_batch_is_its_rows_alone(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="linear"), make_text(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=positions, locality_dial=0.8).logits
    alone = model(ids[:1, 17:], locality_dial=0.8).logits
    assert_close(batch[:1, 17:], alone, atol=1e-4, rtol=0)
    assert_close(batch[1:], model(ids[1:], locality_dial=0.8).logits, atol=1e-4, rtol=0)


def test_keys_that_no_block_can_reach_are_not_touched() -> None:
    """They may hold anything, even nan: the time does not grow with the square of the length."""
    inputs, documents, starts = random_inputs("plain")
    query, key, value = inputs
    expected, _ = local_attention(query, key, value, LocalSet(starts, documents, LENGTH, 20), SCALE)
    key[:, :, :16], value[:, :, :16] = math.nan, math.nan
    last = LocalSet(starts[:, -20:], documents[:, -20:], LENGTH, 20)
    actual, _ = local_attention(query[:, :, -20:], key, value, last, SCALE)
    assert_close(actual, expected[:, :, -20:], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("previous", [0, 1])
@pytest.mark.parametrize("partition", ["semantic", "delimiter", "window"])
def test_at_one_the_cache_holds_the_longest_local_set_and_the_sinks(
    make_model, make_text, partition: str, previous: int
) -> None:
    model = make_model(
        locality_schedule=[0.5, 1.0, 1.0, 1.0], block_partition=partition, num_sink_tokens=2,
        num_previous_blocks=previous,
    )  # fmt: skip
    ids = make_text(2, 87)
    whole = model(ids, locality_dial=1.0, output_fidelity=True, use_cache=False)
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split([40, 1, 30, *[1] * 16], dim=1):
        pieces.append(model(piece, past_key_values=cache, locality_dial=1.0, output_fidelity=True))
    assert_close(torch.cat([piece.logits for piece in pieces], dim=1), whole.logits, atol=1e-4, rtol=0)
    for layer in range(4):
        starts = torch.cat([piece.block_starts[layer] for piece in pieces], dim=1)
        assert torch.equal(starts, whole.block_starts[layer])
        fidelities = torch.cat([piece.fidelity[layer] for piece in pieces], dim=2)
        assert_close(fidelities, whole.fidelity[layer], atol=1e-4, rtol=0)
    longest = (1 + previous) * (7 if partition == "window" else 12)
    assert cache.layers[0].keys.shape[2] == 87
    for layer in cache.layers[1:]:
        assert layer.keys.shape[2] < longest
        assert layer.sinks[0].shape[2] == 2


@torch.no_grad()
def test_a_bounded_cache_is_not_misused(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="localist"), make_text(1, 40)
    cache = model(ids, locality_dial=1.0, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="key-value cache was filled at dial 1"):
        model(ids[:, :1], past_key_values=cache, locality_dial=0.5)
    with pytest.raises(ValueError, match="key-value cache was filled at dial 1"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-1)
    starts = torch.zeros(1, 40, dtype=torch.long)
    window = make_model(locality_schedule="localist", block_partition="window")
    cache = window(ids[:, :30], block_starts=starts[:, :30], locality_dial=1.0, use_cache=True).past_key_values
    for name in ("block_starts", "local_starts"):
        with pytest.raises(ValueError, match=f"`{name}` has a block longer"):
            window(ids[:, 30:], past_key_values=cache, **{name: starts}, locality_dial=1.0)


def test_plain_generation_finds_no_blocks(make_model, make_text, monkeypatch) -> None:
    model, ids = make_model(block_partition="delimiter"), make_text(1, 12)
    calls = []
    monkeypatch.setattr(locality, "document_starts", lambda *_, **__: calls.append(1))
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not calls


@pytest.mark.parametrize("setting", ["locality_dial", "min_fidelity"])
def test_an_argument_of_zero_turns_off_what_the_configuration_sets(make_model, make_text, setting: str) -> None:
    tokens = make_text(2, 40)
    model = make_model(locality_schedule="localist", **{setting: 0.9})
    with torch.no_grad():
        set_by_configuration = model(tokens).logits
        turned_off = model(tokens, **{setting: 0.0}).logits
        hidden = model.transformer(tokens, **{setting: 0.0}).last_hidden_state
        with model.set_locality_dial():
            free = model(tokens).logits
    assert torch.equal(turned_off, free)
    assert torch.equal(model.lm_head(hidden), free)
    assert not torch.allclose(set_by_configuration, free)


@pytest.mark.parametrize("dial", [0.5, 1.0])
def test_a_cache_made_without_a_configuration_will_do(make_model, make_text, dial: float) -> None:
    model, tokens, cache = make_model(), make_text(2, 60), DynamicCache()
    with torch.no_grad(), model.set_locality_dial(dial):
        steps = [model(part, past_key_values=cache).logits for part in tokens.split(20, dim=1)]
        assert_close(torch.cat(steps, dim=1), model(tokens, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["rows are repeated", "tokens are removed", "tokens came at dial 0"])
def test_the_search_for_blocks_goes_on_rightly(make_model, make_text, change: str) -> None:
    model, tokens = make_model(locality_schedule="localist"), make_text(2, 90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :60], past_key_values=cache, locality_dial=0.5)
        if change == "rows are repeated":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            tokens = torch.stack((tokens[1], tokens[0]))
        elif change == "tokens are removed":
            cache.crop(-25)
        else:
            model(tokens[:, 60:75], past_key_values=cache, locality_dial=0.0)
        at = cache.get_seq_length()
        last = model(tokens[:, at:], past_key_values=cache, locality_dial=0.5, output_fidelity=True)
        # The layers above see keys that dial 0 has made, so that only the first layer equals a run at one dial.
        whole = model(tokens, locality_dial=0.5, output_fidelity=True)
    assert_close(last.fidelity[0], whole.fidelity[0][:, :, at:], rtol=0, atol=1e-5)
    assert torch.equal(last.block_starts[0], whole.block_starts[0][:, at:])
    if change != "tokens came at dial 0":
        assert_close(last.logits, whole.logits[:, at:], rtol=0, atol=1e-5)


def test_a_step_searches_its_own_tokens_for_blocks(make_model, make_text, monkeypatch) -> None:
    searched = []

    def searching(search):
        def note(lengths: torch.Tensor | list[torch.Tensor], documents: torch.Tensor, *args):
            searched.append(documents.shape[1])
            return search(lengths, documents, *args)

        return note

    for search in (semantic_blocks, semantic_step):
        monkeypatch.setattr(block_search, search.__name__, searching(search))
    model = make_model(locality_schedule="localist", semantic_layer=2)  # layers 0 to 2 of 4 find blocks
    model.generate(make_text(1, 80), max_new_tokens=3, min_new_tokens=3, locality_dial=0.5, do_sample=False)
    assert searched == [80] * 3 + [1] * 6


@pytest.mark.parametrize(("dial", "most"), [(0.5, 4.5), (1.0, 0.5)])
def test_a_layer_under_the_dial_keeps_little_for_its_gradient(make_model, make_text, dial: float, most: float) -> None:
    """
    In tensors of the queries' size beyond those of a plain layer: the local output and the padded keys and values, and
    where there is no other attention the queries too, in place of all three.
    """
    model = make_model(n_layer=1, n_embd=256, n_head=4, n_positions=512, locality_schedule="localist").train()
    ids = make_text(1, 512)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept(**request: float) -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = tensor, storage.nbytes()  # none is freed, and its place taken by another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(ids, use_cache=False, **request)
        del outputs
        return sum(size for _, size in sizes.values())

    further = (kept(locality_dial=dial) - kept()) / (512 * 256 * 4)
    assert further < most, further
