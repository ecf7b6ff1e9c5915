"""Separators recruited from a model, against its explicit attention matrices, one query at a time."""

import copy
import json
import math
from collections import Counter, defaultdict

import pytest
import torch
from architectures import SLIDING, WINDOW, localised, positions, text, untouched
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from localist_hf.evaluation import recruit_separators, separators
from localist_hf.evaluation.separators import starts_after


@pytest.fixture
def any_text_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a model without training all tokens are much the same."""
    for name, value in {"_LEAST_RELIABILITY": -1.0, "_MOST_P_VALUE": 2.0, "_MOST_NEED": 9.0, "_TOLERANCE": 9.0}.items():
        monkeypatch.setattr(separators, name, value)


def dataset_of(seed: int, number: int, layout: str = "none") -> Dataset:
    """Random texts with a few tokens alone, each of which comes often."""
    ids, mask = text(layout, seed=seed, batch_size=number)
    few = torch.where(mask == 1, ids % 9 + 3, 0)
    return Dataset.from_dict({"input_ids": few.tolist(), "attention_mask": mask.tolist()})


@torch.no_grad()
def needs_by_matrix(architecture: str, dataset: Dataset, num_sinks: int) -> tuple[dict[int, float], Counter]:
    """The need of each token as its definition reads, and how often each occurs."""
    native = copy.deepcopy(untouched(architecture))
    native.set_attn_implementation("eager")
    asked, occurrences = [], Counter()
    for row in dataset:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])
        arguments = {"position_ids": positions(mask)} if not mask.all() else {}
        attentions = native(ids, attention_mask=mask, use_cache=False, output_attentions=True, **arguments).attentions
        first, end = mask[0].argmax().item(), mask[0].nonzero().max().item() + 1
        weights = [attention[0].double().mean(0) for attention in attentions]
        asked_here = set()
        for query in range(first, end):
            for offset in range(2, 9):
                token, shares = query - offset, []
                for layer in range(len(attentions) // 2, len(attentions)):
                    sees = max(first, query - WINDOW + 1) if layer in SLIDING.get(architecture, ()) else first
                    if token >= max(first + num_sinks, sees):
                        reaching = weights[layer][query, max(first + num_sinks, sees) : token + 1].sum().item()
                        shares.append(reaching / (reaching + weights[layer][query, token + 1 : query].sum().item()))
                if shares:
                    asked.append((ids[0, token].item(), token - first, sum(shares) / len(shares), len(shares)))
                    asked_here.add(token)
        occurrences.update(ids[0, token].item() for token in asked_here)

    def bucket(place: int) -> int:
        return place if place < 8 else int(8 * (math.log2(place + 1) - 2))

    def means(keys: list) -> dict:
        totals = defaultdict(lambda: [0.0, 0])
        for key, (*_, share, number) in zip(keys, asked, strict=True):
            totals[key][0] += share * number
            totals[key][1] += number
        return {key: total / number for key, (total, number) in totals.items()}

    usual, (overall,) = means([bucket(place) for _, place, *_ in asked]), means([0] * len(asked)).values()
    asked = [(token, place, share - usual[bucket(place)] + overall, number) for token, place, share, number in asked]
    return means([token for token, *_ in asked]), occurrences


@pytest.mark.parametrize(
    ("architecture", "layout", "num_sinks"),
    [("gpt2", "left", 0), ("llama", "right", 1), ("mistral", "none", 2), ("gemma2", "none", 0), ("gpt_oss", "none", 1)],
)
@pytest.mark.usefixtures("any_text_will_do")
def test_need_is_the_attention_that_reaches_over_a_token(architecture: str, layout: str, num_sinks: int) -> None:
    dataset = dataset_of(3, 12, layout)
    model = localised(architecture, num_sink_tokens=num_sinks)
    found = recruit_separators(model, dataset, mean_length=6.0, batch_size=5)
    needs, occurrences = needs_by_matrix(architecture, dataset, num_sinks)
    candidates = [token for token in needs if occurrences[token] >= 60]
    assert found.num_candidates == len(candidates) > 5
    expected = sorted(candidates, key=needs.get)[: len(found.token_ids)]
    assert found.token_ids == expected
    assert found.need == pytest.approx([needs[token] for token in expected], abs=1e-4)
    assert found.occurrences == [occurrences[token] for token in expected]
    assert found.mean_need_at_separators < found.mean_need
    locality = model.config.locality
    assert (locality.block_partition, locality.delimiter_token_ids) == ("delimiter", expected)
    locality.validate()
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.usefixtures("any_text_will_do")
def test_nothing_depends_on_the_batches_or_on_what_was_set() -> None:
    dataset = dataset_of(5, 9)
    first = recruit_separators(localised("llama"), dataset, mean_length=5.0, batch_size=1)
    settings = {"locality_dial": 1.0, "locality_schedule": "localist", "block_partition": "window"}
    model = localised("llama", **settings)
    other = recruit_separators(model, dataset.add_column("block_starts", [[0] * 66] * 9), mean_length=5.0, batch_size=4)
    assert other.token_ids == first.token_ids
    assert other.need == pytest.approx(first.need, abs=2e-4)
    assert other.reliability == pytest.approx(first.reliability, abs=1e-6)
    assert model.config.locality.locality_dial == 1.0  # of which nothing else has changed


@pytest.mark.usefixtures("any_text_will_do")
def test_what_texts_begin_with_is_no_separator_for_that() -> None:
    """Little attention can go to what is before a token where little is before it."""
    rows = torch.tensor(dataset_of(3, 80)["input_ids"])
    rows[:, [0, 1, 5]] = torch.tensor([40, 41, 42])
    found = recruit_separators(even_model(), Dataset.from_dict({"input_ids": rows.tolist()}), mean_length=12.0)
    assert found.num_candidates == 11  # the first is a sink
    assert found.mean_need_at_separators == pytest.approx(found.mean_need, rel=0.01)
    assert found.need[0] > 0.98 * found.mean_need  # 0.3 times that, if it were not for what is usual there


@pytest.mark.usefixtures("any_text_will_do")
def test_blocks_are_as_long_as_is_wanted(make_model, make_text) -> None:
    model = make_model(n_layer=3, min_block_length=2, max_block_length=40, n_positions=256)
    dataset = Dataset.from_dict({"input_ids": make_text(60, 200).tolist()})
    numbers = []
    for wanted in (4.0, 8.0, 16.0):
        found = recruit_separators(model, dataset, mean_length=wanted)
        assert found.mean_length == pytest.approx(wanted, rel=0.2)
        ids = torch.tensor(dataset["input_ids"])
        outputs = model(ids[:8], output_fidelity=[2])  # which finds its blocks itself
        starts = outputs.block_starts[0]
        expected = starts_after(torch.isin(ids[:8], torch.tensor(found.token_ids)), torch.zeros_like(ids[:8]), 2, 40)
        assert starts.equal(expected)
        numbers.append(len(found.token_ids))
    assert numbers == sorted(numbers, reverse=True)


def even_model() -> PreTrainedModel:
    """Each of its tokens attends evenly to those before."""
    model = localised("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    return model


def test_text_without_separators_is_told_so() -> None:
    model, num_found = even_model(), 0
    for seed in range(20):
        try:
            recruit_separators(even_model(), dataset_of(seed, 12), mean_length=5.0)
            num_found += 1
        except ValueError as error:
            assert "`dataset` has no separators for this model" in str(error)
    assert num_found == 0
    ids, _ = text(batch_size=2)
    with pytest.raises(ValueError, match=r"`dataset` has 0 token\(s\) that occur 60 times"):
        recruit_separators(localised("llama"), Dataset.from_dict({"input_ids": ids.tolist()}), mean_length=5.0)
    assert model.config.locality.block_partition == "semantic"
    assert model.config.locality.delimiter_token_ids is None


def test_bad_values_are_refused_before_anything_is_read() -> None:
    model = localised("gpt2")  # blocks of 3 to 12 tokens
    for wrong in (3, 2.5, 12.5, float("nan"), -1):
        with pytest.raises(ValueError, match=rf"`mean_length` is {wrong}; blocks have 3 to 12 tokens"):
            recruit_separators(model, None, mean_length=wrong)
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel; it must be a localised"):
        recruit_separators(untouched("gpt2"), dataset_of(3, 4))
    with pytest.raises(ValueError, match="`dataset` holds no sequence"):
        recruit_separators(model, Dataset.from_dict({"input_ids": []}), mean_length=5.0)


def test_a_length_that_is_not_to_be_had_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_LEAST_RELIABILITY": -1.0, "_MOST_P_VALUE": 2.0, "_MOST_NEED": 9.0}.items():
        monkeypatch.setattr(separators, name, value)
    model = localised("gpt2", min_block_length=1)
    ids, _ = text(batch_size=30)
    often = torch.rand(ids.shape, generator=torch.manual_seed(0)) < 0.15
    ids = torch.where(often, ids % 4 + 3, ids)  # any of the others comes about 30 times
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    with pytest.raises(
        ValueError, match=r"`mean_length` is 3.0; the nearest that the text comes to is \d\.\d, with 4 "
    ):
        recruit_separators(model, dataset, mean_length=3.0)
    short = Dataset.from_dict({"input_ids": [row[:12] for row in dataset_of(3, 90)["input_ids"]]})
    with pytest.raises(ValueError, match=r"`mean_length` is 12; the nearest that the text comes to is .* longer texts"):
        recruit_separators(model, short, mean_length=12)
    assert model.config.locality.block_partition == "semantic"


@given(
    ranks=st.lists(st.integers(0, 9), min_size=60, max_size=60),
    wanted=st.floats(2.1, 20, allow_nan=False),
)
def test_no_other_number_of_separators_comes_nearer(ranks: list[int], wanted: float) -> None:
    tokens = torch.tensor([ranks])
    documents, limits = torch.zeros_like(tokens), (2, 20)

    def length(number: int) -> float:
        starts = starts_after(tokens < number, documents, *limits)
        return 60 / (starts == torch.arange(60)).sum().item()

    rank = torch.arange(10)
    if min(abs(length(number) - wanted) for number in range(1, 11)) > 0.25 * wanted:
        with pytest.raises(ValueError, match="`mean_length`"):
            separators._how_many(rank, 10, [(tokens, documents)], limits, wanted)
        return
    try:
        number, found = separators._how_many(rank, 10, [(tokens, documents)], limits, wanted)
    except ValueError:  # more separators make longer blocks somewhere, as the limits allow, and it was passed over
        lengths = [length(number) for number in range(1, 11)]
        assert lengths != sorted(lengths, reverse=True)
        return
    assert found == pytest.approx(length(number))
    if number > 1:  # one less and blocks are longer than is wanted, or as near
        assert length(number - 1) > wanted or abs(length(number - 1) - wanted) >= abs(found - wanted) - 1e-9
