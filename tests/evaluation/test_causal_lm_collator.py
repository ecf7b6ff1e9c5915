"""Batches: what is no text is no label, whatever the lengths."""

import pytest
import torch

from localist_hf.evaluation import causal_lm_collator


def test_sequences_of_one_length_are_stacked_with_themselves_as_labels() -> None:
    batch = causal_lm_collator([{"input_ids": [5, 6, 7], "idx": 3}, {"input_ids": torch.tensor([1, 2, 3]), "idx": 4}])
    assert batch.keys() == {"input_ids", "labels"}  # no mask, which would keep attention from its fastest kernel
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6, 7], [1, 2, 3]]
    assert batch["labels"] is not batch["input_ids"]


def test_shorter_sequences_are_padded_under_a_mask_and_without_labels() -> None:
    batch = causal_lm_collator([{"input_ids": [5, 6, 0]}, {"input_ids": [9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [
        [5, 6, 0],
        [9, -100, -100],
    ]  # a token 0 is a label


def test_padding_that_is_there_already_has_no_label() -> None:
    features = [
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
    ]
    batch = causal_lm_collator(features)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 6], [5, 6, -100, -100]]
    with_labels = causal_lm_collator([feature | {"labels": feature["input_ids"]} for feature in features])
    assert torch.equal(with_labels["labels"], batch["labels"])


def test_given_labels_and_columns_of_the_model_are_kept() -> None:
    features = [
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1], "block_starts": [0, 0]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "attention_mask": [1, 1, 1], "block_starts": [0, 0, 2]},
    ]
    batch = causal_lm_collator(features)
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, -100, 7]]
    assert batch["block_starts"].tolist() == [[0, 0, -1], [0, 0, 2]]


def test_texts_packed_into_rows_of_different_lengths_are_refused() -> None:
    features = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [5, 6], "position_ids": [0, 1]}]
    assert "attention_mask" not in causal_lm_collator(features[:1])
    with pytest.raises(ValueError, match="'position_ids' and no 'attention_mask' may hold several texts"):
        causal_lm_collator(features)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"A sequence has no 'input_ids', only 'text'\."):
        causal_lm_collator([{"text": "a"}])
    with pytest.raises(ValueError, match="A sequence has no 'labels', only 'input_ids'"):
        causal_lm_collator([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}])
