"""
The slow reference: every quantity of the method from the explicit length x length attention matrix, and the blocks one
position at a time, each written as its definition reads. Everything in the package is checked against it.

Shapes: `query` `(batch, heads, query_length, head_dim)`, `key` and `value` `(batch, heads, key_length, head_dim)`,
`block_starts` and `documents` `(batch, key_length)` with -1 on padding. The queries are those of the last keys.
"""

import math

import torch


def visible_keys(documents: torch.Tensor, query_length: int) -> torch.Tensor:
    """True where a query sees a key: `(batch, 1, query_length, key_length)`. As in transformers, padding is no key."""
    length = documents.shape[1]
    position = torch.arange(length)
    causal = position[:, None] >= position
    is_token = documents >= 0
    same_document = (documents[:, :, None] == documents[:, None, :]) | ~is_token[:, :, None]
    return (causal & is_token[:, None, :] & same_document)[:, None, -query_length:]


def local_starts(block_starts: torch.Tensor, documents: torch.Tensor, num_previous_blocks: int) -> torch.Tensor:
    """The start of the block that lies so many blocks before each position's own, or as far as its document goes."""
    rows = []
    for of_blocks, of_documents in zip(block_starts.tolist(), documents.tolist(), strict=True):
        rows.append([])
        for start, document in zip(of_blocks, of_documents, strict=True):
            for _ in range(num_previous_blocks):
                if start > document >= 0:
                    start = of_blocks[start - 1]
            rows[-1].append(start)
    return torch.tensor(rows)


def local_set(
    block_starts: torch.Tensor,
    documents: torch.Tensor,
    num_sink_tokens: int,
    query_length: int,
    num_previous_blocks: int = 0,
) -> torch.Tensor:
    """
    True where a key is local to a query: in `{b(i)..i}` or the blocks before it that count, or one of the first tokens
    of the query's document.
    """
    length = documents.shape[1]
    row, column = torch.arange(length)[:, None], torch.arange(length)
    start, document = local_starts(block_starts, documents, num_previous_blocks)[:, :, None], documents[:, :, None]
    in_block = (start <= column) & (column <= row)
    is_sink = (document <= column) & (column < document + num_sink_tokens) & (column <= row)
    return ((in_block | is_sink) & (document >= 0))[:, None, -query_length:]


def shares(
    weights: torch.Tensor,
    local: torch.Tensor,
    block_starts: torch.Tensor,
    documents: torch.Tensor,
    num_sink_tokens: int,
) -> dict[str, torch.Tensor]:
    """Where each query's attention goes: self, sinks outside its own block, the rest of its local set, outside."""
    query_length, length = weights.shape[-2:]
    row, column = torch.arange(length)[-query_length:, None], torch.arange(length)
    start, document = (tensor[:, None, -query_length:, None] for tensor in (block_starts, documents))
    is_token = document >= 0
    is_self = (row == column) & is_token
    is_sink = (document <= column) & (column < document + num_sink_tokens) & (column < start) & is_token
    of = {"self": is_self, "sink": is_sink, "block": local & ~is_self & ~is_sink, "outside": ~local & is_token}
    return {f"{name}_share": (weights * keys).sum(-1) for name, keys in of.items()}


def block_shares(
    weights: torch.Tensor, block_starts: torch.Tensor, documents: torch.Tensor, num_sink_tokens: int
) -> torch.Tensor:
    """
    The attention of each query to each block of its row, but for itself and the sinks outside its own block:
    `(batch, heads, query_length, num_blocks)`.
    """
    query_length, length = weights.shape[-2:]
    row, column = torch.arange(length)[-query_length:, None], torch.arange(length)
    start, document = (tensor[:, None, -query_length:, None] for tensor in (block_starts, documents))
    is_sink = (document <= column) & (column < document + num_sink_tokens) & (column < start)
    counts = weights * ((row != column) & ~is_sink & (document >= 0))
    firsts = [sorted({start for start in of_row if start >= 0}) for of_row in block_starts.tolist()]
    found = weights.new_zeros(*weights.shape[:-1], max(map(len, firsts)))
    for at, of_row in enumerate(firsts):
        for number, first in enumerate(of_row):
            found[at, ..., number] = (counts[at] * (block_starts[at] == first)).sum(-1)
    return found


def blocks_looked_at(of_blocks: torch.Tensor) -> torch.Tensor:
    """`N_i = exp(H(q_i))` of block shares; 1 where there are none."""
    total = of_blocks.sum(-1, keepdim=True)
    part = of_blocks / torch.where(total > 0, total, 1.0)
    logs = torch.where(part > 0, part, 1.0).log()
    return (-(part * logs).sum(-1)).exp()


def has_context(
    local: torch.Tensor, block_starts: torch.Tensor, documents: torch.Tensor, num_sink_tokens: int
) -> torch.Tensor:
    """True on tokens whose block share is of some key: `(batch, query_length)`."""
    ones = torch.ones(local.shape)
    return shares(ones, local, block_starts, documents, num_sink_tokens)["block_share"][:, 0] > 0


def counted(visible: torch.Tensor, local: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """True on tokens that see more than their local set: `(batch, query_length)`."""
    is_token = documents[:, -visible.shape[2] :] >= 0
    return (visible & ~local).any(-1)[:, 0] & is_token


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the explicit weights, and the log-sum-exp of the scores; a query that sees nothing gives zeros."""
    scores = scale * query @ key.transpose(-1, -2)
    scores = scores.masked_fill(~visible, -1e30)  # not -inf: the gradient of a query that sees nothing is 0, not nan
    weights = scores.softmax(-1) * visible
    return weights @ value, weights, scores.logsumexp(-1)


def fidelity(weights: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`phi_i`: the sum of `a_ij` over the local set."""
    return (weights * local).sum(-1)


def entropy_bits(weights: torch.Tensor) -> torch.Tensor:
    """`H_i = -sum_j a_ij log2 a_ij`, where 0 log 0 = 0."""
    logs = torch.where(weights > 0, weights, 1.0).log2()
    return -(weights * logs).sum(-1)


def place_block_starts(
    candidates: torch.Tensor, documents: torch.Tensor, min_block_length: int, max_block_length: int
) -> torch.Tensor:
    """Goes along the text: a block starts at a candidate once the last is long enough, or when it is full."""
    rows = []
    for is_candidate, of_documents in zip(candidates.tolist(), documents.tolist(), strict=True):
        rows.append([])
        start = -1
        for i, document in enumerate(of_documents):
            if document >= 0:
                length = i - start
                is_wanted = is_candidate[i] and length >= min_block_length
                if document == i or is_wanted or length >= max_block_length:
                    start = i
            rows[-1].append(start if document >= 0 else -1)
    return torch.tensor(rows)


def value_lengths(values: torch.Tensor) -> torch.Tensor:
    """`nu_i`: the mean over heads of `log |v_i|`, for values `(batch, heads, length, head_dim)`."""
    return values.double().norm(dim=-1).clamp(min=1e-6).log().mean(dim=1)


def semantic_block_starts(
    lengths: torch.Tensor, documents: torch.Tensor, threshold: float, min_block_length: int, max_block_length: int
) -> tuple[torch.Tensor, float]:
    """The blocks for these `nu`, `(batch, length)`, and how near a decision came to its threshold."""
    rows, margin = [], math.inf
    for nu, of_documents in zip(lengths.double().numpy(), documents.tolist(), strict=True):
        rows.append([])
        start, separates = -1, False
        for i, document in enumerate(of_documents):
            if i == document:
                start, separates = i, False
            elif document >= 0 and (i - start >= max_block_length or (separates and i - start >= min_block_length)):
                start = i
            rows[-1].append(start if document >= 0 else -1)
            if i > document >= 0:
                seen = nu[document + 1 : i + 1]
                gap = float(seen.mean() - threshold * seen.std() - seen[-1])
                if abs(gap) > 1e-9:  # what is equal, as the first of all always is, is not below
                    margin = min(margin, abs(gap))
                separates = gap > 1e-9
    return torch.tensor(rows), margin


def weights_of_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    learned_sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The explicit weights in float64 of queries and of keys that heads may share, and the share of a learned sink, a
    score for each head: `(batch, heads, query_length, key_length)` and without the last dimension.
    """
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * query.double() @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -1e30)
    sinks = torch.full_like(scores[..., :1], -1e30)
    if learned_sinks is not None:
        sinks = learned_sinks.double()[None, :, None, None].expand_as(sinks)
    weights = torch.cat((scores, sinks), dim=-1).softmax(-1)
    sees = visible.any(-1, keepdim=True)
    return weights[..., :-1] * visible, weights[..., -1] * sees[..., 0]
