"""adaln and cached_attention as TensorRT calls them: inputs, then int32 numbers, then outputs, nothing in place.

The same device functions as in `adaln` and `cached_attention`. A plugin of TensorRT is one kernel whose pointers are
tensors of the network: what the engine's own kernels update in place is a result here, vectors of a modulation are
found by their number in the tensor that has all of them, and every length but the number of rows is a constant.

Axes as in `reference`; g and s vectors of width D per row in two tensors of modulations.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adaln import normed_token, warps_of
from .cached_attention import attend_block, tile_of
from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_dtype, require_shape
from .reference import HEAD_DIM, L2_EPS, LN_EPS

#: Bytes of shared memory of a block that every GPU gives unasked; nothing says that TensorRT asks for more.
SHARED_LIMIT = 48 * 1024


def adaln(
    x_RnD: Tensor,
    y_RnD: Tensor | None,
    gates_RgD: Tensor | None,
    norms_RsD: Tensor,
    *,
    gamma_at: int | None,
    scale_at: int,
    shift_at: int,
    x_out_RnD: Tensor | None,
    out_RnD: Tensor,
) -> Tensor:
    """x + gamma·y into `x_out_RnD`, where there is one, and LN of it·scale + shift into `out_RnD`, which is returned.

    gamma is vector `gamma_at` of a row's gates, scale and shift are those of its norms. y, gates and gamma_at are None
    together, and then x is normed as it is.
    """
    (R, n, D), norms = x_RnD.shape, norms_RsD.shape[1]
    require_contiguous(x_RnD=x_RnD, y_RnD=y_RnD, gates_RgD=gates_RgD, norms_RsD=norms_RsD, out_RnD=out_RnD)
    require_dtype("x_RnD", x_RnD, torch.float32)
    require_shape("norms_RsD", norms_RsD, R, norms, D)
    require_shape("out_RnD", out_RnD, R, n, D)
    given = [value is not None for value in (y_RnD, gates_RgD, gamma_at)]
    if len(set(given)) > 1:
        raise ValueError("y_RnD, gates_RgD and gamma_at: expected all or none")
    gates = 0
    if y_RnD is not None and gates_RgD is not None and gamma_at is not None:
        gates = gates_RgD.shape[1]
        require_shape("y_RnD", y_RnD, R, n, D)
        require_shape("gates_RgD", gates_RgD, R, gates, D)
        _require_place("gamma_at", gamma_at, gates)
    if x_out_RnD is not None:
        require_contiguous(x_out_RnD=x_out_RnD)
        require_dtype("x_out_RnD", x_out_RnD, torch.float32)
        require_shape("x_out_RnD", x_out_RnD, R, n, D)
    _require_place("scale_at", scale_at, norms)
    _require_place("shift_at", shift_at, norms)
    block = next_power_of_2(D)
    launch(
        _adaln_plugin_kernel,
        (R * n,),
        {
            "x_ptr": x_RnD,
            "y_ptr": y_RnD,
            "gates_ptr": gates_RgD,
            "norms_ptr": norms_RsD,
            "gamma_at": gamma_at,
            "scale_at": scale_at,
            "shift_at": shift_at,
            "x_out_ptr": x_out_RnD,
            "out_ptr": out_RnD,
        },
        {
            "HAS_Y": y_RnD is not None,
            "N": n,
            "GATES": gates,
            "NORMS": norms,
            "D": D,
            "BLOCK_D": block,
            "EPS": LN_EPS,
        },
        num_warps=warps_of(block),
    )
    return out_RnD


def cached_attention(
    qkv_RnN: Tensor,
    q_scale_H: Tensor | None,
    cache_k_RHLd: Tensor,
    cache_v_RHLd: Tensor,
    *,
    begin: int,
    softmax_scale: float,
    out_RnD: Tensor,
    k_new_RHnd: Tensor,
    v_new_RHnd: Tensor,
) -> Tensor:
    """Attention of a scale's tokens over the caches before `begin` and the scale itself; returns `out_RnD`.

    Its keys and values, which the caches take at `begin`, go into `k_new_RHnd` and `v_new_RHnd`. With `q_scale_H`,
    queries and keys are normalised and queries multiplied by it.
    """
    (R, H, L, _), n = cache_k_RHLd.shape, qkv_RnN.shape[1]
    results = {"out_RnD": out_RnD, "k_new_RHnd": k_new_RHnd, "v_new_RHnd": v_new_RHnd}
    require_contiguous(qkv_RnN=qkv_RnN, q_scale_H=q_scale_H, cache_k_RHLd=cache_k_RHLd, cache_v_RHLd=cache_v_RHLd)
    require_contiguous(**results)
    require_shape("qkv_RnN", qkv_RnN, R, n, 3 * H * HEAD_DIM)
    if q_scale_H is not None:
        require_shape("q_scale_H", q_scale_H, H)
        require_dtype("q_scale_H", q_scale_H, torch.float32)
    require_shape("cache_k_RHLd", cache_k_RHLd, R, H, L, HEAD_DIM)
    require_shape("cache_v_RHLd", cache_v_RHLd, R, H, L, HEAD_DIM)
    require_shape("out_RnD", out_RnD, R, n, H * HEAD_DIM)
    require_shape("k_new_RHnd", k_new_RHnd, R, H, n, HEAD_DIM)
    require_shape("v_new_RHnd", v_new_RHnd, R, H, n, HEAD_DIM)
    require_dtype("qkv_RnN", qkv_RnN, torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in {"cache_k_RHLd": cache_k_RHLd, "cache_v_RHLd": cache_v_RHLd, **results}.items():
        require_dtype(name, tensor, qkv_RnN.dtype)
    if not 0 <= begin <= L - n:
        raise ValueError(f"begin: {begin} with {n} tokens, expected 0 to {L - n} in a cache of {L}")
    # With two stages and no more than the 64 queries that 256 tokens have, all tiles are within SHARED_LIMIT.
    block_m, block_n, num_warps = tile_of(min(n, 256), begin, qkv_RnN.dtype)
    launch(
        _cached_attention_plugin_kernel,
        (R * H, cdiv(n, block_m)),
        {
            "qkv_ptr": qkv_RnN,
            "q_scale_ptr": q_scale_H,
            "cache_k_ptr": cache_k_RHLd,
            "cache_v_ptr": cache_v_RHLd,
            "out_ptr": out_RnD,
            "k_new_ptr": k_new_RHnd,
            "v_new_ptr": v_new_RHnd,
        },
        {
            "SCORE_SCALE": softmax_scale * math.log2(math.e),  # as in `cached_attention`
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
        num_stages=2,
    )
    return out_RnD


def _require_place(name: str, at: int, count: int) -> None:
    if not 0 <= at < count:
        raise ValueError(f"{name}: {at}, expected 0 to {count - 1} of {count} vectors")


@triton.jit
def _adaln_plugin_kernel(
    x_ptr,  # float32 [R, N, D]
    y_ptr,  # [R, N, D]
    gates_ptr,  # [R, GATES, D]
    norms_ptr,  # [R, NORMS, D]
    gamma_at,  # which of a row's gates
    scale_at,  # which of a row's norms
    shift_at,  # which of a row's norms
    x_out_ptr,  # float32 [R, N, D]
    out_ptr,  # [R, N, D]
    HAS_Y: tl.constexpr,
    N: tl.constexpr,
    GATES: tl.constexpr,
    NORMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token // N
    gate = row
    if HAS_Y:
        gate = (row * GATES + gamma_at) * D
    scale_ptr, shift_ptr = norms_ptr + scale_at * D, norms_ptr + shift_at * D
    normed_token(
        x_ptr,
        y_ptr,
        gates_ptr,
        scale_ptr,
        shift_ptr,
        x_out_ptr,
        out_ptr,
        token,
        gate,
        row * (NORMS * D),
        HAS_Y,
        D,
        BLOCK_D,
        EPS,
    )


@triton.jit
def _cached_attention_plugin_kernel(
    qkv_ptr,  # [R, N, 3·H·D]
    q_scale_ptr,  # float32 [H]
    cache_k_ptr,  # [R, H, L, D]
    cache_v_ptr,  # [R, H, L, D]
    out_ptr,  # [R, N, H·D]
    k_new_ptr,  # [R, H, N, D]
    v_new_ptr,  # [R, H, N, D]
    SCORE_SCALE: tl.constexpr,  # softmax scale · log2 e
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
    row_head = tl.program_id(0).to(tl.int64)
    attend_block(
        qkv_ptr,
        q_scale_ptr,
        cache_k_ptr + row_head * (L * D),
        cache_v_ptr + row_head * (L * D),
        out_ptr,
        k_new_ptr + row_head * (N * D),
        v_new_ptr + row_head * (N * D),
        SCORE_SCALE,
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
