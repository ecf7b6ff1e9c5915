"""Rules and pointers, of every architecture, against the explicit matrix."""

import copy
from typing import Any

import pytest
import torch
from architectures import LAYERS, LENGTH, every_architecture, localised, positions, text, untouched
from matrices import PointedMatrices, check_close, documents_of, native_pass, targets_of, windows_of
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from localist_hf import Rule
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.measurements import SHARES


SINKS = 2
#: Where sliding windows hide nothing of them, and one that holds the first tokens, which are sinks.
ANCHORS = {"first": (1, 6), "second": (6, 15), "asked": (15, 20), "answer": (20, None)}
RULES = [
    Rule("second", ["second"]),
    Rule("asked", ["second", 16, (17, 19)]),
    Rule(["answer"], ["asked", "answer"]),
    Rule((24, 26), "second"),
]
#: What they say: for each stretch of queries, the targets.
SAID = {(6, 15): [(6, 15)], (15, 20): [(6, 15), (16, 19)], (20, LENGTH): [(15, LENGTH)], (24, 26): [(6, 15)]}


def matrices_of(architecture: str, documents: torch.Tensor, targets: torch.Tensor, dial=0.0, floor=0.0, sinks=SINKS):
    lambdas = [layer / (LAYERS - 1) for layer in range(LAYERS)]
    return PointedMatrices(
        windows_of(architecture),
        documents,
        (torch.zeros_like(documents),) * LAYERS,
        sinks,
        0,
        [1 - dial * value for value in lambdas],
        [floor * value for value in lambdas],
        targets=targets,
    )


def check_pointed(outputs: Any, matrices: PointedMatrices) -> None:
    for layer in range(LAYERS):
        for name, expected in matrices.measurements(layer).items():
            actual, where = getattr(outputs, name)[layer], f"{name} of layer {layer}"
            if expected.dtype == torch.bool:
                assert torch.equal(actual, expected), where
            else:
                check_close(where, actual.double(), expected)
        keys = sum(part.sum(-1) for name, part in matrices.parts(layer).items() if name != "outside")
        is_token = matrices.documents >= 0
        assert torch.equal(outputs.visible_keys[layer][is_token], keys[is_token])


@every_architecture
@pytest.mark.parametrize(
    ("layout", "dial", "floor"), [("none", 0.0, 0.0), ("right", 0.5, 0.0), ("left", 1.0, 0.0), ("left", 0.0, 0.8)]
)
@torch.no_grad()
def test_rules_turn_down_the_weights_of_the_matrix(architecture: str, layout: str, dial: float, floor: float) -> None:
    model = localised(architecture, num_sink_tokens=SINKS)
    ids, mask = text(layout)
    documents = documents_of(mask)
    told = {"rules": RULES, "anchors": ANCHORS, "locality_dial": dial, "min_fidelity": floor}
    told["position_ids"] = positions(mask)
    measured = model(ids, attention_mask=mask, **told, output_fidelity=True, output_entropy=True, use_cache=False)
    outputs = model(ids, attention_mask=mask, **told)
    matrices = matrices_of(architecture, documents, targets_of(documents, SAID), dial, floor)
    expected = native_pass(
        copy.deepcopy(untouched(architecture)), matrices, ids, attention_mask=mask, position_ids=positions(mask)
    )
    is_token = mask.bool()
    check_close("logits", outputs.logits[is_token], expected.logits[is_token])
    check_close("logits", measured.logits[is_token], expected.logits[is_token])
    check_pointed(measured, matrices)
    if dial == 1:  # to the last bit, where lambda is 1
        assert not measured.outside_share[-1].any()
    elif not floor:
        psi = context_fidelity(*(measured[f"{name}_share"][-1][0, :, 25:].sum() for name in ("block", "outside")))
        assert 0.01 < psi < 0.99  # so that it can fail


@every_architecture
@torch.no_grad()
def test_at_dial_0_rules_change_no_bit(architecture: str) -> None:
    model, ids = localised(architecture), text()[0]
    expected = model(ids).logits
    assert torch.equal(model(ids, rules=RULES, anchors=ANCHORS).logits, expected)
    if architecture not in ("gemma2", "gpt_oss"):  # whose weights are made one by one where anything is measured
        assert torch.equal(model(ids, rules=RULES, anchors=ANCHORS, output_fidelity=True).logits, expected)
    # At dial 1 they do, and nothing of it stays.
    assert (model(ids, rules=RULES, anchors=ANCHORS, locality_dial=1.0).logits - expected).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, expected)


@every_architecture
@torch.no_grad()
def test_cached_equals_uncached(architecture: str, layout: str = "left") -> None:
    model = localised(architecture, num_sink_tokens=SINKS)
    ids, mask = text(layout)
    told = {"rules": RULES, "anchors": ANCHORS, "locality_dial": 1.0}
    whole = model(ids, attention_mask=mask, **told, output_fidelity=True, use_cache=False)
    cache = DynamicCache(config=model.config)
    for start, end in ((0, 21), (21, 27), *((place, place + 1) for place in range(27, LENGTH))):
        argument = {"cache": cache} if "cache" in model._native_arguments else {"past_key_values": cache}
        part = model(ids[:, start:end], attention_mask=mask[:, :end], **told, **argument, output_fidelity=True)
        is_token = mask[:, start:end].bool()
        check_close("logits", part.logits[is_token], whole.logits[:, start:end][is_token])
        for name in SHARES:
            for one, other in zip(getattr(part, name), getattr(whole, name), strict=True):
                check_close(name, one, other[..., start:end])


@every_architecture
@torch.no_grad()
def test_rules_for_all_tokens_isolate_the_parts_of_a_prompt(architecture: str) -> None:
    model = localised(architecture, locality_schedule="localist", num_sink_tokens=0)
    model.generation_config.eos_token_id = None
    if architecture == "deepseek_v3":
        pytest.skip("experts are chosen for batches of tokens, which differ in the last bit")
    parts = {"one": (0, 8), "two": (8, 16), "question": (16, 22), "answer": (22, None)}
    rules = [Rule(name, name) for name in ("one", "two", "question")]
    rules.append(Rule("answer", ["two", "question", "answer"]))
    ids = text(batch_size=1)[0]
    other = ids.clone()
    other[:, :8] = ids[:, :8].roll(1, 1)
    told = {"rules": rules, "anchors": parts, "locality_dial": 1.0}
    before, after = model(ids, **told).logits, model(other, **told).logits
    assert torch.equal(before[:, 8:], after[:, 8:])
    assert not torch.equal(before[:, :8], after[:, :8])
    asked = ids.clone()
    asked[:, 8:16] = ids[:, 8:16].roll(1, 1)
    assert not torch.equal(model(asked, **told).logits[:, 22:], before[:, 22:])
    # The steps of a generation hold to it as well.
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    settings.output_logits = settings.return_dict_in_generate = True
    found = [model.generate(tokens[:, :24], settings, **told) for tokens in (ids, other)]
    assert torch.equal(found[0].sequences[:, 24:], found[1].sequences[:, 24:])
    for one, two in zip(found[0].logits, found[1].logits, strict=True):
        assert torch.equal(one, two)


@every_architecture
@torch.no_grad()
def test_generation_follows_the_rules(architecture: str) -> None:
    model, ids = localised(architecture, num_sink_tokens=SINKS), text()[0][:, :22]
    model.generation_config.eos_token_id = None
    told = {"rules": RULES, "anchors": ANCHORS, "locality_dial": 1.0}
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(ids, settings, **told)
    expected = ids
    for _ in range(6):
        logits = model(expected, **told, use_cache=False).logits[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found, expected)
    # Rows of several beams and samples are told the same.
    beams = model.generate(ids, settings, num_beams=3, **told)
    assert beams.shape == found.shape
    with model.set_locality_dial(1.0):
        assert torch.equal(model.generate(ids, settings, rules=RULES, anchors=ANCHORS), found)


@every_architecture
def test_gradients_are_those_of_the_matrix(architecture: str, layout: str = "left") -> None:
    model = localised(architecture, num_sink_tokens=SINKS).train()
    ids, mask = text(layout)
    documents = documents_of(mask)
    native = copy.deepcopy(untouched(architecture)).train()
    told = {"rules": RULES, "anchors": ANCHORS, "locality_dial": 0.5, "output_fidelity": True, "use_cache": False}
    outputs = model(ids, attention_mask=mask, **told)
    matrices = matrices_of(architecture, documents, targets_of(documents, SAID), 0.5)
    expected = native_pass(native, matrices, ids, attention_mask=mask, position_ids=positions(mask))
    is_token = mask.bool()
    losses = []
    for logits, measured in (
        (outputs.logits, [(outputs.block_share[at], outputs.outside_share[at]) for at in range(LAYERS)]),
        (expected.logits, [tuple(_sums(matrices, at)) for at in range(LAYERS)]),
    ):
        loss = logits[is_token].square().mean()
        for layer, (block, outside) in enumerate(measured):
            counted = outputs.context_mask[layer][:, None]
            loss = loss + (context_fidelity(block, outside, eps=1e-3) * counted).sum() / 50
        losses.append(loss)
    assert_close(losses[0], losses[1].to(losses[0].dtype), atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    expected_gradients = dict(native.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            check_close(name, parameter.grad, expected_gradients[name].grad, atol=1e-4)


def _sums(matrices: PointedMatrices, layer: int) -> list[torch.Tensor]:
    parts = matrices.parts(layer)
    return [(matrices.weights[layer] * parts[name][:, None]).sum(-1) for name in ("block", "outside")]


# --- by the data


@every_architecture
@pytest.mark.parametrize("layout", ["left"])
@torch.no_grad()
def test_pointers_are_rules_told_by_the_data(architecture: str, layout: str) -> None:
    model = localised(architecture, num_sink_tokens=SINKS)
    ids, mask = text(layout)
    documents = documents_of(mask)
    place = torch.where(documents < 0, -1, torch.arange(LENGTH) - documents)
    starts = torch.where(documents < 0, -1, documents + place // 5 * 5)
    pointers = torch.where(place >= 10, torch.where(place < 20, place // 5 - 2, place // 5 - 1), -1)
    pointers[1, 25:28] = -1
    told = {"locality_dial": 0.7, "output_fidelity": True, "output_entropy": True}
    found = model(ids, attention_mask=mask, block_starts=starts, pointer_blocks=pointers, **told)
    targets = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for row, query in (pointers >= 0).nonzero().tolist():
        targets[row, query] = (place[row] // 5 == pointers[row, query]) & (place[row] >= 0)
    matrices = matrices_of(architecture, documents, targets, 0.7)
    expected = native_pass(
        copy.deepcopy(untouched(architecture)), matrices, ids, attention_mask=mask, position_ids=positions(mask)
    )
    check_close("logits", found.logits[mask.bool()], expected.logits[mask.bool()])
    check_pointed(found, matrices)
    assert torch.equal(found.block_starts[-1], starts)


@torch.no_grad()
def test_pointers_of_packed_documents_are_those_of_each_alone() -> None:
    model = localised("llama", num_sink_tokens=SINKS)
    ids = text(batch_size=1)[0]
    place = torch.cat((torch.arange(18), torch.arange(LENGTH - 18)))[None]
    starts = torch.cat((torch.arange(18) // 6 * 6, torch.arange(LENGTH - 18) // 6 * 6))[None]
    alone = [torch.where(part < 6, -1, 0 * part) for part in (torch.arange(18)[None], torch.arange(LENGTH - 18)[None])]
    packed_starts = starts + torch.tensor([0] * 18 + [18] * (LENGTH - 18))
    packed = torch.cat((alone[0], torch.where(alone[1] < 0, -1, alone[1] + 3)), dim=1)
    told = {"locality_dial": 0.7, "output_fidelity": True, "use_cache": False}
    found = model(ids, position_ids=place, block_starts=packed_starts, pointer_blocks=packed, **told)
    for start, end, of_part in ((0, 18, alone[0]), (18, LENGTH, alone[1])):
        expected = model(ids[:, start:end], block_starts=starts[:, start:end], pointer_blocks=of_part, **told)
        check_close("logits", found.logits[:, start:end], expected.logits)
        for name in (*SHARES, "fidelity_mask"):
            for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
                check_close(name, one[..., start:end].float(), other.float())
    with pytest.raises(ValueError, match=r"`pointer_blocks\[0, 30\]` is 0; .* can see: 3 to 5"):
        wrong = packed.clone()
        wrong[0, 30] = 0
        model(ids, position_ids=place, block_starts=packed_starts, pointer_blocks=wrong, **told)
    with pytest.raises(ValueError, match="`rules` are given for packed documents"):
        model(ids, position_ids=place, rules=[Rule(9, 0)], **told)


# --- rows


@torch.no_grad()
def test_each_row_has_its_own_anchors_and_masks() -> None:
    model, (ids, mask) = localised("llama", num_sink_tokens=SINKS), text("left")
    rows = [{"a": (2, 5), "b": (9, 12)}, {"a": [3, (5, 8)], "b": (20, 22)}]
    told = {"locality_dial": 1.0, "output_fidelity": [LAYERS - 1]}
    found = model(ids, attention_mask=mask, rules=[Rule("b", "a")], anchors=rows, **told)
    for row, anchors in enumerate(rows):
        tokens = ids[row : row + 1, mask[row].bool()]
        expected = model(tokens, rules=[Rule("b", "a")], anchors=anchors, **told)
        check_close("logits", found.logits[row, mask[row].bool()], expected.logits[0])
    # By masks, which may be shorter than the text.
    queries, targets = torch.zeros(2, 25, dtype=torch.bool), torch.zeros(2, LENGTH, dtype=torch.bool)
    start = LENGTH - int(mask[0].sum())
    queries[0, start + 9 : start + 12], targets[0, start + 2 : start + 5] = True, True
    queries[1, 20:22] = True
    targets[1, [3, 5, 6, 7]] = True
    by_masks = model(ids, attention_mask=mask, rules=[Rule(queries, targets)], **told)
    assert torch.equal(by_masks.logits, found.logits)
    # And a dial.
    dials = torch.tensor([0.0, 1.0])
    told["locality_dial"] = dials
    of_rows = model(ids, attention_mask=mask, rules=[Rule("b", "a")], anchors=rows, use_cache=False, **told)
    check_close("logits", of_rows.logits[1], found.logits[1])
    check_close("logits", of_rows.logits[0, mask[0].bool()], model(ids, attention_mask=mask).logits[0, mask[0].bool()])


# --- refusals


WRONG = {
    "no list": ({"rules": Rule(9, 0)}, "`rules` is a Rule; it must be a list of 1 to 62 rules"),
    "none": ({"rules": []}, "`rules` is a list of 0; it must be a list of 1 to 62 rules"),
    "many": ({"rules": [Rule(9, 0)] * 63}, "`rules` is a list of 63; it must be"),
    "no rule": ({"rules": [("a", "b")]}, r"`rules\[0\]` is \('a', 'b'\); it must be a `Rule`"),
    "no anchor": ({"rules": [Rule("a", 0)]}, r"`rules\[0\]` names the anchor 'a'; the `anchors` of row 0 are none"),
    "another": (
        {"rules": [Rule("a", 0)], "anchors": {"b": 3}},
        r"`rules\[0\]` names the anchor 'a'; the `anchors` of row 0 are 'b'",
    ),
    "no part": ({"rules": [Rule("a", 0)], "anchors": {"a": "b"}}, "The anchor 'a' is 'b'; it must be"),
    "unused": ({"anchors": {"a": 3}}, "`anchors` are given without `rules`"),
    "no mapping": ({"rules": [Rule(9, 0)], "anchors": 3}, "`anchors` is 3; it must map names to parts"),
    "rows": ({"rules": [Rule(9, 0)], "anchors": [{}]}, r"`anchors` is a list of 1; the batch has 2 rows"),
    "later": (
        {"rules": [Rule(20, 3), Rule((8, 12), (10, 14))]},
        r"`rules\[1\]` \(\(8, 12\) to look at \(10, 14\)\) names the token at position 8 of row 0, before which none",
    ),
    "a mask of another batch": (
        {"rules": [Rule(torch.ones(3, 4, dtype=torch.bool), 0)]},
        r"`rules\[0\]` has a mask of the shape \(3, 4\); it must be \(2, 66\) at most",
    ),
    "both": (
        {"rules": [Rule(9, 0)], "pointer_blocks": torch.zeros(2, LENGTH).long()},
        "`rules` and `pointer_blocks` are both given",
    ),
    "stretches": (
        {"rules": [Rule(9, 0)], "local_starts": torch.zeros(2, LENGTH).long()},
        "`rules` and `local_starts` are both given",
    ),
    "blocks": (
        {"rules": [Rule(9, 0)], "output_fidelity": True, "output_block_choice": True},
        "`rules` and `output_block_choice` are both given",
    ),
    "no blocks": ({"pointer_blocks": torch.zeros(2, LENGTH).long()}, "`pointer_blocks` needs `block_starts`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_told_is_refused_by_name(case: str) -> None:
    arguments, sentence = WRONG[case]
    assert LENGTH == 66
    with pytest.raises(ValueError, match=sentence):
        localised("llama")(text()[0], **{"locality_dial": 1.0, **arguments})


@pytest.mark.parametrize(
    ("pointers", "sentence"),
    [
        (torch.zeros(2, LENGTH), "`pointer_blocks` is a Tensor of the shape .*; it must be a tensor of whole numbers"),
        (torch.zeros(2, 5).long(), r"`pointer_blocks` has the shape \(2, 5\); it must be \(2, 66\)"),
        (torch.full((2, LENGTH), 2), r"`pointer_blocks\[0, 0\]` is 2; it must be -1, or .* can see: 0 to 0"),
        (torch.full((2, LENGTH), -2), r"`pointer_blocks\[0, 0\]` is -2; it must be -1, or"),
    ],
)
def test_pointers_to_nothing_are_refused(pointers: torch.Tensor, sentence: str) -> None:
    starts = (torch.arange(LENGTH) // 6 * 6).expand(2, -1)
    with pytest.raises(ValueError, match=sentence):
        localised("llama")(text()[0], block_starts=starts, pointer_blocks=pointers, locality_dial=1.0)


@pytest.mark.parametrize(
    "part", [-1, 10**30, (0, 10**30), (5, 5), (5, 3), (1, 2, 3), 1.5, None, [], [[]], torch.zeros(3), True, {"a"}]
)
def test_what_is_no_part_of_a_text_is_refused(part: Any) -> None:
    for name, rule in (("queries", (part, 0)), ("targets", (0, part))):
        with pytest.raises(ValueError, match=f"`{name}` of a rule is .*; it must be the name of an anchor"):
            Rule(*rule)


def test_targets_behind_a_sliding_window_are_refused() -> None:
    model, ids = localised("mistral"), text()[0]
    with pytest.raises(
        ValueError, match=r"position 34 of row 0, from which the sliding window of layer \d, 20 keys, hides"
    ):
        model(ids, rules=[Rule(34, (0, 3))], locality_dial=1.0)
    with pytest.raises(ValueError, match=r"`rules\[1\]` .* names the token at position 60 of row 0, from which the sl"):
        model(ids, rules=[Rule(60, 55), Rule(60, (0, 5))], locality_dial=1.0)
    model(ids, rules=[Rule(34, (0, 3))])  # at dial 0 nothing is told


@torch.no_grad()
def test_the_guarantee_holds_however_little_is_left_without_it() -> None:
    """Targets whose scores are a hundred below the others: their share is none in float32."""
    model = localised("gpt2", locality_schedule="localist", num_sink_tokens=0)
    for block in model.transformer.h:
        block.attn.c_attn.weight[:, :64] *= 6
    ids = text()[0]
    told = {"rules": [Rule((20, None), (5, 9))], "output_fidelity": True, "use_cache": False}
    free = model(ids, **told)
    assert min(share[:, :, 20:].min().item() for share in free.fidelity) < 1e-30
    for floor in (0.5, 0.9, 1 - 1e-6):
        held = model(ids, **told, min_fidelity=floor)
        assert min(share.min().item() for share in held.fidelity) >= floor - 1e-5
        assert held.logits.isfinite().all()
        told_only = {name: value for name, value in told.items() if name != "output_fidelity"}
        check_close("logits", model(ids, **told_only, min_fidelity=floor).logits, held.logits, atol=1e-3)


@torch.no_grad()
def test_rules_need_no_blocks() -> None:
    """Where blocks could not be found: of tokens that are not there, and behind what a cache has dropped."""
    model = localised("llama", block_partition="delimiter", delimiter_token_ids=[5], num_sink_tokens=0)
    ids = text()[0]
    told = {"rules": RULES, "anchors": ANCHORS, "locality_dial": 1.0, "use_cache": False}
    embeddings = model.get_input_embeddings()(ids)
    check_close("logits", model(inputs_embeds=embeddings, **told).logits, model(ids, **told).logits)
    model = localised("mistral", locality_schedule="localist")
    cache = DynamicCache(config=model.config)
    name = model._cache_argument
    model(ids[:, :50], **{name: cache})
    rules = [Rule((50, None), (45, None))]
    found = model(ids[:, 50:], rules=rules, locality_dial=1.0, **{name: cache}).logits
    check_close("logits", found, model(ids, rules=rules, locality_dial=1.0, use_cache=False).logits[:, 50:])


@torch.no_grad()
def test_beams_and_samples_of_a_row_are_told_what_it_is_told() -> None:
    model, ids = localised("llama", num_sink_tokens=SINKS), text()[0][:, :22]
    mask = torch.zeros(2, 22, dtype=torch.bool)
    mask[0, 3:6], mask[1, 10:12] = True, True
    anchors = [{"seen": (3, 6)}, {"seen": (10, 12)}]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, num_beams=2, num_return_sequences=2, pad_token_id=0)
    for rule, names in ((Rule((20, None), "seen"), anchors), (Rule([21, (22, None)], mask), None)):
        found = model.generate(ids, settings, rules=[rule], anchors=names, locality_dial=1.0)
        for row in range(2):
            of_row = rule if names else Rule(rule.queries, mask[row : row + 1])
            alone = {"rules": [of_row], "anchors": names and names[row], "locality_dial": 1.0}
            expected = model.generate(ids[row : row + 1], settings, **alone)
            assert torch.equal(found[2 * row : 2 * row + 2], expected)


def test_at_dial_0_what_is_wrong_is_said_too() -> None:
    model, ids = localised("llama"), text()[0]
    with pytest.raises(ValueError, match="names the anchor 'nope'"):
        model(ids, rules=[Rule("nope", 0)])
    with pytest.raises(ValueError, match="`rules` is a str"):
        model(ids, rules="hello")


def test_other_generations_are_refused() -> None:
    model, ids = localised("llama"), text()[0]
    with pytest.raises(ValueError, match="`rules` is given for an assisted or a guided generation"):
        model.generate(ids, rules=[Rule(9, 0)], locality_dial=1.0, guidance_scale=2.0, max_new_tokens=3)
    with pytest.raises(ValueError, match="`rules` is given for an assisted or a guided"):
        model.generate(ids, rules=[Rule(9, 0)], locality_dial=1.0, prompt_lookup_num_tokens=3, max_new_tokens=3)
    filled = model(ids, locality_dial=1.0, use_cache=True)
    cache = getattr(filled, model._cache_argument)
    with pytest.raises(ValueError, match="The key-value cache was filled at dial 1"):
        model(ids[:, :1], rules=[Rule(LENGTH, 0)], locality_dial=1.0, **{model._cache_argument: cache})
