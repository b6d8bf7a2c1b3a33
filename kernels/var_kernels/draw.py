"""Guidance mix, top-k, top-p and one token per position, without sorting; see `reference.draw`.

One program per (image, position) holds its V logits in registers. Each filter is a threshold on the logits, found by
bisection over the 32 bits of unsigned integers that order as the logits do: 32 sums over V, and none where the filter
is off. Expected to be bound by the latency of those sums, not measured yet; every logit is read once.

The settings are read from memory, one set per image, so that a CUDA graph can replay with others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2, require_contiguous, require_dtype, require_shape
from .reference import smooth_temperature


def draw(
    logits_RnV: Tensor,
    uniforms_Bn: Tensor,
    strength_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    codebook_VC: Tensor,
    *,
    guided: bool,
    tokens_out_Bn: Tensor,
    codes_out_BnC: Tensor,
    invalid_out_B: Tensor,
    smooth_weights_out_BnV: Tensor | None = None,
    seeds_B: Tensor | None = None,
    begin: int = 0,
    ratio: float = 0.0,
) -> None:
    """See `reference.draw`. Uniforms and tokens may be a slice of positions: unit stride along n, any between images.

    Of an image marked invalid, only the positions with a bad logit get arbitrary tokens.
    """
    (B, n), (V, C) = uniforms_Bn.shape, codebook_VC.shape
    require_contiguous(
        logits_RnV=logits_RnV,
        codebook_VC=codebook_VC,
        codes_out_BnC=codes_out_BnC,
        smooth_weights_out_BnV=smooth_weights_out_BnV,
    )
    require_shape("logits_RnV", logits_RnV, 2 * B if guided else B, n, V)
    require_shape("tokens_out_Bn", tokens_out_Bn, B, n)
    require_shape("codes_out_BnC", codes_out_BnC, B, n, C)
    for name, setting_B, dtype in (
        ("strength_B", strength_B, torch.float32),
        ("temperature_B", temperature_B, torch.float32),
        ("top_k_B", top_k_B, torch.int32),
        ("top_p_B", top_p_B, torch.float32),
        ("invalid_out_B", invalid_out_B, torch.int32),
    ):
        require_contiguous(**{name: setting_B})
        require_shape(name, setting_B, B)
        require_dtype(name, setting_B, dtype)
    require_dtype("logits_RnV", logits_RnV, torch.float32)
    require_dtype("uniforms_Bn", uniforms_Bn, torch.float64)
    require_dtype("tokens_out_Bn", tokens_out_Bn, torch.int64)
    if n > 1 and (uniforms_Bn.stride(1) != 1 or tokens_out_Bn.stride(1) != 1):
        raise ValueError("uniforms_Bn and tokens_out_Bn: expected unit stride along n")
    if smooth_weights_out_BnV is not None:
        require_shape("smooth_weights_out_BnV", smooth_weights_out_BnV, B, n, V)
        if seeds_B is None:
            raise ValueError("seeds_B: None, expected the images' seeds with smooth_weights_out_BnV")
        require_shape("seeds_B", seeds_B, B)
        require_dtype("seeds_B", seeds_B, torch.int64)
    block = max(next_power_of_2(V), 128)
    launch(
        _draw_kernel,
        (n, B),
        {
            "logits_ptr": logits_RnV,
            "uniforms_ptr": uniforms_Bn,
            "strength_ptr": strength_B,
            "temperature_ptr": temperature_B,
            "top_k_ptr": top_k_B,
            "top_p_ptr": top_p_B,
            "codebook_ptr": codebook_VC,
            "tokens_ptr": tokens_out_Bn,
            "codes_ptr": codes_out_BnC,
            "invalid_ptr": invalid_out_B,
            "smooth_ptr": smooth_weights_out_BnV,
            "seeds_ptr": None if smooth_weights_out_BnV is None else seeds_B,
            "uniforms_stride": uniforms_Bn.stride(0),
            "tokens_stride": tokens_out_Bn.stride(0),
            "begin": begin,
            "sharpening": 1 + ratio,
            "tau": smooth_temperature(ratio),
        },
        {
            "GUIDED": guided,
            "SMOOTH": smooth_weights_out_BnV is not None,
            "V": V,
            "C": C,
            "BLOCK_V": block,
            "BLOCK_C": next_power_of_2(C),
        },
        num_warps=min(max(block // 512, 1), 16),  # 16 logits per thread; not measured yet
    )


@triton.jit(do_not_specialize=["uniforms_stride", "tokens_stride", "begin"])
def _draw_kernel(
    logits_ptr,  # float32 [R, n, V]
    uniforms_ptr,  # float64 [B, n], images uniforms_stride apart
    strength_ptr,  # float32 [B]
    temperature_ptr,  # float32 [B]
    top_k_ptr,  # int32 [B]
    top_p_ptr,  # float32 [B]
    codebook_ptr,  # float32 [V, C]
    tokens_ptr,  # int64 [B, n], images tokens_stride apart
    codes_ptr,  # float32 [B, n, C]
    invalid_ptr,  # int32 [B]
    smooth_ptr,  # float32 [B, n, V] with SMOOTH
    seeds_ptr,  # int64 [B] with SMOOTH
    uniforms_stride,
    tokens_stride,
    begin,
    sharpening,
    tau,
    GUIDED: tl.constexpr,
    SMOOTH: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    position, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, images = tl.num_programs(0), tl.num_programs(1)
    place = image * n + position
    column = tl.arange(0, BLOCK_V)
    inside = column < V

    logits = tl.load((logits_ptr + place * V) + column, mask=inside, other=0.0)
    if GUIDED:
        strength = tl.load(strength_ptr + image)
        null = tl.load((logits_ptr + (place + images * n) * V) + column, mask=inside, other=0.0)
        logits = (1 + strength) * logits - strength * null
    logits = tl.div_rn(logits, tl.load(temperature_ptr + image))  # exact at temperature 1
    finite = tl.abs(logits) < float("inf")  # false for NaN
    broken = tl.max((inside & ~finite).to(tl.int32), axis=0) != 0
    tl.store(invalid_ptr + image, 1, mask=broken)
    # Zeros keep the rest in range. Comparing with zero turns −0 into +0, so that both have one key.
    logits = tl.where(broken | (logits == 0), 0.0, logits)
    # Padding is −∞: its key is below that of every logit and its weight is zero, so that no sum needs a mask.
    logits = tl.where(inside, logits, -float("inf"))

    # Unsigned integers in the order of the logits: all bits of a negative number flip, else the sign bit alone.
    bits = logits.to(tl.uint32, bitcast=True)
    key = tl.where(logits < 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    peak = tl.max(logits, axis=0)
    bound = tl.full([], 0, tl.uint32)  # entries are kept whose key is at least this
    top_k, top_p = tl.load(top_k_ptr + image), tl.load(top_p_ptr + image)
    if (top_k > 0) & (top_k < V):
        # The largest bound that k keys reach is the k-th largest key.
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            reached = tl.sum((key >= (bound | bit)).to(tl.int32), axis=0)
            bound = tl.where(reached >= top_k, bound | bit, bound)
            bit = bit >> 1
    if (top_p > 0) & (top_p < 1):
        # The largest bound below which no more than 1 − p of the weight lies. Rounding cannot upset the bisection: a
        # higher bound turns zeros of one fixed tree of sums into positive numbers, and float addition is monotone.
        weight = tl.where(key >= bound, tl.exp(logits - peak), 0.0)
        limit = (1 - top_p) * tl.sum(weight, axis=0)
        bound = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            dropped = tl.sum(tl.where(key < (bound | bit), weight, 0.0), axis=0)
            bound = tl.where(dropped <= limit, bound | bit, bound)
            bit = bit >> 1
        bound = tl.minimum(bound, tl.max(key, axis=0))  # the largest stays, however small p is
    logits = tl.where(key >= bound, logits, -float("inf"))
    weight = tl.exp(logits - peak)

    # Whatever rounding does to the sums, the token has a positive weight, which only kept entries have: it is the first
    # such one beyond the target or, where none is, the last such one. The largest logit has weight 1.
    cumulated = tl.cumsum(weight, axis=0)
    target = tl.load(uniforms_ptr + image * uniforms_stride + position) * tl.max(cumulated, axis=0)
    first = tl.min(tl.where((weight > 0) & (cumulated > target.to(tl.float32)), column, BLOCK_V), axis=0)
    last = tl.max(tl.where(weight > 0, column, 0), axis=0)
    token = tl.minimum(first, last)
    tl.store(tokens_ptr + image * tokens_stride + position, token.to(tl.int64))
    channel = tl.arange(0, BLOCK_C)
    code = tl.load(codebook_ptr + token * C + channel, mask=channel < C)
    tl.store(codes_ptr + place * C + channel, code, mask=channel < C)

    if SMOOTH:
        # One block of Philox makes the noise of four neighbouring entries.
        word0, word1, word2, word3 = tl.philox(
            tl.load(seeds_ptr + image), tl.arange(0, BLOCK_V // 4), begin + position, 1, 0
        )
        words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
        # float32 would round the largest words to a uniform of 1, whose noise is infinite.
        open_unit = (words.to(tl.float64) + 0.5) * 2.0**-32
        gumbel = (-tl.log(-tl.log(open_unit))).to(tl.float32)
        scores = (logits * sharpening + gumbel) / tau
        mixture = tl.exp(scores - tl.max(scores, axis=0))
        tl.store((smooth_ptr + place * V) + column, mixture / tl.sum(mixture, axis=0), mask=inside)
