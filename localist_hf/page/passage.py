"""A text as a model's tokenizer cuts it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .pieces import decode, text_pieces


@dataclass(frozen=True, eq=False)
class Passage:
    """
    A text as a model's tokenizer cuts it.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`):
            The tokens.
        pieces (`list[str]`):
            What each token stands for; end to end they are the text. Of the tokens that share one character the first
            has it, and the others have nothing. Special tokens that the tokenizer adds have their names.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """

    input_ids: torch.Tensor
    pieces: list[str]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "Passage":
        """
        Cuts a text.

        Raises:
            ValueError: for a text without a token, and for one that is no Unicode text.
        """
        _check_unicode(text)
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        tokens = encoded["input_ids"]
        pieces, own = [""] * len(tokens), []
        if tokenizer.is_fast:
            end = 0
            for place, (token, (_, token_end)) in enumerate(zip(tokens, encoded["offset_mapping"], strict=True)):
                if token_end > 0 or token not in tokenizer.all_special_ids:
                    pieces[place] = text[end : max(end, token_end)]
                    end = max(end, token_end)
                    own.append(place)
                else:
                    pieces[place] = decode(tokenizer, [token])
            if own:
                pieces[own[-1]] += text[end:]  # some leave out the spaces there
        elif bare := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            places = range(len(tokens) - len(bare) + 1)
            start = next((place for place in places if tokens[place : place + len(bare)] == bare), None)
            own = range(len(tokens)) if start is None else range(start, start + len(bare))
            pieces = [decode(tokenizer, [token]) for token in tokens]
            pieces[own.start : own.stop] = text_pieces(tokenizer, tokens[own.start : own.stop], text)
        if not text.strip() or not own:
            raise ValueError("`text` is empty; it must have at least one word.")
        return cls(torch.tensor(tokens), pieces, tokenizer)

    def __len__(self) -> int:
        return len(self.pieces)


def num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """
    How long the [`Passage`] of a text is: of a tokenizer without offsets the pieces take far longer than the tokens.

    Raises:
        ValueError: for a text that is no Unicode text.
    """
    _check_unicode(text)
    return len(tokenizer(text, verbose=False)["input_ids"])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character of two, which a browser may send
        raise ValueError(
            f"`text` has {text[error.start]!r}, character {error.start}; it must be Unicode text."
        ) from error
