"""What a tokenizer puts before a text is found by what it does, and not by the tokens that it has names for."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from localist_hf.evaluation import text_prefix
from localist_hf.evaluation.text_prefix import have_prefix, known_text


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


def test_a_tokenizer_may_know_neither_that_letter_nor_a_token_for_what_is_unknown() -> None:
    backend = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "C4": 2, "G4": 3}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 0), ("[SEP]", 1)]}
    backend.post_processor = processors.TemplateProcessing(**frame)
    notes = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    assert known_text(notes) == "C4"
    assert text_prefix(notes) == [0]
    with pytest.raises(ValueError, match="there is none, or its vocabulary is empty"):
        known_text(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}))))


def test_sequences_with_and_without_it() -> None:
    whole = [{"input_ids": [7, 1, 2]}, {"input_ids": torch.tensor([7, 3])}]
    padded = {"input_ids": [0, 0, 7, 1], "attention_mask": [0, 0, 1, 1]}
    assert have_prefix([*whole, padded], [7])
    assert have_prefix([{"input_ids": [1]}], [])
    for other in ({"input_ids": [1, 7]}, {"input_ids": [7, 1], "attention_mask": [0, 1]}, {"input_ids": []}):
        assert not have_prefix([*whole, other], [7])
