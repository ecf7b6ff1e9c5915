from dataclasses import dataclass

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from localist_hf.modeling import block_partition
from localist_hf.modeling.block_partition import (
    Blocks,
    BlockState,
    delimiter_blocks,
    document_starts,
    place_block_starts,
    semantic_blocks,
    value_lengths,
    window_block_starts,
    with_previous_blocks,
)
from localist_hf.modeling.block_step import semantic_step


PARTITIONS = ("semantic", "delimiter", "window")
VOCABULARY = 6  # few tokens, so that texts repeat themselves
DELIMITERS = [0, 3]


@dataclass
class Partition:
    """One of the three partitions with its settings, applied to rows of token ids."""

    name: str
    threshold: float
    min_length: int
    max_length: int
    window_length: int
    num_previous: int
    codebook_seed: int

    def lengths_of_values(self, ids: torch.Tensor) -> torch.Tensor:
        """A nu `(batch, length)` for each token, which depends on the one before it too."""
        codebook = torch.randn(VOCABULARY, VOCABULARY, generator=torch.manual_seed(self.codebook_seed))
        before = torch.cat((ids[:, :1], ids[:, :-1]), dim=1)
        return codebook[ids, before]

    def search(
        self,
        ids: torch.Tensor,
        documents: torch.Tensor,
        lengths: torch.Tensor | None = None,
        state: BlockState | None = None,
        seen: int = 0,
    ) -> tuple[Blocks, BlockState]:
        """The blocks of these tokens, and where the search stands after them; not for windows, which need none."""
        state = BlockState.at_first(documents, self.num_previous) if state is None else state
        limits = (self.min_length, self.max_length)
        if self.name == "delimiter":
            return delimiter_blocks(ids, documents, DELIMITERS, *limits, state, seen)
        lengths = self.lengths_of_values(ids) if lengths is None else lengths
        settings = (documents, self.threshold, *limits, state, seen)
        found = semantic_blocks(lengths, *settings)
        if ids.shape[1] == 1:  # a step of a generation, which knows how it stands in numbers
            norms = lengths.double().exp()
            # Two layers, of this mean.
            blocks, state_after = semantic_step([norms.sqrt(), norms.sqrt() * norms], *settings)
            torch.testing.assert_close((blocks, state_after.in_tensors(ids.device)), found)
        return found

    def blocks(self, ids: torch.Tensor, documents: torch.Tensor, lengths: torch.Tensor | None = None) -> Blocks:
        if self.name == "window":
            return with_previous_blocks(
                window_block_starts(documents, self.window_length), documents, self.num_previous
            )
        return self.search(ids, documents, lengths)[0]

    def alone(self, ids: torch.Tensor) -> Blocks:
        """The blocks of one text `(length,)` without padding or neighbours."""
        blocks = self.blocks(ids[None], torch.zeros(1, len(ids), dtype=torch.long))
        return Blocks(*(starts[0] for starts in blocks))

    @property
    def limits(self) -> tuple[int, int]:
        return (self.window_length,) * 2 if self.name == "window" else (self.min_length, self.max_length)


@st.composite
def partitions(draw: st.DrawFn, names: tuple[str, ...] = PARTITIONS) -> Partition:
    min_length = draw(st.integers(1, 6))
    return Partition(
        name=draw(st.sampled_from(names)),
        threshold=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        min_length=min_length,
        max_length=min_length + draw(st.integers(0, 12)),
        window_length=draw(st.integers(1, 9)),
        num_previous=draw(st.integers(0, 3)),
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
def test_the_blocks_of_a_prefix_are_the_first_blocks_of_any_continuation(partition, text, data):
    continuation = data.draw(texts(30))
    full = partition.alone(torch.cat((text, continuation)))
    for whole, prefix in zip(full, partition.alone(text), strict=True):
        assert torch.equal(whole[: len(text)], prefix)


@given(partitions(), texts())
def test_every_position_belongs_to_the_block_that_its_start_begins(partition, text):
    starts = partition.alone(text).starts
    assert starts.dtype == torch.long
    assert (starts >= 0).all() and (starts <= torch.arange(len(text))).all()
    assert torch.equal(starts[starts], starts)
    assert (starts.diff() >= 0).all()


@given(partitions(), texts())
def test_only_the_last_block_is_shorter_than_the_minimum_and_none_longer_than_the_maximum(partition, text):
    shortest, longest = partition.limits
    _, lengths = partition.alone(text).starts.unique(return_counts=True)
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
    lengths = partition.lengths_of_values(ids)
    for row, (first, tokens) in enumerate(rows):
        lengths[row, first : first + len(tokens)] = partition.lengths_of_values(tokens[None])[0]
        lengths[row, :first] *= 1e3
    blocks = partition.blocks(ids, document_starts(3, longest, mask), lengths)
    for row, (first, tokens) in enumerate(rows):
        for padded, alone in zip(blocks, partition.alone(tokens), strict=True):
            assert torch.equal(padded[row, first : first + len(tokens)] - first, alone)
            assert (padded[row][mask[row] == 0] == -1).all()


@given(partitions(), st.lists(texts(25), min_size=1, max_size=4))
def test_packed_documents_have_the_blocks_that_they_have_alone(partition, documents):
    ids = torch.cat(documents)[None]
    lengths = torch.cat([partition.lengths_of_values(text[None]) for text in documents], dim=1)
    position_ids = torch.cat([torch.arange(len(text)) for text in documents])[None]
    blocks = partition.blocks(ids, document_starts(1, ids.shape[1], position_ids=position_ids), lengths)
    offset = 0
    for text in documents:
        # Its first token starts a block, and its blocks are its own.
        assert blocks.starts[0, offset] == offset
        for packed, alone in zip(blocks, partition.alone(text), strict=True):
            assert torch.equal(packed[0, offset : offset + len(text)] - offset, alone)
        offset += len(text)


@given(partitions(), st.data())
def test_previous_blocks_go_back_one_by_one_and_never_before_the_document(partition, data):
    length = data.draw(st.integers(1, 50))
    documents = torch.stack([data.draw(document_layouts(length)) for _ in range(2)])
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.manual_seed(length))
    starts, local_starts = partition.blocks(ids, documents)
    assert torch.equal(local_starts, reference.local_starts(starts, documents, partition.num_previous))
    assert (local_starts >= documents).all()


@given(partitions(("semantic", "delimiter")), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_a_search_that_goes_on_finds_what_one_over_everything_finds(partition, pieces, data):
    """Chunk by chunk, whatever the chunks; rows may begin with a chunk of nothing but padding."""
    length = sum(pieces)
    padding = data.draw(st.integers(0, length - 1))
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, :padding] = 0
    ids = torch.randint(0, VOCABULARY, (3, length), generator=torch.manual_seed(padding))
    lengths, documents = partition.lengths_of_values(ids), document_starts(3, length, mask)
    expected, last = partition.search(ids, documents, lengths)
    state, seen, found = None, 0, []
    for piece in pieces:
        chunk = slice(seen, seen + piece)
        # As in chunked prefill, what is known of the padding is that of the chunks so far.
        so_far = document_starts(3, chunk.stop, mask[:, : chunk.stop])[:, chunk]
        blocks, state = partition.search(ids[:, chunk], so_far, lengths[:, chunk], state, seen)
        found.append(blocks)
        seen += piece
    for whole, parts in zip(expected, zip(*found, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim=1), whole)
    for one, other in zip(state, last, strict=True):
        torch.testing.assert_close(one, other)


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


def find(lengths: torch.Tensor, documents: torch.Tensor | None = None, *settings: float) -> torch.Tensor:
    """The starts of semantic blocks."""
    documents = torch.zeros(lengths.shape, dtype=torch.long) if documents is None else documents
    return semantic_blocks(lengths, documents, *settings, BlockState.at_first(documents, 0))[0].starts


@given(st.data())
def test_semantic_starts_equal_the_formula_position_by_position(data):
    length = data.draw(st.integers(1, 50))
    documents = torch.stack([data.draw(document_layouts(length)) for _ in range(2)])
    lengths = torch.randn(2, length, generator=torch.manual_seed(data.draw(st.integers(0, 9999))))
    shortest = data.draw(st.integers(1, 5))
    settings = (data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])), shortest, shortest + data.draw(st.integers(0, 20)))
    expected, margin = reference.semantic_block_starts(lengths, documents, *settings)
    assume(margin > 3e-4)  # the package leaves ties within 1e-4 to the block before
    assert torch.equal(find(lengths, documents, *settings), expected)


def test_semantic_starts_equal_the_formula_on_a_long_text():
    # Prefix sums grow with the length: what they lose must not tip a decision.
    lengths = 3 + torch.randn(1, 1500, generator=torch.manual_seed(2))
    expected, margin = reference.semantic_block_starts(lengths, torch.zeros(1, 1500, dtype=torch.long), 1.25, 8, 64)
    assert margin > 3e-4
    assert torch.equal(find(lengths, None, 1.25, 8, 64), expected)


def test_a_document_has_its_blocks_however_long_the_one_before_it_is():
    generator = torch.manual_seed(0)
    text = torch.randn(1, 2000, generator=generator)
    before = torch.full((1, 200_000), 30.0)  # large prefix sums
    documents = torch.cat((torch.zeros(1, 200_000, dtype=torch.long), torch.full((1, 2000), 200_000)), dim=1)
    packed = find(torch.cat((before, text), dim=1), documents, 1.0, 3, 30)
    assert torch.equal(packed[:, 200_000:] - 200_000, find(text, None, 1.0, 3, 30))


def test_a_block_starts_right_after_a_token_with_short_values():
    values = torch.nn.functional.normalize(torch.randn(1, 3, 60, 8, generator=torch.manual_seed(0)), dim=-1)
    values[:, :, [20, 41, 44]] *= 0.3  # the last one too soon after the one before
    assert find(value_lengths(values), None, 1.25, 8, 64)[0].unique().tolist() == [0, 21, 42]


def test_a_first_token_neither_separates_nor_counts():
    # It is a sink of its own kind: far shorter than all others, it would hide them.
    lengths = torch.zeros(1, 40)
    lengths[0, 20] = -1
    lengths[0, 0] = -50
    assert find(lengths, None, 1.25, 4, 64)[0].unique().tolist() == [0, 21]


def test_value_lengths_equal_the_formula_in_any_floating_dtype():
    values = torch.randn(2, 3, 11, 8, generator=torch.manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rounded = values.to(dtype).requires_grad_()
        lengths = value_lengths(rounded)
        assert lengths.dtype == torch.promote_types(dtype, torch.float32)
        assert not lengths.requires_grad
        torch.testing.assert_close(lengths.double(), reference.value_lengths(rounded.detach()), atol=1e-5, rtol=0)
    assert value_lengths(values * 0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 7, 64])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_text_that_repeats_one_token_makes_no_spurious_starts(dtype, head_dim: int, threshold: float):
    value = torch.randn(1, 3, 1, head_dim, generator=torch.manual_seed(head_dim)).to(dtype)
    noise = 1 + 1e-6 * torch.randn(1, 1, 400, 1, generator=torch.manual_seed(0))  # as of another order of summation
    starts = find(value_lengths((value.float() * noise).to(dtype)), None, threshold, 8, 64)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(starts[0], torch.arange(400) // 64 * 64)
    starts = find(value_lengths(value.expand(-1, -1, 400, -1)), None, threshold, 8, 64)
    assert torch.equal(starts[0], torch.arange(400) // 64 * 64)


def test_devices_without_float64_keep_the_sums_on_the_cpu(monkeypatch):
    """MPS: a stand-in that shows where the sums would be made."""
    assert block_partition.device_of_sums(torch.device("mps")) == torch.device("cpu")
    assert block_partition.device_of_sums(torch.device("cuda", 1)) == torch.device("cuda", 1)
    asked = []
    monkeypatch.setattr(block_partition, "device_of_sums", lambda device: asked.append(device) or torch.device("cpu"))
    lengths = torch.randn(2, 50)
    starts = find(lengths, None, 1.0, 3, 9)
    assert len(asked) == 1  # with the state
    monkeypatch.undo()
    assert torch.equal(find(lengths, None, 1.0, 3, 9), starts)


def test_a_delimiter_ends_its_block_once_that_is_long_enough():
    ids = torch.tensor([[5, 9, 5, 5, 9, 9, 5, 8, 5, 5, 5, 5, 9]])
    documents = torch.zeros_like(ids)
    state = BlockState.at_first(documents, 0)
    blocks, _ = delimiter_blocks(ids, documents, [9, 8], 2, 4, state)
    #  after the 9 at 1, the 9 at 4 (that at 5 comes too soon), the 8 at 7, and when full at 12
    assert blocks.starts[0].tolist() == [0, 0, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 12]


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
