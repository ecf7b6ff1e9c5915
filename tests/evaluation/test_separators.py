"""Separators recruited from a model, against the native model with explicit masks, one text at a time."""

import copy
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from architectures import SLIDING, WINDOW, localised, text, untouched
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from localist_hf.evaluation import recruit_separators, separators
from localist_hf.evaluation.separators import starts_after


@pytest.fixture
def any_text_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a model without training all tokens are much the same."""
    for name in ("_LEAST_COST", "_LEAST_GAIN"):
        monkeypatch.setattr(separators, name, -9.0)
    for name in ("_MOST_P_VALUE", "_TOLERANCE"):
        monkeypatch.setattr(separators, name, 9.0)


def dataset_of(seed: int, number: int, layout: str = "none") -> Dataset:
    """Random texts with a few tokens alone, each of which comes often."""
    ids, mask = text(layout, seed=seed, batch_size=number)
    few = torch.where(mask == 1, ids % 9 + 3, 0)
    return Dataset.from_dict({"input_ids": few.tolist(), "attention_mask": mask.tolist()})


@torch.no_grad()
def costs_by_mask(architecture: str, dataset: Dataset, num_sinks: int) -> tuple[dict[int, float], Counter]:
    """
    What a boundary after each token costs as its definition reads, of the native model with explicit masks, text by
    text; and how often each occurs.
    """
    native = copy.deepcopy(untouched(architecture))
    native.set_attn_implementation("eager")
    layers, mask = (native.transformer.h if architecture == "gpt2" else native.model.layers), {}

    def masked(layer: int) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            is_visible = mask["is_visible"]
            if layer in SLIDING.get(architecture, ()):
                is_visible = is_visible & (torch.ones_like(is_visible).triu(1 - WINDOW) == 1)
            hidden = torch.zeros(is_visible.shape).masked_fill(~is_visible, torch.finfo(torch.float32).min)
            assert "attention_mask" in kwargs
            return args, kwargs | {"attention_mask": hidden[None, None]}

        return hook

    for number in range(len(layers) // 2, len(layers)):
        attention = layers[number].attn if architecture == "gpt2" else layers[number].self_attn
        attention.register_forward_pre_hook(masked(number), with_kwargs=True)
    asked, occurrences = [], Counter()
    for row_number, row in enumerate(dataset):
        ids = torch.tensor(row["input_ids"])[torch.tensor(row["attention_mask"]) == 1]
        last, losses, begins = len(ids) - 1, [], []
        for shift in (0, 3, 6, 9):
            first = (shift + row_number) % 12
            starts = [0 if place < first else place - (place - first) % 12 for place in range(len(ids))]
            sees = [[start <= key <= query or key < min(num_sinks, query + 1) for key in range(len(ids))]
                    for query, start in enumerate(starts)]  # fmt: skip
            mask["is_visible"] = torch.tensor(sees)
            log_p = native(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            losses.append([-log_p[place, ids[place + 1]].item() for place in range(last)])
            begins.append([place for place in range(1, len(ids)) if starts[place] == place and place + 6 <= last])
        usual_loss = [sum(of_place) / 4 for of_place in zip(*losses, strict=True)]
        for of_move, places in zip(losses, begins, strict=True):
            for place in places:
                cost = sum(of_move[at] - usual_loss[at] for at in range(place, place + 6))
                asked.append((ids[place - 1].item(), place - 1, cost))
        occurrences.update(ids[: last - 6].tolist())

    def bucket(place: int) -> int:
        return place if place < 8 else int(8 * (math.log2(place + 1) - 2))

    by_bucket, by_token = defaultdict(list), defaultdict(list)
    for _, place, cost in asked:
        by_bucket[bucket(place)].append(cost)
    mean = fmean(cost for *_, cost in asked)
    for token, place, cost in asked:
        by_token[token].append(cost - fmean(by_bucket[bucket(place)]) + mean)
    drawn = {token: (sum(costs) + 20 * mean) / (len(costs) + 20) for token, costs in by_token.items()}
    return drawn, occurrences


@pytest.mark.parametrize(
    ("architecture", "layout", "num_sinks"),
    [("gpt2", "left", 0), ("llama", "right", 1), ("mistral", "none", 2), ("gemma2", "none", 0), ("gpt_oss", "none", 1)],
)
@pytest.mark.usefixtures("any_text_will_do")
def test_cost_is_what_predictions_lose_by_a_boundary(architecture: str, layout: str, num_sinks: int) -> None:
    dataset = dataset_of(3, 12, layout)
    model = localised(architecture, num_sink_tokens=num_sinks)
    found = recruit_separators(model, dataset, mean_length=6.0, batch_size=5)
    costs, occurrences = costs_by_mask(architecture, dataset, num_sinks)
    candidates = [token for token in costs if occurrences[token] >= 60]
    assert found.num_candidates == len(candidates) > 5
    expected = sorted(candidates, key=costs.get)[: len(found.token_ids)]
    assert found.token_ids == expected
    assert found.cost == pytest.approx([costs[token] for token in expected], abs=1e-4)
    assert found.occurrences == [occurrences[token] for token in expected]
    total = sum(occurrences[token] for token in candidates)
    assert found.mean_cost == pytest.approx(
        sum(costs[token] * occurrences[token] for token in candidates) / total, abs=1e-5
    )
    assert found.mean_cost_at_separators < found.mean_cost
    locality = model.config.locality
    assert (locality.block_partition, locality.delimiter_token_ids) == ("delimiter", expected)
    assert (locality.locality_schedule, locality.num_previous_blocks) == ("linear", 0)
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
    assert other.cost == pytest.approx(first.cost, abs=2e-4)
    assert other.reliability == pytest.approx(first.reliability, abs=1e-6)
    assert model.config.locality.locality_dial == 1.0  # of which nothing else has changed


def test_what_texts_begin_with_is_no_separator_for_that() -> None:
    """Little is lost by a boundary where little is before it."""
    rows = torch.tensor(dataset_of(3, 80)["input_ids"])
    rows[:, [0, 1, 5]] = torch.tensor([40, 41, 42])
    found = separators._costs(localised("llama"), Dataset.from_dict({"input_ids": rows.tolist()}), 8)
    assert (found.occurrences[[40, 41, 42]] == 80).all()
    assert found.cost[[40, 41, 42]].tolist() == pytest.approx([found.asked[1].mean().item()] * 3, abs=1e-9)


@pytest.mark.parametrize("max_block_length", [2, 7, 64])
@pytest.mark.parametrize("length", [10, 64])
def test_every_place_of_short_texts_is_asked_in_both_halves(max_block_length: int, length: int) -> None:
    """As rows, and packed into one row, which is the same."""
    ids = torch.arange(1920).view(-1, length) % min(length, 32) + 3
    model = localised("llama", min_block_length=1, max_block_length=max_block_length)
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    found = separators._costs(model, rows, 16)
    half = min(16, max_block_length) // 2
    last = length - half - 1  # place of the last token with so many predictions behind it
    counts = found.halves[1]
    assert (counts[:, ids[0, : max(last, 0)].unique()] > 0).all()
    assert counts.sum() > 0
    packed = {"input_ids": [ids.flatten().tolist()], "position_ids": [(torch.arange(ids.numel()) % length).tolist()]}
    of_one_row = separators._costs(model, Dataset.from_dict(packed), 1)
    torch.testing.assert_close(of_one_row.cost, found.cost, atol=1e-4, rtol=0)
    assert of_one_row.occurrences.equal(found.occurrences)
    assert of_one_row.halves[1].equal(counts)


@pytest.mark.usefixtures("any_text_will_do")
def test_blocks_are_as_long_as_is_wanted(make_model, make_text) -> None:
    model = make_model(n_layer=3, min_block_length=2, max_block_length=40, n_positions=256)
    dataset = Dataset.from_dict({"input_ids": make_text(30, 200).tolist()})
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
    for length in (66, 7, 6, 1):
        few = Dataset.from_dict({"input_ids": ids[:, :length].tolist()})
        with pytest.raises(ValueError, match=r"`dataset` has 0 token\(s\) that occur 60 times"):
            recruit_separators(localised("llama"), few, mean_length=5.0)
    assert model.config.locality.block_partition == "semantic"
    assert model.config.locality.delimiter_token_ids is None


@pytest.mark.parametrize("difference", [0.0, 4.0])
def test_few_boundaries_show_a_separator_that_there_is(difference: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 20 after each of nine tokens, most of whose order is chance."""
    noise = torch.Generator().manual_seed(0)

    def lost(model, inputs: dict, documents, since: list, period: int) -> torch.Tensor:
        is_after = (inputs["input_ids"] == 5).roll(1, dims=1)
        found = 3 * torch.randn(len(since), *is_after.shape, generator=noise) + 6 - difference * is_after
        return found[..., : -(period // 2)].double()

    monkeypatch.setattr(separators, "_lost", lost)
    model = localised("llama")
    if difference:
        assert recruit_separators(model, dataset_of(3, 12), mean_length=8.0).token_ids[0] == 5
    else:
        with pytest.raises(ValueError, match=r"no separators .* as far as \d{2,3} boundaries show \(p = 0\.\d"):
            recruit_separators(model, dataset_of(3, 12), mean_length=8.0)


def test_where_a_boundary_costs_nothing_there_are_no_separators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separators, "_lost", lambda _, inputs, __, since, period: torch.zeros(
        len(since), len(inputs["input_ids"]), inputs["input_ids"].shape[1] - period // 2, dtype=torch.float64
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"no separators for this model: .* \(p = nan"):
        recruit_separators(localised("llama"), dataset_of(3, 12), mean_length=5.0)


def test_bad_values_are_refused_before_anything_is_read() -> None:
    model = localised("gpt2")  # blocks of 3 to 12 tokens
    for wrong in (3, 2.5, 12.5, float("nan"), -1):
        with pytest.raises(ValueError, match=rf"`mean_length` is {wrong}; blocks have 3 to 12 tokens"):
            recruit_separators(model, None, mean_length=wrong)
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel; it must be a localised"):
        recruit_separators(untouched("gpt2"), dataset_of(3, 4))
    resized = localised("llama")
    resized.resize_token_embeddings(80, mean_resizing=False)
    with pytest.raises(ValueError, match="`dataset` holds the token 77; the model was localised with 64 tokens"):
        recruit_separators(resized, Dataset.from_dict({"input_ids": [[5, 77] * 20]}), mean_length=5.0)
    with pytest.raises(ValueError, match="`dataset` holds a sequence of 129 tokens; the model has 128 positions"):
        recruit_separators(model, Dataset.from_dict({"input_ids": [[5] * 129]}), mean_length=5.0)
    prompted = get_peft_model(localised("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match="`model` has an adapter that puts tokens of its own before a text"):
        recruit_separators(prompted, dataset_of(3, 4), mean_length=5.0)
    assert model.train().training
    with pytest.raises(ValueError, match="`mean_length`"):
        recruit_separators(model, None, mean_length=-1)
    assert model.training
    with pytest.raises(ValueError, match="`dataset` holds no sequence"):
        recruit_separators(model, Dataset.from_dict({"input_ids": []}), mean_length=5.0)


@pytest.mark.usefixtures("any_text_will_do")
def test_a_length_that_is_not_to_be_had_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separators, "_TOLERANCE", 0.25)
    model = localised("gpt2", min_block_length=1)
    ids, _ = text(batch_size=40)
    often = torch.rand(ids.shape, generator=torch.manual_seed(0)) < 0.15
    ids = torch.where(often, ids % 6 + 3, ids)  # any of the others comes about 30 times
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    with pytest.raises(
        ValueError, match=r"`mean_length` is 3.0; the nearest that the text comes to is \d\.\d, with 6 "
    ):
        recruit_separators(model, dataset, mean_length=3.0)
    short = Dataset.from_dict({"input_ids": [row[:12] for row in dataset_of(3, 150)["input_ids"]]})
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
