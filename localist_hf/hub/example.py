"""The example on a model's card: a prompt of several blocks, and what the card's code prints for it."""

import ast
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..evaluation.check_model import num_positions
from ..modeling.measurements import SHARES
from .loading import load_adapter


logger = logging.get_logger(__name__)

#: Several sentences, each about something else: longer than a block, so that there is something to see.
PROMPT = (
    "The with statement wraps a block of code: one method is called before it, and another one after it, even if the "
    "block fails. A dictionary finds things by their names. Its keys can be numbers or strings, but they must not "
    "change. When a function returns, the names inside it are gone. In the evening it began to rain, and the old man "
    "closed the window."
)
#: How much the card's code prints of the text of a block.
SHOWN_LETTERS = 30


def shown_layer(lambdas: Sequence[float]) -> int:
    """The layer that a card speaks of: the last of the most local ones."""
    return max(range(len(lambdas)), key=lambda layer: (lambdas[layer], layer))


def attention_example(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> dict[str, str] | None:
    """
    What the code on the card prints for a model as it was saved, loaded anew as by somebody else: the model at hand may
    be spread over processes, of which only one writes cards.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model whose weights the folder holds; it is not run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; without one there is no example.
        folder (`Path`):
            Where it was saved.

    Returns:
        `dict[str, str]`: the `prompt`, shortened for a model of few positions, and what is `printed`: for each block of
        the shown layer the means of its tokens' attention shares (self, sink, block, outside), their context fidelity,
        and its text. `None` where the model cannot be loaded.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    is_adapter = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapter else model
    try:
        saved = (_saved_adapter(base, str(folder)) if is_adapter else type(base).from_pretrained(folder)).eval()
    except (OSError, ValueError) as error:
        logger.warning(f"The card goes without its example, because {folder} cannot be loaded: {error}")
        return None
    prompt = PROMPT
    if (allowed := num_positions(base.config)) is not None:
        while prompt and len(tokenizer(prompt)["input_ids"]) > allowed // 2:  # the card's code goes on
            prompt = prompt.rpartition(" ")[0]
    if prompt and max(tokenizer(prompt)["input_ids"]) >= base.get_input_embeddings().weight.shape[0]:
        logger.warning("The card goes without its example, because the model lacks a token that its tokenizer knows.")
        return None
    return {"prompt": prompt, "printed": blocks_and_shares(saved, tokenizer, prompt)} if prompt else None


def _saved_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """The adapter in a folder, which says nothing of its base but where it is."""
    adapter = PeftConfig.from_pretrained(folder)
    where = {"pretrained_model_name_or_path": adapter.base_model_name_or_path, "revision": adapter.revision or "main"}
    config = stored_config(base)
    # Added tokens are no part of the base's weights; the adapter brings them.
    stored, _ = config.get_config_dict(**where)
    config.get_text_config().update({key: value for key, value in stored.items() if key == "vocab_size"})
    return load_adapter(type(base).from_pretrained(**where, config=config), folder)


def stored_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of a model as its weights are stored: without a quantization that was done in loading them."""
    config = copy.deepcopy(model.config)
    quantization = vars(config).pop("quantization_config", None)
    if quantization is not None and model.hf_quantizer.pre_quantized:
        config.quantization_config = quantization.to_dict()  # the form in which transformers reads it
    return config


@torch.no_grad()
def blocks_and_shares(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the code on the card prints, with the text whole; the very same steps."""
    layer = shown_layer(model.config.locality.locality_lambdas)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    outputs = model(**inputs, output_fidelity=True)
    shares = [outputs[name][layer][0].mean(0) for name in SHARES]
    starts = outputs.block_starts[layer][0]
    lines = []
    for start in starts.unique():
        here = starts == start
        own, sink, block, outside = [share[here].mean() for share in shares]
        numbers = f"{own:.2f} {sink:.2f} {block:.2f} {outside:.2f} {block / (block + outside):.2f}"
        text = tokenizer.decode(inputs["input_ids"][0][here], clean_up_tokenization_spaces=False)
        lines.append(f"{numbers} {text!r}\n")
    return "".join(lines)


def shortened_blocks(printed: str) -> str:
    """What [`blocks_and_shares`] gives, as the code on the card prints it."""
    lines = (line.split(" ", 5) for line in printed.splitlines())
    return "".join(f"{' '.join(numbers)} {ast.literal_eval(text)[:SHOWN_LETTERS]!r}\n" for *numbers, text in lines)
