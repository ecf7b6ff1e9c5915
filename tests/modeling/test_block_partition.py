from dataclasses import dataclass

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from localist_hf.modeling.block_partition import (
    continue_semantic_blocks,
    delimiter_block_starts,
    document_starts,
    place_block_starts,
    semantic_block_starts,
    window_block_starts,
)


PARTITIONS = ("semantic", "delimiter", "window")
VOCABULARY = 6  # few tokens, so that texts repeat themselves
DELIMITERS = [0, 3]


@dataclass
class Partition:
    """One of the three partitions with its settings, applied to rows of token ids."""

    name: str
    window: int
    threshold: float
    min_length: int
    max_length: int
    window_length: int
    codebook_seed: int

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """Value vectors `(batch, 2 heads, length, 4)` that depend on each token and the one before it."""
        codebook = torch.randn(VOCABULARY, VOCABULARY, 2, 4, generator=torch.manual_seed(self.codebook_seed))
        before = torch.cat((ids[:, :1], ids[:, :-1]), dim=1)
        return codebook[ids, before].transpose(1, 2)

    def starts(self, ids: torch.Tensor, documents: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        if self.name == "window":
            return window_block_starts(documents, self.window_length)
        if self.name == "delimiter":
            return delimiter_block_starts(ids, documents, DELIMITERS, self.min_length, self.max_length)
        values = self.values(ids) if values is None else values
        return semantic_block_starts(values, documents, self.window, self.threshold, self.min_length, self.max_length)

    def alone(self, ids: torch.Tensor) -> torch.Tensor:
        """The starts of one text `(length,)` without padding or neighbours."""
        return self.starts(ids[None], torch.zeros(1, len(ids), dtype=torch.long))[0]

    @property
    def lengths(self) -> tuple[int, int]:
        return (self.window_length,) * 2 if self.name == "window" else (self.min_length, self.max_length)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    min_length = draw(st.integers(1, 6))
    return Partition(
        name=draw(st.sampled_from(PARTITIONS)),
        window=draw(st.integers(1, 8)),
        threshold=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        min_length=min_length,
        max_length=min_length + draw(st.integers(0, 12)),
        window_length=draw(st.integers(1, 9)),
        codebook_seed=draw(st.integers(0, 99)),
    )


def texts(max_size: int = 60) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=max_size).map(torch.tensor)


@st.composite
def document_layouts(draw: st.DrawFn, length: int) -> torch.Tensor:
    """Documents `(length,)` of one row: padded left, padded right, padded on both ends, or packed."""
    if draw(st.booleans()):
        boundaries = draw(st.sets(st.integers(0, length - 1), max_size=4)) | {0}
        return torch.tensor([max(b for b in boundaries if b <= i) for i in range(length)])
    left = draw(st.integers(0, length - 1))
    right = draw(st.integers(0, length - 1 - left))
    return torch.tensor([left if left <= i < length - right else -1 for i in range(length)])


@given(partitions(), texts(), st.data())
def test_the_starts_of_a_prefix_are_the_first_starts_of_any_continuation(partition, text, data):
    continuation = data.draw(texts(30))
    full = partition.alone(torch.cat((text, continuation)))
    assert torch.equal(full[: len(text)], partition.alone(text))


@given(partitions(), texts())
def test_every_position_belongs_to_the_block_that_its_start_begins(partition, text):
    starts = partition.alone(text)
    assert starts.dtype == torch.long
    assert (starts >= 0).all() and (starts <= torch.arange(len(text))).all()
    assert torch.equal(starts[starts], starts)
    assert (starts.diff() >= 0).all()


@given(partitions(), texts())
def test_only_the_last_block_is_shorter_than_the_minimum_and_none_longer_than_the_maximum(partition, text):
    shortest, longest = partition.lengths
    _, lengths = partition.alone(text).unique(return_counts=True)
    assert lengths.max() <= longest
    assert (lengths[:-1] >= shortest).all()


@given(partitions(), texts(), texts(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_padding_gives_each_row_the_blocks_that_it_has_alone(partition, text, other, left, right, both):
    longest = max(left + len(text), len(other) + right, 2 * both + len(text))
    # What stands in the padding must not matter: each kind of row has different tokens there.
    ids = torch.randint(0, VOCABULARY, (3, longest), generator=torch.manual_seed(left))
    mask = torch.zeros(3, longest, dtype=torch.long)
    rows = [(longest - len(text), text), (0, other), (both, text)]
    for row, (first, tokens) in enumerate(rows):
        ids[row, first : first + len(tokens)] = tokens
        mask[row, first : first + len(tokens)] = 1
    values = partition.values(ids)
    for row, (first, tokens) in enumerate(rows):
        values[row, :, first : first + len(tokens)] = partition.values(tokens[None])[0]
        values[row, :, :first] *= 1e3
    starts = partition.starts(ids, document_starts(3, longest, mask), values)
    for row, (first, tokens) in enumerate(rows):
        assert torch.equal(starts[row, first : first + len(tokens)] - first, partition.alone(tokens))
        assert (starts[row][mask[row] == 0] == -1).all()


@given(partitions(), st.lists(texts(25), min_size=1, max_size=4))
def test_packed_documents_have_the_blocks_that_they_have_alone(partition, documents):
    ids = torch.cat(documents)[None]
    values = torch.cat([partition.values(text[None]) for text in documents], dim=2)
    position_ids = torch.cat([torch.arange(len(text)) for text in documents])[None]
    starts = partition.starts(ids, document_starts(1, ids.shape[1], position_ids=position_ids), values)[0]
    offset = 0
    for text in documents:
        # Its first token starts a block, and its blocks are its own.
        assert starts[offset] == offset
        assert torch.equal(starts[offset : offset + len(text)] - offset, partition.alone(text))
        offset += len(text)


@given(st.data())
def test_placing_starts_equals_going_along_the_text(data):
    length = data.draw(st.integers(1, 70))
    documents = torch.stack([data.draw(document_layouts(length)) for _ in range(2)])
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    seed = data.draw(st.integers(0, 999))
    candidates = torch.rand(2, length, generator=torch.manual_seed(seed)) < density
    shortest = data.draw(st.integers(1, 9))
    longest = shortest + data.draw(st.integers(0, 20))
    expected = reference.place_block_starts(candidates, documents, shortest, longest)
    assert torch.equal(place_block_starts(candidates, documents, shortest, longest), expected)


@pytest.mark.parametrize("shortest", [1, 8])
def test_placing_starts_reaches_the_end_of_a_long_text(shortest: int):
    # The longest chain that pointer doubling must follow: every position a candidate.
    candidates = torch.ones(1, 1000, dtype=torch.bool)
    starts = place_block_starts(candidates, torch.zeros(1, 1000, dtype=torch.long), shortest, 64)
    position = torch.arange(1000)
    assert torch.equal(starts[0], position - position % shortest)


@given(st.data())
def test_semantic_starts_equal_the_formula_position_by_position(data):
    length = data.draw(st.integers(1, 50))
    documents = torch.stack([data.draw(document_layouts(length)) for _ in range(2)])
    generator = torch.manual_seed(data.draw(st.integers(0, 9999)))
    values = torch.randn(2, 2, length, 4, generator=generator) + data.draw(st.sampled_from([0.0, 0.7]))
    shortest = data.draw(st.integers(1, 5))
    settings = {
        "window": data.draw(st.integers(1, 12)),
        "threshold": data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        "min_block_length": shortest,
        "max_block_length": shortest + data.draw(st.integers(0, 20)),
    }
    expected, margin = reference.semantic_block_starts(values, documents, **settings)
    assume(margin > 3e-4)  # the package leaves ties within 1e-4 to the block before
    assert torch.equal(semantic_block_starts(values, documents, **settings), expected)


def test_semantic_starts_equal_the_formula_on_a_long_text():
    # Prefix sums grow with the length: what they lose must not tip a decision.
    generator = torch.manual_seed(2)
    values = torch.randn(1, 4, 1500, 16, generator=generator) + 0.3 * torch.randn(1, 4, 1, 16, generator=generator)
    documents = torch.zeros(1, 1500, dtype=torch.long)
    expected, margin = reference.semantic_block_starts(values, documents, 16, 1.0, 8, 64)
    assert margin > 3e-4
    assert torch.equal(semantic_block_starts(values, documents, 16, 1.0, 8, 64), expected)


def test_a_document_has_its_blocks_however_long_the_one_before_it_is():
    generator = torch.manual_seed(0)
    text = torch.randn(1, 2, 2000, 4, generator=generator)
    before = torch.randn(1, 2, 1, 4, generator=generator).expand(-1, -1, 200_000, -1)  # large prefix sums
    documents = torch.cat((torch.zeros(1, 200_000, dtype=torch.long), torch.full((1, 2000), 200_000)), dim=1)
    settings = {"window": 8, "threshold": 1.0, "min_block_length": 3, "max_block_length": 30}
    alone = semantic_block_starts(text, torch.zeros(1, 2000, dtype=torch.long), **settings)
    packed = semantic_block_starts(torch.cat((before, text), dim=2), documents, **settings)
    assert torch.equal(packed[:, 200_000:] - 200_000, alone)


def test_a_turn_of_the_values_starts_a_block_exactly_there():
    directions = torch.randn(2, 3, 8, generator=torch.manual_seed(0))
    values = torch.cat((directions[:1].expand(30, -1, -1), directions[1:].expand(30, -1, -1))).transpose(0, 1)[None]
    starts = semantic_block_starts(values, torch.zeros(1, 60, dtype=torch.long), 8, 1.0, 8, 64)
    assert starts[0].unique().tolist() == [0, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 7, 64])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_text_that_repeats_one_token_makes_no_spurious_starts(dtype, head_dim: int, threshold: float):
    value = torch.randn(1, 3, 1, head_dim, generator=torch.manual_seed(head_dim)).to(dtype)
    documents = torch.zeros(1, 400, dtype=torch.long)
    starts = semantic_block_starts(value.expand(-1, -1, 400, -1), documents, 16, threshold, 8, 64)
    assert torch.equal(starts[0], torch.arange(400) // 64 * 64)


def test_semantic_starts_ignore_the_length_of_the_vectors():
    values = torch.randn(1, 2, 80, 8, generator=torch.manual_seed(0))
    documents = torch.zeros(1, 80, dtype=torch.long)
    scales = 2.0 ** torch.randint(-3, 4, (1, 1, 80, 1), generator=torch.manual_seed(1))
    starts = semantic_block_starts(values, documents, 6, 0.5, 2, 20)
    assert torch.equal(starts, semantic_block_starts(values * scales, documents, 6, 0.5, 2, 20))
    assert len(starts.unique()) > 5


def test_semantic_starts_survive_vectors_of_zeros():
    values = torch.randn(1, 2, 40, 8, generator=torch.manual_seed(0))
    values[:, :, 5:20] = 0
    starts = semantic_block_starts(values, torch.zeros(1, 40, dtype=torch.long), 4, 1.0, 3, 9)
    assert torch.equal(starts[0][starts[0]], starts[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_semantic_starts_take_any_floating_dtype(dtype: torch.dtype):
    values = torch.randn(1, 2, 60, 8, generator=torch.manual_seed(0)).to(dtype).requires_grad_()
    documents = torch.zeros(1, 60, dtype=torch.long)
    starts = semantic_block_starts(values, documents, 6, 1.0, 3, 12)
    assert torch.equal(starts, semantic_block_starts(values.float(), documents, 6, 1.0, 3, 12))


def test_a_delimiter_ends_its_block_once_that_is_long_enough():
    ids = torch.tensor([[5, 9, 5, 5, 9, 9, 5, 8, 5, 5, 5, 5, 9]])
    documents = torch.zeros_like(ids)
    starts = delimiter_block_starts(ids, documents, [9, 8], min_block_length=2, max_block_length=4)
    #  after the 9 at 1, the 9 at 4 (that at 5 comes too soon), the 8 at 7, and when full at 12
    assert starts[0].tolist() == [0, 0, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 12]


def test_documents_begin_at_the_first_token_of_a_padded_row():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    expected = [[-1, -1, 2, 2, 2], [0, 0, 0, -1, -1], [-1, 1, 1, 1, -1], [0] * 5, [-1] * 5]
    for dtype in (torch.long, torch.bool, torch.float32):
        assert document_starts(5, 5, mask.to(dtype)).tolist() == expected


def test_documents_begin_where_the_position_ids_start_anew():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 1, 2, 3]])
    expected = [[0, 0, 0, 3, 3, 5, 6], [0] * 7, [0, 0, 0, 3, 3, 3, 3]]
    assert document_starts(3, 7, position_ids=position_ids).tolist() == expected
    assert document_starts(2, 7, position_ids=position_ids[:1]).tolist() == [expected[0]] * 2


def test_position_ids_mark_no_documents_where_there_is_an_attention_mask():
    mask = torch.tensor([[0, 1, 1, 1]])
    position_ids = torch.tensor([[0, 0, 1, 0]])
    assert document_starts(1, 4, mask, position_ids).tolist() == [[-1, 1, 1, 1]]


def test_without_padding_and_positions_a_row_is_one_document():
    assert document_starts(2, 3).tolist() == [[0, 0, 0]] * 2


@given(st.integers(0, 2**31), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 12))
def test_a_search_that_goes_on_finds_what_one_over_everything_finds(seed: int, pieces: list[int], padding: int):
    """With old values dropped, as a bounded cache does; the second row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    length = sum(pieces) + padding + 1
    pieces = [padding + 1, *pieces]
    values = torch.randn(2, 2, length, 4, generator=generator)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :padding] = 0
    documents = document_starts(2, length, mask)
    settings = (5, 0.5, 3, 9)
    expected = semantic_block_starts(values, documents, *settings)
    state, seen, found = None, 0, []
    for piece in pieces:
        kept = slice(max(0, seen - 5), seen + piece)
        starts, state = continue_semantic_blocks(values[:, :, kept], documents[:, kept], *settings, piece, seen, state)
        found.append(starts)
        seen += piece
    assert torch.equal(torch.cat(found, dim=1), expected)
