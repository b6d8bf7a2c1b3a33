"""Attention of one scale's tokens over the cached prefix and the scale itself; see `reference.cached_attention`.

    q, k ← q/|q|·q_scale, k/|k|;   out = softmax(q·[cache, k]ᵀ·softmax_scale)·[cache, v];   cache ← k, v

One launch: normalising, writing the cache and attending. Programs read their own scale's keys and values from the
projection, never from the cache, so that nothing read in a launch is written in it and programs need no order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_dtype, require_shape
from .reference import HEAD_DIM, L2_EPS


def cached_attention(
    qkv_MN: Tensor,
    q_scale_H: Tensor | None,
    cache_k_RHLd: Tensor,
    cache_v_RHLd: Tensor,
    *,
    begin: int,
    softmax_scale: float,
    out_MD: Tensor,
) -> Tensor:
    """See `reference.cached_attention`. Compiled once per (n, begin, H, L): ten times for ten scales."""
    (R, H, L, _), (M, _) = cache_k_RHLd.shape, qkv_MN.shape
    require_contiguous(
        qkv_MN=qkv_MN, q_scale_H=q_scale_H, cache_k_RHLd=cache_k_RHLd, cache_v_RHLd=cache_v_RHLd, out_MD=out_MD
    )
    require_shape("cache_k_RHLd", cache_k_RHLd, R, H, L, HEAD_DIM)
    require_shape("cache_v_RHLd", cache_v_RHLd, R, H, L, HEAD_DIM)
    require_shape("qkv_MN", qkv_MN, M, 3 * H * HEAD_DIM)
    require_shape("out_MD", out_MD, M, H * HEAD_DIM)
    require_dtype("qkv_MN", qkv_MN, torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in (("cache_k_RHLd", cache_k_RHLd), ("cache_v_RHLd", cache_v_RHLd), ("out_MD", out_MD)):
        require_dtype(name, tensor, qkv_MN.dtype)
    if q_scale_H is not None:
        require_shape("q_scale_H", q_scale_H, H)
        require_dtype("q_scale_H", q_scale_H, torch.float32)
    if M % R:
        raise ValueError(f"qkv_MN: {M} tokens do not divide into {R} rows")
    n = M // R
    if not 0 <= begin <= L - n:
        raise ValueError(f"begin: {begin} with {n} tokens, expected 0 to {L - n} in a cache of {L}")
    block_m, block_n, num_warps = tile_of(n, begin, qkv_MN.dtype)
    launch(
        _cached_attention_kernel,
        (R * H, cdiv(n, block_m)),
        {
            "qkv_ptr": qkv_MN,
            "q_scale_ptr": q_scale_H,
            "cache_k_ptr": cache_k_RHLd,
            "cache_v_ptr": cache_v_RHLd,
            "out_ptr": out_MD,
            # Powers of two instead of e: on the float32 scores, for on q it would be rounded to the storage type.
            "score_scale": softmax_scale * math.log2(math.e),
        },
        {
            "UNIT": q_scale_H is not None,
            "H": H,
            "N": n,
            "BEGIN": begin,
            "L": L,
            "D": HEAD_DIM,
            "EPS": L2_EPS,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        num_warps=num_warps,
        num_stages=3,
    )
    return out_MD


def tile_of(n: int, begin: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(queries, keys, warps) of a program. Reasoned for Hopper, not measured.

    64 queries are what one warpgroup multiplies at once. Fewer where a scale has fewer: with R·H = 32 at batch 1 the
    early scales leave most multiprocessors idle anyway, so blocks are kept small and their latency short. From 512
    tokens on there are enough blocks for two warpgroups each, which halves how often keys and values are read.
    The tile depends on the scale alone, so that a row's result does not depend on the batch it is in.
    """
    if dtype == torch.float32:  # no tensor cores: operands come from registers, which larger tiles overflow
        return (16 if n <= 16 else 32), 16, 8
    keys = min(max(next_power_of_2(max(n, begin)), 16), 64)
    if n <= 16:
        return 16, keys, 2
    if n < 64:
        return 32, keys, 4
    return (64, keys, 4) if n < 512 else (128, keys, 8)


@triton.jit
def _rows(ptr, index, STRIDE: tl.constexpr, END: tl.constexpr, D: tl.constexpr):
    """Rows `index` of a matrix of width D, zeros from END on."""
    offset = index[:, None] * STRIDE + tl.arange(0, D)[None, :]
    return tl.load(ptr + offset, mask=(index < END)[:, None], other=0.0)


@triton.jit
def _unit_length(x, EPS: tl.constexpr):
    x = x.to(tl.float32)
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), EPS)[:, None]


@triton.jit
def _attend(q, k, v, inside, score_scale, peak, total, attended):
    """Adds a tile of keys and values to the softmax so far: its largest score, sum of weights and weighted values.

    Every tile has a key inside, so the peak is finite from the first tile on and no difference is inf − inf.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
    scores = tl.where(inside[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, axis=1)
    attended = tl.dot(weights.to(v.dtype), v, attended * fade[:, None], input_precision="ieee")
    return new_peak, total, attended


@triton.jit
def _cached_attention_kernel(
    qkv_ptr,  # [R·N, 3·H·D]
    q_scale_ptr,  # float32 [H]
    cache_k_ptr,  # [R, H, L, D]
    cache_v_ptr,  # [R, H, L, D]
    out_ptr,  # [R·N, H·D]
    score_scale,  # softmax scale · log2 e
    UNIT: tl.constexpr,  # queries and keys are normalised
    H: tl.constexpr,
    N: tl.constexpr,  # tokens of the scale
    BEGIN: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a tile
):
    row_head = tl.program_id(0).to(tl.int64)  # a large batch's caches have more than 2³¹ elements
    cache_k_ptr += row_head * (L * D)
    cache_v_ptr += row_head * (L * D)
    attend_block(
        qkv_ptr,
        q_scale_ptr,
        cache_k_ptr,
        cache_v_ptr,
        out_ptr,
        cache_k_ptr + BEGIN * D,
        cache_v_ptr + BEGIN * D,
        score_scale,
        row_head,
        UNIT,
        H,
        N,
        BEGIN,
        D,
        EPS,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit
def attend_block(
    qkv_ptr,  # [R·N, 3·H·D]
    q_scale_ptr,  # float32 [H]
    cache_k_ptr,  # [BEGIN, D], of this row and head
    cache_v_ptr,  # [BEGIN, D], likewise
    out_ptr,  # [R·N, H·D]
    own_k_ptr,  # [N, D], where the scale's keys of this row and head go
    own_v_ptr,  # [N, D], likewise
    score_scale,  # softmax scale · log2 e
    row_head,  # row · H + head
    UNIT: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BEGIN: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What every kernel of this kind does with BLOCK_M tokens of one row and head."""
    row, head = row_head // H, row_head % H
    q_ptr = qkv_ptr + row * (N * 3 * H * D) + head * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D

    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q = _rows(q_ptr, token, 3 * H * D, N, D)
    own_k = _rows(k_ptr, token, 3 * H * D, N, D)
    own_v = _rows(v_ptr, token, 3 * H * D, N, D)
    if UNIT:
        q = (_unit_length(q, EPS) * tl.load(q_scale_ptr + head)).to(qkv_ptr.dtype.element_ty)
        own_k = _unit_length(own_k, EPS).to(qkv_ptr.dtype.element_ty)
    place = token[:, None] * D + d[None, :]
    tl.store(own_k_ptr + place, own_k, mask=(token < N)[:, None])
    tl.store(own_v_ptr + place, own_v, mask=(token < N)[:, None])

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, D), tl.float32)
    for first in range(0, BEGIN, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        k = _rows(cache_k_ptr, position, D, BEGIN, D)
        v = _rows(cache_v_ptr, position, D, BEGIN, D)
        peak, total, attended = _attend(q, k, v, position < BEGIN, score_scale, peak, total, attended)
    for first in range(0, N, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, position, 3 * H * D, N, D)
        v = _rows(v_ptr, position, 3 * H * D, N, D)
        if UNIT:
            k = _unit_length(k, EPS).to(qkv_ptr.dtype.element_ty)
        peak, total, attended = _attend(q, k, v, position < N, score_scale, peak, total, attended)
    result = (attended / total[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += row * (N * H * D) + head * D
    tl.store(out_ptr + token[:, None] * (H * D) + d[None, :], result, mask=(token < N)[:, None])
