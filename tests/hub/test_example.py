"""The example on a card: a prompt, and what the card's code prints for it."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.hub import RunRecord
from localist_hf.hub.adapters import brings_embeddings
from localist_hf.hub.example import attention_example, blocks_and_shares


def test_a_model_of_no_more_positions_than_the_tokenizer_fills_has_no_example(
    make_model: Callable, make_framed_tokenizer: Callable, tmp_path: Path
) -> None:
    tokenizer = make_framed_tokenizer("<bos> $A <eos>")
    (model := make_model(n_positions=3, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    assert attention_example(model, tokenizer, tmp_path) is None


def test_an_adapter_s_example_has_the_tokens_that_were_added_to_its_base(
    make_model: Callable, tokenizer, tmp_path: Path
) -> None:
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    base = LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer) + 7)
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, adapter).eval()
    model.save_pretrained(tmp_path / "adapter")
    example = attention_example(model, tokenizer, tmp_path / "adapter")
    assert example["printed"] == blocks_and_shares(model, tokenizer, example["prompt"])
    # As the card says it.
    assert brings_embeddings(tmp_path / "adapter", len(tokenizer) + 7)
    base = LocalistGPT2LMHeadModel.from_pretrained(tmp_path / "base", config=base.config, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert example["printed"] == blocks_and_shares(loaded, tokenizer, example["prompt"])


def test_there_is_no_example_where_the_model_lacks_a_token_of_it(make_model, tokenizer, tmp_path: Path) -> None:
    (model := make_model(vocab_size=97)).save_pretrained(tmp_path)  # the tokenizer knows more, as that of Gemma 3
    assert attention_example(model, tokenizer, tmp_path) is None


def test_the_example_does_not_depend_on_what_the_tokenizer_gives_and_how_it_writes(make_model, tokenizer) -> None:
    model, own = make_model(vocab_size=len(tokenizer)), copy.deepcopy(tokenizer)
    own.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # which GPT-2 would add to the tokens
    text = "Some words . do n't"
    assert blocks_and_shares(model, own, text) == blocks_and_shares(model, tokenizer, text)


def test_the_example_is_that_of_the_saved_model(family: Path) -> None:
    example = RunRecord.load(family / "quintic").example
    assert len(example["printed"].splitlines()) > 3
    model = LocalistGPT2LMHeadModel.from_pretrained(family / "quintic")
    tokenizer = AutoTokenizer.from_pretrained(family / "quintic")
    ids = tokenizer(example["prompt"], return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= model.config.n_positions // 2  # the card's code goes on from it
    outputs = model(ids, output_fidelity=True)
    starts = outputs.block_starts[-1][0]
    second = starts == starts.unique()[1]
    own, block, outside = [
        outputs[f"{name}_share"][-1][0].mean(0)[second].mean() for name in ("self", "block", "outside")
    ]
    numbers = f"{own:.2f} 0.00 {block:.2f} {outside:.2f} {block / (block + outside):.2f}"
    assert example["printed"].splitlines()[1] == f"{numbers} {tokenizer.decode(ids[0, second])!r}"
    assert re.match(r"0\.\d\d 0\.00 0\.\d\d 0\.00 1\.00 ", example["printed"])  # nothing else to look at
