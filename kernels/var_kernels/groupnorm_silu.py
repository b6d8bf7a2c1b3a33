"""GroupNorm over 32 groups of a sum, then optionally y·sigmoid(y), channels-last; see `reference.groupnorm_silu`.

    s = x + branch + conv_bias_c;   y = (s − mean_g)·rstd_g·weight_c + bias_c;   out = y·sigmoid(y)

Expected to be bound by memory, not measured yet: without a branch x is read twice and out written once; with one, x and
branch are read once, the sum is written and read again, out is written. The first launch leaves the sum, and mean and
M2 (the sum of squared deviations from it) of every group in every chunk of cells; the second combines an image's chunks
and normalises. Nothing is computed as E[s²] − E[s]², which cancels where the mean is large. How an image is cut depends
on its shape alone, so its result does not depend on the batch it is in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2, require_contiguous, require_dtype, require_shape
from .reference import GROUPS, NORM_EPS

# Reasoned, not measured yet; so are the warps of both launches.
TILE = 4096  # elements a program holds at once: 8 or 16 per thread, so that means, M2 and loads stay in registers
MAX_CHUNKS = 128  # per image: one for about every multiprocessor, few enough that combining them stays cheap
STAGES = 4  # tiles in flight while the statistics are read: one program per multiprocessor must hide the latency


def groupnorm_silu(
    x_BlC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    silu: bool,
    branch_BlC: Tensor | None = None,
    conv_bias_C: Tensor | None = None,
    sum_out_BlC: Tensor | None = None,
    out_BlC: Tensor,
) -> Tensor:
    """See `reference.groupnorm_silu`. C is a multiple of 32; outputs may be each other's or an input map's memory."""
    B, cells, C = x_BlC.shape
    require_contiguous(x_BlC=x_BlC, branch_BlC=branch_BlC, sum_out_BlC=sum_out_BlC, out_BlC=out_BlC)
    require_contiguous(weight_C=weight_C, bias_C=bias_C, conv_bias_C=conv_bias_C)
    if branch_BlC is not None and sum_out_BlC is None:
        raise ValueError("sum_out_BlC: None, expected a place for the sum with branch_BlC")
    for name, map_BlC in (("branch_BlC", branch_BlC), ("sum_out_BlC", sum_out_BlC), ("out_BlC", out_BlC)):
        if map_BlC is not None:
            require_shape(name, map_BlC, B, cells, C)
    for name, vector_C in (("weight_C", weight_C), ("bias_C", bias_C), ("conv_bias_C", conv_bias_C)):
        if vector_C is not None:
            require_shape(name, vector_C, C)
    require_dtype("weight_C", weight_C, torch.float32)
    require_dtype("bias_C", bias_C, torch.float32)
    if C % GROUPS:
        raise ValueError(f"x_BlC: {C} channels, expected a multiple of {GROUPS}")
    block_c = next_power_of_2(C)
    tile_cells = max(TILE // block_c, 1)
    chunk_cells = max(cdiv(cdiv(cells, tile_cells), MAX_CHUNKS), 2) * tile_cells
    chunks = cdiv(cells, chunk_cells)
    # A program of the second launch reads every chunk's statistics, so it takes more tiles where there are more chunks.
    part_cells = cdiv(chunks, 16) * tile_cells
    statistics_2BKG = torch.empty(2, B, chunks, GROUPS, device=x_BlC.device)
    shape = {"C": C, "GROUPS": GROUPS, "BLOCK_C": block_c, "TILE_CELLS": tile_cells}
    launch(
        _statistics_kernel,
        (chunks, B),
        {
            "x_ptr": x_BlC,
            "branch_ptr": branch_BlC,
            "conv_bias_ptr": conv_bias_C,
            "sum_ptr": sum_out_BlC,
            "statistics_ptr": statistics_2BKG,
            "cells": cells,
            "chunk_cells": chunk_cells,
        },
        {
            **shape,
            "HAS_BRANCH": branch_BlC is not None,
            "HAS_CONV_BIAS": conv_bias_C is not None,
            "KEEP_SUM": sum_out_BlC is not None,
            "BLOCK_W": next_power_of_2(C // GROUPS),
            "STAGES": STAGES,
        },
        num_warps=16,
    )
    if sum_out_BlC is not None:  # the second launch reads the sum; without a place for it, it adds the bias again
        x_BlC, conv_bias_C = sum_out_BlC, None
    launch(
        _apply_kernel,
        (cdiv(cells, part_cells), B),
        {
            "x_ptr": x_BlC,
            "conv_bias_ptr": conv_bias_C,
            "statistics_ptr": statistics_2BKG,
            "weight_ptr": weight_C,
            "bias_ptr": bias_C,
            "out_ptr": out_BlC,
            "cells": cells,
            "chunk_cells": chunk_cells,
            "part_cells": part_cells,
            "chunks": chunks,
        },
        {
            **shape,
            "HAS_CONV_BIAS": conv_bias_C is not None,
            "BLOCK_K": next_power_of_2(chunks),
            "SILU": silu,
            "EPS": NORM_EPS,
        },
        num_warps=8,
    )
    return out_BlC


@triton.jit
def _combine(mean, m2, count, total):
    """Chan, Golub and LeVeque (1979) along the first axis: one mean and M2 out of several with their counts.

    Means are added up as differences from the largest, which keeps their digits and makes equal means come out exactly.
    """
    anchor = tl.max(tl.where(count > 0, mean, float("-inf")), axis=0)
    combined = anchor + tl.sum(count * (mean - anchor[None, :]), axis=0) / total
    away = mean - combined[None, :]
    return combined, tl.sum(m2 + count * away * away, axis=0)


@triton.jit
def _statistics_kernel(
    x_ptr,  # [B, cells, C]
    branch_ptr,  # [B, cells, C]
    conv_bias_ptr,  # [C]
    sum_ptr,  # [B, cells, C]
    statistics_ptr,  # float32 [2, B, chunks, GROUPS]: mean, M2
    cells,
    chunk_cells,  # cells of a chunk; the last may have fewer
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_CELLS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    BLOCK_W: tl.constexpr,  # power of two, at least the C / GROUPS channels of a group
    STAGES: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inside = tl.minimum(cells - chunk * chunk_cells, chunk_cells)  # cells of this chunk
    begin = (image * cells + chunk * chunk_cells) * C
    x_ptr += begin
    if HAS_BRANCH:
        branch_ptr += begin
    if KEEP_SUM:
        sum_ptr += begin
    row, channel = tl.arange(0, TILE_CELLS), tl.arange(0, BLOCK_C)
    offset = row[:, None] * C + channel[None, :]
    if HAS_CONV_BIAS:
        conv_bias = tl.load(conv_bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)

    # Every place of the tile keeps its own mean and M2 over the tiles (Chan's formula for one more value), so that the
    # loop needs no exchange between threads.
    mean = tl.zeros((TILE_CELLS, BLOCK_C), tl.float32)
    m2 = tl.zeros((TILE_CELLS, BLOCK_C), tl.float32)
    for tile in tl.range(0, tl.cdiv(inside, TILE_CELLS), num_stages=STAGES):
        first = tile * TILE_CELLS
        here = (row + first < inside)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + first * C + offset, mask=here, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            x += tl.load(branch_ptr + first * C + offset, mask=here, other=0.0).to(tl.float32)
        if HAS_CONV_BIAS:
            x += conv_bias[None, :]
        if KEEP_SUM:
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + first * C + offset, rounded, mask=here)
            x = rounded.to(tl.float32)  # the second launch reads no other
        difference = tl.where(here, x - mean, 0.0)
        mean += difference / (tile + 1.0)
        m2 += difference * (x - mean)

    count = tl.maximum((inside - row + TILE_CELLS - 1) // TILE_CELLS, 0).to(tl.float32)
    mean, m2 = _combine(mean, m2, count[:, None], inside.to(tl.float32))

    # [BLOCK_C] → [BLOCK_W, GROUPS]: the channels of a group are neighbours.
    group, member = tl.arange(0, GROUPS), tl.arange(0, BLOCK_W)
    place = tl.minimum(group[None, :] * (C // GROUPS) + member[:, None], BLOCK_C - 1)
    place = tl.reshape(place, (BLOCK_W * GROUPS,))
    member_mean = tl.reshape(tl.gather(mean, place, axis=0), (BLOCK_W, GROUPS))
    member_m2 = tl.reshape(tl.gather(m2, place, axis=0), (BLOCK_W, GROUPS))
    belongs = (member < C // GROUPS)[:, None]
    member_mean, member_m2 = tl.where(belongs, member_mean, 0.0), tl.where(belongs, member_m2, 0.0)
    member_count = tl.where(belongs, inside.to(tl.float32), 0.0)
    mean, m2 = _combine(member_mean, member_m2, member_count, inside.to(tl.float32) * (C // GROUPS))

    at = (image * tl.num_programs(0) + chunk) * GROUPS + group
    tl.store(statistics_ptr + at, mean)
    tl.store(statistics_ptr + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * GROUPS + at, m2)


@triton.jit
def _apply_kernel(
    x_ptr,  # [B, cells, C]
    conv_bias_ptr,  # [C]
    statistics_ptr,  # float32 [2, B, chunks, GROUPS]: mean, M2
    weight_ptr,  # float32 [C]
    bias_ptr,  # float32 [C]
    out_ptr,  # [B, cells, C]
    cells,
    chunk_cells,
    part_cells,  # cells a program normalises
    chunks,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_CELLS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, at least chunks
    SILU: tl.constexpr,
    EPS: tl.constexpr,
):
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, group = tl.arange(0, BLOCK_K), tl.arange(0, GROUPS)
    at = (image * chunks + chunk[:, None]) * GROUPS + group[None, :]
    known = (chunk < chunks)[:, None]
    means = tl.load(statistics_ptr + at, mask=known, other=0.0)
    m2s = tl.load(statistics_ptr + tl.num_programs(1).to(tl.int64) * chunks * GROUPS + at, mask=known, other=0.0)
    counts = tl.maximum(tl.minimum(cells - chunk * chunk_cells, chunk_cells), 0).to(tl.float32) * (C // GROUPS)
    total = tl.cast(cells, tl.float32) * (C // GROUPS)  # a compile-time number where there is one cell
    mean, m2 = _combine(means, m2s, counts[:, None], total)
    rstd = 1.0 / tl.sqrt(m2 / total + EPS)

    row, channel = tl.arange(0, TILE_CELLS), tl.arange(0, BLOCK_C)
    belongs_to = tl.minimum(channel // (C // GROUPS), GROUPS - 1)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
    # The mean is taken off x before the product: folded into the bias it would cost digits where it is large.
    mean, scale = tl.gather(mean, belongs_to, axis=0), tl.gather(rstd, belongs_to, axis=0) * weight
    if HAS_CONV_BIAS:  # x + conv_bias − mean, with one vector to hold instead of two
        mean -= tl.load(conv_bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * part_cells, cells)
    offset = row[:, None] * C + channel[None, :]
    for first in range(part * part_cells, end, TILE_CELLS):
        here = (row + first < end)[:, None] & (channel < C)[None, :]
        tile = (image * cells + first) * C
        x = tl.load(x_ptr + tile + offset, mask=here, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_ptr + tile + offset, y.to(out_ptr.dtype.element_ty), mask=here)
