"""Rows of activations as float8 with one scale each; see `reference.quantize_rows`.

    scale = max|x|/448, or 1 for zeros;   out = x/scale, rounded to the nearest e4m3

Expected to be bound by memory, not measured yet: one program per row holds it in registers, so x is read once. Converts
to e4m3 in hardware from compute capability 8.9 on; Triton compiles no such conversion for 8.0, where there are no
float8 products either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2, require_contiguous, require_dtype, require_shape
from .reference import FP8_MAX

MAX_K = 16384  # 32 values in each of 512 threads


def quantize_rows(x_MK: Tensor, *, out_MK: Tensor, scale_out_M1: Tensor) -> None:
    """See `reference.quantize_rows`. K is at most 16384."""
    M, K = x_MK.shape
    require_contiguous(x_MK=x_MK, out_MK=out_MK, scale_out_M1=scale_out_M1)
    require_shape("out_MK", out_MK, M, K)
    require_shape("scale_out_M1", scale_out_M1, M, 1)
    require_dtype("x_MK", x_MK, torch.float32, torch.float16, torch.bfloat16)
    require_dtype("out_MK", out_MK, torch.float8_e4m3fn)
    require_dtype("scale_out_M1", scale_out_M1, torch.float32)
    if K > MAX_K:
        raise ValueError(f"x_MK: rows of {K}, expected at most {MAX_K}")
    block = next_power_of_2(K)
    launch(
        _quantize_rows_kernel,
        (M,),
        {"x_ptr": x_MK, "out_ptr": out_MK, "scale_ptr": scale_out_M1},
        {"K": K, "BLOCK_K": block, "FP8_MAX": FP8_MAX},
        num_warps=min(max(block // 256, 1), 16),  # 8 values per thread, more in long rows; not measured yet
    )


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    out_ptr,  # float8 [M, K]
    scale_ptr,  # float32 [M]
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    inside = column < K
    x = tl.load(x_ptr + row * K + column, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), axis=0)
    # Divisions are rounded to nearest: an error in the last place would move values that lie halfway between two e4m3.
    scale = tl.where(peak > 0, tl.div_rn(peak, FP8_MAX), 1.0)
    tl.store(scale_ptr + row, scale)
    # A NaN stays one, so that it reaches whoever looks for it.
    scaled = tl.clamp(tl.div_rn(x, scale), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + row * K + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
