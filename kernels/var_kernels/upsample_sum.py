"""A residual sum enlarged to twice its sides by repeating cells, channels-last; see `reference.upsample_sum`.

    out[2i + a, 2j + b] = x[i, j] + branch[i, j] + conv_bias   for a and b in {0, 1}

Expected to be bound by memory, not measured yet: x and branch are read once, out is written once. One program per run
of cells of an image; channels come in runs of a power of two that divides C, so that no thread is idle and the place of
a run is computed once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, require_contiguous, require_shape

BLOCK = 1024  # values of a program: eight neighbours per thread, which are 16 bytes of a 2-byte type; not measured yet


def upsample_sum(
    x_BhwC: Tensor, *, branch_BhwC: Tensor | None = None, conv_bias_C: Tensor | None = None, out_BHWC: Tensor
) -> Tensor:
    """See `reference.upsample_sum`. Meant for widths that a power of two from 8 on divides; any width works."""
    B, h, w, C = x_BhwC.shape
    require_contiguous(x_BhwC=x_BhwC, branch_BhwC=branch_BhwC, conv_bias_C=conv_bias_C, out_BHWC=out_BHWC)
    if branch_BhwC is not None:
        require_shape("branch_BhwC", branch_BhwC, B, h, w, C)
    if conv_bias_C is not None:
        require_shape("conv_bias_C", conv_bias_C, C)
    require_shape("out_BHWC", out_BHWC, B, 2 * h, 2 * w, C)
    run = min(C & -C, BLOCK)
    runs = h * w * (C // run)
    launch(
        _upsample_sum_kernel,
        (cdiv(runs, BLOCK // run), B),
        {
            "x_ptr": x_BhwC,
            "branch_ptr": branch_BhwC,
            "conv_bias_ptr": conv_bias_C,
            "out_ptr": out_BHWC,
            "runs": runs,
            "w": w,
        },
        {
            "HAS_BRANCH": branch_BhwC is not None,
            "HAS_CONV_BIAS": conv_bias_C is not None,
            "C": C,
            "RUN": run,
            "TILE_RUNS": BLOCK // run,
        },
    )
    return out_BHWC


@triton.jit
def _upsample_sum_kernel(
    x_ptr,  # [B, h, w, C]
    branch_ptr,  # [B, h, w, C]
    conv_bias_ptr,  # [C]
    out_ptr,  # [B, 2h, 2w, C]
    runs,  # of an image
    w,
    HAS_BRANCH: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    C: tl.constexpr,
    RUN: tl.constexpr,  # neighbouring channels, power of two, divides C
    TILE_RUNS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * TILE_RUNS + tl.arange(0, TILE_RUNS)
    cell = run // (C // RUN)
    member = tl.arange(0, RUN)[None, :]
    inside = (run < runs)[:, None]
    here = run[:, None] * RUN + member
    channel = (run % (C // RUN) * RUN)[:, None] + member
    begin = image * runs * RUN

    x = tl.load(x_ptr + begin + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + begin + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_CONV_BIAS:
        x += tl.load(conv_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x = x.to(out_ptr.dtype.element_ty)

    first = (cell // w) * 4 * w + (cell % w) * 2  # of the four cells, among those of the large map
    first_ptr = out_ptr + begin * 4 + (first * C)[:, None] + channel
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            tl.store(first_ptr + (a * 2 * w + b) * C, x, mask=inside)
