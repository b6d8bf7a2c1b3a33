"""Residual, gate, LayerNorm and modulation in one pass over the tokens; see `reference.adaln`.

    x ← x + gamma·y;   out = LN(x)·scale + shift

Expected to be bound by memory, not measured yet: a token's x and y are read once, x and out written once. One program
per token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2, require_contiguous, require_shape
from .reference import LN_EPS


def adaln(
    x_MD: Tensor,
    y_MD: Tensor | None,
    gamma_RD: Tensor | None,
    scale_RD: Tensor,
    shift_RD: Tensor,
    *,
    out_MD: Tensor,
) -> Tensor:
    """See `reference.adaln`. The row vectors need a unit stride along D only."""
    (M, D), R = x_MD.shape, scale_RD.shape[0]
    require_contiguous(x_MD=x_MD, y_MD=y_MD, out_MD=out_MD)
    require_shape("out_MD", out_MD, M, D)
    require_shape("shift_RD", shift_RD, R, D)
    if M % R:
        raise ValueError(f"x_MD: {M} tokens do not divide into {R} rows")
    if (y_MD is None) != (gamma_RD is None):
        raise ValueError("y_MD and gamma_RD: expected both or neither")
    if y_MD is not None and gamma_RD is not None:
        require_shape("y_MD", y_MD, M, D)
        require_shape("gamma_RD", gamma_RD, R, D)
    modulations = [m for m in (gamma_RD, scale_RD, shift_RD) if m is not None]
    if any(m.stride(1) != 1 or m.stride(0) != scale_RD.stride(0) for m in modulations):
        raise ValueError("gamma, scale and shift: expected one row stride, and unit stride along D")
    block = next_power_of_2(D)
    launch(
        _adaln_kernel,
        (M,),
        {
            "x_ptr": x_MD,
            "y_ptr": y_MD,
            "gamma_ptr": gamma_RD,
            "scale_ptr": scale_RD,
            "shift_ptr": shift_RD,
            "out_ptr": out_MD,
            "tokens_per_row": M // R,
            "row_stride": scale_RD.stride(0),
        },
        {"HAS_Y": y_MD is not None, "D": D, "BLOCK_D": block, "EPS": LN_EPS},
        num_warps=warps_of(block),
    )
    return out_MD


def warps_of(block: int) -> int:
    """Warps of a program over that many elements: 8 per thread. Not measured yet."""
    return min(max(block // 256, 1), 8)


@triton.jit
def _adaln_kernel(
    x_ptr,  # float32 [M, D]
    y_ptr,  # [M, D]
    gamma_ptr,  # float32 [R, D], rows row_stride apart
    scale_ptr,  # float32 [R, D], likewise
    shift_ptr,  # float32 [R, D], likewise
    out_ptr,  # [M, D]
    tokens_per_row,
    row_stride,
    HAS_Y: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = (token // tokens_per_row) * row_stride
    normed_token(x_ptr, y_ptr, gamma_ptr, scale_ptr, shift_ptr, x_ptr, out_ptr, token, row, row, HAS_Y, D, BLOCK_D, EPS)


@triton.jit
def normed_token(
    x_ptr,  # float32 [M, D]
    y_ptr,  # [M, D]
    gamma_ptr,
    scale_ptr,
    shift_ptr,
    x_out_ptr,  # float32 [M, D], may be x itself; None, or without a y: nothing is written
    out_ptr,  # [M, D]
    token,
    gamma_at,  # where its row of gamma begins
    norm_at,  # where its rows of scale and shift begin
    HAS_Y: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    """What every kernel of this kind does with one token."""
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    here = token * D + column
    x = tl.load(x_ptr + here, mask=inside, other=0.0)
    if HAS_Y:
        gamma = tl.load(gamma_ptr + (gamma_at + column), mask=inside, other=0.0).to(tl.float32)
        x += gamma * tl.load(y_ptr + here, mask=inside, other=0.0).to(tl.float32)
        if x_out_ptr is not None:
            tl.store(x_out_ptr + here, x, mask=inside)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + EPS)
    scale = tl.load(scale_ptr + (norm_at + column), mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + (norm_at + column), mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, (centred * rstd * scale + shift).to(out_ptr.dtype.element_ty), mask=inside)
