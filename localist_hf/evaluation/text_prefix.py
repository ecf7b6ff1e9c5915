"""What a tokenizer puts before every text, as those of Gemma, Llama and Mistral do."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that a tokenizer puts before every text. A model that was trained with them is lost without, so a
    sequence that is cut out of a longer text must begin with them too. It is what the tokenizer does that counts:
    GPT-2's has a `bos_token`, and puts none before a text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.

    Returns:
        `list[int]`: token ids; empty for most tokenizers.

    Example:

    ```python
    >>> prefix = text_prefix(tokenizer)
    >>> room = sequence_length - len(prefix)
    >>> tokens = tokenizer(book, add_special_tokens=False)["input_ids"]
    >>> sequences = [prefix + tokens[start : start + room] for start in range(0, len(tokens) - room + 1, room)]
    ```
    """
    if not tokenizer("")["input_ids"]:
        return []
    # Of what surrounds an empty text some may stand after it, as an end-of-text does.
    text = known_text(tokenizer)
    whole, own = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(own) + 1)
    return whole[: next((start for start in places if whole[start : start + len(own)] == own), 0)]


def known_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    A text of which a tokenizer knows a token: `"a"`, or one of its own tokens. Those of notes or of molecules may know
    neither that letter nor a token for what is unknown.

    Raises:
        ValueError: where there is none.
    """
    for text in chain(["a"], islice(_own_words(tokenizer), 100)):
        try:
            if tokenizer(text, add_special_tokens=False)["input_ids"]:
                return text
        except Exception:  # the Rust library raises `Exception` itself
            continue
    raise ValueError("there is none, or its vocabulary is empty.")


def _own_words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A tokenizer's words; the whole vocabulary is sorted when the first is asked for, and not before."""
    for token in sorted(set(tokenizer.get_vocab().values()).difference(tokenizer.all_special_ids)):
        yield tokenizer.decode([token])


def have_prefix(sequences: Iterable[Mapping[str, Any]], prefix: list[int]) -> bool:
    """Whether all of these sequences, in `"input_ids"` and perhaps padded under an `"attention_mask"`, begin so."""
    for sequence in sequences:
        tokens = list(map(int, sequence["input_ids"]))
        if (mask := sequence.get("attention_mask")) is not None:
            tokens = [token for token, is_seen in zip(tokens, mask, strict=True) if is_seen]
        if tokens[: len(prefix)] != prefix:
            return False
    return True
