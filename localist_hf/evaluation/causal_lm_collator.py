"""Batches for causal language modeling."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


# What stands on padding, by column.
_PADDING = {
    "input_ids": 0,  # any token will do where the mask is 0
    "attention_mask": 0,
    "labels": -100,
    "position_ids": 0,
    "token_type_ids": 0,
    "block_starts": -1,
}


def causal_lm_collator(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Makes a batch of sequences; where there are no labels, they are the tokens.

    Shorter sequences are padded on the right under an attention mask. No token is needed for that and none is taken for
    padding: transformers' collators go by the tokenizer's pad token, which GPT-2 lacks, and where the end-of-text token
    stands in for it they leave the ends of all texts out of the labels.

    Args:
        features (`Sequence[Mapping[str, Any]]`):
            For each sequence `"input_ids"` and optionally `"attention_mask"`, `"labels"`, `"position_ids"`,
            `"token_type_ids"` and `"block_starts"`, all of one length. Other columns are left out.

    Returns:
        `dict[str, torch.Tensor]`: tensors of shape `(batch_size, sequence_length)`; labels are -100 on padding.

    Raises:
        ValueError: for sequences without `"input_ids"`, or of which some lack a column that others have; for those of
            different lengths with `"position_ids"` but no `"attention_mask"`: the mask that hides their padding would
            also undo the borders of the texts that such positions mark (see [`LocalistGPT2LMHeadModel.forward`]).
    """
    columns = set().union(*features)
    for feature in features:
        if missing := {"input_ids", *(columns & _PADDING.keys())} - feature.keys():
            name = min(missing)
            raise ValueError(f"A sequence has no {name!r}, only {', '.join(map(repr, feature)) or 'nothing'}.")
    batch = {
        name: pad_sequence([torch.as_tensor(feature[name]) for feature in features], True, padding)
        for name, padding in _PADDING.items()
        if name in columns
    }
    if "attention_mask" not in batch:
        masks = pad_sequence([torch.ones(len(feature["input_ids"]), dtype=torch.long) for feature in features], True)
        if not masks.all():
            if "position_ids" in batch:
                raise ValueError(
                    "Sequences with 'position_ids' and no 'attention_mask' may hold several texts each, which padding "
                    "would run together; give them one length, or a mask where each is one text."
                )
            batch["attention_mask"] = masks
    labels = batch.get("labels", batch["input_ids"])
    mask = batch.get("attention_mask")
    batch["labels"] = labels.clone() if mask is None else labels.masked_fill(mask == 0, -100)
    return batch
