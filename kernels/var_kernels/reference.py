"""What every kernel computes, in plain PyTorch: the oracle, never rewritten for speed.

Arithmetic is float32 (draws: float64) whatever the storage type, and results are rounded where the kernel rounds: to
the type of the buffer they go into. Each function has the signature of its kernel and writes into the caller's buffers.

Axes: R rows (B images, or 2B under guidance: conditioned first), n tokens of a scale per row, M = R·n, D width, H heads
of width 64, L cache length, V codebook entries, C code or channel width, h side of the feature map, l = h² cells, p and
q sides of two consecutive token maps, K and N the sides of a weight matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIM = 64
LN_EPS = 1e-6  # of the transformer's LayerNorm, which has no affine part
L2_EPS = 1e-12  # of the unit length of queries and keys
GROUPS = 32  # GroupNorm groups of the VQVAE
NORM_EPS = 1e-6  # of its GroupNorm
FP8_MAX = 448.0  # largest finite float8 e4m3


def adaln(
    x_MD: Tensor,  # float32 [R·n, D], the residual stream; updated in place where there is a y
    y_MD: Tensor | None,  # [R·n, D], what the branch before computed
    gamma_RD: Tensor | None,  # float32 [R, D], its gate
    scale_RD: Tensor,  # float32 [R, D]; holds 1 + scale already
    shift_RD: Tensor,  # float32 [R, D]
    *,
    out_MD: Tensor,  # [R·n, D]
) -> Tensor:
    """x ← x + gamma·y, then LN(x)·scale + shift into `out_MD`, which is returned.

    LayerNorm without affine part, eps 1e-6. The row vectors may be strided views of one modulation tensor.
    """
    n = x_MD.shape[0] // scale_RD.shape[0]
    if y_MD is not None and gamma_RD is not None:
        x_MD.add_(gamma_RD.repeat_interleave(n, 0) * y_MD.float())
    normed_MD = F.layer_norm(x_MD, x_MD.shape[-1:], eps=LN_EPS)
    return out_MD.copy_(normed_MD * scale_RD.repeat_interleave(n, 0) + shift_RD.repeat_interleave(n, 0))


def cached_attention(
    qkv_MN: Tensor,  # [R·n, 3·H·64]: queries, keys, values of a scale's tokens
    q_scale_H: Tensor | None,  # float32 [H], exp of the learned scale; None: plain attention, nothing is normalised
    cache_k_RHLd: Tensor,  # [R, H, L, 64]; positions [begin, begin + n) are written, those before are read
    cache_v_RHLd: Tensor,  # [R, H, L, 64]
    *,
    begin: int,  # first position of the scale
    softmax_scale: float,  # 1 with unit-length queries and keys
    out_MD: Tensor,  # [R·n, H·64]
) -> Tensor:
    """Attention of a scale's tokens over all positions up to their own scale's last; returns `out_MD`.

    With `q_scale_H`, queries and keys are normalised to unit length per head and queries multiplied by it. Keys go
    into the cache normalised. No mask: a token attends to its whole scale and to all before. Queries, keys and the
    softmax weights are rounded to the storage type before the two products, which add up in float32.
    """
    R, H = cache_k_RHLd.shape[:2]
    dtype, end = qkv_MN.dtype, begin + qkv_MN.shape[0] // R
    q, k, v = qkv_MN.view(R, -1, 3, H, HEAD_DIM).permute(2, 0, 3, 1, 4)
    if q_scale_H is not None:
        q, k = _unit_length(q.float()) * q_scale_H.view(H, 1, 1), _unit_length(k.float())
    cache_k_RHLd[:, :, begin:end] = k
    cache_v_RHLd[:, :, begin:end] = v
    keys, values = cache_k_RHLd[:, :, :end].float(), cache_v_RHLd[:, :, :end].float()
    scores_RHnl = q.to(dtype).float() @ keys.transpose(-1, -2) * softmax_scale
    weights_RHnl = (scores_RHnl - scores_RHnl.amax(-1, keepdim=True)).exp()
    attended_RHnd = (weights_RHnl.to(dtype).float() @ values) / weights_RHnl.sum(-1, keepdim=True)
    return out_MD.copy_(attended_RHnd.transpose(1, 2).reshape(out_MD.shape))


def _unit_length(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(L2_EPS)


def linear(
    x_MK: Tensor,
    weight_KN: Tensor,  # of x's type, or int8
    bias_N: Tensor,  # any floating type
    *,
    column_scale_N: Tensor | None = None,  # float32, with int8 weights: the weight is weight·column_scale
    gelu: bool = False,
    out_MN: Tensor,
) -> Tensor:
    """x·weight + bias, then with `gelu` the tanh-approximated GELU; added up in float32; returns `out_MN`."""
    y_MN = x_MK.float() @ weight_KN.float()
    if column_scale_N is not None:
        y_MN *= column_scale_N
    y_MN += bias_N.float()
    return out_MN.copy_(F.gelu(y_MN, approximate="tanh") if gelu else y_MN)


def quantize_rows(
    x_MK: Tensor,
    *,
    out_MK: Tensor,  # float8_e4m3fn
    scale_out_M1: Tensor,  # float32
) -> None:
    """Every row as float8 times one scale, so that its largest magnitude becomes 448; a row of zeros has scale 1."""
    peak_M1 = x_MK.float().abs().amax(-1, keepdim=True)
    scale_M1 = torch.where(peak_M1 > 0, peak_M1 / FP8_MAX, torch.ones_like(peak_M1))
    scale_out_M1.copy_(scale_M1)
    out_MK.copy_((x_MK.float() / scale_M1).clamp(-FP8_MAX, FP8_MAX))


def uniforms(
    seeds_B: Tensor,  # int64 (the bits of an unsigned 64-bit seed)
    *,
    out_BL: Tensor,  # float64
) -> Tensor:
    """One uniform number in [0, 1) per image and position, 53 bits each; returns `out_BL`.

    Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (0, position, 0, 0).
    """
    positions = torch.arange(out_BL.shape[1], device=seeds_B.device)
    words = _philox4x32(torch.zeros_like(positions), positions, 0, seeds_B.view(-1, 1))
    bits_53 = (words[..., 0] >> 5 << 26) + (words[..., 1] >> 6)
    return out_BL.copy_(bits_53.double() * 2.0**-53)


def draw(
    logits_RnV: Tensor,  # float32; R = 2B where `guided`, else B
    uniforms_Bn: Tensor,  # float64 in [0, 1)
    strength_B: Tensor,  # float32, guidance t: (1 + t)·conditioned − t·null
    temperature_B: Tensor,  # float32 > 0, divides the mixed logits
    top_k_B: Tensor,  # int32, 0 or at least V: off
    top_p_B: Tensor,  # float32, 0 or at least 1: off
    codebook_VC: Tensor,  # float32
    *,
    guided: bool,
    tokens_out_Bn: Tensor,  # int64
    codes_out_BnC: Tensor,  # float32
    invalid_out_B: Tensor,  # int32, set to 1 for an image with a logit that is NaN or infinite; never set to 0
    smooth_weights_out_BnV: Tensor | None = None,  # float32: also compute the smooth mixture
    seeds_B: Tensor | None = None,  # int64 (the bits of an unsigned 64-bit seed), for `smooth` only
    begin: int = 0,  # first position of the scale, for `smooth` only
    ratio: float = 0.0,  # k/(K − 1), for `smooth` only
) -> None:
    """Guidance mix, top-k, top-p, and one token per position by inverting the cumulative distribution.

    The token is the first in vocabulary order at which the cumulative probability of the kept tokens exceeds the
    uniform; its code is looked up. Both filters are one threshold on the logits, so equal logits are kept or dropped
    together (paper section 3.4; VAR's published sampler up to ties). An image marked invalid gets arbitrary tokens in
    range. Smooth weights are softmax((logits·(1 + ratio) + gumbel)/τ) over the kept tokens, with
    τ = max(0.27·(1 − 0.95·ratio), 0.005) and Philox4x32-10 noise: key = seed, counter = (token / 4, position, 1, 0).
    """
    B, n = uniforms_Bn.shape
    V = logits_RnV.shape[-1]
    logits_BnV = logits_RnV[:B]
    if guided:
        t_B11 = strength_B.view(B, 1, 1)
        logits_BnV = (1 + t_B11) * logits_BnV - t_B11 * logits_RnV[B:]
    logits_BnV = logits_BnV / temperature_B.view(B, 1, 1)
    invalid_B = ~logits_BnV.isfinite().all(-1).all(-1)
    invalid_out_B.masked_fill_(invalid_B, 1)
    logits_BnV = logits_BnV.masked_fill(invalid_B.view(B, 1, 1), 0.0)

    ascending_BnV = logits_BnV.sort(-1).values
    k_B11 = torch.where((top_k_B > 0) & (top_k_B < V), top_k_B, V).long().view(B, 1, 1)
    threshold_Bn1 = ascending_BnV.gather(-1, (V - k_B11).expand(B, n, 1))
    p_B11 = torch.where((top_p_B > 0) & (top_p_B < 1), top_p_B, torch.ones_like(top_p_B)).double().view(B, 1, 1)
    weights_BnV = (ascending_BnV - ascending_BnV[..., -1:]).double().exp()
    cumulated_BnV = weights_BnV.masked_fill(ascending_BnV < threshold_Bn1, 0.0).cumsum(-1)
    dropped_Bn1 = (cumulated_BnV <= (1 - p_B11) * cumulated_BnV[..., -1:]).sum(-1, keepdim=True)
    least_Bn1 = ascending_BnV.gather(-1, dropped_Bn1.clamp_max(V - 1))
    threshold_Bn1 = torch.where(p_B11 < 1, torch.maximum(threshold_Bn1, least_Bn1), threshold_Bn1)

    kept_BnV = logits_BnV >= threshold_Bn1
    peak_Bn1 = logits_BnV.amax(-1, keepdim=True)
    cumulated_BnV = ((logits_BnV - peak_Bn1).double().exp() * kept_BnV).cumsum(-1)
    tokens_Bn = (cumulated_BnV <= uniforms_Bn.unsqueeze(-1) * cumulated_BnV[..., -1:]).sum(-1)
    tokens_out_Bn.copy_(tokens_Bn)
    codes_out_BnC.copy_(codebook_VC[tokens_Bn])
    if smooth_weights_out_BnV is not None:
        assert seeds_B is not None
        scores_BnV = (logits_BnV * (1 + ratio) + gumbels(seeds_B, begin, n, V)) / smooth_temperature(ratio)
        smooth_weights_out_BnV.copy_(scores_BnV.masked_fill(~kept_BnV, -math.inf).softmax(-1))


def keep_given(
    given_tokens_Bn: Tensor,  # int64, negative where none is given
    given_codes_BnC: Tensor,  # float32, anything where none is given
    *,
    tokens_out_Bn: Tensor,  # int64
    codes_out_BnC: Tensor,  # float32
) -> None:
    """Where a token is given, it and its code take the place of those that are there; the rest stays."""
    given_Bn = given_tokens_Bn >= 0
    tokens_out_Bn.copy_(torch.where(given_Bn, given_tokens_Bn, tokens_out_Bn))
    codes_out_BnC.copy_(torch.where(given_Bn.unsqueeze(-1), given_codes_BnC, codes_out_BnC))


def mix_codes(
    weights_BnV: Tensor,  # float32, of `draw`
    codebook_VC: Tensor,  # float32
    *,
    codes_out_BnC: Tensor,  # float32
) -> None:
    """Smooth weights times codebook: what takes the place of a drawn code."""
    torch.matmul(weights_BnV, codebook_VC, out=codes_out_BnC)


def smooth_temperature(ratio: float) -> float:
    """τ of the smooth mixture at ratio k/(K − 1), as published."""
    return max(0.27 * (1 - 0.95 * ratio), 0.005)


def gumbels(seeds_B: Tensor, begin: int, n: int, V: int) -> Tensor:
    """Standard Gumbel noise float32 [B, n, V] from Philox4x32-10 (Salmon et al., SC 2011)."""
    groups = torch.arange(-(-V // 4), device=seeds_B.device)
    positions = torch.arange(begin, begin + n, device=seeds_B.device).view(-1, 1)
    words_BnV = _philox4x32(groups, positions, 1, seeds_B.view(-1, 1, 1)).flatten(-2)[..., :V]
    return -((words_BnV.double() + 0.5) * 2.0**-32).log().neg().log().float()


def _philox4x32(index: Tensor, position: Tensor, stream: int, seed: Tensor) -> Tensor:
    """Ten rounds on the counter (index, position, stream, 0): unsigned 32-bit words in int64, [..., 4]."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = torch.broadcast_tensors(index, position, torch.full_like(key0, stream), torch.zeros_like(key0))
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3], -1)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers held in int64, which would overflow."""
    low_part = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low_part >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low_part & 0xFFFF


def next_scale(
    codes_BnC: Tensor,  # float32, n = p²: the codes of the scale before, row-major
    f_hat_BlC: Tensor,  # float32, l = h²: what the scales before that add up to
    phi_weight_9CC: Tensor,  # float32 [tap, in, out], taps row-major: φ as one convolution
    phi_bias_C: Tensor,  # float32
    cell_taps_3hp: Tensor,  # float32: enlargement p → h, moved by −1, 0, +1 cells (see `resampling_taps`)
    *,
    f_hat_out_BlC: Tensor,  # float32, another buffer than `f_hat_BlC`
    token_taps_3qp: Tensor | None = None,  # float32: the same, then shrunk to the next scale's q × q tokens
    area_qh: Tensor | None = None,  # float32: area shrinking h → q
    word_weight_CD: Tensor | None = None,  # float32
    position_mD: Tensor | None = None,  # float32, m = q²: level, position and word bias
    x_out_RmD: Tensor | None = None,  # float32: the next scale's input, the same for both halves of the rows
) -> None:
    """f_hat + φ(bicubic enlargement of the codes); then, unless it was the last scale, the next scale's input tokens:

        x = area_shrink(f_hat)·word_weight + position        (paper section 3.2, algorithm 2)

    The taps are what the kernel works with; here the two resamplings and the convolution run as they are defined.
    """
    B, _, C = codes_BnC.shape
    h, p = cell_taps_3hp.shape[1:]
    map_BCpp = codes_BnC.transpose(1, 2).reshape(B, C, p, p)
    enlarged_BChh = F.interpolate(map_BCpp, size=(h, h), mode="bicubic") if p != h else map_BCpp
    weight_CC33 = phi_weight_9CC.view(3, 3, C, C).permute(3, 2, 0, 1)
    contribution_BChh = F.conv2d(enlarged_BChh, weight_CC33, phi_bias_C, padding=1)
    f_hat_out_BlC.copy_(f_hat_BlC + contribution_BChh.flatten(2).transpose(1, 2))
    if x_out_RmD is None:
        return
    assert area_qh is not None
    assert word_weight_CD is not None
    assert position_mD is not None
    q = area_qh.shape[0]
    f_hat_BChh = f_hat_out_BlC.transpose(1, 2).reshape(B, C, h, h)
    features_BCqq = F.interpolate(f_hat_BChh, size=(q, q), mode="area")
    words_BmD = features_BCqq.flatten(2).transpose(1, 2) @ word_weight_CD + position_mD
    x_out_RmD.view(-1, *words_BmD.shape).copy_(words_BmD)


def resampling_taps(enlarge_hp: Tensor, shrink_qh: Tensor | None = None) -> Tensor:
    """The two axes of enlarging, moving by −1, 0 or +1 cells with zeros beyond the edge, and shrinking: [3, h or q, p].

    A 3×3 convolution of an enlarged map is a sum over its nine taps (dy, dx) of the moved map; enlarging, moving and
    shrinking are separable, so each tap is taps[dy] · map · taps[dx]ᵀ and the enlarged map need never be made.
    """
    h = enlarge_hp.shape[0]
    padded = F.pad(enlarge_hp, (0, 0, 1, 1))
    moved_3hp = torch.stack([padded[d : d + h] for d in range(3)])
    return moved_3hp if shrink_qh is None else shrink_qh @ moved_3hp


def groupnorm_silu(
    x_BlC: Tensor,  # channels-last: l cells, 32 groups of neighbouring channels
    weight_C: Tensor,  # float32
    bias_C: Tensor,  # float32
    *,
    silu: bool,  # the norm before an attention block has none
    branch_BlC: Tensor | None = None,  # what a residual branch adds; needs `sum_out_BlC`
    conv_bias_C: Tensor | None = None,  # any floating type: the bias that the convolution before left out
    sum_out_BlC: Tensor | None = None,
    out_BlC: Tensor,
) -> Tensor:
    """GroupNorm of x + branch + conv_bias over 32 groups, eps 1e-6, then y·sigmoid(y); returns `out_BlC`.

    Where the sum has a place to go, what is normalised is the sum as rounded there. Each output may be the memory of
    `x_BlC` or `branch_BlC`, or both the same.
    """
    sum_BlC = _sum(x_BlC, branch_BlC, conv_bias_C)
    if sum_out_BlC is not None:
        sum_BlC = sum_out_BlC.copy_(sum_BlC).float()
    normed_BCl = F.group_norm(sum_BlC.transpose(1, 2), GROUPS, weight_C, bias_C, eps=NORM_EPS)
    return out_BlC.copy_((F.silu(normed_BCl) if silu else normed_BCl).transpose(1, 2))


def upsample_sum(
    x_BhwC: Tensor,  # channels-last
    *,
    branch_BhwC: Tensor | None = None,  # what a residual branch adds
    conv_bias_C: Tensor | None = None,  # any floating type: the bias that the convolution before left out
    out_BHWC: Tensor,  # H = 2h, W = 2w
) -> Tensor:
    """x + branch + conv_bias with every cell repeated 2×2: nearest-neighbour enlargement; returns `out_BHWC`."""
    sum_BhwC = _sum(x_BhwC, branch_BhwC, conv_bias_C)
    return out_BHWC.copy_(sum_BhwC.repeat_interleave(2, 1).repeat_interleave(2, 2))


def _sum(x: Tensor, branch: Tensor | None, conv_bias_C: Tensor | None) -> Tensor:
    """In float32; what is None counts as 0."""
    total = x.float()
    if branch is not None:
        total = total + branch.float()
    return total if conv_bias_C is None else total + conv_bias_C.float()


def to_pixels(
    x_Bl3: Tensor,  # channels-last, l = R² pixels in [−1, 1], not yet clamped
    bias_3: Tensor,  # any floating type: that of the last convolution, which left it out
    *,
    pixels_out_B3RR: Tensor,  # float32 in [0, 1]
    bytes_out_BRR3: Tensor,  # uint8, rounded to nearest
) -> None:
    """(x + bias + 1)/2 clamped to [0, 1]: as floats in planes, and as 8-bit RGB."""
    unit_Bl3 = ((x_Bl3.float() + bias_3.float()) * 0.5 + 0.5).clamp(0, 1)
    pixels_out_B3RR.copy_(unit_Bl3.transpose(1, 2).view(pixels_out_B3RR.shape))
    bytes_out_BRR3.copy_((unit_Bl3 * 255).round().view(bytes_out_BRR3.shape))
