"""
Fine-tune GPT-2 under the quintic locality configuration: the whole thing as a Trainer script.

    python examples/fine_tune.py book.txt runs/quintic
    python examples/fine_tune.py book.txt runs/quintic ./my-gpt2
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.evaluation import text_prefix
from localist_hf.trainers import LocalistTrainer, LocalistTrainingArguments


if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
text_file, output_dir, *base = sys.argv[1:]
checkpoint = base[0] if base else "openai-community/gpt2"

model = LocalistGPT2LMHeadModel.from_pretrained(checkpoint, locality_schedule="quintic")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)

# One long document, cut into sequences of equal length, each of which begins as the tokenizer begins a text (some put a
# token there); the last tenth is held out.
length, prefix = min(256, model.config.n_positions), text_prefix(tokenizer)
room = length - len(prefix)
text = Dataset.from_dict({"text": [Path(text_file).read_text(encoding="utf-8-sig")]})
sequences = text.map(
    lambda batch: {
        "input_ids": [
            prefix + ids[start : start + room]
            for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
            for start in range(0, len(ids) - room + 1, room)
        ]
    },
    batched=True,
    remove_columns=["text"],
).train_test_split(test_size=0.1, shuffle=False)

trainer = LocalistTrainer(
    model=model,
    args=LocalistTrainingArguments(output_dir=output_dir, num_train_epochs=1, report_to="none"),
    train_dataset=sequences["train"],
    eval_dataset=sequences["test"],
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()

metrics = trainer.evaluate()
print(f"perplexity {metrics['eval_perplexity']:.2f}")
for layer, weight in enumerate(model.config.locality_lambdas):
    psi, share = (metrics[f"eval_{name}_layer_{layer}"] for name in ("context_fidelity", "context_share"))
    print(
        f"layer {layer}: lambda {weight:.2f}; {share:.2f} of its attention to other words, {psi:.2f} of that in blocks"
    )
