"""`measure`: what the meter, the probe and the controls say, in one go and without an attention matrix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from localist_hf import localize
from localist_hf.evaluation import locality_probe, measure, measure_controls, plot_heads, report_table
from localist_hf.evaluation.tables import heads_table


def llama(**settings):
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, initializer_range=0.3,
    )  # fmt: skip
    return localize(LlamaForCausalLM(config), **{"min_block_length": 3, "max_block_length": 12, **settings})


@pytest.fixture
def texts(make_text) -> Dataset:
    return Dataset.from_dict({"input_ids": make_text(5, 60).tolist()})


@pytest.mark.parametrize("has_block_model", [False, True])
def test_it_says_what_the_others_say(texts, has_block_model: bool) -> None:
    model = llama(num_sink_tokens=1, num_previous_blocks=1, locality_schedule="localist")
    block_model = llama() if has_block_model else None
    report = measure(model, texts, 2, block_model, with_controls=True)
    assert report.metrics == pytest.approx(measure(model, texts, 2, block_model).metrics, rel=1e-6)
    batches = [{"input_ids": torch.tensor(texts["input_ids"])}]
    profile = locality_probe(model, batches, block_model)
    for name in ("context_fidelity", "self_share", "sink_share", "block_share", "outside_share", "entropy"):
        torch.testing.assert_close(getattr(report.profile, name), getattr(profile, name), atol=1e-6, rtol=1e-5)
    for layer in range(4):
        mean = report.profile.fidelity[layer].mean().item()
        assert report.metrics[f"fidelity_layer_{layer}"] == pytest.approx(mean)

    # Of these only windows and recency leave out further positions.
    controls = next(
        each for each in measure_controls(model, texts, 2, block_model).blocks if each.num_previous_blocks == 1
    )
    assert report.controls.num_counted >= controls.num_counted
    assert report.controls.own.visible_keys == pytest.approx(controls.own.visible_keys, rel=0.1)
    assert report.controls.wrong.context_fidelity == pytest.approx(controls.wrong.context_fidelity, rel=0.1)
    assert report.controls.windows is report.controls.recency is None


def test_the_control_is_on_the_blocks_of_the_next_text(make_text) -> None:
    model, rows = llama().eval(), make_text(2, 60)
    starts = model(rows, output_fidelity=[3]).block_starts[0]
    own, wrong = (model(rows, output_fidelity=True, block_starts=each) for each in (starts, starts.flip(0)))
    counted = own.fidelity_mask[0] & wrong.fidelity_mask[0]
    controls = measure(model, Dataset.from_dict({"input_ids": rows.tolist()}), with_controls=True).controls
    assert controls.num_counted == counted.sum()
    for figures, outputs in ((controls.own, own), (controls.wrong, wrong)):
        for layer in range(4):
            block, outside = (
                share.mean(1)[counted].sum().item()
                for share in (outputs.block_share[layer], outputs.outside_share[layer])
            )
            assert figures.context_fidelity[layer] == pytest.approx(block / (block + outside), rel=1e-5)


def test_a_single_text_has_no_control(texts) -> None:
    report = measure(llama(), texts.select([0]), with_controls=True)
    assert report.controls is None
    table = report_table(report, [0, 0, 0, 1])
    assert "wrong" not in table
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["controls"] is None


def test_the_numbers_as_json(texts) -> None:
    model = llama()
    report = measure(model, texts, with_controls=True)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["metrics"]["perplexity"] == report.metrics["perplexity"]
    assert content["heads"]["context_fidelity"] == report.profile.context_fidelity.tolist()
    assert len(content["controls"]["wrong"]["context_fidelity"]) == 4
    # No position counts where a block is the whole text.
    report = measure(llama(block_partition="window", window_length=60), texts, with_controls=True)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["heads"]["context_fidelity"] == [[None] * 4] * 4


def test_the_tables(texts) -> None:
    report = measure(llama(num_sink_tokens=1), texts, with_controls=True)
    head, *rows = report_table(report, [0, 0, 0.5, 1]).split("\n\n")[0].splitlines()
    titles = "layer lambda psi psi, own psi, wrong context self sink block outside fidelity bits keys blocks top"
    assert " ".join(head.split()) == titles
    values = dict(zip(("layer", "lambda", "psi", "own", "wrong", "context", "self"), rows[3].split(), strict=False))
    assert (values["layer"], values["lambda"]) == ("3", "1.000")
    assert values["psi"] == f"{report.metrics['context_fidelity_layer_3']:.3f}"
    assert values["wrong"] == f"{report.controls.wrong.context_fidelity[3]:.3f}"
    assert values["self"] == f"{report.metrics['self_share_layer_3']:.3f}"
    table = heads_table(torch.tensor([[0.5, 1.0], [float("nan"), 0.004]]))
    assert table.splitlines() == ["layer    0   1", "    0   50 100", "    1    -   0"]


@pytest.mark.parametrize("shape", [(2, 2), (30, 9), (80, 64)])
def test_the_picture_of_the_heads_is_small(shape, tmp_path: Path) -> None:
    values = torch.rand(shape, dtype=torch.float64)
    values[0, 0] = float("nan")
    plot_heads(values, tmp_path / "heads.png", "model")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "heads.png").stat().st_size < 200_000


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("length", [512, 2048])
def test_no_tensor_is_as_large_as_an_attention_matrix(make_text, length: int) -> None:
    texts = Dataset.from_dict({"input_ids": make_text(2, length).tolist()})
    with LargestTensor() as tensors:
        measure(llama(num_sink_tokens=1), texts, 1, with_controls=True)
    # The logits, or the band of the longest block and its previous ones.
    assert tensors.largest <= 2 * length * 4 * 64
    assert tensors.largest < length * length


LONG = """
import resource, sys, torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from localist_hf import localize
from localist_hf.evaluation import measure

torch.set_num_threads(1)
config = LlamaConfig(
    num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=97
)
model = localize(LlamaForCausalLM(config), num_sink_tokens=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = torch.randint(97, (2, 16_384)).tolist()
report = measure(model, Dataset.from_dict({"input_ids": rows}), 1, with_controls=True)
assert 0 < report.controls.wrong.context_fidelity[-1] < 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_texts_of_16384_tokens_take_little_memory() -> None:
    """One attention matrix of one head would take 1 GB."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=600, check=True)
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 400_000
