"""Tokens and codes that a request brings, in the place of those that were drawn; see `reference.keep_given`.

One program per block of positions of one image. A few bytes move, so a launch is all that it is expected to cost; not
measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_dtype, require_shape

BLOCK_N = 32


def keep_given(
    given_tokens_Bn: Tensor, given_codes_BnC: Tensor, *, tokens_out_Bn: Tensor, codes_out_BnC: Tensor
) -> None:
    """See `reference.keep_given`. All but `codes_out_BnC` may be a slice of positions: any stride between images."""
    B, n, C = codes_out_BnC.shape
    require_contiguous(codes_out_BnC=codes_out_BnC)
    for name, tokens_Bn in (("given_tokens_Bn", given_tokens_Bn), ("tokens_out_Bn", tokens_out_Bn)):
        require_shape(name, tokens_Bn, B, n)
        require_dtype(name, tokens_Bn, torch.int64)
        if n > 1 and tokens_Bn.stride(1) != 1:
            raise ValueError(f"{name}: expected unit stride along n")
    require_shape("given_codes_BnC", given_codes_BnC, B, n, C)
    require_dtype("given_codes_BnC", given_codes_BnC, torch.float32)
    if given_codes_BnC.stride()[1:] != (C, 1):
        raise ValueError(f"given_codes_BnC: strides {given_codes_BnC.stride()}, expected (any, {C}, 1)")
    launch(
        _keep_given_kernel,
        (cdiv(n, BLOCK_N), B),
        {
            "given_tokens_ptr": given_tokens_Bn,
            "given_codes_ptr": given_codes_BnC,
            "tokens_ptr": tokens_out_Bn,
            "codes_ptr": codes_out_BnC,
            "n": n,
            "given_tokens_stride": given_tokens_Bn.stride(0),
            "given_codes_stride": given_codes_BnC.stride(0),
            "tokens_stride": tokens_out_Bn.stride(0),
        },
        {"C": C, "BLOCK_N": BLOCK_N, "BLOCK_C": next_power_of_2(C)},
    )


@triton.jit(do_not_specialize=["n", "given_tokens_stride", "given_codes_stride", "tokens_stride"])
def _keep_given_kernel(
    given_tokens_ptr,  # int64 [B, n], images given_tokens_stride apart; negative: not given
    given_codes_ptr,  # float32 [B, n, C], images given_codes_stride apart
    tokens_ptr,  # int64 [B, n], images tokens_stride apart
    codes_ptr,  # float32 [B, n, C]
    n,
    given_tokens_stride,
    given_codes_stride,
    tokens_stride,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    position, image = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    token = tl.load(given_tokens_ptr + image * given_tokens_stride + position, mask=position < n, other=-1)
    given = token >= 0
    tl.store(tokens_ptr + image * tokens_stride + position, token, mask=given)
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = given[:, None] & (channel < C)
    place = position[:, None] * C + channel
    code = tl.load(given_codes_ptr + image * given_codes_stride + place, mask=inside)
    tl.store(codes_ptr + image * n * C + place, code, mask=inside)
