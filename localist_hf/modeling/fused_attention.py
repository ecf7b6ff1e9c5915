# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
Attention that also returns its log-sum-exp, differentiably, by torch's own fused kernels: no matrix of length x length
is ever held.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from .opaque_ops import warn_once


logger = logging.get_logger(__name__)

_aten = torch.ops.aten
_KERNELS = {
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
    "cuda": ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
}
_MATMULS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}

# Queries per step of the attention without a fused kernel.
_CHUNK = 256


class Scoring(NamedTuple):
    """
    How weights are made of queries and keys.

    Args:
        scale (`float`):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the weights.
        softcap (`float`, *optional*):
            Scores s become `softcap * tanh(s / softcap)`.
        learned_sinks (`torch.Tensor` of shape `(num_heads,)`, *optional*):
            A score for each head of a sink that is no token, and has no value.
    """

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    learned_sinks: torch.Tensor | None = None


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
        log-sum-exp, float32 (float64 for float64 inputs), of shape `(batch_size, num_heads, query_length)`.
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
        warn_once(
            logger,
            f"Attention dropout is {dropout}: locality is measured without a fused kernel, several times slower. Set "
            "the configuration's attention dropout to 0 to avoid it.",
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
        warn_once(logger, f"No fused attention kernel: {reason}. Locality is measured by a slower path.")
        return None
    if device == "cpu":
        return "cpu"
    head_dim, has_mask = query.shape[-1], attention_mask is not None
    fits = head_dim % 8 == 0  # what they ask of their callers
    kernel = _cuda_kernel(query.device, query.dtype, head_dim, has_mask, query.requires_grad) if fits else None
    if kernel is None:
        warn_once(
            logger,
            f"Torch has no fused attention kernel for {query.dtype} heads of size {head_dim} on "
            f"{torch.cuda.get_device_name(query.device)}. Locality is measured by a slower path.",
        )
    return kernel


@torch.compiler.assume_constant_result  # it depends on nothing that a compiled graph does not already assume
def _cuda_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, has_mask: bool, requires_grad: bool
) -> str | None:
    """Which kernel torch may use here: that depends on the card, and on what the user has switched off."""
    query = torch.empty(1, 1, 16, head_dim, dtype=dtype, device=device, requires_grad=requires_grad)
    bias = torch.empty(1, 1, 16, 16, dtype=dtype, device=device) if has_mask else None
    inputs = torch.backends.cuda.SDPAParams(query, query, query, bias, 0.0, not has_mask, False)
    if not has_mask and torch.backends.cuda.can_use_flash_attention(inputs):
        return "cuda_flash"
    return "cuda_efficient" if torch.backends.cuda.can_use_efficient_attention(inputs) else None


@torch.compiler.assume_constant_result
def matmul_rounds_float32(device_type: str) -> bool:
    """
    Whether torch multiplies float32 matrices with less than their precision on this device (TF32, for one), as the
    fused kernels do not: what is measured by a product and what by a kernel then disagree.
    """
    return device_type in _MATMULS and _MATMULS[device_type].fp32_precision in ("tf32", "bf16")


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
        # What else the kernel returns: tensors, numbers, and None where it has nothing to say.
        ctx.is_tensor = [isinstance(entry, torch.Tensor) for entry in rest]
        ctx.others = [None if is_tensor else entry for entry, is_tensor in zip(rest, ctx.is_tensor, strict=True)]
        tensors = [entry for entry, is_tensor in zip(rest, ctx.is_tensor, strict=True) if is_tensor]
        ctx.save_for_backward(query, key, value, bias, output, lse, *tensors)
        ctx.is_causal, ctx.scale, ctx.kernel = is_causal, scale, kernel
        # The memory-efficient kernel pads its log-sum-exp to a multiple of 32 queries.
        return output, lse[..., : query.shape[2]].to(torch.promote_types(query.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        query, key, value, bias, output, lse, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        entries = zip(ctx.is_tensor, ctx.others, strict=True)
        rest = [next(tensors) if is_tensor else other for is_tensor, other in entries]
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
    square = torch.linalg.vector_norm(grad_output, dim=-1, dtype=wide).square_()
    is_small = square <= floor.square()
    # On CPU it costs nothing to look whether there is such a row; on a device it would wait for all that went before.
    if output.device.type != "cpu" or torch.compiler.is_compiling() or is_small.any():
        grad_output = torch.where(is_small[..., None], floor[..., None].to(output.dtype), grad_output)
        square = torch.where(is_small, output.shape[-1] * floor.square(), square)
    shift = grad_lse / square.clamp(min=torch.finfo(wide).tiny)
    # In at least float32, so that half precision cannot overflow between the factors.
    shifted = torch.addcmul(output.to(wide), grad_output.to(wide), shift[..., None], value=-1)
    return grad_output, shifted.to(output.dtype)


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
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
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
