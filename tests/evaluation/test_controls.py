"""`measure_controls`: each figure is what its definition says, text by text, from explicit attention matrices."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from architectures import localised, text, untouched
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from localist_hf.evaluation import measure, measure_controls
from localist_hf.evaluation.control_results import ControlResults
from localist_hf.modeling import locality


LENGTHS = (60, 47, 60)


@pytest.fixture
def rows(make_text) -> list[list[int]]:
    return [make_text(1, length, seed=length + i)[0].tolist() for i, length in enumerate(LENGTHS)]


@contextmanager
def settings(model, **fields) -> Iterator[None]:
    former = {name: getattr(model.config, name) for name in fields}
    for name, value in fields.items():
        setattr(model.config, name, value)
    yield
    for name, value in former.items():
        setattr(model.config, name, value)


@torch.no_grad()
def perplexity(model, rows: list[list[int]], starts: Callable | None = None, **kwargs) -> float:
    """Text by text, with block starts as a function of the text's length."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        explicit = {} if starts is None else {"block_starts": starts(len(row))[None]}
        total += model(ids, labels=ids, **explicit, **kwargs).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)


@torch.no_grad()
def figures_by_matrix(model, native, rows: list[list[int]], previous: int, layers: list[int]) -> list[dict]:
    """
    Of each layer `own`, `wrong`, and for each length `("windows", n)` and `("recency", n)`: block, outside and keys of
    every position, and whether it counts.
    """
    sinks, tables = model.config.locality.num_sink_tokens, [{} for _ in layers]
    own = [model(torch.tensor([row]), output_fidelity=[3]).block_starts[0][0] for row in rows]
    text_of_stream = [i for i, row in enumerate(rows) for _ in row]
    stream_of = {}  # text, position in it -> place in the stream
    for place, number in enumerate(text_of_stream):
        stream_of[number, place - text_of_stream.index(number)] = place
    place_of = {place: key for key, place in stream_of.items()}

    def wrong(text: int) -> torch.Tensor:
        starts, current = [], 0
        for i in range(len(rows[text])):
            first = stream_of[(text + 1) % len(rows), 0]
            other, at = place_of[(first + i) % len(text_of_stream)]
            if own[other][at] == at:
                current = i
            starts.append(current)
        return torch.tensor(starts)

    for number, row in enumerate(rows):
        length = len(row)
        attentions = native(torch.tensor([row]), output_attentions=True).attentions
        documents = torch.zeros(1, length, dtype=torch.long)
        position = torch.arange(length)
        partitions = {"own": own[number], "wrong": wrong(number)}
        partitions |= {("windows", n): position - position % n for n in range(1, 40)}
        local_sets = {
            name: reference.local_set(starts[None], documents, sinks, length, previous)
            for name, starts in partitions.items()
        }
        for n in range(1, 40):
            near = (position[:, None] - position < n) & (position <= position[:, None])
            local_sets["recency", n] = (near | ((position < sinks) & (position <= position[:, None])))[None, None]
        nowhere = torch.full((1, length), length)  # a sink that counts is outside of the block
        for layer, table in zip(layers, tables, strict=True):
            window = model.config.locality.sliding_windows[layer] or length
            visible = reference.visible_keys(documents, length) & (position[:, None] - position < window)
            seen = torch.cat(list(local_sets.values())) & visible  # all at once, each a row of a batch
            like_rows = [each.expand(len(seen), *each.shape[1:]) for each in (nowhere, documents)]
            of = reference.shares(attentions[layer], seen, *like_rows, sinks)
            shares = [of[f"{part}_share"].mean(1) for part in ("block", "outside")]
            counted = reference.counted(visible, seen, like_rows[1])
            for name, *entry in zip(local_sets, *shares, seen[:, 0].sum(-1), counted, strict=True):
                table.setdefault(name, []).append(entry)
    return [
        {name: [torch.cat(parts) for parts in zip(*entries, strict=True)] for name, entries in table.items()}
        for table in tables
    ]


def matched_lengths(tables: list[dict], kind: str) -> tuple[int, int] | None:
    """Between which as many keys are seen as in the own blocks, on average over layers with these tables."""
    for n in range(1, 40):
        common = [torch.stack([table[name][3] for name in ("own", "wrong", (kind, n))]).all(0) for table in tables]
        if not torch.stack(common).any():
            break
        own, other = (
            torch.cat([table[name][2][mask] for table, mask in zip(tables, common, strict=True)]).double().mean()
            for name in ("own", (kind, n))
        )
        if other >= own:
            return max(1, n - 1), n
    return None


def check_blocks(results: ControlResults, model, native, rows: list[list[int]], by_matrix: dict | None = None) -> None:
    """Whoever checks several results of one model gives them one dictionary `by_matrix`."""
    by_matrix = {} if by_matrix is None else by_matrix
    for blocks in results.blocks:
        if (previous := blocks.num_previous_blocks) not in by_matrix:
            by_matrix[previous] = figures_by_matrix(model, native, rows, previous, results.layers)
        of_layers = by_matrix[previous]
        for index, tables in enumerate(of_layers):
            lengths_of = {kind: matched_lengths([tables], kind) for kind in ("windows", "recency")}
            names = ["own", "wrong", *((kind, n) for kind, both in lengths_of.items() for n in both or ())]
            common = torch.stack([tables[name][3] for name in names]).all(0)
            assert common.sum() > 20
            if tables is of_layers[-1]:
                assert (blocks.window_lengths, blocks.recency_lengths) == (*lengths_of.values(),)
                assert blocks.num_counted == common.sum()

            def figures(name, common=common, tables=tables) -> list[float]:
                block, outside, keys, _ = (each.double()[common] for each in tables[name])
                block, outside, keys = block.mean(), outside.mean(), keys.mean()
                return [each.item() for each in (keys, block / (block + outside), block + outside, 1 - outside)]

            def given(found, index=index) -> list[float]:
                each = (found.visible_keys, found.context_fidelity, found.context_share, found.fidelity)
                return [values[index] for values in each]

            assert given(blocks.own) == pytest.approx(figures("own"), abs=1e-5)
            assert given(blocks.wrong) == pytest.approx(figures("wrong"), abs=1e-5)
            for name, lengths in lengths_of.items():
                found = getattr(blocks, name)
                low, high = (figures((name, n)) for n in lengths)
                # As many keys as the own blocks show, and everything else at the same place between the two.
                assert found.visible_keys[index] == pytest.approx(blocks.own.visible_keys[index])
                weight = (found.visible_keys[index] - low[0]) / (high[0] - low[0])
                assert -0.5 <= weight <= 1.5
                expected = [(1 - weight) * one + weight * other for one, other in zip(low, high, strict=True)]
                assert given(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("sinks", "previous"), [(0, 0), (2, 1)])
def test_own_and_other_blocks_are_measured_on_the_same_positions(
    make_model, gpt2_twin, rows, sinks: int, previous: int
) -> None:
    model = make_model(
        num_sink_tokens=sinks, num_previous_blocks=previous, max_block_length=9, locality_schedule=[0, 0, 0.5, 1]
    )
    native, by_matrix = gpt2_twin(model, "eager"), {}
    for batch_size in (1, 3):
        results = measure_controls(model, Dataset.from_dict({"input_ids": rows}), batch_size, dials=(0, 1))
        assert results.layers == [2, 3]
        assert [blocks.num_previous_blocks for blocks in results.blocks] == [0, 1]
        check_blocks(results, model, native, rows, by_matrix)


def test_more_previous_blocks_are_measured_too(make_model, gpt2_twin, rows) -> None:
    model = make_model(num_previous_blocks=2, max_block_length=6)
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows}), dials=(0, 1))
    assert [blocks.num_previous_blocks for blocks in results.blocks] == [0, 1, 2]
    check_blocks(results, model, gpt2_twin(model, "eager"), rows)


@pytest.mark.parametrize(
    ("architecture", "sinks", "previous"), [("mistral", 0, 1), ("gemma3", 2, 1), ("gpt_oss", 3, 1)]
)
@torch.no_grad()
def test_what_a_sliding_window_hides_counts_for_nothing(architecture: str, sinks: int, previous: int) -> None:
    """In a layer with one, other positions count than in a layer without, and other lengths show as many keys."""
    model = localised(architecture, num_sink_tokens=sinks, num_previous_blocks=previous)
    native = copy.deepcopy(untouched(architecture))
    native.set_attn_implementation("eager")
    rows = [row[:length].tolist() for row, length in zip(text(batch_size=3)[0], LENGTHS, strict=True)]
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows}), 3, dials=(0, 1), num_previous_blocks=[])
    assert results.layers == [1, 2, 3]
    check_blocks(results, model, native, rows)
    # At dial 1 every layer has the same: as many keys as the own blocks on average over those that are local.
    tables = figures_by_matrix(model, native, rows, previous, results.layers)
    for kind, argument in (("windows", "block_starts"), ("recency", "local_starts")):
        found, losses = torch.tensor(results.documents.losses[kind]), []
        for n in matched_lengths(tables, kind):
            for row in rows:
                position = torch.arange(len(row))[None]
                starts = position - position % n if kind == "windows" else (position - n + 1).clamp(min=0)
                ids = torch.tensor([row])
                outputs = model(ids, labels=ids, **{argument: starts}, locality_dial=1.0)
                losses.append(outputs.loss.item() * (len(row) - 1))
        low, high = torch.tensor(losses).view(2, -1)
        place = (found - low) / (high - low)
        assert place == pytest.approx(place.mean().expand(3), abs=0.05)
        assert -0.5 <= place.mean() <= 1.5


def test_the_dial_and_the_perplexities_are_those_of_each_text_alone(make_model, rows) -> None:
    model = make_model(num_sink_tokens=1, num_previous_blocks=1, min_fidelity=0.3)
    dataset = Dataset.from_dict({"input_ids": rows})
    results = measure_controls(model.train(), dataset, batch_size=2)
    assert not model.training
    assert [point.dial for point in results.dials] == pytest.approx([tenth / 10 for tenth in range(11)])
    free = {"min_fidelity": 0.0}
    for point in results.dials:
        assert point.perplexity == pytest.approx(perplexity(model, rows, locality_dial=point.dial, **free), rel=1e-4)
    assert results.perplexity == results.dials[0].perplexity
    assert results.cost_at_dial_1 == pytest.approx(results.dials[10].perplexity / results.perplexity)
    one_each = {"starts": torch.arange, "locality_dial": 1.0, **free}
    with settings(model, num_previous_blocks=0):
        assert results.self_only_perplexity == pytest.approx(perplexity(model, rows, **one_each), rel=1e-4)
        with settings(model, locality_schedule="localist"):
            expected = perplexity(model, rows, locality_dial=1.0, **free)
            assert results.all_local_perplexity == pytest.approx(expected, rel=1e-4)
            assert results.all_local_cost_at_dial_1 == pytest.approx(expected / results.perplexity, rel=1e-4)
            expected = perplexity(model, rows, **one_each)
            assert results.all_local_self_only_perplexity == pytest.approx(expected, rel=1e-4)
    assert len({results.perplexity, results.self_only_perplexity, results.all_local_perplexity, expected}) == 4
    assert (model.config.num_previous_blocks, model.config.locality_schedule) == (1, "quintic")


def test_the_locality_at_each_place_of_the_dial_is_what_measure_finds_there(make_model, rows) -> None:
    model, dataset = make_model(num_previous_blocks=1), Dataset.from_dict({"input_ids": rows})
    results = measure_controls(model, dataset)
    for point in (results.dials[0], results.dials[7], results.dials[10]):
        with model.set_locality_dial(point.dial):
            metrics = measure(model, dataset).metrics
        for name in ("context_fidelity", "context_share", "fidelity", "visible_keys"):
            expected = [metrics[f"{name}_layer_{layer}"] for layer in results.layers]
            assert getattr(point.locality, name) == pytest.approx(expected, rel=1e-4)
    assert results.dials[10].locality.context_fidelity[-1] == 1.0


@torch.no_grad()
def test_the_divergence_is_that_of_the_predictions_of_labels_in_bits(make_model, rows) -> None:
    model = make_model()
    labels = [[-100] * 9 + row[9:] for row in rows]
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows, "labels": labels}))
    total, count = 0.0, 0
    for row in rows:
        free, dialled = (
            model(torch.tensor([row]), locality_dial=dial).logits[0, 8:-1].double().softmax(-1) for dial in (0.0, 1.0)
        )
        total += (free * (free / dialled).log2()).sum().item()
        count += len(free)
    assert results.divergence == pytest.approx(total / count, rel=1e-4)
    assert results.divergence > 0.01


@torch.no_grad()
def test_at_dial_1_other_blocks_are_given_to_every_layer(make_model, make_text) -> None:
    rows = make_text(3, 50).tolist()
    model = make_model(num_sink_tokens=1, max_block_length=9, locality_schedule=[0, 0.5, 1, 1])
    results = measure_controls(
        model, Dataset.from_dict({"input_ids": rows}), batch_size=2, dials=(0, 0.5, 1), num_previous_blocks=[]
    )
    assert [point.dial for point in results.dials] == [0, 0.5, 1]
    (blocks,) = results.blocks
    ids = torch.tensor(rows)
    own, position = model(ids, output_fidelity=[3]).block_starts[0], torch.arange(50)

    def losses(**starts: torch.Tensor) -> torch.Tensor:
        logits = model(ids, **starts, locality_dial=1.0).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1)

    expected = {"own": losses(block_starts=own), "wrong": losses(block_starts=own.roll(-1, 0))}
    for name, lengths in (("windows", blocks.window_lengths), ("recency", blocks.recency_lengths)):
        starts = [position - position % n if name == "windows" else (position - n + 1).clamp(0) for n in lengths]
        argument = "block_starts" if name == "windows" else "local_starts"
        low, high = (losses(**{argument: each.expand(3, -1)}) for each in starts)
        # Two lengths, and the same place between them in every text.
        found = torch.tensor(results.documents.losses[name])
        place = (found - low) / (high - low)
        assert place == pytest.approx(place.mean().expand(3), abs=0.05)
        assert -0.5 <= place.mean() <= 1.5
        expected[name] = found
    for name, of_texts in expected.items():
        assert results.documents.losses[name] == pytest.approx(of_texts.tolist(), abs=2e-3)
        assert results.perplexity_on_blocks[name] == pytest.approx((of_texts.sum() / 147).exp().item(), rel=1e-5)
    assert len(set(results.perplexity_on_blocks.values())) == 4


def test_what_belongs_to_each_text_adds_up_to_the_figures(make_model, rows) -> None:
    model = make_model()
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows}), batch_size=2)
    documents = results.documents
    assert documents.labels == [len(row) - 1 for row in rows]
    for point in results.dials:
        total = sum(documents.losses[f"dial {point.dial:g}"])
        assert math.exp(total / sum(documents.labels)) == pytest.approx(point.perplexity, rel=1e-5)
    total = sum(documents.losses["self only"])
    assert math.exp(total / sum(documents.labels)) == pytest.approx(results.self_only_perplexity, rel=1e-5)
    for blocks in results.blocks:
        for kind in ("own", "wrong"):
            block, outside = torch.tensor(documents.shares[f"{kind} {blocks.num_previous_blocks}"]).sum(0).tolist()
            expected = getattr(blocks, kind).context_fidelity[-1]
            assert block / (block + outside) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dials", [(0,), (0, 0.5), (0.5, 1), (0, 1, 0.5, 1), (0, 0, 1)])
def test_dials_rise_from_0_to_1(make_model, rows, dials: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"`dials` are .* rise from 0 to 1"):
        measure_controls(make_model(), Dataset.from_dict({"input_ids": rows}), dials=dials)


@pytest.mark.parametrize("schedule", ["quintic", "distributed"])
def test_packed_padded_and_separate_texts_give_the_same(make_model, rows, schedule: str) -> None:
    model = make_model(num_sink_tokens=1, locality_schedule=schedule)
    dials = (0, 0.5, 1)
    separate = measure_controls(model, Dataset.from_dict({"input_ids": rows}), dials=dials).to_dict()
    width = 64
    left = Dataset.from_dict(
        {
            "input_ids": [[1] * (width - len(row)) + row for row in rows],
            "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
            "position_ids": [[0] * (width - len(row)) + list(range(len(row))) for row in rows],
        }
    )
    tokens, positions = ([place for row in rows for place in of(row)] for of in (list, lambda row: range(len(row))))
    packed = Dataset.from_dict({"input_ids": [tokens], "position_ids": [positions]})
    for dataset in (left, left.remove_columns("position_ids"), packed):
        found = measure_controls(model, dataset, batch_size=2, dials=dials).to_dict()
        assert_close(found["blocks"], separate["blocks"])
        for name in ("dials", "divergence", "perplexity_on_blocks", "self_only_perplexity", "all_local_perplexity"):
            assert_close(found[name], separate[name])
        assert sum(found["documents"]["labels"]) == sum(separate["documents"]["labels"])


def assert_close(value, expected) -> None:
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        value, expected = list(value.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_close(one, other)
    else:
        assert value == (None if expected is None else pytest.approx(expected, rel=2e-4, abs=2e-5))


def test_blocks_that_ignore_the_text_are_as_good_on_another(make_model, make_text) -> None:
    model = make_model(block_partition="window", window_length=7)
    blocks = measure_controls(model, Dataset.from_dict({"input_ids": make_text(2, 50).tolist()})).blocks[0]
    assert blocks.wrong == blocks.own
    assert 7 in blocks.window_lengths
    assert blocks.windows.context_fidelity == pytest.approx(blocks.own.context_fidelity)


def test_on_given_blocks_and_those_of_another_model(make_model, rows) -> None:
    model, base = make_model(seed=1), make_model(seed=2)
    texts = Dataset.from_dict({"input_ids": rows})
    with torch.no_grad():
        starts = [base(torch.tensor([row]), output_fidelity=[3]).block_starts[0][0].tolist() for row in rows]
    dials = (0, 0.5, 1)
    given = measure_controls(model, texts.add_column("block_starts", starts), dials=dials).to_dict()
    assert_close(measure_controls(model, texts, block_model=base, dials=dials).to_dict(), given)
    assert given["blocks"][0]["own"] != measure_controls(model, texts, dials=dials).to_dict()["blocks"][0]["own"]


def test_an_adapter_is_measured_as_the_model_that_it_makes(make_model, rows) -> None:
    lora = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, r=4, fan_in_fan_out=True)
    adapted, dataset = get_peft_model(make_model(), lora), Dataset.from_dict({"input_ids": rows})
    dials = (0, 0.5, 1)
    found = measure_controls(adapted, dataset, dials=dials).to_dict()
    assert_close(found, measure_controls(adapted.merge_and_unload(), dataset, dials=dials).to_dict())


def test_a_model_without_local_layers_has_one_place_on_the_dial(make_model, rows, transformers_warnings) -> None:
    model = make_model(locality_schedule="distributed")
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows}))
    assert results.layers == [3]
    assert [point.dial for point in results.dials] == [0.0]
    assert (results.cost_at_dial_1, results.divergence) == (1.0, 0.0)
    assert results.self_only_perplexity == pytest.approx(results.perplexity)
    assert results.all_local_perplexity != pytest.approx(results.perplexity, rel=1e-3)
    assert "change nothing" not in transformers_warnings.text


def test_texts_too_short_to_compare_have_no_figures_and_json_says_so(make_model, make_text) -> None:
    results = measure_controls(make_model(), Dataset.from_dict({"input_ids": make_text(2, 9).tolist()}))
    blocks = results.blocks[1]
    assert (blocks.num_counted, blocks.windows, blocks.recency, blocks.window_lengths) == (0, None, None, None)
    assert math.isnan(blocks.own.context_fidelity[0])
    text = json.dumps(results.to_dict(), allow_nan=False)
    assert json.loads(text)["blocks"][1]["own"]["context_fidelity"][0] is None
    assert json.loads(text)["cost_at_dial_1"] == results.cost_at_dial_1


def test_block_lift_is_that_of_the_own_blocks_in_each_text(make_model, rows) -> None:
    block_lift = pytest.importorskip("localist_hf.evaluation.block_lift").block_lift
    model = make_model()
    generator = torch.manual_seed(3)
    boundaries = [(torch.rand(len(row), generator=generator) < 0.2).tolist() for row in rows]
    results = measure_controls(model, Dataset.from_dict({"input_ids": rows}), boundaries=boundaries, batch_size=2)
    starts, marks = torch.full((3, 60), -1), torch.zeros(3, 60, dtype=torch.bool)
    for i, row in enumerate(rows):
        with torch.no_grad():
            starts[i, : len(row)] = model(torch.tensor([row]), output_fidelity=[3]).block_starts[0][0]
        marks[i, : len(row)] = torch.tensor(boundaries[i])
    assert results.block_lift == pytest.approx(block_lift(starts, marks))


def test_what_cannot_be_compared_is_refused(make_model, gpt2_twin, rows) -> None:
    model, texts = make_model(), Dataset.from_dict({"input_ids": rows})
    with pytest.raises(ValueError, match=r"`dataset` holds 1 text\(s\); it must hold two"):
        measure_controls(model, Dataset.from_dict({"input_ids": rows[:1]}))
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel; it must be"):
        measure_controls(gpt2_twin(model), texts)
    with pytest.raises(ValueError, match="`boundaries` has 2 entries; the data set has 3 sequences"):
        measure_controls(model, texts, boundaries=[[True] * 60] * 2)
    with pytest.raises(ValueError, match="`boundaries` holds 5 values for a sequence of another length"):
        measure_controls(model, texts, boundaries=[[True] * 60, [True] * 5, [True] * 60])


def test_a_failure_leaves_the_configuration_as_it_was(make_model, rows, monkeypatch) -> None:
    model = make_model(num_previous_blocks=1)
    monkeypatch.setattr(locality, "check_cache", lambda *_: 1 / 0 if model.config.num_previous_blocks == 0 else None)
    with pytest.raises(ZeroDivisionError):
        measure_controls(model, Dataset.from_dict({"input_ids": rows}))
    assert (model.config.num_previous_blocks, model.config.locality_schedule) == (1, "quintic")
