"""What the page says that predictions rest on, and can depend on, and where queries look under the dial."""

from itertools import pairwise

import pytest
import torch
from architectures import LAYERS, localised, text
from peft import PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import PreTrainedModel

from localist_hf import Rule
from localist_hf.evaluation import measure_influence
from localist_hf.modeling.measurements import SHARES
from localist_hf.modeling.reach import of_found_blocks
from localist_hf.page import Passage, Reading, read
from localist_hf.page import dependence as module


def reading_of(model: PreTrainedModel, length: int | None = None) -> Reading:
    ids = text(batch_size=1)[0][0, :length]
    return read(model, Passage(ids, [f"<{token}>" for token in ids.tolist()], tokenizer=None))


# Where attention is done each way: with windows, with learned sinks, with neither.
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gemma3", "gpt_oss", "qwen2"])
@torch.no_grad()
def test_weights_under_the_dial_add_up_to_the_shares_that_the_model_reports(architecture: str) -> None:
    reading = reading_of(localised(architecture, num_sink_tokens=2, num_previous_blocks=1))
    starts, length = reading.block_starts, len(reading.passage)
    for dial in (0.4, 1.0):
        outputs = reading.model(
            reading.passage.input_ids[None], block_starts=starts[None], output_fidelity=True, locality_dial=dial
        )
        for layer in range(LAYERS):
            expected = [getattr(outputs, share)[layer][0] for share in SHARES]
            columns = {key: reading.looked_at(layer, key, dial) for key in (0, 30, length - 1)}
            for position in range(0, length, 9):
                row = reading.weights(layer, position, dial)
                # The other direction has the same numbers.
                for key in columns:
                    if key <= position:
                        assert_close(columns[key][:, position - key], row[:, key], atol=1e-5, rtol=0)
                keys = torch.arange(position + 1)
                own, sink = keys == position, (keys < 2) & (keys < starts[position])
                block = (keys >= reading.local_starts[position]) & ~own & ~sink
                for part, share in ((own, expected[0]), (block, expected[2]), (~(own | sink | block), expected[3])):
                    assert_close(row[:, part].sum(1), share[:, position], atol=2e-5, rtol=0)


@torch.no_grad()
def test_weights_under_the_dial_where_hardly_any_is_local() -> None:
    model = localised("llama", locality_schedule="localist", num_sink_tokens=0)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 300  # so that the others' weights are none in float32
    reading = reading_of(model)
    rows = [reading.weights(layer, position, 1.0) for layer in range(LAYERS) for position in range(20, 50)]
    free = [reading.weights(0, position)[:, reading.block_starts[position] :].sum(1) for position in range(20, 50)]
    assert min(local.min().item() for local in free) < 1e-38
    for row in rows:
        assert_close(row.sum(1), torch.ones(len(row)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_of_a_token_that_is_told_where_to_look() -> None:
    reading = reading_of(localised("llama", num_sink_tokens=1))
    position, ids = 40, reading.passage.input_ids[None]
    edges, own = reading.block_starts.unique().tolist(), int(reading.block_starts[40])
    rule = Rule((position, None), [(edges[1], edges[2]), (own, None)])
    outputs = reading.model(ids[:, :41], rules=[rule], output_fidelity=True, locality_dial=0.7)
    for layer in range(LAYERS):
        row = reading.weights(layer, position, 0.7, target=1)
        keys = torch.arange(41)
        told = (keys >= edges[1]) & (keys < edges[2]) | (keys >= own)
        assert_close(row[:, told & (keys < 40)].sum(1), outputs.block_share[layer][0, :, 40], atol=2e-5, rtol=0)
        assert_close(row[:, ~told & (keys > 0)].sum(1), outputs.outside_share[layer][0, :, 40], atol=2e-5, rtol=0)
        assert_close(reading.weights(layer, position, 0.0, target=1), reading.weights(layer, position))


@torch.no_grad()
def test_passes_under_other_dials_make_room() -> None:
    reading = reading_of(localised("llama"))
    free = reading.num_bytes
    sizes = []
    for dial in (0.5, 1.0, 0.5):
        assert not reading.has_weights(dial, 9, None)
        reading.weights(0, 9, dial)
        assert reading.has_weights(dial, 30, None)
        assert not reading.has_weights(dial, 30, 0)
        sizes.append(reading.num_bytes)
    assert free < sizes[0] == sizes[1] == sizes[2]
    assert reading.has_weights(0.0, 9, 0)


# --- reach


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_the_reach_is_that_of_the_model_on_the_blocks_shown(architecture: str) -> None:
    reading = reading_of(localised(architecture, locality_schedule="localist"))
    ids, starts = reading.passage.input_ids[None], reading.block_starts
    for dial in (0.0, 0.5, 1.0):
        found = reading.dependence.reach(dial)
        expected = reading.model.reach(ids, block_starts=starts[None], locality_dial=dial, min_fidelity=0.0)
        expected = of_found_blocks(expected)  # nobody has given them
        assert (found.statement, found.is_bounded) == (expected.statement, expected.is_bounded)
        assert torch.equal(found.first, expected.first)
    assert found.is_bounded
    assert found.statement.startswith("Given these blocks, ")
    windows = reading_of(localised(architecture, locality_schedule="localist", block_partition="window"))
    assert windows.dependence.reach(1.0).statement.startswith("No token before those in reach")
    assert torch.equal(found.first[0], starts)  # of one block, with no previous one
    assert not reading_of(localised(architecture, locality_schedule="quintic")).dependence.reach(1.0).is_bounded


def test_adapters_with_tokens_of_their_own_have_no_reach() -> None:
    model = get_peft_model(
        localised("llama", locality_schedule="localist"),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    reach = reading_of(model).dependence.reach(1.0)
    assert not reach.is_bounded
    assert "an adapter that puts tokens of its own before a text" in reach.statement


# --- erasure


def portions(reading: Reading, position: int, dial: float, unit: str, num: int, target: int | None = None):
    """All influences, and where each portion begins."""
    bits, firsts = [], []
    while num > 0:
        left, found = reading.dependence.influence(position, dial, unit, num, target)
        firsts.insert(0, num - len(found))
        bits, num = found + bits, left
    return bits, firsts


@torch.no_grad()
def test_portions_are_what_the_library_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PORTION_TOKENS", 1600)
    reading = reading_of(localised("llama", locality_schedule="localist", num_sink_tokens=0))
    position, starts = 39, reading.block_starts[:40]
    ids = reading.passage.input_ids[:40]
    edges = [*starts.unique().tolist(), 40]
    units = {"block": list(pairwise(edges)), "token": [(place, place + 1) for place in range(40)]}
    for unit, dial, target in (("block", 0.6, None), ("token", 1.0, 0), ("token", 1.0, None)):
        bits, firsts = portions(reading, position, dial, unit, len(units[unit]), target)
        assert len(bits) == len(units[unit])
        assert len(firsts) > 3 if unit == "token" else firsts == [0]
        rules = None if target is None else [Rule((39, None), [(edges[0], edges[1]), (edges[-2], None)])]
        for first, end in zip(firsts, [*firsts[1:], len(bits)], strict=True):
            expected = measure_influence(
                reading.model, ids, units[unit][first:end], [39], seed=first, locality_dial=dial, min_fidelity=0.0,
                rules=rules, block_starts=starts,
            )  # fmt: skip
            assert_close(torch.tensor(bits[first:end]), expected.values[:, 0], atol=1e-4, rtol=1e-3)
        assert max(bits) > 0.01
    # What is out of reach changes nothing, to the last bit.
    first = int(reading.dependence.reach(1.0).first[0, 39])
    assert first > 0
    assert set(bits[:first]) == {0.0}
    assert min(bits[first:]) > 0


@torch.no_grad()
def test_what_was_measured_is_kept_and_what_takes_too_long_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, measured = reading_of(localised("llama")), []

    def measure(*args, **kwargs):
        measured.append(args[2])
        return measure_influence(*args, **kwargs)

    monkeypatch.setattr(module, "measure_influence", measure)
    found = [reading.dependence.influence(20, 0.5, "block", 1) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert len(measured) == 1
    monkeypatch.setattr(module, "MOST_WORDS", 5)
    left, bits = reading.dependence.influence(20, 0.5, "token", 21)
    assert (left, len(bits), measured[1]) == (0, 5, [(place, place + 1) for place in range(16, 21)])
    for end in (0, 16, 22):
        with pytest.raises(ValueError, match=f"`end` is {end}; it must be in 17 to 21"):
            reading.dependence.influence(20, 0.5, "token", end)
    monkeypatch.setattr(module, "MOST_BEFORE", 20)
    for arguments, message in (
        ((20, 0.5, "block", 1), "is measured for tokens 0 to 19; this is 20"),
        ((0, 0.5, "token", 1), "Up to here the text has one token only"),
        ((999, 0.5, "block", 1), "`position` is 999"),
        ((9, 1.5, "block", 1), "`dial` is 1.5"),
        ((9, 0.5, "letter", 1), "`unit` is 'letter'; it must be 'block' or 'token'"),
        ((9, 0.5, "block", 1, 99), "`target` is 99"),
    ):
        with pytest.raises(ValueError, match=message):
            reading.dependence.influence(*arguments)
    assert len(measured) == 2
