import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GPT2Config, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from localist_hf.modeling.block_partition import window_block_starts
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.localist_attention import localist_attention_forward
from localist_hf.modeling.locality import Locality, build_locality
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION, REQUEST_ARGUMENTS, LocalityRequest, NativeInputs


LENGTH = 50


def build(config, **arguments) -> Locality | None:
    """`build_locality` for two rows of 50 tokens, with some arguments replaced."""
    defaults = {"output_fidelity": True, "input_ids": torch.arange(2 * LENGTH).view(2, LENGTH) % 90}
    config._attn_implementation = config._attn_implementation or LOCALIST_ATTENTION["sdpa"]  # as a model sets it
    arguments = defaults | arguments
    request = {name: arguments.pop(name) for name in REQUEST_ARGUMENTS if name in arguments}
    return build_locality(config, LocalityRequest(**request), NativeInputs(**arguments))


def starts_of(locality: Locality, layer: int) -> torch.Tensor:
    """The local starts of all positions, which without previous blocks and sinks are the block starts."""
    return locality.local_set(layer, locality.documents.shape[1], torch.device("cpu")).starts


def filled_cache(length: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(4):
        cache.update(torch.zeros(2, 4, length, 8), torch.zeros(2, 4, length, 8), layer)
    return cache


def attention_module(layer: int, groups: int = 1) -> nn.Module:
    """What the attention function reads of an attention module of any architecture."""
    module = nn.Module()
    module.config = GPT2Config(attn_implementation=LOCALIST_ATTENTION["sdpa"])
    module.layer_idx, module.is_causal, module.num_key_value_groups = layer, True, groups
    return module


def random_inputs(num_heads: int, num_key_value_heads: int, query_length: int = LENGTH) -> list[torch.Tensor]:
    return [
        torch.randn(2, heads, length, 8)
        for heads, length in ((num_heads, query_length), (num_key_value_heads, LENGTH), (num_key_value_heads, LENGTH))
    ]


def left_padding(*lengths: int) -> torch.Tensor:
    return (torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]).long()


# --- the attention function


def test_it_is_registered_with_transformers():
    for name in LOCALIST_ATTENTION.values():
        assert AttentionInterface()[name] is localist_attention_forward
        assert name in AttentionMaskInterface()


@pytest.mark.parametrize("layers", [None, [1, 3]])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_a_layer_that_is_not_measured_is_sdpa(make_config, layers, num_key_value_heads: int):
    locality = build(make_config(), output_fidelity=layers)
    query, key, value = random_inputs(4, num_key_value_heads)
    for layer in range(3):
        module = attention_module(layer, groups=4 // num_key_value_heads)
        output, weights = localist_attention_forward(module, query, key, value, None, scaling=0.3, locality=locality)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    assert torch.equal(output, expected)
    assert weights is None
    assert locality is None or set(locality.results) == {1}


@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (7, 0)])
@pytest.mark.parametrize("query_length", [LENGTH, 5, 1])
def test_any_ratio_of_query_heads_to_key_heads_equals_the_matrix(
    make_config, num_heads: int, num_key_value_heads: int, padding: tuple[int, int], query_length: int
):
    config = make_config(block_partition="window", window_length=9, num_sink_tokens=2)
    mask = left_padding(*padding)
    locality = build(config, output_entropy=True, attention_mask=mask)
    query, key, value = inputs = random_inputs(num_heads, num_key_value_heads, query_length)
    groups = num_heads // num_key_value_heads
    for tensor in inputs:
        tensor.requires_grad_()
    documents = locality.documents
    visible = reference.visible_keys(documents, query_length)
    can_skip = sum(padding) == 0 and query_length in (1, LENGTH)
    output, _ = localist_attention_forward(
        attention_module(1, groups), query, key, value, None if can_skip else visible, scaling=0.4, locality=locality
    )

    _, entropy, _, local_set, *_ = result = locality.results[1]
    fidelity = result.shares.fidelity
    starts = window_block_starts(documents, 9)
    # Query head h reads key head h // groups, in every architecture with grouped heads.
    keys, values = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value))
    expected, weights, _ = reference.attention(query.double(), keys, values, visible, 0.4)
    local = reference.local_set(starts, documents, 2, query_length)
    counted = reference.counted(visible, local, documents)
    assert torch.equal(local_set.is_counted(), counted)
    assert torch.equal(result.block_starts, starts[:, -query_length:])
    phi = torch.where(counted[:, None], reference.fidelity(weights, local), 1.0)
    bits = reference.entropy_bits(weights)
    is_token = (documents >= 0)[:, None, -query_length:].expand_as(bits)
    assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=0)
    assert_close(fidelity.double(), phi, atol=1e-5, rtol=0)
    assert_close(entropy.double()[is_token], bits[is_token], atol=1e-5, rtol=0)
    assert (entropy[~is_token] == 0).all()

    coefficients = torch.randn_like(phi)
    grads = torch.autograd.grad((fidelity * coefficients).sum(), inputs[:2], retain_graph=True)
    exacts = torch.autograd.grad((phi * coefficients).sum(), inputs[:2])
    for grad, exact in zip(grads, exacts, strict=True):
        assert_close(grad, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fidelity_and_entropy_of_half_precision_are_those_of_the_rounded_inputs(make_config, dtype: torch.dtype):
    locality = build(make_config(block_partition="window"), output_entropy=True)
    query, key, value = inputs = [2 * tensor.to(dtype) for tensor in random_inputs(2, 2)]
    output, _ = localist_attention_forward(attention_module(1), *inputs, None, locality=locality)
    visible = reference.visible_keys(locality.documents, LENGTH)
    _, weights, _ = reference.attention(query.double(), key.double(), value.double(), visible, 8**-0.5)
    local = reference.local_set(locality.results[1].block_starts, locality.documents, 0, LENGTH)
    assert output.dtype == dtype
    assert_close(locality.results[1].shares.fidelity.double(), reference.fidelity(weights, local), atol=1e-3, rtol=0)
    assert_close(locality.results[1].entropy.double(), reference.entropy_bits(weights), atol=1e-3, rtol=0)


def test_the_default_scale_is_one_over_the_root_of_the_head_size(make_config):
    query, key, value = random_inputs(2, 2)
    results = []
    for scaling in (None, 8**-0.5):
        locality = build(make_config(block_partition="window"))
        localist_attention_forward(attention_module(0), query, key, value, None, scaling=scaling, locality=locality)
        results.append(locality.results[0].shares.fidelity)
    assert torch.equal(*results)


@pytest.mark.parametrize("semantic_layer", [None, 0, 1, 3])
def test_layer_l_takes_its_blocks_from_the_band_up_to_itself_or_from_its_own_values(
    make_config, semantic_layer: int | None
):
    config = make_config(semantic_layer=semantic_layer)
    locality = build(config)
    inputs = [random_inputs(2, 2) for _ in range(4)]
    lengths = [reference.value_lengths(value) for _, _, value in inputs]
    for layer, (query, key, value) in enumerate(inputs):
        localist_attention_forward(attention_module(layer), query, key, value, None, locality=locality)
    m = 3 if semantic_layer is None else semantic_layer
    expected = []
    for layer in range(4):
        last = min(layer, m)
        band = lengths[min(1, m, last) : last + 1]  # from 3/8 of 4 layers, rounded down
        starts, margin = reference.semantic_block_starts(
            torch.stack(band).mean(0), locality.documents, config.semantic_threshold, config.min_block_length,
            config.max_block_length,
        )  # fmt: skip
        assert margin > 3e-4
        assert torch.equal(starts_of(locality, layer), starts)
        expected.append(starts)
    assert m == 0 or not torch.equal(expected[0], expected[m])


def test_a_layer_above_takes_the_blocks_of_a_semantic_layer_that_is_not_measured(make_config):
    locality, everything = build(make_config(), output_fidelity=[3]), build(make_config())
    for layer in range(4):
        query, key, value = random_inputs(2, 2)
        for each in (locality, everything):
            localist_attention_forward(attention_module(layer), query, key, value, None, locality=each)
    assert torch.equal(starts_of(locality, 3), starts_of(everything, 3))
    assert set(locality.results) == {3}


def test_no_gradient_flows_into_the_values_that_define_the_blocks(make_config):
    locality = build(make_config())
    query, key, value = random_inputs(2, 2)
    value.requires_grad_()
    for layer in range(3):
        localist_attention_forward(attention_module(layer), query, key, value, None, locality=locality)
    (grad,) = torch.autograd.grad(
        locality.results[2].shares.fidelity.sum(), value, allow_unused=True, materialize_grads=True
    )
    assert (grad.abs() < 1e-6).all()


# --- what a forward pass is asked for


@pytest.mark.parametrize("output_fidelity", [None, False, [], ()])
def test_without_a_request_there_is_nothing_to_measure(make_config, output_fidelity):
    assert build(make_config(), output_fidelity=output_fidelity) is None


@pytest.mark.parametrize(("output_fidelity", "layers"), [(True, {0, 1, 2, 3}), ([2, 0], {0, 2}), ((3,), {3})])
def test_a_request_names_its_layers(make_config, output_fidelity, layers):
    assert build(make_config(), output_fidelity=output_fidelity).layers == frozenset(layers)


def explicit_starts(**changes: int) -> torch.Tensor:
    """Blocks of 10 for two rows of 50 tokens, with entries like `at_0_13=4` changed."""
    position = torch.arange(LENGTH)
    starts = (position - position % 10).repeat(2, 1)
    for name, value in changes.items():
        _, row, position = name.split("_")
        starts[int(row), int(position)] = value
    return starts


def mask_with_holes(*holes: slice) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    for hole in holes:
        mask[1, hole] = 0
    return mask


REFUSED = {
    "entropy without fidelity": ({"output_fidelity": None, "output_entropy": True}, "`output_entropy=True` needs"),
    "a layer above": ({"output_fidelity": [1, 4]}, r"`output_fidelity` asks for layers \[1, 4\].* 0 to 3"),
    "a layer below": ({"output_fidelity": [-1]}, r"`output_fidelity` asks for layers \[-1\].* 0 to 3"),
    "a mask too short": (
        {"attention_mask": torch.ones(2, 49)},
        r"`attention_mask` has the shape \(2, 49\).*\(2, 50\)",
    ),
    "a mask of one row": ({"attention_mask": torch.ones(1, 50)}, r"`attention_mask` has the shape \(1, 50\)"),
    "a mask of 4 dimensions": ({"attention_mask": torch.ones(2, 1, 50, 50)}, "`attention_mask` has the shape"),
    "a hole between tokens": (
        {"attention_mask": mask_with_holes(slice(10, 20))},
        "`attention_mask` has padding between tokens",
    ),
    "a hole after padding": (
        {"attention_mask": mask_with_holes(slice(0, 3), slice(10, 20))},
        "`attention_mask` has padding between tokens",
    ),
    "a hole before padding": (
        {"attention_mask": mask_with_holes(slice(10, 20), slice(45, 50))},
        "`attention_mask` has padding between tokens",
    ),
    "starts too few": (
        {"block_starts": explicit_starts()[:, 1:]},
        r"`block_starts` has the shape \(2, 49\).*\(2, 50\)",
    ),
    "starts of one row": ({"block_starts": explicit_starts()[:1]}, r"`block_starts` has the shape \(1, 50\)"),
    "a start after its position": ({"block_starts": explicit_starts(at_1_13=14)}, r"`block_starts\[1, 13\]` is 14"),
    "a start far outside": ({"block_starts": explicit_starts(at_0_13=99)}, r"`block_starts\[0, 13\]` is 99"),
    "a negative start": ({"block_starts": explicit_starts(at_0_0=-1)}, r"`block_starts\[0, 0\]` is -1"),
    "a start that is in a block": ({"block_starts": explicit_starts(at_0_13=12)}, r"`block_starts\[0, 13\]` is 12"),
    "a start in the padding": (
        {"block_starts": explicit_starts(), "attention_mask": left_padding(0, 5)},
        r"`block_starts\[1, 5\]` is 0.*\(5\)",
    ),
    "a start in the document before": (
        {"block_starts": explicit_starts(), "position_ids": (torch.arange(LENGTH) % 25)[None]},
        r"`block_starts\[0, 25\]` is 20.*\(25\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_met_is_refused_by_name(make_config, case: str):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(make_config(), **arguments)


def test_blocks_that_go_back_to_an_earlier_one_are_refused(make_config):
    # 10..19 start at 10, but 20..29 claim 0: between them stands another block.
    starts = explicit_starts()
    starts[:, 20:30] = 0
    with pytest.raises(ValueError, match=r"`block_starts\[0, 20\]` is 0"):
        build(make_config(), block_starts=starts)


def test_another_attention_implementation_is_refused(make_config):
    with pytest.raises(
        ValueError, match=r"`output_fidelity` and `locality_dial` need the attention implementation 'localist'.*'eager'"
    ):
        build(make_config(attn_implementation="eager"))


def test_a_cache_of_fixed_size_is_refused(make_config):
    cache = StaticCache(config=make_config(), max_cache_len=60)
    with pytest.raises(ValueError, match=r"`output_fidelity`.*StaticCache.*DynamicCache"):
        build(make_config(), cache=cache)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": None, "inputs_embeds": torch.zeros(2, LENGTH, 32)},
        {"cache": filled_cache(5)},
    ],
    ids=["inputs_embeds", "filled cache"],
)
def test_delimiters_need_the_tokens_or_explicit_starts(make_config, arguments: dict):
    config = make_config(block_partition="delimiter")
    with pytest.raises(
        ValueError, match=r"delimiter.*`input_ids` of all tokens, from the first one on.*`block_starts`"
    ):
        build(config, **arguments)
    length = 55 if "cache" in arguments else 50
    starts = torch.zeros(2, length, dtype=torch.long)
    assert torch.equal(starts_of(build(config, block_starts=starts, **arguments), 0), starts)


def test_delimiter_blocks_are_those_of_the_tokens(make_config):
    config = make_config(block_partition="delimiter")
    ids = torch.randint(0, 20, (2, LENGTH))
    locality = build(config, input_ids=ids, attention_mask=left_padding(0, 11))
    before = torch.cat((torch.zeros(2, 1, dtype=torch.long), ids[:, :-1]), dim=1)
    expected = reference.place_block_starts(
        torch.isin(before, torch.tensor(config.delimiter_token_ids)), locality.documents, 3, 12
    )
    assert torch.equal(starts_of(locality, 3), expected)


def test_padding_belongs_to_no_block_whatever_the_explicit_starts_say_there(make_config):
    starts = explicit_starts(at_1_0=77, at_1_1=-5)
    starts[1, 2:10] = 2
    locality = build(make_config(), block_starts=starts, attention_mask=left_padding(0, 2))
    starts[1, :2] = -1
    assert torch.equal(starts_of(locality, 0), starts)


def test_a_batch_of_nothing_but_padding_has_no_blocks(make_config):
    for starts in (None, explicit_starts()):
        locality = build(
            make_config(block_partition="window"), attention_mask=torch.zeros(2, LENGTH), block_starts=starts
        )
        assert (starts_of(locality, 0) == -1).all()
        assert not locality.local_set(0, LENGTH, torch.device("cpu")).is_counted().any()


def test_a_cache_without_packing_is_measured_as_one_text(make_config):
    # transformers separates packed documents only where there is no cache: with one, all keys are seen.
    position_ids = (torch.arange(LENGTH) % 25)[None]
    assert (build(make_config(), position_ids=position_ids).documents[:, 25:] == 25).all()
    locality = build(make_config(), position_ids=position_ids, cache=DynamicCache())
    assert (locality.documents == 0).all()


@pytest.mark.parametrize("num_sink_tokens", [0, 1, 4])
def test_the_fidelity_mask_leaves_out_what_is_one_by_construction(make_config, num_sink_tokens: int):
    config = make_config(block_partition="window", window_length=3, num_sink_tokens=num_sink_tokens)
    for arguments in ({"attention_mask": left_padding(4, 11)}, {"position_ids": (torch.arange(LENGTH) % 20)[None]}):
        locality = build(config, **arguments)
        visible = reference.visible_keys(locality.documents, LENGTH)
        starts = window_block_starts(locality.documents, 3)
        local = reference.local_set(starts, locality.documents, num_sink_tokens, LENGTH)
        assert torch.equal(
            locality.local_set(0, LENGTH, torch.device("cpu")).is_counted(),
            reference.counted(visible, local, locality.documents),
        )


# --- what is asked of a layer


@given(st.lists(st.floats(1e-3, 1), min_size=4, max_size=4), st.floats(0, 0.99), st.sampled_from(["self", "sink"]))
def test_attention_parked_on_self_or_sink_raises_the_fidelity_and_not_the_context_fidelity(parts, moved, to):
    own, sink, block, outside = (torch.tensor(part, dtype=torch.float64) / sum(parts) for part in parts)
    parked = moved * (block + outside)  # in proportion, from the other words
    psi = context_fidelity((1 - moved) * block, (1 - moved) * outside)
    assert_close(psi, context_fidelity(block, outside))
    phi = own + sink + block + parked - moved * block
    assert phi >= own + sink + block - 1e-12
    if moved > 0.01:
        assert phi > own + sink + block


def test_the_last_keys_in_place_of_blocks_equal_the_matrix(make_config):
    """Recency, which is no partition: for measuring only."""
    position = torch.arange(LENGTH)
    mask = left_padding(0, 7)
    first = torch.tensor([[0], [7]])
    starts = torch.maximum(position - 8, first).where(mask.bool(), torch.tensor(-1))
    locality = build(make_config(num_sink_tokens=2), attention_mask=mask, local_starts=starts)
    query, key, value = random_inputs(2, 2)
    visible = reference.visible_keys(locality.documents, LENGTH)
    localist_attention_forward(attention_module(1), query, key, value, visible, scaling=0.4, locality=locality)
    _, weights, _ = reference.attention(query.double(), key.double(), value.double(), visible, 0.4)
    start, is_token = starts[:, None, :, None], (starts >= 0)[:, None]
    is_self = position[:, None] == position
    is_last = (start <= position) & (position <= position[:, None])
    is_sink = (first[:, None, None] <= position) & (position < first[:, None, None] + 2) & (position < start)
    for share, keys in zip(
        locality.results[1].shares, (is_self, is_sink, is_last & ~is_self, ~is_last & ~is_sink), strict=True
    ):
        expected = (weights * keys).sum(-1) * is_token
        assert_close(share.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_starts": torch.zeros(2, 9).long()}, r"`local_starts` has the shape \(2, 9\); it must be \(2, 50\)"),
        ({"local_starts": torch.full((2, LENGTH), 3)}, r"`local_starts\[0, 0\]` is 3; it must lie between"),
        (
            {"local_starts": torch.zeros(2, LENGTH).long(), "block_starts": explicit_starts()},
            "`block_starts` and `local_starts` are both given",
        ),
    ],
)
def test_stretches_that_cannot_be_are_refused(make_config, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build(make_config(), **arguments)
