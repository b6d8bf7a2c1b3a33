"""The launches that `resources` compiles: every operation at the published sizes, small and large scales.

The arguments' memory is never touched, so large ones cost nothing. `quick` cases compile every kernel and every branch
of it at least once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .reference import HEAD_DIM
from .sizes import PLAIN_SCALE, SCALES, SCALES_256, SCALES_512, WIDTH, C, V, positions

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: Triton's names of what a pointer points to.
POINTERS = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.float64: "fp64", torch.float8_e4m3fn: "fp8e4nv"}
POINTERS |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}

MAPS = ((16, 640), (32, 640), (32, 320), (64, 320), (128, 320), (128, 160), (256, 160), (512, 160))  # side, channels
LAYERS = ("qkv", "fc1", "fc2", "head", "modulation")
Arguments = dict[str, Any]


def _begin(scales: tuple[int, ...], side: int) -> int:
    """Positions of the scales before the one of this side."""
    return positions(scales[: scales.index(side)])


def _t(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _adaln(model: str, side: int, dtype: torch.dtype, *, branch: bool = True) -> Arguments:
    M, D = 2 * side**2, WIDTH[model]
    gamma_RD, scale_RD, shift_RD = _t(2, 6, D)[:, ::2].unbind(1)  # strided, as in the engine
    first = {"y_MD": _t(M, D, dtype=dtype), "gamma_RD": gamma_RD} if branch else {"y_MD": None, "gamma_RD": None}
    return {**first, "x_MD": _t(M, D), "scale_RD": scale_RD, "shift_RD": shift_RD, "out_MD": _t(M, D, dtype=dtype)}


def _cached_attention(model: str, side: int, dtype: torch.dtype, *, R: int = 2, unit: bool = True) -> Arguments:
    n, D, scales = side**2, WIDTH[model], SCALES[model]
    cache_k, cache_v = (_t(R, D // HEAD_DIM, positions(scales), HEAD_DIM, dtype=dtype) for _ in range(2))
    scaling = {"q_scale_H": _t(D // HEAD_DIM) if unit else None, "softmax_scale": 1.0 if unit else PLAIN_SCALE}
    state = {"cache_k_RHLd": cache_k, "cache_v_RHLd": cache_v, "begin": _begin(scales, side)}
    return {"qkv_MN": _t(R * n, 3 * D, dtype=dtype), **scaling, **state, "out_MD": _t(R * n, D, dtype=dtype)}


def _draw(side: int, *, guided: bool = True, smooth: bool = False) -> Arguments:
    B, n, scales = 2, side**2, SCALES_512 if side > 16 else SCALES_256
    begin, L = _begin(scales, side), positions(scales)
    i32, i64, f64 = torch.int32, torch.int64, torch.float64
    settings = {name: _t(B) for name in ("strength_B", "temperature_B", "top_p_B")}
    smoothing = {"smooth_weights_out_BnV": _t(B, n, V), "seeds_B": _t(B, dtype=i64), "ratio": 0.5}
    return {
        "logits_RnV": _t(2 * B if guided else B, n, V),
        "uniforms_Bn": _t(B, L, dtype=f64)[:, begin : begin + n],  # a slice, as in the engine
        **settings,
        "top_k_B": _t(B, dtype=i32),
        "codebook_VC": _t(V, C),
        "guided": guided,
        "tokens_out_Bn": _t(B, L, dtype=i64)[:, begin : begin + n],
        "codes_out_BnC": _t(B, n, C),
        "invalid_out_B": _t(B, dtype=i32),
        **(smoothing if smooth else {}),
        "begin": begin,
    }


def _keep_given(side: int) -> Arguments:
    n, L, begin = side**2, positions(SCALES_256), _begin(SCALES_256, side)
    given_BL, tokens_BL = _t(2, L, dtype=torch.int64), _t(2, L, dtype=torch.int64)
    return {
        "given_tokens_Bn": given_BL[:, begin : begin + n],  # slices, as in the engine
        "given_codes_BnC": _t(2, L, C)[:, begin : begin + n],
        "tokens_out_Bn": tokens_BL[:, begin : begin + n],
        "codes_out_BnC": _t(2, n, C),
    }


def _mix_codes(side: int) -> Arguments:
    n = side**2
    return {"weights_BnV": _t(2, n, V), "codebook_VC": _t(V, C), "codes_out_BnC": _t(2, n, C)}


def _groupnorm_silu(
    side: int,
    dtype: torch.dtype,
    *,
    C: int,
    silu: bool = True,
    branch: bool = False,
    bias: bool = False,
    keep: bool = False,
) -> Arguments:
    x_BlC, branch_BlC, out_BlC = (_t(1, side**2, C, dtype=dtype) for _ in range(3))
    added = {"branch_BlC": branch_BlC if branch else None, "conv_bias_C": _t(C, dtype=dtype) if bias else None}
    outputs = {"sum_out_BlC": x_BlC if branch or keep else None, "out_BlC": out_BlC}
    return {"x_BlC": x_BlC, "weight_C": _t(C), "bias_C": _t(C), "silu": silu, **added, **outputs}


def _linear(
    model: str, side: int, dtype: torch.dtype, *, layer: str = "qkv", R: int = 2, int8: bool = False
) -> Arguments:
    M, D = R * side**2, WIDTH[model]
    modulations = (
        8 * D if model == "d36-s" else (6 * D // HEAD_DIM + 2) * D
    )  # of one projection for all; of every block
    sides = {"qkv": (D, 3 * D), "fc1": (D, 4 * D), "fc2": (4 * D, D), "head": (D, V), "modulation": (D, modulations)}
    K, N = sides[layer]
    weight_KN, column_scale_N = (_t(K, N, dtype=torch.int8), _t(N)) if int8 else (_t(K, N, dtype=dtype), None)
    result = FP32 if layer in ("head", "modulation") else dtype
    weights = {"weight_KN": weight_KN, "bias_N": _t(N, dtype=result), "column_scale_N": column_scale_N}
    return {"x_MK": _t(M, K, dtype=dtype), **weights, "gelu": layer == "fc1", "out_MN": _t(M, N, dtype=result)}


def _next_scale(model: str, side: int) -> Arguments:
    D, scales, p = WIDTH[model], SCALES[model], side
    h = scales[-1]
    maps = {"codes_BnC": _t(1, p * p, C), "f_hat_BlC": _t(1, h * h, C), "f_hat_out_BlC": _t(1, h * h, C)}
    first = {**maps, "phi_weight_9CC": _t(9, C, C), "phi_bias_C": _t(C), "cell_taps_3hp": _t(3, h, p)}
    if p == h:
        return first
    q = scales[scales.index(p) + 1]
    words = {"token_taps_3qp": _t(3, q, p), "area_qh": _t(q, h), "word_weight_CD": _t(C, D)}
    return {**first, **words, "position_mD": _t(q * q, D), "x_out_RmD": _t(2, q * q, D)}


def _quantize_rows(model: str, side: int, dtype: torch.dtype, *, layer: str = "qkv") -> Arguments:
    M, K = 2 * side**2, WIDTH[model] * (4 if layer == "fc2" else 1)
    return {"x_MK": _t(M, K, dtype=dtype), "out_MK": _t(M, K, dtype=torch.float8_e4m3fn), "scale_out_M1": _t(M, 1)}


def _to_pixels(side: int, dtype: torch.dtype) -> Arguments:
    out = {"pixels_out_B3RR": _t(2, 3, side, side), "bytes_out_BRR3": _t(2, side, side, 3, dtype=torch.uint8)}
    return {"x_Bl3": _t(2, side**2, 3, dtype=dtype), "bias_3": _t(3, dtype=dtype), **out}


def _uniforms(model: str) -> Arguments:
    return {"seeds_B": _t(2, dtype=torch.int64), "out_BL": _t(2, positions(SCALES[model]), dtype=torch.float64)}


def _upsample_sum(side: int, dtype: torch.dtype, *, C: int, bias: bool = True) -> Arguments:
    maps = {name: _t(1, side, side, C, dtype=dtype) for name in ("x_BhwC", "branch_BhwC")}
    conv_bias_C, out_BHWC = _t(C, dtype=dtype) if bias else None, _t(1, 2 * side, 2 * side, C, dtype=dtype)
    return {**maps, "conv_bias_C": conv_bias_C, "out_BHWC": out_BHWC}


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an operation."""

    operation: str
    name: str
    arguments: Callable[[], Arguments]
    quick: bool  #: among the few that compile every kernel, storage type and branch once


def _case(
    build: Callable[..., Arguments], *sizes: str | int | torch.dtype, quick: bool = False, **options: Any
) -> Case:
    words = [f"{s}²" if isinstance(s, int) else POINTERS[s] if isinstance(s, torch.dtype) else s for s in sizes]
    words += [f"{name}={value}" for name, value in options.items()]
    return Case(build.__name__[1:], " ".join(words), partial(build, *sizes, **options), quick)


CASES = (
    *(_case(_adaln, "d16", side, BF16, quick=side == 16) for side in (1, 6, 16)),
    *(_case(_adaln, model, side, BF16) for model, side in (("d30", 16), ("d36-s", 32))),
    *(_case(_adaln, "d16", 16, dtype, quick=True) for dtype in (FP16, FP32)),
    _case(_adaln, "d16", 16, BF16, branch=False, quick=True),
    *(_case(_cached_attention, "d16", side, BF16, quick=side == 16) for side in (1, 6, 16)),
    *(_case(_cached_attention, model, side, BF16) for model, side in (("d30", 1), ("d30", 16), ("d36-s", 32))),
    *(_case(_cached_attention, "d16", 16, dtype, quick=True) for dtype in (FP16, FP32)),
    _case(_cached_attention, "d16", 16, BF16, unit=False, quick=True),
    _case(_cached_attention, "d30", 16, BF16, R=16),
    *(_case(_draw, side, quick=side == 16) for side in (1, 6, 16, 32)),
    _case(_draw, 16, guided=False, quick=True),
    _case(_draw, 16, smooth=True, quick=True),
    # As they follow each other in a decoder: after a residual block, inside one, after enlarging, after attention.
    *(_case(_groupnorm_silu, side, BF16, C=C, branch=True, bias=True) for side, C in MAPS),
    *(_case(_groupnorm_silu, side, BF16, C=C, bias=True, quick=side == 256) for side, C in MAPS),
    *(_case(_groupnorm_silu, side, BF16, C=C, bias=True, keep=True) for side, C in MAPS if side > 16),
    _case(_groupnorm_silu, 16, BF16, C=640, branch=True, quick=True),
    _case(_groupnorm_silu, 16, BF16, C=640, silu=False, branch=True, bias=True, quick=True),
    *(_case(_groupnorm_silu, 16, FP32, C=C, branch=True, bias=True) for C in (32, 64, 640)),
    *(_case(_groupnorm_silu, 256, dtype, C=160, bias=True, keep=True, quick=True) for dtype in (FP16, FP32)),
    *(_case(_groupnorm_silu, 256, dtype, C=160, branch=True, bias=True, quick=True) for dtype in (FP16, FP32)),
    *(_case(_groupnorm_silu, 256, dtype, C=160) for dtype in (BF16, FP32)),
    _case(_groupnorm_silu, 1, BF16, C=64, branch=True, bias=True, quick=True),  # Triton makes sizes of 1 constants
    _case(_keep_given, 16, quick=True),
    *(_case(_linear, "d16", side, BF16, layer=layer) for side in (1, 6, 16) for layer in LAYERS),
    *(_case(_linear, "d30", side, BF16, layer=layer) for side in (1, 16) for layer in LAYERS),
    *(_case(_linear, "d36-s", 32, BF16, layer=layer) for layer in LAYERS),
    _case(_linear, "d30", 16, BF16, layer="fc1", R=16, quick=True),
    *(_case(_linear, "d16", 16, dtype, quick=True) for dtype in (FP16, FP32)),
    *(_case(_linear, "d16", side, BF16, layer="fc1", int8=True, quick=side == 16) for side in (1, 16)),
    _case(_linear, "d16", 16, FP16, int8=True),
    _case(_mix_codes, 16, quick=True),
    *(_case(_next_scale, "d16", side, quick=side > 10) for side in (1, 6, 13, 16)),
    _case(_next_scale, "d30", 13),
    *(_case(_next_scale, "d36-s", side) for side in (1, 24, 32)),
    *(_case(_quantize_rows, "d16", side, BF16, quick=side == 16) for side in (1, 16)),
    *(_case(_quantize_rows, model, side, BF16, layer="fc2") for model, side in (("d30", 16), ("d36-s", 32))),
    *(_case(_quantize_rows, "d16", 16, dtype, quick=True) for dtype in (FP16, FP32)),
    *(_case(_to_pixels, 256, dtype, quick=True) for dtype in (BF16, FP16, FP32)),
    _case(_to_pixels, 512, BF16),
    *(_case(_uniforms, model, quick=model == "d16") for model in WIDTH),
    *(_case(_upsample_sum, side, BF16, C=C) for side, C in ((16, 640), (32, 320), (64, 320), (256, 160))),
    *(_case(_upsample_sum, 128, dtype, C=160, quick=True) for dtype in (BF16, FP16, FP32)),
    _case(_upsample_sum, 16, BF16, C=640, bias=False, quick=True),
)
