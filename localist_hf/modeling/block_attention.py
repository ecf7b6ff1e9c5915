# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
What the keys near a query contribute to its attention: its own token, its block, the sinks. Only a band of keys as wide
as the longest local set is touched: O(length * max_length) time.
"""

import math

import torch
from torch.nn import functional as F

from .fused_attention import attention_with_lse, matmul_rounds_float32
from .local_set import LOCAL_SET_SCHEMA, NOWHERE, LocalSet
from .opaque_ops import opaque_without_gradient


# Queries of a tile. Small tiles waste fewer scores outside the local sets, large ones multiply faster.
_TILE = 16
# Scores held at a time: on CPU few enough to stay in the cache, elsewhere enough to fill the device.
_MAX_SCORES = {"cpu": 2**18}
_MAX_SCORES_ELSEWHERE = 2**27


def local_shares(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, local_set: LocalSet, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The shares of each query's attention on its own token, on sinks, and on the rest of its local set: sums of
    `a_ij = exp(s_ij - LSE_i)`. Their sum is the fidelity.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of shape
            `(batch_size, num_heads, key_length, head_dim)`):
            Any floating dtype; the queries are those of the last `query_length` keys.
        lse (`torch.Tensor` of shape `(batch_size, num_heads, query_length)`):
            Log-sum-exp of each query's scores over the keys that the shares are of: all that it sees, or its local set.
        local_set ([`LocalSet`]):
            What is local to each query; its `sink_keys` have as many heads as the keys.
        scale (`float`):
            Factor of the scores.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`: self, sink and block, each `(batch_size, num_heads,
        query_length)`, float32, differentiable in query, key and lse; 0 on padding.
    """
    return _local_shares(query, key, lse, scale, *local_set)


def local_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, local_set: LocalSet, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention over each query's local set only (see `local_shares` for the arguments; `value` has the key's
    shape).

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: the attention output, of the query's shape and dtype, and the log-sum-exp
        of the local scores, float32, of shape `(batch_size, num_heads, query_length)`; zeros on padding.
    """
    return _local_attention(query, key, value, scale, *local_set)


def _fake_lse(query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@opaque_without_gradient(
    f"(Tensor query, Tensor key, Tensor lse, float scale, {LOCAL_SET_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    lambda query, *_: tuple(_fake_lse(query) for _ in range(3)),
)
def _local_shares(query, key, lse, scale, *fields) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    local_set = LocalSet(*fields)
    local_set = local_set.counted_from(local_set.num_tokens - key.shape[2])
    is_padding = local_set.starts[:, None] < 0
    with torch.autocast(query.device.type, enabled=False):
        # Padding may see nothing, and the log of nothing is no number to go on with.
        lse = torch.where(is_padding, 0.0, lse).contiguous()
        own_scores = (_wide(query) * _wide(key[:, :, -query.shape[2] :])).sum(-1) * scale - lse
        own = own_scores.masked_fill(is_padding, float("-inf")).exp()
        sink = torch.zeros_like(own)
        if local_set.num_sinks:
            is_outside, keys = local_set.sinks_of(key)
            keys = keys if local_set.sink_keys is None else local_set.sink_keys
            sink = (_sink_scores(query, is_outside, keys, scale) - lse[..., None]).exp().sum(-1)
        if matmul_rounds_float32(query.device.type):
            # The same kernel for both log-sum-exps: products of the band would be rounded as the kernel's are not.
            _, local_lse = local_attention(query, key, key, local_set._replace(sink_values=local_set.sink_keys), scale)
            fidelity = (local_lse - lse).masked_fill(is_padding, float("-inf")).exp()
            return own, sink, (fidelity - own - sink).clamp(min=0)
        return own, sink, _BandShare.apply(query, key, lse, local_set.starts, local_set.max_length, scale)


@opaque_without_gradient(
    f"(Tensor query, Tensor key, Tensor value, float scale, {LOCAL_SET_SCHEMA}) -> (Tensor, Tensor)",
    lambda query, *_: (query.new_empty(query.shape), _fake_lse(query)),
)
def _local_attention(query, key, value, scale, *fields) -> tuple[torch.Tensor, torch.Tensor]:
    local_set = LocalSet(*fields)
    local_set = local_set.counted_from(local_set.num_tokens - key.shape[2])
    tiling = _Tiling(local_set.starts, query.shape[2], key.shape[2], local_set.max_length)
    outputs, lses = [], []
    # Row by row, so that the stretches of keys stay views; the tiles take the place of the batch.
    for row in range(len(query)):
        output, lse = attention_with_lse(
            tiling.tile(query[row : row + 1])[0].transpose(0, 1),
            tiling.stretches(key[row]),
            tiling.stretches(value[row]),
            tiling.is_local[row, :, None],
            False,
            scale,
        )
        outputs.append(tiling.untile(output.transpose(0, 1)[None]))
        lses.append(tiling.untile(lse.transpose(0, 1)[None]))
    # One row is often all there is, and then a view that needs no copy.
    output, lse = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in (outputs, lses))
    if local_set.num_sinks:
        is_outside, keys, values = local_set.sinks_of(key, value)
        if local_set.sink_keys is not None:
            keys, values = local_set.sink_keys, local_set.sink_values
        with torch.autocast(query.device.type, enabled=False):  # whose products would be in half precision
            scores = _sink_scores(query, is_outside, keys, scale)
            total = torch.cat((lse[..., None], scores), dim=-1).logsumexp(-1)
            weights = (scores - total[..., None]).exp()
            of_sinks = weights @ _wide(values) if values.ndim == 4 else (weights[..., None] * values).sum(-2)
            output, lse = output * (lse - total).exp()[..., None] + of_sinks, total
    return output.to(query.dtype), lse


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sink_scores(query: torch.Tensor, is_outside: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """`(batch_size, num_heads, query_length, num_sinks)`, -inf where a sink is none for a query."""
    query, keys = _wide(query), _wide(keys)
    scores = query @ keys.transpose(-1, -2) if keys.ndim == 4 else (query[..., None, :] * keys).sum(-1)
    return (scores * scale).masked_fill(is_outside, float("-inf"))


class _Tiling:
    """
    Queries in tiles of `_TILE`, each with the keys that the local stretches of its queries can reach: its own and those
    of the tiles before it. Dummy queries fill the first and the last tile.
    """

    def __init__(
        self,
        local_starts: torch.Tensor,
        query_length: int,
        key_length: int,
        max_length: int,
        with_own: bool = True,
    ) -> None:
        # Tiles before its own that a query's local stretch can reach.
        self.reach = -(-(min(max_length, key_length) - 1) // _TILE)
        self.width = (self.reach + 1) * _TILE
        offset = key_length - query_length  # keys of a cache, before the first query
        self.first_key = max(0, offset // _TILE - self.reach) * _TILE
        self.padding = (offset - self.first_key, -(key_length - self.first_key) % _TILE)
        self.queries = slice(self.padding[0], self.padding[0] + query_length)

        position = torch.arange(self.first_key, key_length + self.padding[1], device=local_starts.device)
        # No key is local to a dummy query or to padding.
        starts = torch.where(local_starts < 0, NOWHERE, local_starts)
        starts = F.pad(starts, self.padding, value=NOWHERE).unflatten(1, (-1, _TILE))[..., None]
        rows = position.view(-1, _TILE, 1)
        columns = rows[:, :1] + torch.arange(self.width, device=position.device) - self.reach * _TILE
        #: Which keys are local to a query, with or without its own: `(batch_size, num_tiles, _TILE, width)`.
        self.is_local = (columns >= starts.clamp(min=self.first_key)) & (columns < rows + with_own)

    def bias(self) -> torch.Tensor:
        """0 on the keys that are local to a query and -inf elsewhere."""
        return torch.zeros(self.is_local.shape, device=self.is_local.device).masked_fill_(~self.is_local, float("-inf"))

    def tile(self, rows: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_heads, query_length, n)` to `(batch_size, num_heads, num_tiles, _TILE, n)`."""
        rows = F.pad(rows, (0, 0, *self.padding)) if any(self.padding) else rows  # by nothing would be a copy
        return rows.unflatten(2, (-1, _TILE))

    def stretches(self, rows: torch.Tensor) -> torch.Tensor:
        """The stretch of each tile, a view: `(num_heads, key_length, n)` to `(num_tiles, num_heads, width, n)`."""
        rows = F.pad(rows[:, self.first_key :], (0, 0, self.reach * _TILE, self.padding[1]))
        return rows.unfold(1, self.width, _TILE).permute(1, 0, 3, 2)

    def untile(self, tiles: torch.Tensor) -> torch.Tensor:
        """The inverse of `tile`, with or without the last dimension."""
        return tiles.flatten(2, 3)[:, :, self.queries]


class _BandShare(torch.autograd.Function):
    """
    The sum of `a_ij = exp(s_ij - LSE_i)` over the stretch of keys from each query's local start up to the key before
    its own. With g its gradient, that of `s_ij` is `a_ij * g_i` and that of `LSE_i` is `-g_i` times the sum. The band
    is gone over piece by piece, so that no more than a piece of it is ever held, and computed again in the backward
    pass.
    """

    @staticmethod
    def forward(ctx, query, key, lse, local_starts, max_length, scale):
        tiling = _Tiling(local_starts, query.shape[2], key.shape[2], max_length, with_own=False)
        bias, share = tiling.bias(), torch.empty_like(lse)
        for piece in _pieces(query, tiling):
            _, _, weights = _band_weights(query[piece], key[piece], lse[piece], tiling, bias[piece[0]], scale)
            sums = weights.sum(-1).view(*query[piece].shape[:2], -1)
            share[piece] = sums[..., tiling.queries]
        ctx.save_for_backward(query, key, lse, local_starts, share)
        ctx.max_length, ctx.scale = max_length, scale
        return share

    @staticmethod
    def backward(ctx, grad):
        query, key, lse, local_starts, share = ctx.saved_tensors
        tiling = _Tiling(local_starts, query.shape[2], key.shape[2], ctx.max_length, with_own=False)
        bias, grad_query, grad_key = tiling.bias(), torch.empty_like(query), torch.zeros_like(key)
        with torch.autocast(query.device.type, enabled=False):
            for piece in _pieces(query, tiling):
                heads = query[piece].shape[:2]
                queries, keys, weights = _band_weights(
                    query[piece], key[piece], lse[piece], tiling, bias[piece[0]], ctx.scale
                )
                grads = tiling.tile(grad[piece][..., None]).flatten(0, 2)
                grad_queries = torch.bmm(weights, keys).mul_(grads * ctx.scale)
                grad_query[piece] = tiling.untile(grad_queries.unflatten(0, (*heads, -1)))

                # Each tile's part of the keys' gradient is a stretch that overlaps those of the tiles after it.
                queries.mul_(grads * math.log(2))  # they are scaled by log2(e) too
                stretches = torch.bmm(weights.transpose(1, 2), queries).unflatten(1, (-1, _TILE))
                tiles = stretches.new_zeros(len(stretches) + tiling.reach, _TILE, key.shape[-1])
                for tile in range(tiling.reach + 1):
                    tiles[tile : tile + len(stretches)] += stretches[:, tile]
                rows = tiles[tiling.reach :].view(*heads, -1, key.shape[-1])
                grad_key[piece][:, :, tiling.first_key :] = rows[:, :, : key.shape[2] - tiling.first_key]
        return grad_query, grad_key, -share * grad, None, None, None


def _pieces(query: torch.Tensor, tiling: _Tiling) -> list[tuple[slice, slice]]:
    """Slices of batch rows and heads whose bands hold few enough scores."""
    batch_size, num_heads = query.shape[:2]
    # A compiled graph would unroll the loop; its kernels hold no more than they need anyway.
    if torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    scores_per_head = tiling.is_local[0].numel()
    heads = max(1, _MAX_SCORES.get(query.device.type, _MAX_SCORES_ELSEWHERE) // scores_per_head)
    if heads >= num_heads:
        rows = heads // num_heads
        return [(slice(row, row + rows), slice(None)) for row in range(0, batch_size, rows)]
    return [
        (slice(row, row + 1), slice(head, head + heads))
        for row in range(batch_size)
        for head in range(0, num_heads, heads)
    ]


def _band_weights(query, key, lse, tiling, bias, scale):
    """
    Queries times `scale * log2(e)`, `(n, _TILE, head_dim)`, keys `(n, width, head_dim)`, and `exp(s - LSE)`, 0 outside
    the stretches, `(n, _TILE, width)`, for the n tiles of all heads of a piece; float32 for half-precision inputs.

    The tiles of all heads stand in one line, so that a tile's keys are one contiguous stretch and the stretches of all
    tiles one overlapping view that the matrix product reads without a copy. What a stretch shows of the head before its
    own is not local.
    """
    head_dim = query.shape[-1]
    queries = tiling.tile(_wide(query) * (scale / math.log(2))).reshape(-1, _TILE, head_dim)
    keys = F.pad(_wide(key[:, :, tiling.first_key :]), (0, 0, 0, tiling.padding[1])).reshape(-1, head_dim)
    keys = F.pad(keys, (0, 0, tiling.reach * _TILE, 0))
    keys = keys.as_strided((len(queries), tiling.width, head_dim), (_TILE * head_dim, head_dim, 1))
    scores = bias[:, None] - tiling.tile(lse[..., None] / math.log(2))
    scores = scores.reshape(-1, _TILE, tiling.width)
    # No score exceeds its log-sum-exp, so the power cannot overflow. Powers of two, because torch's `exp` on CPU takes
    # ten times as long where the result is 0, as it is for most of the band.
    return queries, keys, scores.baddbmm_(queries, keys.transpose(1, 2)).exp2_()
