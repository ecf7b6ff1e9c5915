"""Batches for causal language modeling."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling.block_partition import document_starts


# What stands on padding, by column.
_PADDING = {
    "input_ids": 0,  # any token will do where the mask is 0
    "attention_mask": 0,
    "labels": -100,
    "position_ids": 0,
    "token_type_ids": 0,
    "block_starts": -1,
    "pointer_blocks": -1,
}


def causal_lm_collator(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Makes a batch of sequences; where there are no labels, they are the tokens, but for the first of a text that stands
    behind padding or another text in its row, which no token of its own text predicts.

    Shorter sequences are padded on the right under an attention mask. No token is needed for that and none is taken for
    padding: transformers' collators go by the tokenizer's pad token, which GPT-2 lacks, and where the end-of-text token
    stands in for it they leave the ends of all texts out of the labels.

    Args:
        features (`Sequence[Mapping[str, Any]]`):
            For each sequence `"input_ids"` and optionally `"attention_mask"`, `"labels"`, `"position_ids"`,
            `"token_type_ids"`, `"block_starts"` and `"pointer_blocks"`, all of one length. `"seq_lengths"`, the lengths
            of the texts that TRL has packed into a sequence, stand for positions that start anew with each, in place of
            a mask. Other columns are left out.

    Returns:
        `dict[str, torch.Tensor]`: tensors of shape `(batch_size, sequence_length)`; given labels stay as they
            are, but for -100 on padding.

    Raises:
        ValueError: for sequences without `"input_ids"`, or of which some lack a column that others have; for
            `"seq_lengths"` with another sum than the number of tokens; for sequences of different lengths that tell
            packed texts apart, or have `"position_ids"` but no `"attention_mask"`: the mask that hides their padding
            would also undo the borders of the texts that such positions mark (see [`LocalistGPT2LMHeadModel.forward`]).
    """
    columns = set().union(*features)
    if "seq_lengths" in columns:
        features = [_with_positions(feature) for feature in features]
        columns = columns - {"attention_mask"} | {"position_ids"}
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
    shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
    if "labels" not in columns:
        documents, position = document_starts(*shape, mask, batch.get("position_ids")), torch.arange(shape[1])
        batch["labels"] = batch["input_ids"].masked_fill((documents == position) & (position > 0), -100)
    if mask is not None:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return batch


def _with_positions(feature: Mapping[str, Any]) -> dict[str, Any]:
    """A sequence with the positions that its `"seq_lengths"` say, and without a mask, which would undo them."""
    if "seq_lengths" not in feature:
        raise ValueError(f"A sequence has no 'seq_lengths', only {', '.join(map(repr, feature))}.")
    positions = [position for length in feature["seq_lengths"] for position in range(length)]
    if len(positions) != len(feature["input_ids"]):
        raise ValueError(
            f"The 'seq_lengths' of a sequence are {[*feature['seq_lengths']]}; they must sum to its "
            f"{len(feature['input_ids'])} tokens."
        )
    return {name: value for name, value in feature.items() if name != "attention_mask"} | {"position_ids": positions}
