"""Which stretch of a text each of its tokens stands for, where the tokenizer does not say so itself."""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """What tokens stand for, as it stood in the text; nothing of it is tidied up."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def added_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What tokens add to those before them; the number of one that the model alone knows, and not the tokenizer."""
    if len(tokens) == 1 and not _is_known(tokenizer, tokens[0]):
        return f"<{tokens[0]}>"
    tokens = [token for token in tokens if _is_known(tokenizer, token)]
    # A tokenizer writes a space, or a character in several tokens, only where it knows what stands before.
    shorter, longer = decode(tokenizer, before), decode(tokenizer, [*before, *tokens])
    return longer[_reach(shorter, longer) :]


def _is_known(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a tokenizer knows a token: models may have more, so that their number is a round one."""
    try:
        decode(tokenizer, [token])
        return tokenizer.convert_ids_to_tokens(token) is not None
    except (ValueError, KeyError, IndexError, OverflowError):  # of those that reckon
        return False


def _reach(start: str, whole: str) -> int:
    """How far into a whole its start goes. Some tokenizers put spaces elsewhere, and end otherwise, by what follows."""
    if whole.startswith(start):
        return len(start)
    letters = [place for place, letter in enumerate(whole) if not letter.isspace()]
    same = _common("".join(start.split()), "".join(whole.split()))
    return max(_common(start, whole), letters[same - 1] + 1 if same else 0)


def _common(one: str, other: str) -> int:
    """How long the beginning is that both have."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str) -> list[str]:
    """
    Cuts a text where its tokens end.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Any, such as one that gives no offsets.
        tokens (`Sequence[int]`):
            The text's, without those that the tokenizer puts around it.
        text (`str`):
            The text.

    Returns:
        `list[str]`: one for each token; end to end they are the text, whatever the tokenizer has changed or left out of
        it. Of the tokens that share one character the first has it, and the others have nothing.
    """
    written = decode(tokenizer, tokens)
    starts = (decode(tokenizer, tokens[:number]) for number in range(1, len(tokens) + 1))
    ends = [0, *accumulate((_reach(start, written) for start in starts), max)]
    for index in range(len(tokens) - 1, 0, -1):
        if ends[index] == ends[index - 1]:
            # A token that adds nothing is the beginning of a character, unless the next one says the same without it.
            added, alone = written[ends[index] : ends[index + 1]], decode(tokenizer, tokens[index : index + 1])
            if not alone or alone.strip() != added.strip():
                ends[index] = ends[index + 1]
    places = _places(written, text)
    cuts = [0, *(places[end] for end in ends[1:-1]), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _places(written: str, text: str) -> list[int]:
    """For each place in what a tokenizer has written, its end too, the place in the text that this was made of."""
    places, end = [], 0
    for place, of_text, length in _matches(written, text):
        changed, original = written[len(places) : place], text[end:of_text]
        first = of_text
        if changed == original:
            places += range(end, of_text)
        elif changed:  # all of it falls to the token that it begins in
            places += [end, *[of_text] * (len(changed) - 1)]
        else:  # what was left out falls to the token after it
            first = end
        places += [first, *range(of_text + 1, of_text + length)] if length else [len(text)]
        end = of_text + length
    return places


def _matches(written: str, text: str) -> Iterator[tuple[int, int, int]]:
    """Where both are alike, in order: the places in either, and the length; at last their ends."""
    # By words first, which takes a fraction of the time; tokenizers lose or change little but what is between them.
    one, other = (list(re.finditer(r"\S+", each)) for each in (written, text))
    matcher = SequenceMatcher(None, [word[0].lower() for word in one], [word[0].lower() for word in other], False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        if kind == "equal":
            for word, same in zip(one[start:stop], other[other_start:other_stop], strict=True):
                yield word.start(), same.start(), min(len(word[0]), len(same[0]))
        elif kind == "replace":
            place, of_text = one[start].start(), other[other_start].start()
            parts = written[place : one[stop - 1].end()], text[of_text : other[other_stop - 1].end()]
            for match in SequenceMatcher(None, *parts, autojunk=False).get_matching_blocks()[:-1]:
                yield place + match.a, of_text + match.b, match.size
    yield len(written), len(text), 0
