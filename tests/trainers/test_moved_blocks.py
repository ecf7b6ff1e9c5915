"""Moved blocks are a partition of the same text, with the lengths of its own blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from localist_hf.trainers.moved_blocks import moved_blocks


@st.composite
def texts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """A row of texts with padding at its ends: the block starts, the texts' first tokens, and the lengths of blocks."""
    blocks = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
    starts, documents = [], []
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    position = before
    for text in blocks:
        documents += [position] * sum(text)
        for length in text:
            starts += [position] * length
            position += length
    row = [torch.tensor([[-1] * before + entries + [-1] * after]) for entries in (starts, documents)]
    return *row, blocks


@given(texts(), st.floats(0, 1, exclude_max=True))
def test_every_text_keeps_its_blocks_but_for_where_they_are(text, share: float) -> None:
    starts, documents, blocks = text
    moved = moved_blocks(starts, documents, share)[0].tolist()
    first = 0
    for lengths in blocks:
        first = next(index for index, value in enumerate(documents[0].tolist()) if value >= first)
        end = first + sum(lengths)
        found = [index for index in range(first, end) if moved[index] == index]
        for index in range(first, end):  # a partition
            assert moved[index] == max(start for start in found if start <= index)
        distance = max(1, int(torch.tensor(share * (end - first)).long()))
        own = {index for index in range(first, end) if starts[0, index] == index}
        assert set(found) == {first} | {first + (index - first + distance) % (end - first) for index in own}
        first = end
    assert all((value < 0) == (document < 0) for value, document in zip(moved, documents[0].tolist(), strict=True))


def test_rows_are_moved_by_shares_of_their_own_lengths() -> None:
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3], [0, 0, 2, 2, -1, -1, -1, -1]])
    documents = torch.tensor([[0] * 8, [0, 0, 0, 0, -1, -1, -1, -1]])
    moved = moved_blocks(starts, documents, 0.25)
    assert moved.tolist() == [[0, 0, 2, 2, 2, 5, 5, 5], [0, 1, 1, 3, -1, -1, -1, -1]]
