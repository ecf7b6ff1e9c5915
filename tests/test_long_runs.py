"""Long runs: nothing that a step, a generation or a reading leaves behind piles up."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.configuration import RECIPES
from localist_hf.page import reading_server
from localist_hf.page.reading_server import Readings
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


pytestmark = pytest.mark.slow

#: After the first tenth a whole run may add so much: what the allocator keeps, and what libraries cache.
_MEGABYTES, _OBJECTS = 24, 400


class Watch:
    """Memory and live objects, taken at each tenth of a run."""

    def __init__(self, total: int) -> None:
        self.every, self.seen = total // 10, []

    def at(self, number: int) -> None:
        if number % self.every == 0:
            gc.collect()
            self.seen.append((psutil.Process().memory_info().rss / 2**20, len(gc.get_objects())))

    def check(self) -> None:
        assert len(self.seen) == 10
        (memory, objects), rest = self.seen[0], self.seen[1:]
        # One tenth may be taken in the middle of something.
        assert sorted(each for each, _ in rest)[-2] - memory < _MEGABYTES, self.seen
        assert sorted(each for _, each in rest)[-2] - objects < _OBJECTS, self.seen


@pytest.mark.parametrize("kind", ["hold", "both", "budget"])
def test_three_thousand_steps_of_training(make_model: Callable, tmp_path: Path, kind: str) -> None:
    watch = Watch(3000)

    class Watched(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            watch.at(state.global_step)

    given = {"max_loss_increase": 0.1} if kind == "budget" else RECIPES[kind]
    args = LocalistTrainingArguments(
        str(tmp_path), max_steps=3000, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=3000, dataloader_pin_memory=False, **given,
    )  # fmt: skip
    text = torch.randint(2, 97, (50, 24), generator=torch.Generator().manual_seed(1)).tolist()
    model = make_model(n_layer=2, n_embd=16, locality_schedule="linear")
    dataset = Dataset.from_dict({"input_ids": text})
    LocalistTrainer(model, args, train_dataset=dataset, callbacks=[Watched()]).train()
    watch.check()


@pytest.mark.parametrize("partition", ["semantic", "window"])
def test_two_thousand_generations_under_a_dial(make_model: Callable, partition: str) -> None:
    model, watch = make_model(locality_schedule="linear", block_partition=partition).eval(), Watch(2000)
    prompts = torch.randint(2, 97, (2000, 1, 12), generator=torch.Generator().manual_seed(1))
    for number, prompt in enumerate(prompts, 1):
        with model.set_locality_dial(1.0 if number % 2 else 0.5):
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        watch.at(number)
    watch.check()


def test_five_hundred_readings_by_twenty_clients(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading_server, "_READING_BYTES", 2**20)  # else no text makes room for another
    model, watch = make_model(vocab_size=len(tokenizer), locality_schedule="localist"), Watch(500)
    readings = Readings(lambda name, flag: (model, tokenizer))

    def visit(number: int) -> None:
        about = (f"Sentence number {number} says something. some more of the words here\nnumber {number}.", "a", None)
        readings.read(*about)
        readings.weights(*about, 0, 1, None, 5, 1.0, None)
        readings.predict(*about, 0, 5, 1.0, None)

    done = 0
    with ThreadPoolExecutor(20) as clients:
        for some in range(0, 500, 50):
            list(clients.map(visit, range(some, some + 50)))
            done += 50
            watch.at(done)
    watch.check()
