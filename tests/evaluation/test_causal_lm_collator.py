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


def test_padding_that_is_there_already_has_no_label_and_predicts_none() -> None:
    features = [
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
    ]
    batch = causal_lm_collator(features)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6], [5, 6, -100, -100]]
    with_labels = causal_lm_collator([feature | {"labels": feature["input_ids"]} for feature in features])
    assert with_labels["labels"].tolist() == [[-100, -100, 5, 6], [5, 6, -100, -100]]


def test_given_labels_and_columns_of_the_model_are_kept() -> None:
    features = [
        {
            "input_ids": [5, 6],
            "labels": [-100, 6],
            "attention_mask": [1, 1],
            "block_starts": [0, 0],
            "pointer_blocks": [-1, 0],
        },
        {
            "input_ids": [5, 6, 7],
            "labels": [-100, -100, 7],
            "attention_mask": [1, 1, 1],
            "block_starts": [0, 0, 2],
            "pointer_blocks": [-1, 0, 1],
        },
    ]
    batch = causal_lm_collator(features)
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, -100, 7]]
    assert batch["block_starts"].tolist() == [[0, 0, -1], [0, 0, 2]]
    assert batch["pointer_blocks"].tolist() == [[-1, 0, -1], [-1, 0, 1]]


def test_no_text_packed_in_a_row_predicts_the_first_token_of_the_next() -> None:
    """Nor does one of a single token, as padding of such rows is one."""
    features = [
        {"input_ids": [5, 6, 7, 8, 9, 4], "position_ids": [0, 1, 0, 1, 2, 0]},
        {"input_ids": [5, 6, 7, 0, 0, 0], "position_ids": [3, 4, 0, 0, 0, 0]},
    ]
    batch = causal_lm_collator(features)
    assert batch["labels"].tolist() == [[5, 6, -100, 8, 9, -100], [5, 6, -100, -100, -100, -100]]
    with_labels = causal_lm_collator([feature | {"labels": feature["input_ids"]} for feature in features])
    assert torch.equal(with_labels["labels"], batch["input_ids"])
    masked = causal_lm_collator([feature | {"attention_mask": [1] * 6} for feature in features])  # one text each
    assert torch.equal(masked["labels"], batch["input_ids"])


def test_the_lengths_of_packed_texts_stand_for_their_positions() -> None:
    """As TRL packs them."""
    features = [
        {"input_ids": [5, 6, 7, 8], "seq_lengths": [3, 1], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": torch.tensor([9, 8, 7, 6]), "seq_lengths": torch.tensor([2, 2]), "attention_mask": [1, 1, 1, 1]},
    ]
    batch = causal_lm_collator(features)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [9, 8, -100, 6]]
    with pytest.raises(ValueError, match=r"'seq_lengths' of a sequence are \[3, 2\]; they must sum to its 4 tokens"):
        causal_lm_collator([features[0] | {"seq_lengths": [3, 2]}])
    with pytest.raises(ValueError, match="A sequence has no 'seq_lengths'"):
        causal_lm_collator([features[0], {"input_ids": [1, 2, 3, 4]}])


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
