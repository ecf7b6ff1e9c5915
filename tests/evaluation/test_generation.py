"""`measure_generation`: the model's own text under the dial, and the texts that it was to go on with."""

import copy
from unittest.mock import patch

import pytest
import torch
from generation_defaults import OWN_GENERATION, set_defaults
from peft import LoraConfig, get_peft_model

from localist_hf.evaluation import measure_generation


@torch.no_grad()
def test_the_texts_themselves_are_measured_by_hand(make_model, make_text) -> None:
    model, judge = make_model(seed=1), make_model(seed=2)
    texts = make_text(2, 30)
    texts[0, 10:] = torch.tensor([3, 4] * 10)
    figures = measure_generation(model, judge, texts, prompt_length=10)
    assert figures.keys() == {"dial 0", "dial 1", "text"}
    assert all(each.num_tokens == 20 for each in figures.values())
    assert figures["text"].distinct_2[0] == pytest.approx(2 / 19)
    assert figures["text"].repetition_4[0] == pytest.approx(15 / 17)
    logits = judge(texts).logits[:, 9:-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, texts[:, 10:], reduction="none").sum(1)
    assert figures["text"].losses == pytest.approx(losses.tolist(), rel=1e-4)


def test_what_is_written_depends_on_the_dial_and_the_seed_alone(make_model, make_text) -> None:
    model, texts = make_model(max_block_length=6), make_text(3, 40)
    state = torch.get_rng_state()
    figures = measure_generation(model, model, texts, prompt_length=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert figures == measure_generation(model.train(), model, texts, prompt_length=12)
    assert figures["dial 0"] != figures["dial 1"]
    assert figures["dial 0"] != measure_generation(model, model, texts, prompt_length=12, seed=1)["dial 0"]
    # Sampled from the whole distribution of a random model: next to nothing repeats.
    assert max(figures["dial 0"].repetition_4) < 0.1


@torch.no_grad()
def test_the_judge_is_free_whatever_its_dial(make_model, make_text) -> None:
    model, judge, texts = make_model(seed=1), make_model(seed=2, locality_schedule="localist"), make_text(2, 30)
    expected = measure_generation(model, judge, texts, prompt_length=10, dials=(0.0,))
    with judge.set_locality_dial(1.0):
        assert measure_generation(model, judge, texts, prompt_length=10, dials=(0.0,)) == expected
    judge.config.locality_dial, judge.config.min_fidelity = 0.5, 0.9
    assert measure_generation(model, judge, texts, prompt_length=10, dials=(0.0,)) == expected


@torch.no_grad()
def test_what_a_checkpoint_says_of_generation_counts_for_nothing(make_model, make_text) -> None:
    model, texts, drawn = make_model(), make_text(2, 14), []

    def draw(probabilities: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        drawn.append(probabilities)
        return multinomial(probabilities, *args, **kwargs)

    multinomial = torch.multinomial
    with patch("torch.multinomial", draw):
        expected = measure_generation(model, model, texts, prompt_length=8, dials=[1.0])
    assert len(drawn) == 6  # every text is as long
    of_prompt = model(texts[:, :8], locality_dial=1.0).logits[:, -1].softmax(-1)
    assert torch.allclose(drawn[0], of_prompt, atol=1e-6)
    for fields in [{name: value} for name, value in OWN_GENERATION.items()] + [OWN_GENERATION]:
        own = set_defaults(model, **fields)
        before = copy.deepcopy(vars(own))
        assert measure_generation(model, model, texts, prompt_length=8, dials=[1.0]) == expected, fields
        assert model.generation_config is own
        assert vars(own) == before


def test_what_is_written_is_free_of_the_guarantee_of_the_configuration(make_model, make_text) -> None:
    model, judge, texts = make_model(locality_schedule="localist"), make_model(seed=2), make_text(2, 24)
    expected = measure_generation(model, judge, texts, prompt_length=8)
    model.config.min_fidelity = 0.9
    assert measure_generation(model, judge, texts, prompt_length=8) == expected


def test_an_adapter_writes_so_too(make_model, make_text) -> None:
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    base, texts = make_model(), make_text(2, 24)
    expected = measure_generation(base, base, texts, prompt_length=8)
    model = get_peft_model(base, adapter)
    base.generation_config.min_p = 0.9
    assert measure_generation(model, model, texts, prompt_length=8) == expected
    assert base.generation_config.min_p == 0.9


def test_without_local_layers_there_is_one_place_of_the_dial(make_model, make_text) -> None:
    model = make_model(locality_schedule="distributed")
    figures = measure_generation(model, model, make_text(2, 24), prompt_length=8)
    assert figures.keys() == {"dial 0", "text"}


@pytest.mark.parametrize("prompt_length", [0, 21, 24])
def test_something_must_be_left_to_write(make_model, make_text, prompt_length: int) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=f"`prompt_length` is {prompt_length}"):
        measure_generation(model, model, make_text(1, 24), prompt_length=prompt_length)
