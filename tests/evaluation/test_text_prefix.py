"""What a tokenizer puts before a text is found by what it does, and not by the tokens that it has names for."""

import pytest
import torch
from transformers import ByT5Tokenizer

from localist_hf.evaluation import text_prefix
from localist_hf.evaluation.text_prefix import have_prefix


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("$A", []),
        ("<bos> $A", ["<bos>"]),
        ("<bos> $A <eos>", ["<bos>"]),
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>"]),
        ("$A <eos>", []),
        ("<|endoftext|> $A <|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_it_is_what_stands_before_the_text(make_framed_tokenizer, template: str, prefix: list[str]) -> None:
    tokenizer = make_framed_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(text_prefix(tokenizer)) == prefix


def test_a_named_token_is_none(tokenizer) -> None:
    assert tokenizer.bos_token is not None
    assert text_prefix(tokenizer) == []
    assert text_prefix(ByT5Tokenizer()) == []  # which has no fast backend, and ends texts


def test_sequences_with_and_without_it() -> None:
    whole = [{"input_ids": [7, 1, 2]}, {"input_ids": torch.tensor([7, 3])}]
    padded = {"input_ids": [0, 0, 7, 1], "attention_mask": [0, 0, 1, 1]}
    assert have_prefix([*whole, padded], [7])
    assert have_prefix([{"input_ids": [1]}], [])
    for other in ({"input_ids": [1, 7]}, {"input_ids": [7, 1], "attention_mask": [0, 1]}, {"input_ids": []}):
        assert not have_prefix([*whole, other], [7])
