"""A matrix product with its epilogue: scale of int8 columns, bias, GELU; see `reference.linear`.

    y = x·W·column_scale + bias;   out = y·sigmoid(2·√(2/π)·(y + 0.044715·y³)), the tanh-approximated GELU, or y

One program per tile of the result runs over the whole of K, so sums have one order and no atomics. Few rows are bound
by reading W, many by the tensor cores. An int8 tile is converted to x's type, which is exact, as |w| ≤ 127.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_dtype, require_shape

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 128  # about one per multiprocessor: tiles shrink until there are as many
PIPELINE_BYTES = 96 * 1024  # of operands on their way to a program; the smallest GPUs, 8.6 and 8.9, have 99 KiB for it
GROUP_M = 8  # tiles of rows that take turns before the next columns, so that programs started together share both in L2


def linear(
    x_MK: Tensor,
    weight_KN: Tensor,
    bias_N: Tensor,
    *,
    column_scale_N: Tensor | None = None,
    gelu: bool = False,
    out_MN: Tensor,
) -> Tensor:
    """See `reference.linear`. Compiled once per (K, N, tile)."""
    (M, K), N = x_MK.shape, weight_KN.shape[-1]
    require_contiguous(x_MK=x_MK, weight_KN=weight_KN, bias_N=bias_N, column_scale_N=column_scale_N, out_MN=out_MN)
    require_shape("weight_KN", weight_KN, K, N)
    require_shape("bias_N", bias_N, N)
    require_shape("out_MN", out_MN, M, N)
    require_dtype("x_MK", x_MK, *FLOATS)
    require_dtype("weight_KN", weight_KN, x_MK.dtype, torch.int8)
    require_dtype("bias_N", bias_N, *FLOATS)
    require_dtype("out_MN", out_MN, *FLOATS)
    if (column_scale_N is None) != (weight_KN.dtype != torch.int8):
        raise ValueError("column_scale_N: expected with int8 weights, and with no others")
    if column_scale_N is not None:
        require_shape("column_scale_N", column_scale_N, N)
        require_dtype("column_scale_N", column_scale_N, torch.float32)
    block_m, block_n = _tile(M, N, x_MK.dtype)
    block_k, num_stages, num_warps = _pipeline(block_m, block_n, x_MK.dtype, weight_KN.dtype)
    launch(
        _linear_kernel,
        (cdiv(M, block_m) * cdiv(N, block_n),),
        {
            "x_ptr": x_MK,
            "weight_ptr": weight_KN,
            "bias_ptr": bias_N,
            "column_scale_ptr": column_scale_N,
            "out_ptr": out_MN,
            "M": M,
        },
        {
            "K": K,
            "N": N,
            "SCALED": column_scale_N is not None,
            "GELU": gelu,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": GROUP_M,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out_MN


def _tile(M: int, N: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a program. Reasoned for Hopper, not measured.

    As few rows as hold M, so that W is read once where reading it is what takes the time; then the longer side is
    halved until there is a program for about every multiprocessor: at N = 1024, 64 for up to 16 rows, else 128.
    """
    largest = 128 if dtype != torch.float32 else 64  # without tensor cores operands come from registers
    block_m, block_n = min(max(next_power_of_2(M), 16), largest), largest
    while cdiv(M, block_m) * cdiv(N, block_n) < PROGRAMS and max(block_m, block_n) > 16:
        block_m, block_n = (block_m // 2, block_n) if block_m > block_n else (block_m, block_n // 2)
    return block_m, block_n


def _pipeline(block_m: int, block_n: int, x: torch.dtype, weight: torch.dtype) -> tuple[int, int, int]:
    """(depth, stages, warps) of a program. Reasoned for Hopper, not measured.

    Small tiles go deeper and have more stages: few programs must still ask for W at the memory's full rate.
    """
    if x == torch.float32:
        return 32, 4, 8 if block_m == block_n == 64 else 4
    block_k = min(128 * 64 // max(block_m, block_n), 256)
    stage_bytes = block_k * (block_m * x.itemsize + block_n * weight.itemsize)
    return block_k, min(PIPELINE_BYTES // stage_bytes, 8), 8 if block_m == block_n == 128 else 4


@triton.jit
def _linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [K, N], of x's type or int8
    bias_ptr,  # [N]
    column_scale_ptr,  # float32 [N]
    out_ptr,  # [M, N]
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    SCALED: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs walk down GROUP_M tiles of rows before they go on to the next columns.
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_tile_m = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_tile_m, GROUP_M)
    tile_m = first_tile_m + program % (GROUP_M * tiles_n) % height
    tile_n = program % (GROUP_M * tiles_n) // height

    # Tiles start at 64-bit offsets; within a tile 32 bits do.
    row, column, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns = row < M - tile_m * BLOCK_M, column < N - tile_n * BLOCK_N
    x_ptr += tile_m.to(tl.int64) * (BLOCK_M * K)
    weight_ptr += tile_n * BLOCK_N
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        x_here, weight_here = rows[:, None], columns[None, :]
        if K % BLOCK_K != 0:
            x_here &= (depth < K - first)[None, :]
            weight_here &= (depth < K - first)[:, None]
        x = tl.load(x_ptr + row[:, None] * K + depth[None, :], mask=x_here, other=0.0)
        weight = tl.load(weight_ptr + depth[:, None] * N + column[None, :], mask=weight_here, other=0)
        y = tl.dot(x, weight.to(x.dtype), y, input_precision="ieee")
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K * N

    columns_of = tile_n * BLOCK_N + column
    if SCALED:
        y *= tl.load(column_scale_ptr + columns_of, mask=columns, other=0.0)[None, :]
    y += tl.load(bias_ptr + columns_of, mask=columns, other=0.0).to(tl.float32)[None, :]
    if GELU:  # ½(1 + tanh u) is sigmoid(2u)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    out_ptr += tile_m.to(tl.int64) * (BLOCK_M * N) + tile_n * BLOCK_N
    here = rows[:, None] & columns[None, :]
    tl.store(out_ptr + row[:, None] * N + column[None, :], y.to(out_ptr.dtype.element_ty), mask=here)
