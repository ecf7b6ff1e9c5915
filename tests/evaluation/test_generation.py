"""`measure_generation`: the model's own text under the dial, and the texts that it was to go on with."""

import pytest
import torch

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


def test_without_local_layers_there_is_one_place_of_the_dial(make_model, make_text) -> None:
    model = make_model(locality_schedule="distributed")
    figures = measure_generation(model, model, make_text(2, 24), prompt_length=8)
    assert figures.keys() == {"dial 0", "text"}


@pytest.mark.parametrize("prompt_length", [0, 21, 24])
def test_something_must_be_left_to_write(make_model, make_text, prompt_length: int) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=f"`prompt_length` is {prompt_length}"):
        measure_generation(model, model, make_text(1, 24), prompt_length=prompt_length)
