"""Codes of one scale → the feature map after it and the next scale's input, in one launch; see `reference.next_scale`.

Enlarging, moving by a cell and shrinking are linear and separable, and a 3×3 convolution is a sum over nine moved maps.
So the map and the next tokens come from the codes alone, neither from the other, and no program waits for another:

    f_hat_out = f_hat       + bias + Σ taps[dy]·codes·taps[dx]ᵀ·W[dy, dx]        taps of the cells
    features  = area(f_hat) + bias + Σ the same sum                              taps already shrunk to the tokens
    x         = features·word_weight + position

A program makes one row of cells, or one row of tokens and BLOCK_D of their D channels. For each dy it adds up the few
rows of codes that reach its row; the nine taps then take q·p·C + q·C² multiply-adds each, the words q·C·BLOCK_D. At
256 px (h = 16, C = 32, D = 1024) the longest scale is 144 programs of 0.3 million. Those of one row of tokens all make
its features, three times the work of their words; sharing them would take a second launch. The whole is 0.1 GFLOP,
where the transformer's next pass takes 200 at depth 16.

Matrix products split each float32 into two TF32 numbers ("tf32x3"), which keeps 22 of its 24 bits. Exact float32
products run without tensor cores and spill hundreds of registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_shape


def next_scale(
    codes_BnC: Tensor,
    f_hat_BlC: Tensor,
    phi_weight_9CC: Tensor,
    phi_bias_C: Tensor,
    cell_taps_3hp: Tensor,
    *,
    f_hat_out_BlC: Tensor,
    token_taps_3qp: Tensor | None = None,
    area_qh: Tensor | None = None,
    word_weight_CD: Tensor | None = None,
    position_mD: Tensor | None = None,
    x_out_RmD: Tensor | None = None,
) -> None:
    """See `reference.next_scale`. The rows of `area_qh` must add up to one, as a mean's do: the bias is not shrunk."""
    (B, _, C), (h, p) = codes_BnC.shape, cell_taps_3hp.shape[1:]
    require_contiguous(
        codes_BnC=codes_BnC,
        f_hat_BlC=f_hat_BlC,
        phi_weight_9CC=phi_weight_9CC,
        phi_bias_C=phi_bias_C,
        cell_taps_3hp=cell_taps_3hp,
        f_hat_out_BlC=f_hat_out_BlC,
        token_taps_3qp=token_taps_3qp,
        area_qh=area_qh,
        word_weight_CD=word_weight_CD,
        position_mD=position_mD,
        x_out_RmD=x_out_RmD,
    )
    require_shape("codes_BnC", codes_BnC, B, p * p, C)
    require_shape("f_hat_BlC", f_hat_BlC, B, h * h, C)
    require_shape("f_hat_out_BlC", f_hat_out_BlC, B, h * h, C)
    require_shape("phi_weight_9CC", phi_weight_9CC, 9, C, C)
    require_shape("phi_bias_C", phi_bias_C, C)
    if f_hat_out_BlC.is_set_to(f_hat_BlC):
        raise ValueError("f_hat_out_BlC: the same buffer as f_hat_BlC, expected another")
    q, D, copies = 0, 0, 0
    if x_out_RmD is not None:
        if token_taps_3qp is None or area_qh is None or word_weight_CD is None or position_mD is None:
            raise ValueError("x_out_RmD: expected token_taps, area, word_weight and position with it")
        q, D, copies = area_qh.shape[0], word_weight_CD.shape[1], x_out_RmD.shape[0] // B
        require_shape("token_taps_3qp", token_taps_3qp, 3, q, p)
        require_shape("area_qh", area_qh, q, h)
        require_shape("word_weight_CD", word_weight_CD, C, D)
        require_shape("position_mD", position_mD, q * q, D)
        require_shape("x_out_RmD", x_out_RmD, copies * B, q * q, D)
    block_d = 128 if q <= 32 else 64  # the longer rows of images above 512 px would not fit into the registers
    launch(
        _next_scale_kernel,
        (B * (q * cdiv(D, block_d) + h),),
        {
            "codes_ptr": codes_BnC,
            "f_hat_ptr": f_hat_BlC,
            "phi_weight_ptr": phi_weight_9CC,
            "phi_bias_ptr": phi_bias_C,
            "cell_taps_ptr": cell_taps_3hp,
            "f_hat_out_ptr": f_hat_out_BlC,
            "token_taps_ptr": token_taps_3qp,
            "area_ptr": area_qh,
            "word_weight_ptr": word_weight_CD,
            "position_ptr": position_mD,
            "x_out_ptr": x_out_RmD,
            "B": B,
            "h": h,
            "p": p,
            "q": q,
        },
        {
            "COPIES": copies,
            "C": C,
            "D": D,
            "BLOCK_H": next_power_of_2(max(h, 16)),
            "BLOCK_P": next_power_of_2(max(p, 16)),
            "BLOCK_Q": next_power_of_2(max(q, 16)),
            "BLOCK_C": next_power_of_2(max(C, 16)),
            "BLOCK_D": block_d,
            "STEP_Y": 4,
        },
        num_warps=4 if h <= 16 else 8,  # the wider rows of 512 px spill with four
    )


@triton.jit(do_not_specialize=["B", "h", "p", "q"])
def _next_scale_kernel(
    codes_ptr,  # float32 [B, p², C]
    f_hat_ptr,  # float32 [B, h², C]
    phi_weight_ptr,  # float32 [9, C, C]
    phi_bias_ptr,  # float32 [C]
    cell_taps_ptr,  # float32 [3, h, p]
    f_hat_out_ptr,  # float32 [B, h², C]
    token_taps_ptr,  # float32 [3, q, p]
    area_ptr,  # float32 [q, h]
    word_weight_ptr,  # float32 [C, D]
    position_ptr,  # float32 [q², D]
    x_out_ptr,  # float32 [COPIES·B, q², D]
    B,
    h,
    p,
    q,
    COPIES: tl.constexpr,  # how often every image's tokens are stored; 0 after the last scale
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_Y: tl.constexpr,  # rows of a map read at once; a bicubic tap reaches four
):
    program = tl.program_id(0)
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token_programs = B * q * chunks
    channel = tl.arange(0, BLOCK_C)[None, :]
    bias_1C = tl.load(phi_bias_ptr + channel, mask=channel < C, other=0.0)
    cell = tl.arange(0, BLOCK_H)[:, None]
    cell_mask = (cell < h) & (channel < C)
    if program >= token_programs:
        image, row = ((program - token_programs) // h).to(tl.int64), (program - token_programs) % h
        codes = codes_ptr + image * p * p * C
        sums_HC = _taps_of_row(codes, cell_taps_ptr, phi_weight_ptr, row, h, p, C, BLOCK_H, BLOCK_P, BLOCK_C, STEP_Y)
        cells = image * h * h * C + (row * h + cell) * C + channel
        f_hat_HC = tl.load(f_hat_ptr + cells, mask=cell_mask, other=0.0)
        tl.store(f_hat_out_ptr + cells, f_hat_HC + bias_1C + sums_HC, mask=cell_mask)
    elif COPIES > 0:
        image, row = (program // (chunks * q)).to(tl.int64), program // chunks % q
        codes = codes_ptr + image * p * p * C
        sums_QC = _taps_of_row(codes, token_taps_ptr, phi_weight_ptr, row, q, p, C, BLOCK_Q, BLOCK_P, BLOCK_C, STEP_Y)
        shrunk_HC = _sum_of_rows(f_hat_ptr + image * h * h * C, area_ptr + row * h, h, C, BLOCK_H, BLOCK_C, STEP_Y)
        token = tl.arange(0, BLOCK_Q)[:, None]
        x = tl.arange(0, BLOCK_H)[None, :]
        area_QH = tl.load(area_ptr + token * h + x, mask=(token < q) & (x < h), other=0.0)
        features_QC = tl.dot(area_QH, shrunk_HC, sums_QC, input_precision="tf32x3") + bias_1C
        c = tl.arange(0, BLOCK_C)[:, None]
        d = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        words_CD = tl.load(word_weight_ptr + c * D + d, mask=(c < C) & (d < D), other=0.0)
        tokens = (row * q + token) * D + d
        token_mask = (token < q) & (d < D)
        position_QD = tl.load(position_ptr + tokens, mask=token_mask, other=0.0)
        x_QD = tl.dot(features_QC, words_CD, position_QD, input_precision="tf32x3")
        for copy in tl.static_range(COPIES):
            tl.store(x_out_ptr + (copy * B + image) * q * q * D + tokens, x_QD, mask=token_mask)


@triton.jit
def _taps_of_row(
    codes_ptr,  # float32 [p², C], of one image
    taps_ptr,  # float32 [3, rows, p]
    phi_weight_ptr,  # float32 [9, C, C]
    row,
    rows,
    p,
    C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP_Y: tl.constexpr,
):
    """Row `row` of Σ taps[dy]·codes·taps[dx]ᵀ·W[dy, dx]: [BLOCK_O, BLOCK_C]."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    channel_in = tl.arange(0, BLOCK_C)[:, None]
    weight_mask = (channel_in < C) & (channel < C)
    out = tl.arange(0, BLOCK_O)[:, None]
    column = tl.arange(0, BLOCK_P)[None, :]
    taps_mask = (out < rows) & (column < p)
    sums_OC = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for dy in range(3):
        row_PC = _sum_of_rows(codes_ptr, taps_ptr + (dy * rows + row) * p, p, C, BLOCK_P, BLOCK_C, STEP_Y)
        for dx in range(3):
            taps_OP = tl.load(taps_ptr + (dx * rows + out) * p + column, mask=taps_mask, other=0.0)
            weight_ptr = phi_weight_ptr + (dy * 3 + dx) * C * C + channel_in * C + channel
            weight_CC = tl.load(weight_ptr, mask=weight_mask, other=0.0)
            moved_OC = tl.dot(taps_OP, row_PC, input_precision="tf32x3")
            sums_OC = tl.dot(moved_OC, weight_CC, sums_OC, input_precision="tf32x3")
    return sums_OC


@triton.jit
def _sum_of_rows(
    map_ptr,  # float32 [side, side, C]
    share_ptr,  # float32 [side]
    side,
    C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP_Y: tl.constexpr,
):
    """Σ share[y]·map[y]: [BLOCK_X, BLOCK_C]. Only rows from the first share that is not zero to the last are read."""
    all_y = tl.arange(0, BLOCK_X)
    used = tl.load(share_ptr + all_y, mask=all_y < side, other=0.0) != 0
    first, end = tl.min(tl.where(used, all_y, side), axis=0), tl.max(tl.where(used, all_y + 1, 0), axis=0)
    x = tl.arange(0, BLOCK_X)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    sum_XC = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    for begin in range(first, end, STEP_Y):
        y = begin + tl.arange(0, STEP_Y)[:, None, None]
        mask = (y < end) & (x < side) & (channel < C)
        share_Y11 = tl.load(share_ptr + y, mask=y < end, other=0.0)
        rows_YXC = tl.load(map_ptr + (y * side + x) * C + channel, mask=mask, other=0.0)
        sum_XC += tl.sum(share_Y11 * rows_YXC, axis=0)
    return sum_XC
