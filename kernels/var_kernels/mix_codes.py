"""Mixtures of codes: smooth weights times codebook, in float32; see `reference.mix_codes`.

    codes = weights·codebook

A program makes the mixtures of BLOCK_M positions and reads the codebook once for all of them. Products split each
float32 into two TF32 numbers ("tf32x3"), which keeps 22 of its 24 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_shape

BLOCK_M, BLOCK_V = 16, 128  # the fewest rows of a product on tensor cores; not measured yet


def mix_codes(weights_BnV: Tensor, codebook_VC: Tensor, *, codes_out_BnC: Tensor) -> None:
    """See `reference.mix_codes`."""
    (B, n, V), C = weights_BnV.shape, codebook_VC.shape[1]
    require_contiguous(weights_BnV=weights_BnV, codebook_VC=codebook_VC, codes_out_BnC=codes_out_BnC)
    require_shape("codebook_VC", codebook_VC, V, C)
    require_shape("codes_out_BnC", codes_out_BnC, B, n, C)
    launch(
        _mix_codes_kernel,
        (cdiv(B * n, BLOCK_M),),
        {"weights_ptr": weights_BnV, "codebook_ptr": codebook_VC, "codes_ptr": codes_out_BnC, "M": B * n},
        {"V": V, "C": C, "BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "BLOCK_C": max(next_power_of_2(C), 16)},
    )


@triton.jit(do_not_specialize=["M"])
def _mix_codes_kernel(
    weights_ptr,  # float32 [M, V]
    codebook_ptr,  # float32 [V, C]
    codes_ptr,  # float32 [M, C]
    M,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    sums_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for begin in range(0, V, BLOCK_V):
        entry = begin + tl.arange(0, BLOCK_V)
        weights_MV = tl.load(
            weights_ptr + place * V + entry[None, :], mask=(place < M) & (entry < V)[None, :], other=0.0
        )
        codes_VC = tl.load(
            codebook_ptr + entry[:, None] * C + channel, mask=(entry < V)[:, None] & (channel < C), other=0.0
        )
        sums_MC = tl.dot(weights_MV, codes_VC, sums_MC, input_precision="tf32x3")
    tl.store(codes_ptr + place * C + channel, sums_MC, mask=(place < M) & (channel < C))
