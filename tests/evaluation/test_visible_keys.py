"""The number of keys in a local set, under a sliding window too, and models whose decoder is no whole transformer."""

import math
from pathlib import Path

import pytest
import reference
import torch
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from localist_hf import localize
from localist_hf.evaluation import locality_probe, measure, measure_controls
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


@pytest.mark.parametrize("window", [None, 5, 9, 20])
def test_what_a_window_hides_is_not_counted(make_text, window: int | None) -> None:
    config = MistralConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, sliding_window=window,
    )  # fmt: skip
    sinks, length = 3, 40
    settings = {"min_block_length": 2, "max_block_length": 6, "num_sink_tokens": sinks}
    model = localize(MistralForCausalLM(config), **settings).eval()
    rows = [row.tolist() for row in make_text(2, length)]
    outputs = model(torch.tensor(rows), output_fidelity=True)
    documents = torch.zeros(2, length, dtype=torch.long)
    position = torch.arange(length)
    distance = position[:, None] - position
    is_seen = (distance >= 0) & (distance < (window or length))
    sizes = []
    for starts, mask in zip(outputs.block_starts, outputs.fidelity_mask, strict=True):
        local = reference.local_set(starts, documents, sinks, length)[:, 0] & is_seen
        assert torch.equal(mask, (local.sum(-1) < is_seen.sum(-1)))
        sizes.append(local.sum(-1)[mask].double().mean().item())

    data = Dataset.from_dict({"input_ids": rows})
    metrics = measure(model, data).metrics
    profile = locality_probe(model, [{"input_ids": torch.tensor(rows)}])
    dial = measure_controls(model, data).dials[0].locality
    for layer, size in enumerate(sizes):
        assert math.isclose(metrics[f"visible_keys_layer_{layer}"], size, rel_tol=1e-6)
        assert math.isclose(profile.visible_keys[layer].item(), size, rel_tol=1e-6)
    assert math.isclose(dial.visible_keys[-1], sizes[-1], rel_tol=1e-6)


def test_controls_under_a_window_show_no_more_keys_than_it_has(make_text) -> None:
    config = MistralConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, sliding_window=4,
    )  # fmt: skip
    model = localize(MistralForCausalLM(config), num_sink_tokens=1, block_partition="window", window_length=6)
    results = measure_controls(model, Dataset.from_dict({"input_ids": make_text(2, 40).tolist()}))
    blocks, with_previous = results.blocks
    for figures in (blocks.own, blocks.wrong, blocks.windows, blocks.recency):
        assert 1 < figures.visible_keys[0] < 4
    # With the block before its own a token has all that the window shows it: nothing is left to count.
    assert (with_previous.num_counted, with_previous.windows, with_previous.recency) == (0, None, None)
    assert all(math.isnan(figures.context_fidelity[0]) for figures in (with_previous.own, with_previous.wrong))


def test_sinks_of_texts_packed_in_a_row_are_seen_as_far_as_the_window_reaches(make_text, tmp_path: Path) -> None:
    config = MistralConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, sliding_window=12,
    )  # fmt: skip
    settings = {"min_block_length": 2, "max_block_length": 5, "num_sink_tokens": 2}
    model = localize(MistralForCausalLM(config), **settings).eval()
    rows = [make_text(1, length, seed=length)[0].tolist() for length in (20, 13, 27)]
    separate = Dataset.from_dict({"input_ids": rows})
    tokens, positions = ([place for row in rows for place in of(row)] for of in (list, lambda row: range(len(row))))
    packed = Dataset.from_dict({"input_ids": [tokens], "position_ids": [positions]})
    reports = [measure(model, data) for data in (separate, packed)]
    expected, found = (report.metrics for report in reports)
    assert found == pytest.approx(expected, rel=1e-5)
    profiles = [report.profile for report in reports]
    assert profiles[0].visible_keys.tolist() == pytest.approx(profiles[1].visible_keys.tolist())
    dials = [measure_controls(model, data, dials=(0, 1)).dials[0].locality for data in (separate, packed)]
    assert dials[0].visible_keys == pytest.approx(dials[1].visible_keys)
    assert dials[0].visible_keys[-1] == pytest.approx(expected["visible_keys_layer_1"])
    args = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = LocalistTrainingArguments(str(tmp_path), **args)
    trainer = LocalistTrainer(model, arguments, eval_dataset=packed)
    assert trainer.evaluate()["eval_visible_keys"] == pytest.approx(expected["visible_keys"])


def test_a_model_whose_decoder_is_a_part_of_its_transformer(make_text) -> None:
    """OPT's `get_decoder()` is not the localised class."""
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=16, ffn_dim=24, num_attention_heads=2, vocab_size=97, word_embed_proj_dim=16
    )
    model, other = (localize(OPTForCausalLM(config)) for _ in range(2))
    rows = make_text(2, 80)
    data = Dataset.from_dict({"input_ids": rows.tolist()})
    metrics = measure(model, data, block_model=other).metrics
    profile = locality_probe(model, [{"input_ids": rows}], block_model=other)
    assert profile.context_fidelity[1].mean().isfinite()
    assert math.isclose(profile.fidelity[1].mean().item(), metrics["fidelity_layer_1"], abs_tol=1e-6)
    assert 0 < measure_controls(model, data, block_model=other).blocks[0].wrong.context_fidelity[-1] < 1
