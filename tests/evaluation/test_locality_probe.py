"""`locality_probe`: per-head means of what the model's outputs say, whatever the batches, in linear memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from localist_hf.evaluation import LocalityMeter, LocalityProfile, locality_probe
from localist_hf.evaluation.measure import everything


def padded(make_text: Callable) -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 60, dtype=torch.long)
    mask[0, 25:], mask[1, :20], mask[2, :7], mask[2, 53:] = 0, 0, 0, 0
    return {"input_ids": make_text(4, 60), "attention_mask": mask}


def packed(make_text: Callable) -> dict[str, torch.Tensor]:
    documents = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((30, 9, 21), (9, 51))]
    return {"input_ids": make_text(2, 60), "position_ids": torch.stack(documents)}


SHARES = ("self_share", "sink_share", "block_share", "outside_share")
OF_BLOCKS = ("blocks_looked_at", "top_block_share")

LAYOUTS = {
    "plain": lambda make_text: {"input_ids": make_text(3, 60)},
    "padded": padded,
    "padded, with the positions of each row alone": lambda make_text: (
        (batch := padded(make_text)) | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    ),
    "padding alone in a row": lambda make_text: {
        "input_ids": make_text(2, 40),
        "attention_mask": torch.tensor([[1], [0]]).expand(2, 40),
    },
    "packed": packed,
    "one row of positions for all": lambda make_text: {
        "input_ids": make_text(2, 60),
        "position_ids": torch.arange(60)[None] % 33,
    },
    "positions that a mask keeps from marking documents": lambda make_text: (
        packed(make_text) | {"attention_mask": torch.ones(2, 60)}
    ),
    "explicit blocks": lambda make_text: (
        padded(make_text) | {"block_starts": (torch.arange(60) // 20 * 20).expand(4, 60)}
    ),
    "labels too": lambda make_text: {"input_ids": make_text(2, 50), "labels": make_text(2, 50)},
    "a single token": lambda make_text: {"input_ids": make_text(2, 1)},
}


def by_hand(outputs, num_sinks: int = 0) -> LocalityProfile:
    """From the outputs of one forward pass, a head and a token at a time, as the fields' descriptions read."""
    fidelity, shares, entropy, of_blocks, lengths, num_keys, num_counted = [], [], [], [], [], [], []
    for layer, starts in enumerate(outputs.block_starts):
        is_token, is_counted = starts >= 0, outputs.fidelity_mask[layer]
        heads = outputs.fidelity[layer].double().unbind(1)
        fidelity.append([head[is_counted].mean() if is_counted.any() else 1.0 for head in heads])
        for name in SHARES:
            shares.append([head[is_counted].mean() for head in outputs[name][layer].double().unbind(1)])
        for name in OF_BLOCKS:
            others = outputs.block_share[layer].double() + outputs.outside_share[layer].double()
            heads = zip(outputs[name][layer].double().unbind(1), others.unbind(1), strict=True)
            of_blocks.append([(head * by)[is_counted].sum() / by[is_counted].sum() for head, by in heads])
        num_keys.append((torch.arange(starts.shape[1]) - starts + 1 + num_sinks)[is_counted].double().mean())
        entropy.append([head[is_token].mean() for head in outputs.entropy[layer].double().unbind(1)])
        num_blocks = sum(len(set(row.tolist()) - {-1}) for row in starts)
        lengths.append(is_token.sum() / num_blocks)
        num_counted.append(is_counted.sum())
    num_heads = outputs.fidelity[0].shape[1]
    shares = torch.tensor(shares, dtype=torch.float64).view(-1, len(SHARES), num_heads)
    of_blocks = torch.tensor(of_blocks, dtype=torch.float64).view(-1, len(OF_BLOCKS), num_heads)
    return LocalityProfile(
        torch.tensor(fidelity, dtype=torch.float64),
        *shares.unbind(1),
        *(torch.tensor(values, dtype=torch.float64) for values in (entropy, lengths, num_keys)),
        num_counted=torch.tensor(num_counted),
        num_tokens=int(is_token.sum()),
        blocks_looked_at=of_blocks[:, 0],
        top_block_share=of_blocks[:, 1],
    )


def assert_same(profile: LocalityProfile, expected: LocalityProfile) -> None:
    assert profile.num_tokens == expected.num_tokens
    assert torch.equal(profile.num_counted, expected.num_counted)
    for name in ("fidelity", *SHARES, "entropy", *OF_BLOCKS, "mean_block_length", "visible_keys"):
        values, others = getattr(profile, name), getattr(expected, name)
        torch.testing.assert_close(values, others, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("partition", ["semantic", "delimiter", "window"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_mean_of_the_outputs_for_the_batch_as_it_comes(make_model, make_text, partition: str, layout: str):
    model = make_model(block_partition=partition, num_sink_tokens=1)
    batch = LAYOUTS[layout](make_text)
    if "block_starts" in batch:  # padding before a text moves the start of its first block
        batch["block_starts"] = torch.maximum(batch["block_starts"], batch["attention_mask"].argmax(1, keepdim=True))
    with torch.no_grad():
        arguments = {name: tensor for name, tensor in batch.items() if name != "labels"}
        outputs = model(**arguments, use_cache=False, **everything({}))
    profile = locality_probe(model.train(), [batch])
    assert not model.training
    assert_same(profile, by_hand(outputs, num_sinks=1))


def test_batches_weigh_by_what_they_hold(make_model, make_text):
    model, whole = make_model(), padded(make_text)
    rows = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(4)]
    apart = iter([rows[0], {name: tensor[1:] for name, tensor in whole.items()}])  # gone through once
    assert_same(locality_probe(model, apart), locality_probe(model, [whole]))
    # Not the mean of the rows' means, which the lengths of the rows would not enter.
    means = torch.stack([locality_probe(model, [row]).entropy for row in rows]).mean(0)
    assert (means - locality_probe(model, rows).entropy).abs().max() > 1e-3


def test_a_packed_row_is_its_documents(make_model, make_text):
    model, batch = make_model(), packed(make_text)
    documents = [
        {"input_ids": row[None, first : first + length]}
        for row, lengths in zip(batch["input_ids"], ((30, 9, 21), (9, 51)), strict=True)
        for first, length in zip((0, *torch.tensor(lengths).cumsum(0).tolist()), lengths, strict=False)
    ]
    assert_same(locality_probe(model, [batch]), locality_probe(model, documents))


def test_the_mean_over_heads_is_what_the_meter_gives(make_model, make_text):
    model, input_ids = make_model(num_previous_blocks=1, num_sink_tokens=1), make_text(3, 200)
    meter = LocalityMeter()
    with torch.no_grad():
        meter.update(model(input_ids, labels=input_ids, **everything({})), input_ids)
    metrics, profile = meter.compute(), locality_probe(model, [{"input_ids": input_ids}])
    for name in ("fidelity", *SHARES, "context_share", "entropy", *OF_BLOCKS):
        values = getattr(profile, name)
        if name in OF_BLOCKS:  # over the attention to other words, of which heads have more and less
            means = ((values * profile.context_share).sum(1) / profile.context_share.sum(1)).tolist()
        else:
            means = values.mean(1).tolist()
        assert means == pytest.approx([metrics[f"{name}_layer_{layer}"] for layer in range(4)], rel=1e-5)
    keys = profile.visible_keys.tolist()
    assert keys == pytest.approx([metrics[f"visible_keys_layer_{layer}"] for layer in range(4)])
    ratios = (profile.block_share.sum(1) / profile.context_share.sum(1)).tolist()  # of the sums over heads
    assert ratios == pytest.approx([metrics[f"context_fidelity_layer_{layer}"] for layer in range(4)], rel=1e-5)
    assert torch.equal(profile.context_fidelity, profile.block_share / profile.context_share)


def test_blocks_have_the_length_that_the_partition_says(make_model, make_text):
    model = make_model(block_partition="window", window_length=8)
    profile = locality_probe(model, [{"input_ids": make_text(2, 64)}, {"input_ids": make_text(1, 4)}])
    assert profile.mean_block_length.tolist() == pytest.approx([132 / 17] * 4)
    assert profile.num_counted.tolist() == [112] * 4
    assert profile.num_tokens == 132


def test_a_layer_without_counted_positions_has_fidelity_one_and_no_shares(make_model, make_text):
    profile = locality_probe(make_model(block_partition="window"), [{"input_ids": make_text(2, 7)}])
    assert profile.num_counted.tolist() == [0] * 4
    assert torch.equal(profile.fidelity, torch.ones(4, 4, dtype=torch.float64))
    assert profile.context_fidelity.isnan().all()


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def test_on_the_blocks_of_another_model(make_model, make_text, layout: str):
    model, base, batch = make_model(seed=1), make_model(seed=2), LAYOUTS[layout](make_text)
    with torch.no_grad():
        starts = base(**batch, use_cache=False, output_fidelity=[3]).block_starts[0]
    profile = locality_probe(model, [batch], block_model=base)
    assert_same(profile, locality_probe(model, [batch | {"block_starts": starts}]))
    assert not torch.equal(profile.num_counted, locality_probe(model, [batch]).num_counted)


def test_the_language_modeling_head_does_not_run(make_model, make_text):
    model, batch = make_model(), {"input_ids": make_text(2, 60)}
    adapted = get_peft_model(
        make_model(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False, r=4, fan_in_fan_out=True)
    ).eval()
    with torch.no_grad():
        outputs = adapted(**batch, **everything({}))
    for language_model in (model, adapted):
        language_model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    assert_same(locality_probe(model, [batch]), locality_probe(model.transformer, [batch]))
    assert_same(locality_probe(adapted, [batch]), by_hand(outputs))


def test_what_cannot_be_measured_is_refused(make_model, make_text):
    model, batch = make_model(), {"input_ids": make_text(1, 5)}
    for nothing in ([], [batch | {"attention_mask": torch.zeros(1, 5)}]):
        with pytest.raises(ValueError, match="`batches` hold no token"):
            locality_probe(model, nothing)
    with pytest.raises(ValueError, match="`attention_mask` has padding between tokens"):
        locality_probe(model, [batch | {"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}])
    with pytest.raises(ValueError, match="`batches` hold `block_starts` and a `block_model` is given too"):
        locality_probe(model, [batch | {"block_starts": torch.zeros(1, 5, dtype=torch.long)}], block_model=model)


# Prints the process's peak memory in bytes: before the long batches, and after each of them.
MEASURE_MEMORY = """
import json, sys
import torch
from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel
from localist_hf.evaluation import locality_probe

def peak():  # not ru_maxrss, which starts from that of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def batch(layout, length):
    ids = torch.randint(256, (1, length))
    if layout == "padded":
        return {"input_ids": ids, "attention_mask": (torch.arange(length) >= 3)[None]}
    if layout == "packed":
        return {"input_ids": ids, "position_ids": (torch.arange(length) % (length - 9))[None]}
    return {"input_ids": ids}

layouts, length, warm_up, config = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
model = LocalistGPT2LMHeadModel(LocalistGPT2Config(n_layer=2, vocab_size=256, n_positions=length, **config))
for layout in layouts:
    locality_probe(model, [batch(layout, warm_up)])
peaks = [peak()]
for layout in layouts:
    profile = locality_probe(model, [batch(layout, length)])
    assert profile.num_tokens == length - 3 * (layout == "padded")
    peaks.append(peak())
print(json.dumps(peaks))
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")


def peak_memory(layouts: list[str], length: int, warm_up: int, **config: int) -> list[int]:
    """Peak memory in bytes of a fresh process: after batches of `warm_up` tokens, and after each of `length`."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, json.dumps([layouts, length, warm_up, config])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@needs_proc
def test_memory_grows_linearly_with_the_length():
    length = 12_288
    before, *_, after = peak_memory(["plain", "padded", "packed"], length, 1024, n_embd=16, n_head=2)
    # A mask of booleans has length ** 2 bytes, and a matrix of weights 4 times as many for each head.
    assert after - before < length**2 / 2


@needs_proc
@pytest.mark.slow
def test_sixteen_thousand_tokens_fit_in_four_gigabytes():
    assert peak_memory(["plain"], 16_384, 64, n_embd=768, n_head=12)[-1] < 4e9


def test_a_device_without_float64_will_do(make_model, make_text, on_device, monkeypatch):
    model, batch = make_model(), padded(make_text)
    expected = locality_probe(model, [batch])
    forward = type(model.transformer).forward
    monkeypatch.setattr(type(model.transformer), "forward", lambda *args, **kwargs: on_device(forward(*args, **kwargs)))
    assert_same(locality_probe(model, [batch]), expected)


def test_a_model_of_another_class_is_refused_by_name(make_model, make_text, gpt2_twin):
    model, batch = make_model(), {"input_ids": make_text(1, 5)}
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel; it must be a localised model"):
        locality_probe(gpt2_twin(model), [batch])
    with pytest.raises(ValueError, match="`block_model` is a GPT2Model; it must be"):
        locality_probe(model, [batch], block_model=gpt2_twin(model).transformer)
