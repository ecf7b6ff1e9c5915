"""Influence by erasure and by knock-out, against predictions that are made one by one."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import every_architecture, localised, text, untouched
from matrices import Matrices, matrices_for, native_pass

from localist_hf import LocalistGPT2LMHeadModel, Rule
from localist_hf.evaluation import measure_influence
from localist_hf.evaluation.influence import replaced


@every_architecture
@torch.no_grad()
def test_influence_is_what_changes_in_the_predictions(architecture: str) -> None:
    model, ids = localised(architecture, locality_schedule="localist"), text(batch_size=1)[0][0]
    positions = [9, 30, 65]
    for dial in (0.0, 1.0):
        units = [(3, 8), (20, 21), (28, 40)]
        found = measure_influence(model, ids, units, positions, num_draws=2, batch_size=3, locality_dial=dial)
        assert (found.units, found.positions) == (units, positions)
        twice = [unit for unit in units for _ in range(2)]
        texts = replaced(ids, twice, torch.Generator().manual_seed(0)).unflatten(0, (3, 2))
        starts = model(ids[None], output_fidelity=[3], use_cache=False, locality_dial=dial).block_starts[0]
        for unit, drawn in enumerate(texts):
            first, end = units[unit]
            assert (drawn[:, first:end] != ids[first:end]).all()  # every token is another one
            assert torch.equal(drawn[:, :first], ids[:first].expand(2, -1))
            assert torch.equal(drawn[:, end:], ids[end:].expand(2, -1))
            for place, position in enumerate(positions):
                logits = [
                    model(each[None], block_starts=starts, locality_dial=dial, use_cache=False).logits[0, position]
                    for each in (ids, *drawn)
                ]
                before, *after = (each.double().log_softmax(-1) for each in logits)
                expected = sum((before.exp() * (before - each)).sum() for each in after) / 2 / torch.tensor(2.0).log()
                assert found.values[unit, place].item() == pytest.approx(expected.item(), abs=1e-4)
        assert found.values[2, 0] == 0  # what comes later
        if dial == 0:
            assert found.values[2, 1] > 0


@dataclasses.dataclass
class CutMatrices(Matrices):
    """Matrices of which some weights are taken away, after the dial, and given to no other."""

    cut: torch.Tensor = None

    def attend(self, layer: int, weights: torch.Tensor, value: torch.Tensor, has_learned_sink: bool) -> torch.Tensor:
        super().attend(layer, weights, value, has_learned_sink)
        left = self.weights[layer] * ~self.cut
        return (left @ value.repeat_interleave(left.shape[1] // value.shape[1], dim=1)).transpose(1, 2).contiguous()


@every_architecture
@pytest.mark.parametrize("dial", [0.0, 1.0])
@torch.no_grad()
def test_knock_out_cuts_attention_and_gives_it_to_no_other(architecture: str, dial: float) -> None:
    model, (ids, mask) = localised(architecture), text(batch_size=1)
    positions, units = [9, 30, 65], [(3, 8), (20, 21), (28, 40)]
    found = measure_influence(model, ids[0], units, positions, locality_dial=dial, batch_size=2, method="knock_out")
    asked = {"output_fidelity": [3], "use_cache": False, "locality_dial": dial}
    outputs = model(ids, **asked)
    outputs.block_starts = outputs.block_starts * 4  # all layers on the blocks of the last one
    native, place = copy.deepcopy(untouched(architecture)), torch.arange(66)

    def predicted(cut: torch.Tensor, position: int) -> torch.Tensor:
        matrices = CutMatrices(**vars(matrices_for(architecture, model, outputs, mask, dial)), cut=cut)
        return native_pass(native, matrices, ids).logits[0, position].double().log_softmax(-1)

    for unit, (first, end) in enumerate(units):
        for at, position in enumerate(positions):
            last = min(position, end)  # within a unit: what stands before there
            is_cut = (place[:, None] >= last) & (place >= first) & (place < last)
            before, after = predicted(torch.zeros_like(is_cut), position), predicted(is_cut, position)
            expected = (before.exp() * (before - after)).sum() / torch.tensor(2.0).log()
            assert found.values[unit, at].item() == pytest.approx(expected.item() * (first < position), abs=1e-4)
    assert found.values[2, 0] == 0  # what comes later
    assert (found.values[:, 2] > 0).all() or dial == 1


def test_what_is_out_of_reach_has_no_influence_by_knock_out(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    model = make_model(locality_schedule="localist", num_previous_blocks=1)
    ids = torch.randint(2, 97, (40,), generator=torch.manual_seed(1))
    starts = model(ids[None], output_fidelity=[3], locality_dial=1.0).block_starts[0]
    first = model.reach(ids[None], block_starts=starts, locality_dial=1.0).first[0]
    found = measure_influence(model, ids, "token", method="knock_out", locality_dial=1.0).values
    is_before = torch.arange(40)[:, None] < torch.arange(40)
    is_out = torch.arange(40)[:, None] < first
    assert is_out.any()
    assert not found[is_out | ~is_before].any()
    assert (found[is_before & ~is_out] > 0).float().mean() > 0.9


def test_units_are_tokens_or_blocks(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    model, ids = make_model(), torch.randint(2, 97, (40,), generator=torch.manual_seed(1))
    starts = model(ids[None], output_fidelity=[3]).block_starts[0][0]
    blocks = measure_influence(model, ids, num_draws=1)
    assert [first for first, _ in blocks.units] == starts.unique().tolist()
    assert blocks.units[-1][1] == 40
    assert blocks.values.shape == (len(blocks.units), 40)
    tokens = measure_influence(model, ids, "token", num_draws=1, batch_size=7)
    assert tokens.units == [(place, place + 1) for place in range(40)]
    assert not tokens.values.tril(-1).any()
    assert (tokens.values.diagonal() > 0).all()
    # The same draws, whatever goes together in a batch.
    assert torch.allclose(measure_influence(model, ids, "token", num_draws=1).values, tokens.values, atol=1e-6)
    others = measure_influence(model, ids, "token", num_draws=1, seed=1).values
    assert not torch.allclose(others, tokens.values, atol=1e-3)


def test_under_rules_what_may_not_be_looked_at_has_no_influence(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
) -> None:
    model, ids = make_model(locality_schedule="localist"), torch.randint(2, 97, (40,), generator=torch.manual_seed(1))
    parts = {"one": (0, 10), "two": (10, 20), "answer": (20, 40)}
    rules = [Rule("one", "one"), Rule("two", "two"), Rule("answer", ["two", "answer"])]
    told = {"rules": rules, "anchors": parts, "locality_dial": 1.0}
    found = measure_influence(model, ids, [parts["one"], parts["two"]], [39], **told)
    assert found.values[0, 0] == 0
    assert found.values[1, 0] > 0


@torch.no_grad()
def test_blocks_may_be_given(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    model, ids = make_model(locality_schedule="localist"), torch.randint(2, 97, (40,), generator=torch.manual_seed(1))
    starts = torch.tensor([0] * 25 + [25] * 15)
    found = measure_influence(model, ids, "block", [39], locality_dial=1.0, block_starts=starts)
    assert found.units == [(0, 25), (25, 40)]
    assert found.values[0, 0] == 0  # out of sight
    found = measure_influence(model, ids, "token", [39], locality_dial=1.0, block_starts=starts)
    assert set(found.values[:25, 0].tolist()) == {0.0}
    assert found.values[25:, 0].min() > 0


def test_knock_out_replaces_nothing_and_needs_no_other_tokens(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
) -> None:
    found = measure_influence(make_model(), torch.full((20,), 3), [(2, 9)], [19, 2], method="knock_out")
    assert found.values[0, 0] > 0 == found.values[0, 1]
    assert not measure_influence(make_model(), torch.tensor([3]), "token", method="knock_out").values.any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_ids": torch.zeros(2, 5).long()}, "`input_ids` must be a tensor of token ids"),
        ({"input_ids": torch.full((5,), 3)}, "`input_ids` has fewer than two different tokens"),
        ({"input_ids": torch.zeros(0).long(), "method": "knock_out"}, "`input_ids` is empty"),
        ({"input_ids": torch.arange(500) % 90}, "`input_ids` has 500 tokens; the model has positions for"),
        ({"units": None}, "`units` is None; it must be 'token', 'block' or stretches"),
        ({"units": "word"}, "`units` is 'word'; it must be 'token', 'block' or stretches"),
        ({"units": []}, r"`units` is \[\]; it must be"),
        ({"units": [(3, 3)]}, r"`units` holds \(3, 3\); a stretch of this text"),
        ({"units": [(3, 41)]}, r"`units` holds \(3, 41\); a stretch of this text is \(first, end\), with end up to 40"),
        ({"positions": []}, "`positions` is empty"),
        ({"positions": 5}, "`positions` is 5; it must be a list of positions"),
        ({"positions": [40]}, "`positions` holds 40; positions of this text are 0 to 39"),
        ({"method": "noise"}, "`method` is 'noise'; it must be 'erasure' or 'knock_out'"),
        ({"num_draws": 0}, "`num_draws` is 0; it must be a whole number above 0"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5; it must be a whole number above 0"),
        ({"block_starts": torch.zeros(5).long()}, r"`block_starts` has the shape \(5,\); the text has 40 tokens"),
        ({"block_starts": [0] * 40}, "`block_starts` is a list; it must be a tensor"),
        ({"block_starts": torch.arange(40) + 1}, r"`block_starts\[0, 0\]` is 1; it must lie between"),
        ({"block_starts": torch.zeros(40)}, "`block_starts`"),
        ({"anchors": {"one": (0, 10)}}, "`anchors` are given without `rules`"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    make_model: Callable[..., LocalistGPT2LMHeadModel], arguments: dict[str, Any], sentence: str
) -> None:
    ids = torch.randint(2, 97, (40,), generator=torch.manual_seed(1))
    with pytest.raises(ValueError, match=sentence):
        measure_influence(make_model(), **{"input_ids": ids, **arguments})
