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

from localist_hf.evaluation import recruit_separators, separators
from localist_hf.evaluation.separators import starts_after


@pytest.fixture
def any_text_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a model without training all tokens are much the same."""
    monkeypatch.setattr(separators, "_LEAST_RELIABILITY", -1.0)


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
    found, occurrences = defaultdict(list), Counter()
    for row in dataset:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])
        arguments = {"position_ids": positions(mask)} if not mask.all() else {}
        attentions = native(ids, attention_mask=mask, use_cache=False, output_attentions=True, **arguments).attentions
        first, end = mask[0].argmax().item(), mask[0].nonzero().max().item() + 1
        occurrences.update(ids[0, first:end].tolist())
        for layer in range(len(attentions) // 2, len(attentions)):
            weights = attentions[layer][0].double().mean(0)
            for query in range(first, end):
                for offset in range(2, 9):
                    token = query - offset
                    sees = max(first, query - WINDOW + 1) if layer in SLIDING.get(architecture, ()) else first
                    if token < max(first + num_sinks, sees):
                        continue
                    reaching = weights[query, max(first + num_sinks, sees) : token + 1].sum().item()
                    between = weights[query, token + 1 : query].sum().item()
                    found[ids[0, token].item()].append(reaching / (reaching + between))
    return {token: math.fsum(values) / len(values) for token, values in found.items()}, occurrences


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
def test_blocks_are_as_long_as_is_wanted(make_model, make_text) -> None:
    model = make_model(n_layer=3, min_block_length=2, max_block_length=40, n_positions=256)
    dataset = Dataset.from_dict({"input_ids": make_text(60, 200).tolist()})
    numbers = []
    for wanted in (4.0, 8.0, 16.0):
        found = recruit_separators(model, dataset, mean_length=wanted)
        assert found.mean_length == pytest.approx(wanted, rel=0.15)
        ids = torch.tensor(dataset["input_ids"])
        outputs = model(ids[:8], output_fidelity=[2])  # which finds its blocks itself
        starts = outputs.block_starts[0]
        expected = starts_after(torch.isin(ids[:8], torch.tensor(found.token_ids)), torch.zeros_like(ids[:8]), 2, 40)
        assert starts.equal(expected)
        numbers.append(len(found.token_ids))
    assert numbers == sorted(numbers, reverse=True)


def test_text_without_separators_is_told_so() -> None:
    model = localised("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # so that each token attends evenly to those before
            layer.self_attn.q_proj.weight.zero_()
    with pytest.raises(ValueError, match="`dataset` has no separators for this model"):
        recruit_separators(model, dataset_of(3, 20), mean_length=5.0)
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


@pytest.mark.usefixtures("any_text_will_do")
def test_a_text_whose_frequent_tokens_are_too_few_is_told_so() -> None:
    ids, _ = text(batch_size=30)
    often = torch.rand(ids.shape, generator=torch.manual_seed(0)) < 0.15
    ids = torch.where(often, ids % 4 + 3, ids)  # any of the others comes about 30 times
    with pytest.raises(ValueError, match=r"with all 4 tokens that occur 60 times blocks have \d\.\d tokens"):
        recruit_separators(localised("gpt2"), Dataset.from_dict({"input_ids": ids.tolist()}), mean_length=3.01)


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
    if length(10) > wanted:
        with pytest.raises(ValueError, match="`mean_length`"):
            separators._how_many(rank, 10, [(tokens, documents)], limits, wanted)
        return
    number, found = separators._how_many(rank, 10, [(tokens, documents)], limits, wanted)
    assert found == pytest.approx(length(number))
    if number > 1:  # one less and blocks are longer than is wanted, or as near
        assert length(number - 1) > wanted or abs(length(number - 1) - wanted) >= abs(found - wanted) - 1e-9
