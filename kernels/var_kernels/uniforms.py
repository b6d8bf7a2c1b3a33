"""The uniform numbers of a whole request in one launch, so that only seeds cross to the device; see `reference`.

One program per block of positions of one image.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, require_contiguous, require_shape

_BLOCK = 128


def uniforms(seeds_B: Tensor, *, out_BL: Tensor) -> Tensor:
    """See `reference.uniforms`."""
    B, L = out_BL.shape
    require_shape("seeds_B", seeds_B, B)
    require_contiguous(seeds_B=seeds_B, out_BL=out_BL)
    launch(
        _uniforms_kernel,
        (B, cdiv(L, _BLOCK)),
        {"seeds_ptr": seeds_B, "out_ptr": out_BL},
        {"L": L, "BLOCK": _BLOCK},
    )
    return out_BL


@triton.jit
def _uniforms_kernel(
    seeds_ptr,  # int64 [B]
    out_ptr,  # float64 [B, L]
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word0, word1, _, _ = tl.philox(tl.load(seeds_ptr + image), tl.zeros_like(position), position, 0, 0)
    high = (word0.to(tl.uint32) >> 5).to(tl.float64) * 2.0**26
    value = (high + (word1.to(tl.uint32) >> 6).to(tl.float64)) * 2.0**-53
    tl.store(out_ptr + image * L + position, value, mask=position < L)
