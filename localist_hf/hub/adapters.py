"""What adapters bring along beside their own weights: embeddings of added tokens, and a tokenizer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import has_file


#: Whatever has a tokenizer has one of these.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")


def has_tokenizer(name: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub repository holds a tokenizer."""
    offline = is_offline_mode()
    return any(has_file(name, file, revision=revision, local_files_only=offline) for file in _TOKENIZER_FILES)


def brings_embeddings(folder: Path, vocabulary_size: int) -> bool:
    """Whether an adapter in a folder holds embeddings of all tokens, which then need not fit those of its base."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118  (no mapping)
    return any(len(shape) == 2 and shape[0] == vocabulary_size and ".lora_" not in key for key, shape in shapes.items())


def fit_embeddings(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Gives a base as many embeddings as an adapter was trained with. Where tokens were added for that, PEFT saves the
    embeddings whole, and they do not fit those that the base was saved with.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
        weights (`Mapping[str, torch.Tensor]`):
            The adapter's, by the names that PEFT saves them under.

    Raises:
        ValueError: for embeddings without a head of as many tokens.
    """

    def saved_rows(module: nn.Module) -> int | None:
        """How many rows there are of a module's weight, whatever PEFT has put around it."""
        prefix = next(f"base_model.model.{name}." for name, own in model.named_modules() if own is module)
        width = module.weight.shape[1:]
        rows = [
            len(weight)
            for key, weight in weights.items()
            if key.startswith(prefix) and key.endswith(".weight") and ".lora_" not in key and weight.shape[1:] == width
        ]
        return rows[0] if rows else None

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    number = saved_rows(embeddings)
    if number is None or number == embeddings.num_embeddings:
        return
    # transformers would fill up a head of its own with random numbers.
    if head.weight is not embeddings.weight and (found := saved_rows(head)) != number:
        heads = "no head" if found is None else f"a head of {found}"
        raise ValueError(f"it holds embeddings of {number} tokens and {heads}.")
    model.resize_token_embeddings(number, mean_resizing=False)
