"""A tokenizer for the command's tests."""

import pytest
from transformers import PreTrainedTokenizerFast

from localist_hf.cli.base import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Sentence number 0123456789 says something. some more of the words here\n"] * 5)
