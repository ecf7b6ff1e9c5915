"""The reach of a prediction: what it says cannot change it does not, by no bit, and what is in reach does."""

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, LENGTH, VOCABULARY, localised, text
from datasets import Dataset
from transformers import AutoModelForCausalLM, DynamicCache, RobertaConfig

from localist_hf import localize
from localist_hf.evaluation import measure_controls
from localist_hf.modeling.reach import first_in_reach


#: Whose experts work on tokens in groups.
EXPERTS = ("deepseek_v3", "gpt_oss")
DENSE = [name for name in ARCHITECTURES if name not in EXPERTS]
PARTITIONS = [
    {"block_partition": "window", "window_length": 7},
    {"block_partition": "window", "window_length": 5, "num_previous_blocks": 1},
    {"block_partition": "semantic"},
    {"block_partition": "delimiter", "delimiter_token_ids": [5, 9, 11], "num_previous_blocks": 1},
]


@pytest.mark.parametrize("settings", [
    {"block_partition": "window"}, {"block_partition": "window", "num_previous_blocks": 1}, {"num_previous_blocks": 1},
    {"block_partition": "delimiter", "num_previous_blocks": 1},
])  # fmt: skip
@pytest.mark.parametrize("sinks", [0, 2])
def test_gradients_end_where_the_reach_does(make_model, make_text, settings: dict, sinks: int) -> None:
    model = make_model(n_layer=3, locality_schedule="localist", num_sink_tokens=sinks, **settings).eval()
    ids = make_text(2, 60)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    # Blocks stay as they are: delimiters are told by the ids, and semantic ones are given.
    starts = model(ids, locality_dial=1.0, output_fidelity=[2]).block_starts[0]
    outputs = model(inputs_embeds=embeddings, block_starts=starts, locality_dial=1.0, output_fidelity=True)
    first = model.reach(ids, block_starts=starts, locality_dial=1.0).first
    assert torch.equal(first, first_in_reach(outputs.block_starts, outputs.document_starts, model.config.locality))
    assert (first[:, 0] == 0).all() and first.max() > 10
    for position in (7, 33, 59):
        (gradient,) = torch.autograd.grad(outputs.logits[:, position].sum(), embeddings, retain_graph=True)
        for row in range(2):
            seen = gradient[row].abs().sum(-1).nonzero().flatten().tolist()
            assert min(each for each in seen if each >= sinks) == max(first[row, position].item(), sinks)
            assert all(each < sinks or each >= first[row, position] for each in seen)


@torch.no_grad()
def change_what_is_out_of_reach(architecture: str, settings: dict, sinks: int, rows: int, seed: int) -> int:
    """
    Changes tokens out of the reach of one position of each row, in whole texts and in steps, and sees that nothing
    changes there, and that something in reach changes something. Returns how many rows were looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    model = localised(architecture, locality_schedule="localist", num_sink_tokens=sinks, **settings)
    ids = text(seed=seed, batch_size=1)[0].repeat(rows, 1)
    # Blocks that tokens tell are held.
    starts = model(ids, locality_dial=1.0, output_fidelity=[LAYERS - 1], use_cache=False).block_starts[0]
    told = {"block_starts": starts, "locality_dial": 1.0, "use_cache": False}
    reach = model.reach(ids, block_starts=starts, locality_dial=1.0)
    assert reach.is_bounded
    position = torch.randint(LENGTH // 2, LENGTH, (rows,), generator=generator)
    place = torch.arange(LENGTH)
    outside = (place >= sinks) & (place < reach.first[torch.arange(rows), position][:, None])
    drawn = torch.randint(3, VOCABULARY, ids.shape, generator=generator)
    is_drawn = torch.rand(ids.shape, generator=generator) < 0.5
    changed = torch.where(outside & is_drawn, drawn, ids)
    at = torch.arange(rows), position
    before, after = model(ids, **told).logits, model(changed, **told).logits
    moved = (changed != ids).any(1)
    assert torch.equal(before[at], after[at])
    assert (before != after)[moved].flatten(1).any(1).all()  # elsewhere it counts
    inside = torch.where(place == position[:, None], (ids - 2) % (VOCABULARY - 3) + 3, ids)
    assert (model(inside, **told).logits[at] != before[at]).any(1).all()
    # With a cache: all but the last token first, of texts that end at one position.
    end = int(position[0]) + 1
    found = []
    for tokens in (ids[:1, :end], changed[:1, :end]):
        cache, name = DynamicCache(config=model.config), model._cache_argument
        given = {"locality_dial": 1.0, name: cache}
        model(tokens[:, :-2], block_starts=starts[:1, : end - 2], **given)
        model(tokens[:, -2:-1], block_starts=starts[:1, : end - 1], **given)
        found.append(model(tokens[:, -1:], block_starts=starts[:1, :end], **given).logits)
    assert torch.equal(*found)
    return int(moved.sum())


@pytest.mark.parametrize("architecture", DENSE)
def test_what_is_out_of_reach_changes_no_bit(architecture: str) -> None:
    number = DENSE.index(architecture)
    settings = PARTITIONS[number % len(PARTITIONS)]
    assert change_what_is_out_of_reach(architecture, settings, number % 3, rows=24, seed=number) > 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", DENSE)
def test_ten_thousand_changes_out_of_reach_change_no_bit(architecture: str) -> None:
    number = 0
    for seed in range(8):
        for settings in PARTITIONS:
            for sinks in (0, 2):
                number += change_what_is_out_of_reach(architecture, settings, sinks, rows=24, seed=seed)
    assert number * len(DENSE) > 10_000


@pytest.mark.parametrize("architecture", EXPERTS)
@torch.no_grad()
def test_of_experts_it_holds_within_rounding(architecture: str) -> None:
    model = localised(architecture, locality_schedule="localist", block_partition="window", window_length=5)
    ids = text(batch_size=1)[0]
    reach = model.reach(ids, locality_dial=1.0)
    first = int(reach.first[0, -1])
    assert first > 10
    assert "can change a prediction by more than rounding, as its experts work" in reach.statement
    other = ids.clone()
    other[:, 1:first] = (ids[:, 1:first] - 2) % (VOCABULARY - 3) + 3
    before, after = (model(tokens, locality_dial=1.0).logits[0, -1] for tokens in (ids, other))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


# --- what is said


def test_where_a_layer_is_free_there_is_no_bound(make_model, make_text) -> None:
    ids = make_text(2, 40)
    for schedule, dial, sentence in (
        ("quintic", 1.0, "No bound by local sets: layer 0 has lambda 0.0 at dial 1.0, and sees"),
        ("localist", 0.5, "No bound by local sets: layer 0 has lambda 1.0 at dial 0.5, and sees"),
    ):
        reach = make_model(locality_schedule=schedule).reach(ids, locality_dial=dial)
        assert not reach.is_bounded
        assert reach.statement.startswith(sentence)
        assert not reach.first.any()
        assert reach.share_outside == 0
    model = make_model(locality_schedule="localist")
    assert model.reach(ids, min_fidelity=1.0).is_bounded
    with model.set_locality_dial(1.0):
        assert model.reach(ids).is_bounded


def test_it_is_said_of_blocks_that_the_model_finds(make_model, make_text) -> None:
    ids = make_text(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    window = make_model(locality_schedule="localist", block_partition="window", window_length=5, num_sink_tokens=1)
    reach = window.reach(ids, attention_mask=mask, locality_dial=1.0)
    assert reach.statement.startswith("No token before those in reach, but for the first token of its text, can change")
    assert (reach.first[0, :9] == -1).all()
    assert reach.first[0, 9:14].tolist() == [9] * 5
    hidden = [max(0, at // 5 * 5 - 1) / at for length in (31, 40) for at in range(1, length)]
    assert reach.share_outside == pytest.approx(sum(hidden) / len(hidden))
    semantic = make_model(locality_schedule="localist")
    assert semantic.reach(ids, locality_dial=1.0).statement.startswith("Given these blocks, no token before")
    given = semantic.reach(ids, block_starts=torch.zeros_like(ids), locality_dial=1.0)
    assert given.statement.startswith("No token before")
    assert given.share_outside == 0
    with pytest.raises(ValueError, match="`locality_dial` is a tensor; the reach is of one dial"):
        semantic.reach(ids, locality_dial=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"`input_ids` has the shape \(40,\); it must be \(batch_size, length\)"):
        semantic.reach(ids[0], locality_dial=1.0)
    alone = semantic.reach(ids[:, :1], locality_dial=1.0)
    assert alone.statement == "Given these blocks, no token before those in reach can change a prediction."


@torch.no_grad()
def test_models_that_count_positions_by_padding_tokens_have_no_bound() -> None:
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, is_decoder=True,
    )  # fmt: skip
    settings = {"locality_schedule": "localist", "block_partition": "window", "window_length": 5}
    model = localize(AutoModelForCausalLM.from_config(config).eval(), **settings)
    ids = torch.randint(3, 60, (1, 40), generator=torch.manual_seed(0))
    reach = model.reach(ids, locality_dial=1.0)
    assert not reach.is_bounded
    assert "counts positions by the padding tokens in a text; pass `position_ids`" in reach.statement
    told = {"position_ids": torch.arange(1, 41)[None], "locality_dial": 1.0}
    assert model.reach(ids, **told).is_bounded
    other = ids.clone()
    other[:, 4] = 0
    assert torch.equal(model(other, **told).logits[0, -1], model(ids, **told).logits[0, -1])
    assert not torch.equal(model(other, locality_dial=1.0).logits[0, -1], model(ids, locality_dial=1.0).logits[0, -1])


def test_controls_say_how_much_of_the_context_is_out_of_reach(make_model, make_text) -> None:
    dataset = Dataset.from_dict({"input_ids": make_text(3, 42).tolist()})
    settings = {"n_layer": 2, "block_partition": "window", "window_length": 7, "num_previous_blocks": 1}
    found = measure_controls(make_model(locality_schedule="localist", **settings), dataset, dials=[0, 1])
    # Two layers, one block before: the own block and two before it.
    expected = [max(0, at // 7 - 2) * 7 / at for at in range(1, 42)]
    assert found.share_out_of_reach == pytest.approx(sum(expected) / len(expected))
    free = measure_controls(make_model(locality_schedule="upper_half", **settings), dataset, dials=[0, 1])
    assert free.share_out_of_reach is None
