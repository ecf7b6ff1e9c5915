"""
Layers recruited from a model, beside other schedules at an equal sum of lambda: perplexity at dial 1, of the model as
it is and held and taught.

    python study/recruited_layers.py --train 150
    python study/recruited_layers.py runs/smollm2/model --text-file ../shared/data/wikitext-2-raw/valid.txt \
        --held-out-text ../shared/data/wikitext-2-raw/test.txt --sequence-length 512 --number 8 --sinks 1 \
        --schedules quintic upper_half --train 40 --lora
"""

import argparse
import copy
import time
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, set_seed

from localist_hf.configuration import RECIPES
from localist_hf.evaluation import recruit_layers
from localist_hf.evaluation.block_controls import Losses, setting
from localist_hf.evaluation.measure import evaluation_batches
from localist_hf.evaluation.tables import markdown_table
from localist_hf.experiments.base import BASE
from localist_hf.experiments.data import some_of, tokenize_and_pack
from localist_hf.experiments.preparation import load_texts
from localist_hf.hub.loading import load
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


SCHEDULES = ("quintic", "reverse_quintic", "upper_half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE))
    parser.add_argument("--text-file")
    parser.add_argument("--held-out-text")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--number", type=int, default=48, help="sequences to recruit on, and to measure on")
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--train", type=int, default=0, help="steps to train each schedule for, held and taught")
    parser.add_argument("--lora", action="store_true", help="train adapters of all layers, in batches of 2")
    args = parser.parse_args()
    model, tokenizer = load(args.model, {"num_sink_tokens": args.sinks})
    model = model.float()
    texts, _ = load_texts(args.text_file, args.held_out_text)
    train, held_out = (
        tokenize_and_pack(Dataset.from_dict({"text": texts[part]}), tokenizer, args.sequence_length)
        for part in ("training", "held-out")
    )
    asked, held_out = some_of(train, args.number), some_of(held_out, args.number)
    locality, place = model.config.locality, torch.arange(args.sequence_length)[None]

    @torch.no_grad()
    def perplexity(model: PreTrainedModel, schedule: str | list[float], **blocks: torch.Tensor) -> float:
        locality = model.config.locality
        losses = Losses()
        with setting(locality, locality_schedule=schedule):
            for inputs, labels in evaluation_batches(model, held_out, 4, None):
                of_batch = {name: starts.expand_as(labels) for name, starts in blocks.items()}
                outputs = model(**inputs, **of_batch, use_cache=False, locality_dial=1.0)
                losses.add(outputs, labels)
        return losses.perplexity

    start = time.perf_counter()
    recruited = recruit_layers(model, asked, total=1, batch_size=4)
    print(f"recruited in {time.perf_counter() - start:.0f} s: order {recruited.order}")
    print("costs", *(f"{each:.3f}" for each in recruited.costs))
    print("gains", *(f"{each:.2f}" for each in recruited.gains), flush=True)
    rows = [
        [
            "sum of lambda",
            "schedule",
            "perplexity at dial 1",
            "self only",
            "lambdas",
            *["trained", "self only"] * bool(args.train),
        ]
    ]
    rows.append(
        ["0", "distributed", *[f"{perplexity(model, 'distributed'):.2f}"] * 2, "", *[""] * 2 * bool(args.train)]
    )
    after: dict[str, list[float]] = {}
    for schedule in args.schedules:
        with setting(locality, locality_schedule=schedule):
            lambdas = locality.locality_lambdas
        total = sum(lambdas)
        of_order = [max(0.0, min(1.0, total - recruited.order.index(layer))) for layer in range(len(lambdas))]
        for name, each in ((schedule, lambdas), ("recruited", of_order)):
            numbers = [f"{perplexity(model, each, **blocks):.2f}" for blocks in ({}, {"block_starts": place})]
            rows.append([f"{total:.2f}", name, *numbers, " ".join(f"{value:.2g}" for value in each)])
            if args.train:
                if str(each) not in after:
                    taught = trained(model, train, each, args.train, args.lora)
                    after[str(each)] = [perplexity(taught, each, **b) for b in ({}, {"block_starts": place})]
                rows[-1] += [f"{value:.2f}" for value in after[str(each)]]
            print(*rows[-1], sep="  ", flush=True)
    print(markdown_table(rows))


def trained(model: PreTrainedModel, train: Dataset, lambdas: list[float], steps: int, lora: bool) -> PreTrainedModel:
    """A copy of the model, held at dial 1 and taught by itself as in study/training.yaml or smollm2_training.yaml."""
    set_seed(0)
    model = copy.deepcopy(model)
    model.config.locality.locality_schedule = lambdas
    batch_size, rate = (2, 1e-3) if lora else (8, 6e-4)
    if lora:
        of_attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig("CAUSAL_LM", r=16, lora_alpha=32, target_modules=of_attention))
    with TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": rate, "seed": 0}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        args = LocalistTrainingArguments(folder, **RECIPES["hold"], **settings, **quiet)
        LocalistTrainer(model, args, train_dataset=train).train()
    return (model.merge_and_unload() if lora else model).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
