"""What a user of PyTorch would write for each operation: library calls in the storage type, results as new tensors.

The storage type holds also where the kernel keeps float32 (the residual stream), so these move fewer bytes there and
are not put at a disadvantage; maps have the layout that the library's next call wants.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .benchmark_setup import GUIDANCE, TOP_K, TOP_P, Results
from .reference import FP8_MAX, GROUPS, HEAD_DIM, LN_EPS, NORM_EPS


def adaln(x_RnD: Tensor, y_RnD: Tensor, gamma_R1D: Tensor, scale_R1D: Tensor, shift_R1D: Tensor) -> Results:
    x_RnD = x_RnD + gamma_R1D * y_RnD
    return x_RnD, F.layer_norm(x_RnD, x_RnD.shape[-1:], eps=LN_EPS) * scale_R1D + shift_R1D


def cached_attention(
    qkv_MN: Tensor, q_scale_H11: Tensor | None, cache_k_RHLd: Tensor, cache_v_RHLd: Tensor, begin: int, scale: float
) -> Results:
    R, H = cache_k_RHLd.shape[:2]
    q_RHnd, k_RHnd, v_RHnd = qkv_MN.view(R, -1, 3, H, HEAD_DIM).permute(2, 0, 3, 1, 4)
    end = begin + q_RHnd.shape[2]
    if q_scale_H11 is not None:
        q_RHnd, k_RHnd = F.normalize(q_RHnd, dim=-1) * q_scale_H11, F.normalize(k_RHnd, dim=-1)
    cache_k_RHLd[:, :, begin:end] = k_RHnd
    cache_v_RHLd[:, :, begin:end] = v_RHnd
    y_RHnd = F.scaled_dot_product_attention(q_RHnd, cache_k_RHLd[:, :, :end], cache_v_RHLd[:, :, :end], scale=scale)
    return (y_RHnd.transpose(1, 2).reshape(-1, H * HEAD_DIM),)


def linear(x_MK: Tensor, weight_KN: Tensor, bias_N: Tensor, column_scale_N: Tensor | None) -> Results:
    if column_scale_N is not None:
        weight_KN = weight_KN.to(x_MK.dtype) * column_scale_N
    return (torch.addmm(bias_N, x_MK, weight_KN),)


def linear_gelu(x_MK: Tensor, weight_KN: Tensor, bias_N: Tensor, column_scale_N: Tensor | None) -> Results:
    (y_MN,) = linear(x_MK, weight_KN, bias_N, column_scale_N)
    return (F.gelu(y_MN, approximate="tanh"),)


def quantize_rows(x_MK: Tensor) -> Results:
    peak_M1 = x_MK.abs().amax(-1, keepdim=True).float()
    scale_M1 = torch.where(peak_M1 > 0, peak_M1 / FP8_MAX, 1.0)
    return (x_MK.float() / scale_M1).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_M1


def uniforms(seeds_B: Tensor, L: int) -> Results:
    """No library call makes these numbers, so that it is the reference's integer arithmetic."""
    out_BL = torch.empty(seeds_B.shape[0], L, dtype=torch.float64, device=seeds_B.device)
    return (reference.uniforms(seeds_B, out_BL=out_BL),)


def draw(
    logits_RnV: Tensor, uniforms_Bn: Tensor, codebook_VC: Tensor, gumbel_BnV: Tensor | None, ratio: float
) -> Results:
    """Filters as VAR's published sampler has them, then one token by the given uniform number.

    Guided where an image has two rows. With noise, the smooth mixture too; the kernel makes its noise itself.
    """
    B, V = uniforms_Bn.shape[0], logits_RnV.shape[-1]
    logits_BnV = logits_RnV
    if logits_RnV.shape[0] > B:
        logits_BnV = (1 + GUIDANCE) * logits_RnV[:B] - GUIDANCE * logits_RnV[B:]
    if TOP_K < V:
        least_Bn1 = logits_BnV.topk(TOP_K, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits_BnV = logits_BnV.masked_fill(logits_BnV < least_Bn1, -math.inf)
    ascending_BnV, order_BnV = logits_BnV.sort(-1)
    dropped_BnV = ascending_BnV.softmax(-1).cumsum(-1) <= 1 - TOP_P
    logits_BnV = logits_BnV.masked_fill(dropped_BnV.scatter(-1, order_BnV, dropped_BnV), -math.inf)
    cumulated_BnV = logits_BnV.softmax(-1).cumsum(-1)
    drawn_Bn1 = uniforms_Bn.unsqueeze(-1).float() * cumulated_BnV[..., -1:]
    tokens_Bn = torch.searchsorted(cumulated_BnV, drawn_Bn1, right=True).squeeze(-1).clamp_max(V - 1)
    if gumbel_BnV is None:
        return tokens_Bn, codebook_VC[tokens_Bn]
    scores_BnV = (logits_BnV * (1 + ratio) + gumbel_BnV) / reference.smooth_temperature(ratio)
    return tokens_Bn, codebook_VC[tokens_Bn], scores_BnV.softmax(-1)


def keep_given(given_Bn: Tensor, given_BnC: Tensor, tokens_Bn: Tensor, codes_BnC: Tensor) -> Results:
    kept_Bn = given_Bn >= 0
    return torch.where(kept_Bn, given_Bn, tokens_Bn), torch.where(kept_Bn.unsqueeze(-1), given_BnC, codes_BnC)


def mix_codes(weights_BnV: Tensor, codebook_VC: Tensor) -> Results:
    return (weights_BnV @ codebook_VC,)


def next_scale(
    codes_BnC: Tensor, f_hat_BChh: Tensor, weight_CC33: Tensor, bias_C: Tensor, word_CD: Tensor, position_mD: Tensor
) -> Results:
    B, n, C = codes_BnC.shape
    p, q, h = math.isqrt(n), math.isqrt(position_mD.shape[0]), f_hat_BChh.shape[-1]
    codes_BCpp = codes_BnC.transpose(1, 2).reshape(B, C, p, p)
    enlarged_BChh = F.interpolate(codes_BCpp, size=(h, h), mode="bicubic")
    f_hat_BChh = f_hat_BChh + F.conv2d(enlarged_BChh, weight_CC33, bias_C, padding=1)
    features_BmC = F.interpolate(f_hat_BChh, size=(q, q), mode="area").flatten(2).transpose(1, 2)
    return f_hat_BChh, (features_BmC @ word_CD + position_mD).repeat(2, 1, 1)


def groupnorm_silu(
    x_BChh: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    branch_BChh: Tensor | None = None,
    conv_bias_C11: Tensor | None = None,
) -> Results:
    """The norm, and where there is a branch the sum."""
    sum_BChh = x_BChh if branch_BChh is None or conv_bias_C11 is None else x_BChh + branch_BChh + conv_bias_C11
    out_BChh = F.silu(F.group_norm(sum_BChh, GROUPS, weight_C, bias_C, eps=NORM_EPS))
    return (out_BChh,) if branch_BChh is None else (out_BChh, sum_BChh)


def upsample_sum(x_BChh: Tensor, branch_BChh: Tensor, conv_bias_C11: Tensor) -> Results:
    return (F.interpolate(x_BChh + branch_BChh + conv_bias_C11, scale_factor=2, mode="nearest"),)


def to_pixels(x_Bl3: Tensor, bias_3: Tensor, side: int) -> Results:
    unit_BRR3 = ((x_Bl3.float() + bias_3) * 0.5 + 0.5).clamp(0, 1).view(-1, side, side, 3)
    return unit_BRR3.permute(0, 3, 1, 2).contiguous(), (unit_BRR3 * 255).round().to(torch.uint8)
