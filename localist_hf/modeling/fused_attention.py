# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Attention that also returns its log-sum-exp, differentiably, without ever holding a matrix of length x length.

`attention_with_lse` runs torch's own fused kernel over all keys; `local_lse` sums over each query's block only, a band
as wide as the longest block. Their difference is the fidelity: `phi = exp(LSE_local - LSE)`.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging


logger = logging.get_logger(__name__)

_aten = torch.ops.aten
_KERNELS = {
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
    "cuda": ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
}

# Queries of one tile of the band. Small tiles waste fewer scores outside the blocks, large ones multiply faster.
_TILE = 32
# Scores held at a time: on CPU few enough to stay in the cache, elsewhere enough to fill the device.
_MAX_SCORES = {"cpu": 2**19}
_MAX_SCORES_ELSEWHERE = 2**27
# Queries per step of the attention without a fused kernel.
_CHUNK = 256


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention and the log-sum-exp of its scores, both with exact gradients, in O(length) memory.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key and value (`torch.Tensor`
            of shape `(batch_size, num_heads, key_length, head_dim)`):
            Any floating dtype.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            True where a query sees a key. A query that sees nothing gives zeros.
        is_causal (`bool`):
            Query i sees keys 0..i; only without a mask and with `query_length == key_length`.
        scale (`float`):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights. No fused kernel with a log-sum-exp has it: anything above 0 takes the
            slower path. The log-sum-exp is that of the scores before dropout.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: the attention output, of the query's shape and dtype, and the
        log-sum-exp, float32, of shape `(batch_size, num_heads, query_length)`.
    """
    kernel = _choose_kernel(query, attention_mask, dropout)
    if kernel is None:
        return _chunked_attention(query, key, value, attention_mask, is_causal, scale, dropout)
    bias = None
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, float("-inf"))
    return _FusedAttention.apply(query, key, value, bias, is_causal, scale, kernel)


def _choose_kernel(query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float) -> str | None:
    """The fused kernel for these inputs, or None with a warning that says why there is none."""
    device = query.device.type
    if dropout > 0:
        logger.warning_once(
            f"Attention dropout is {dropout}: locality is measured without a fused kernel, several times slower. Set "
            "`config.attn_pdrop = 0.0` to avoid it."
        )
        return None
    missing = [
        name
        for forward in _KERNELS.get(device, ())
        for name in (forward, f"{forward}_backward")
        if not hasattr(_aten, name)
    ]
    if device not in _KERNELS or missing:
        reason = f"torch {torch.__version__} lacks {missing[0]}" if missing else f"none is known for device {device!r}"
        logger.warning_once(f"No fused attention kernel: {reason}. Locality is measured by a slower path.")
        return None
    if device == "cpu":
        return "cpu"
    if query.shape[-1] % 8:
        logger.warning_once(
            f"The head size is {query.shape[-1]}; the fused attention kernels for CUDA need a multiple of 8. Locality "
            "is measured by a slower path."
        )
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "cuda_flash" if half and attention_mask is None and query.shape[-1] <= 256 else "cuda_efficient"


class _FusedAttention(torch.autograd.Function):
    """
    Torch's fused attention with a gradient through its log-sum-exp.

    The stock backward kernel computes `dS = A * (dP - D)` with `D = rowsum(dO * O)`, and uses `O` for nothing else. A
    gradient g on the log-sum-exp adds `A * g` to `dS`, that is, turns `D` into `D - g`; so the unmodified kernel gives
    the exact gradients when it is handed `O' = O - g * dO / |dO|^2` instead of `O`.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, is_causal, scale, kernel):
        if kernel == "cpu":
            output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
            )
            rest = ()
        elif kernel == "cuda_flash":
            output, lse, *rest = _aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, is_causal, scale=scale
            )
        else:
            bias = _aligned(bias, query)
            output, lse, *rest = _aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, 0.0, is_causal, scale=scale
            )
        tensors = [entry for entry in rest if isinstance(entry, torch.Tensor)]
        ctx.save_for_backward(query, key, value, bias, output, lse, *tensors)
        ctx.rest = [None if isinstance(entry, torch.Tensor) else entry for entry in rest]
        ctx.is_causal, ctx.scale, ctx.kernel = is_causal, scale, kernel
        # The memory-efficient kernel pads its log-sum-exp to a multiple of 32 queries.
        return output, lse[..., : query.shape[2]].float()

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        query, key, value, bias, output, lse, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        rest = [next(tensors) if entry is None else entry for entry in ctx.rest]
        grad_output, output = _with_lse_gradient(grad_output, output, grad_lse)
        if ctx.kernel == "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output, query, key, value, output, lse, 0.0, ctx.is_causal, attn_mask=bias, scale=ctx.scale
            )
        elif ctx.kernel == "cuda_flash":
            grads = _aten._scaled_dot_product_flash_attention_backward(
                grad_output, query, key, value, output, lse, *rest[:4], 0.0, ctx.is_causal, *rest[4:6], scale=ctx.scale
            )
        else:
            grads = _aten._scaled_dot_product_efficient_attention_backward(
                grad_output, query, key, value, bias, output, lse, *rest, 0.0, [True, True, True, False],
                ctx.is_causal, scale=ctx.scale,
            )[:3]  # fmt: skip
        return *grads, None, None, None, None


def _with_lse_gradient(
    grad_output: torch.Tensor, output: torch.Tensor, grad_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `dO` and `O'` whose row sums of products are `rowsum(dO * O) - g` (see `_FusedAttention`).

    Where a row of `dO` is too small for the division, each of its entries becomes a small share of g: what that adds to
    the gradients is below their rounding.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    grad_lse = grad_lse.to(wide)
    # As small as the dtype's range lets the quotient be; float16's is narrow.
    share = 2.0**-14 if output.dtype == torch.float16 else torch.finfo(wide).eps
    floor = (grad_lse.abs() * share).to(output.dtype).to(wide)
    square = grad_output.to(wide).square().sum(-1)
    is_small = square <= floor.square()
    grad_output = torch.where(is_small[..., None], floor[..., None].to(output.dtype), grad_output)
    square = torch.where(is_small, output.shape[-1] * floor.square(), square)
    shift = grad_lse / square.clamp(min=torch.finfo(wide).tiny)
    # The product in at least float32, so that half precision cannot overflow between the factors.
    return grad_output, (output - shift[..., None] * grad_output).to(output.dtype)


def _aligned(bias: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """The bias for all heads, its rows at addresses that the memory-efficient CUDA kernel can read."""
    if bias is None:
        return None
    batch_size, num_heads, query_length, _ = query.shape
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % 16))[..., :length].expand(batch_size, num_heads, query_length, length)


def _chunked_attention(query, key, value, attention_mask, is_causal, scale, dropout):
    """What no kernel does: explicit scores for a few queries at a time, computed again in the backward pass."""

    def attend(query, key, value, visible):
        scores = (query.float() @ key.float().transpose(-1, -2)) * scale
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1) * visible, dropout).to(value.dtype)
        return weights @ value, scores.logsumexp(-1)

    key_length = key.shape[2]
    outputs = []
    for start in range(0, query.shape[2], _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, query.shape[2]), device=query.device)
        if attention_mask is not None:
            visible = attention_mask[:, :, rows]
        elif is_causal:
            visible = rows[:, None] >= torch.arange(key_length, device=query.device)
        else:
            visible = torch.ones(1, 1, dtype=torch.bool, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            outputs.append(checkpoint(attend, query[:, :, rows], key, value, visible, use_reentrant=False))
    output, lse = zip(*outputs, strict=True)
    return torch.cat(output, dim=2), torch.cat(lse, dim=2)


def local_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    block_starts: torch.Tensor,
    documents: torch.Tensor,
    max_block_length: int,
    num_sink_tokens: int,
    scale: float,
) -> torch.Tensor:
    """
    Log-sum-exp of each query's scores over its local set: the keys from its block's start up to itself, and the first
    `num_sink_tokens` of its document. O(length * max_block_length) time.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`), key (`torch.Tensor` of shape
            `(batch_size, num_heads, key_length, head_dim)`):
            Any floating dtype; the queries are those of the last `query_length` keys.
        block_starts (`torch.LongTensor` of shape `(batch_size, query_length)`), documents (`torch.LongTensor` of shape
            `(batch_size, query_length)`):
            First key of each query's block and of its document; -1 on padding, where the result means nothing.
        max_block_length (`int`):
            No block is longer.
        num_sink_tokens (`int`):
            Keys at the start of the document that are local to every query.
        scale (`float`):
            Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_heads, query_length)`: float32.
    """
    return _LocalLSE.apply(query, key, block_starts, documents, max_block_length, num_sink_tokens, scale)


class _LocalLSE(torch.autograd.Function):
    """Forward and backward go over the band in pieces, so that no more than a piece of the scores is ever held."""

    @staticmethod
    def forward(ctx, query, key, block_starts, documents, *settings):
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for rows, heads in _pieces(query, settings[0]):
            band = _Band(query[rows, heads], key[rows, heads], block_starts[rows], documents[rows], *settings)
            lse[rows, heads] = band.untile(band.scores().logsumexp(-1))
        ctx.save_for_backward(query, key, block_starts, documents, lse)
        ctx.settings = settings
        return lse

    @staticmethod
    def backward(ctx, grad_lse):
        query, key, block_starts, documents, lse = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
        for rows, heads in _pieces(query, ctx.settings[0]):
            band = _Band(query[rows, heads], key[rows, heads], block_starts[rows], documents[rows], *ctx.settings)
            grad_scores = band.scores().sub_(band.tile(lse[rows, heads])).exp_().mul_(band.tile(grad_lse[rows, heads]))
            grad_query[rows, heads], grad_key[rows, heads] = band.gradients(grad_scores)
        return grad_query, grad_key, None, None, None, None, None


def _pieces(query: torch.Tensor, max_block_length: int) -> list[tuple[slice, slice]]:
    """Slices of batch rows and heads whose bands hold few enough scores."""
    batch_size, num_heads, query_length, _ = query.shape
    # A compiled graph would unroll the loop; its kernels hold no more than they need anyway.
    if torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    scores_per_head = (query_length + _TILE) * (max_block_length + _TILE)
    heads = max(1, _MAX_SCORES.get(query.device.type, _MAX_SCORES_ELSEWHERE) // scores_per_head)
    if heads >= num_heads:
        rows = heads // num_heads
        return [(slice(row, row + rows), slice(None)) for row in range(0, batch_size, rows)]
    return [
        (slice(row, row + 1), slice(head, head + heads))
        for row in range(batch_size)
        for head in range(0, num_heads, heads)
    ]


class _Band:
    """
    The scores of the local sets in tiles of `_TILE` queries: each tile meets its own keys and those of the tiles before
    it that a block can reach, then the sinks.

    All heads of all rows stand in one line of tiles, so that the keys of a tile are one contiguous stretch, and the
    stretches of all tiles one overlapping view that the matrix product reads without a copy. What a stretch shows of
    the head before its own is masked. Everything is float32, whatever the inputs' dtype.
    """

    def __init__(self, query, key, block_starts, documents, max_block_length, num_sink_tokens, scale):
        batch_size, _, query_length, head_dim = query.shape
        key_length = key.shape[2]
        reach = -(-(max_block_length - 1) // _TILE)  # tiles before its own that a block can reach
        offset = key_length - query_length  # keys of a cache, before the first query
        self.first_key = max(0, offset // _TILE - reach) * _TILE
        self.padding = (offset - self.first_key, -(key_length - self.first_key) % _TILE)  # dummy queries
        self.query_length, self.scale = query_length, scale
        self.key_shape = key.shape

        self.query = F.pad(query.float() * scale, (0, 0, *self.padding)).reshape(-1, _TILE, head_dim)
        num_tiles = self.query.shape[0]
        keys = F.pad(key[:, :, self.first_key :].float(), (0, 0, 0, self.padding[1])).reshape(-1, head_dim)
        keys = F.pad(keys, (0, 0, reach * _TILE, 0))
        self.width = (reach + 1) * _TILE
        self.keys = keys.as_strided((num_tiles, self.width, head_dim), (_TILE * head_dim, head_dim, 1))

        # Dummy queries and padding see themselves, so that nothing is the log of zero.
        position = torch.arange(self.first_key, key_length + self.padding[1], device=query.device)
        own = position[self.padding[0] : self.padding[0] + query_length]
        starts = F.pad(torch.where(block_starts < 0, own, block_starts), self.padding, value=-1)
        starts = torch.where(starts < 0, position, starts).reshape(batch_size, 1, -1, _TILE, 1)
        rows = position.view(1, 1, -1, _TILE, 1)
        columns = rows[..., :1, :] + torch.arange(self.width, device=query.device) - reach * _TILE
        self.outside = (columns < starts.clamp(min=self.first_key)) | (columns > rows)

        self.sinks = []
        for sink in range(num_sink_tokens):
            index = (documents.clamp(min=0) + sink).clamp(max=key_length - 1)
            is_outside = (documents < 0) | (documents + sink >= block_starts)  # in the block already, or no token
            self.sinks.append((index, is_outside[:, None]))
        self._query, self._key = query, key

    def tile(self, per_query: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_heads, query_length)` to `(num_tiles, _TILE, 1)`."""
        return F.pad(per_query, self.padding).reshape(-1, _TILE, 1)

    def untile(self, tiles: torch.Tensor) -> torch.Tensor:
        """The inverse of `tile`, without the last dimension."""
        flat = tiles.view(*self.key_shape[:2], -1)
        return flat[:, :, self.padding[0] : self.padding[0] + self.query_length]

    def scores(self) -> torch.Tensor:
        """Scores of shape `(num_tiles, _TILE, width + num_sink_tokens)`, -inf outside the local set."""
        batch_size, num_heads = self.key_shape[:2]
        with torch.autocast(self.query.device.type, enabled=False):
            scores = torch.bmm(self.query, self.keys.transpose(1, 2))
        scores.view(batch_size, num_heads, -1, _TILE, self.width).masked_fill_(self.outside, float("-inf"))
        if not self.sinks:
            return scores
        sinks = []
        for index, is_outside in self.sinks:
            score = (self._query.float() * self._sink_keys(index)).sum(-1) * self.scale
            sinks.append(F.pad(score.masked_fill(is_outside, float("-inf")), self.padding, value=float("-inf")))
        return torch.cat((scores, torch.stack(sinks, -1).reshape(-1, _TILE, len(sinks))), dim=-1)

    def gradients(self, grad_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the query and the key from that of `scores()`."""
        batch_size, num_heads, key_length, head_dim = self.key_shape
        band = grad_scores[..., : self.width]
        with torch.autocast(band.device.type, enabled=False):
            grad_query = self._untile_rows(torch.bmm(band, self.keys)) * self.scale
            by_tile = torch.bmm(band.transpose(1, 2), self.query).view(-1, self.width // _TILE, _TILE, head_dim)

        lines = self.keys.new_zeros(by_tile.shape[0] + by_tile.shape[1] - 1, _TILE, head_dim)
        for tile in range(by_tile.shape[1]):
            lines[tile : tile + by_tile.shape[0]] += by_tile[:, tile]
        lines = lines[by_tile.shape[1] - 1 :].view(batch_size, num_heads, -1, head_dim)
        grad_key = F.pad(lines[:, :, : key_length - self.first_key], (0, 0, self.first_key, 0))

        for column, (index, _) in enumerate(self.sinks):
            grad = self.untile(grad_scores[..., self.width + column])[..., None] * self.scale
            grad_query = grad_query + grad * self._sink_keys(index)
            index = index[:, None, :, None].expand(-1, num_heads, -1, head_dim)
            grad_key = grad_key.scatter_add(2, index, grad * self._query.float())
        return grad_query, grad_key

    def _untile_rows(self, tiles: torch.Tensor) -> torch.Tensor:
        batch_size, num_heads, _, head_dim = self.key_shape
        lines = tiles.view(batch_size, num_heads, -1, head_dim)
        return lines[:, :, self.padding[0] : self.padding[0] + self.query_length]

    def _sink_keys(self, index: torch.Tensor) -> torch.Tensor:
        _, num_heads, _, head_dim = self.key_shape
        return self._key.float().gather(2, index[:, None, :, None].expand(-1, num_heads, -1, head_dim))
