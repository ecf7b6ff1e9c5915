"""Agreement of attention with influence, against scipy's correlations and the model's own attention matrices."""

import math
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import torch
from architectures import LAYERS, eager_attentions, every_architecture, localised, text
from datasets import Dataset
from hypothesis import strategies
from scipy.stats import rankdata, spearmanr
from torch.testing import assert_close

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import measure_agreement, measure_influence
from localist_hf.evaluation.agreement import compare
from localist_hf.evaluation.guesses import attention_guesses, gradient_guesses


numbers = strategies.lists(strategies.integers(0, 9), min_size=8, max_size=8)


@hypothesis.given(guess=numbers, truth=numbers)
@hypothesis.settings(max_examples=200, deadline=None)
def test_correlations_are_those_of_ranks_and_of_what_nearness_leaves_of_them(
    guess: list[int], truth: list[int]
) -> None:
    one, other, nearness = np.array(guess, float), np.array(truth, float), np.arange(8.0)
    found = compare(one, other, nearness, has_nearness=True)
    if len({*guess}) < 2 or len({*truth}) < 2:
        assert math.isnan(found["spearman"])
        return
    assert found["spearman"] == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
    # What is left of both ranks when those of the distance are taken out by least squares.
    ranks = np.stack((np.ones(8), rankdata(nearness)), axis=1)
    rest = [each - ranks @ np.linalg.lstsq(ranks, each)[0] for each in (rankdata(one), rankdata(other))]
    scale = math.sqrt((rest[0] @ rest[0]) * (rest[1] @ rest[1]))
    if scale > 1e-6:
        assert found["beyond_nearness"] == pytest.approx(rest[0] @ rest[1] / scale, abs=1e-6)


def test_hits_count_ties_by_half() -> None:
    truth, nearness = np.array([0.0, 5.0, 1.0, 0.0, 0.0, 0.0]), np.arange(6.0)
    for guess, top_1, top_5 in (
        ([0, 1, 0, 0, 0, 0], 1, 1),
        ([1, 1, 0, 0, 0, 0], 0.5, 1),
        ([2, 1, 0, 0, 0, 0], 0, 1),
        ([2, 0, 3, 4, 5, 6], 0, 0),
        ([0, 0, 0, 0, 0, 0], 1 / 6, 5 / 6),
    ):
        found = compare(np.array(guess, float), truth, nearness, has_nearness=True)
        assert (found["top_1"], found["top_5"]) == pytest.approx((top_1, top_5))


@every_architecture
@torch.no_grad()
def test_guesses_are_made_of_the_model_s_own_attention(architecture: str) -> None:
    ids = text(batch_size=1)[0]
    attention = torch.stack(eager_attentions(architecture, ids))[:, 0]
    model = localised(architecture, locality_schedule="localist", num_sink_tokens=2)
    guesses, sights = attention_guesses(model, ids[0], [30, 50], 0.0)
    means = attention.mean(1)
    for layer in range(LAYERS):
        assert_close(torch.tensor(guesses[f"layer {layer}"][1]).float(), means[layer, 50], atol=1e-5, rtol=0)
    assert_close(torch.tensor(guesses["all layers"][0]).float(), means.mean(0)[30], atol=1e-5, rtol=0)
    rollout = torch.eye(66)
    for layer in means:
        rollout = (layer + torch.eye(66)) / 2 @ rollout
    assert_close(torch.tensor(guesses["rollout"][1]).float(), rollout[50], atol=1e-5, rtol=0)
    assert len(sights[0]) == 66
    alone, sight = attention_guesses(model, ids[0], [50], 0.0, with_rollout=False)
    assert alone.keys() == guesses.keys() - {"rollout"}
    for name, rows in alone.items():
        assert np.array_equal(rows[0], guesses[name][1])
    assert np.array_equal(sight[0], sights[1])
    dialled, sights = attention_guesses(model, ids[0], [30, 50], 1.0)
    for layer in range(LAYERS):
        row = dialled[f"layer {layer}"][1]
        assert not row[~sights[1]].any()
        assert row.sum() == pytest.approx(1, abs=1e-5) or architecture == "gpt_oss"
    last = model(ids, output_fidelity=[LAYERS - 1], locality_dial=1.0, use_cache=False).block_starts[0]
    outputs = model(ids, block_starts=last, output_fidelity=True, locality_dial=1.0, use_cache=False)
    for layer in range(LAYERS):
        share = outputs.self_share[layer][0, :, 50].mean().item()
        assert dialled[f"layer {layer}"][1][50] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_gradients_are_those_of_the_prediction(architecture: str) -> None:
    model, ids = localised(architecture, locality_schedule="localist", block_partition="delimiter",
                           delimiter_token_ids=[5, 9]), text(batch_size=1)[0][0]  # fmt: skip
    for dial in (0.0, 1.0):
        found = gradient_guesses(model, ids, [30, 50], dial)
        starts = model(ids[None], output_fidelity=[3], locality_dial=dial, use_cache=False).block_starts[0]
        embeddings = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        outputs = model(inputs_embeds=embeddings, block_starts=starts, locality_dial=dial, use_cache=False)
        outputs.logits[0, 50].log_softmax(-1).max().backward()
        expected = (embeddings.grad * embeddings)[0].sum(-1).abs().detach()
        assert_close(torch.tensor(found["gradient x input"][1]).float(), expected, atol=1e-5, rtol=1e-4)
        for rows in found.values():
            assert not rows[0][31:].any()  # what comes later
        total = found["integrated gradients"][1].sum()
        assert total > 0
        if dial:
            first = model.reach(ids[None], block_starts=starts, locality_dial=dial).first[0, 50]
            assert first > 5
            assert not found["gradient x input"][1][1:first].any()  # but for the sink


def test_without_captum_gradients_are_refused(
    make_model: Callable[..., LocalistGPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    dataset = Dataset.from_dict({"input_ids": [list(range(2, 40))]})
    with pytest.raises(ValueError, match=r"Captum, .* is not installed: pip install captum"):
        measure_agreement(make_model(), dataset, with_gradients=True)


def test_where_nothing_is_to_be_hit_there_is_no_hit() -> None:
    zeros, guess = np.zeros(6), np.arange(6.0)
    assert all(math.isnan(value) for value in compare(guess, zeros, guess).values())
    two = np.array([0.0, 3, 3, 0, 0, 0])  # either is meant
    assert compare(np.array([0.0, 1, 0, 0, 0, 0]), two, guess)["top_1"] == 0.5


def test_blocks_too_small_to_compare_in_sight_give_no_number(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
) -> None:
    model = make_model(locality_schedule="localist", block_partition="window", window_length=2)
    dataset = Dataset.from_dict({"input_ids": [list(range(2, 40))]})
    found = measure_agreement(model, dataset, 3, 1, locality_dial=1.0, in_sight=True)
    assert found.num_positions == [0]
    assert all(math.isnan(value) for figures in found.means().values() for value in figures.values())


def test_a_guess_that_is_the_influence_agrees_wholly(
    make_model: Callable[..., LocalistGPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(locality_schedule="localist", min_block_length=4)
    ids = torch.randint(2, 97, (2, 40), generator=torch.manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})

    def guesses(model, ids, places, dial):
        found = measure_influence(model, ids, "token", places, 2, 8, 0, locality_dial=dial, min_fidelity=0.0).values
        _, sights = attention_guesses(model, ids, places, dial)
        return {"influence": [found[:, at].numpy() for at in range(len(places))]}, sights

    monkeypatch.setattr("localist_hf.evaluation.agreement.attention_guesses", guesses)
    for dial, in_sight in ((0.0, False), (1.0, True)):
        found = measure_agreement(model, dataset, num_positions=4, num_draws=2, locality_dial=dial, in_sight=in_sight)
        means = found.means()
        assert means["influence"]["spearman"] == pytest.approx(1)
        assert means["influence"]["top_1"] == 1
        assert means["influence"]["beyond_nearness"] == pytest.approx(1)
        assert len(found.spearman["influence"]) == 2
        assert abs(means["random"]["spearman"]) < 0.9
        assert math.isnan(means["nearness"]["beyond_nearness"])


def test_texts_that_are_too_short_are_refused(make_model: Callable[..., LocalistGPT2LMHeadModel]) -> None:
    short = Dataset.from_dict({"input_ids": [list(range(2, 30)), list(range(2, 18))]})
    with pytest.raises(ValueError, match="`dataset` has 16 tokens in row 1; each text needs more than 16"):
        measure_agreement(make_model(), short)
    for rows, sentence in (
        ([list(range(2, 30)), [5] * 20], "`dataset` has one token only in row 1"),
        ([[5, 6] * 200], "`dataset` has 400 tokens in row 0; the model has positions for"),
        ([], "`dataset` holds no text"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measure_agreement(make_model(), Dataset.from_dict({"input_ids": rows}))
    with pytest.raises(ValueError, match="`num_positions` is 0; it must be a whole number above 0"):
        measure_agreement(make_model(), short, num_positions=0)
