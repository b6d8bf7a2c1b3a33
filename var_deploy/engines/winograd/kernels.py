"""Compiled loops of the Winograd decoder: what happens to a map before and after the matrix products.

F(4×4, 3×3) of Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), with the points
0, ±1, ±2, ∞: a tile of 4×4 outputs takes 36 multiplications per pair of channels instead of 144, up to float32 rounding
(about 1e-5 of a map's standard deviation). Maps are [H, W, C] with channels innermost, so every loop over channels is
one over adjacent numbers, which the compiler turns into vector instructions; numba compiles for the CPU that it finds.

A tile passes through small buffers of LANES channels whose offsets are constants: among them the compiler can prove
that nothing overlaps, between two rows of a map it cannot. All arrays are float32, C-contiguous and the caller's.
"""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

import numba
import numpy as np

TILE = 4  #: outputs along one side of a tile
PATCH = TILE + 2  #: inputs along one side of it
PLANES = PATCH * PATCH  #: products per tile
LANES = 16  #: channels worked on at a time; every width is a multiple, as GroupNorm has 32 groups

_F = np.float32
_LOG2_E = _F(math.log2(math.e))
# 2^f = Σ (f·ln 2)^k / k!, |f| ≤ 1/2: the eighth power is 5e-9.
_EXP2 = tuple(_F(math.log(2) ** k / math.factorial(k)) for k in range(8))
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = _EXP2


def _compiled(function: Any) -> Any:
    """Machine code for a function that holds no lock while it runs, kept on disk where there is a place for it."""
    # Products and sums may be fused, zeros lose their sign; infinities and NaNs stay what they are.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}
    without = numba.njit(function, **options)
    try:
        kept = numba.njit(function, cache=True, **options)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written: compile every time
        return without

    @wraps(function)
    def call(*arrays: Any) -> None:
        nonlocal kept
        try:
            kept(*arrays)
        except OSError:  # the disk is full: machine code is written before it runs for the first time
            kept = without
            kept(*arrays)

    return call


@numba.njit(inline="always")
def _silu(x):  # type: ignore[no-untyped-def]
    """x / (1 + e^−x)."""
    power = min(max(-x * _LOG2_E, _F(-126)), _F(126))
    whole = math.floor(power + _F(0.5))
    f = power - whole
    series = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
    two_to_whole = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return x / (_F(1) + series * two_to_whole)


@_compiled
def normed_rows(x_HWC, scale_C, shift_C, first, last, padded, at):  # type: ignore[no-untyped-def]
    """Rows [first, last) as SiLU(x·scale + shift) into rows `at`… of `padded`, whose column 0 is left of the map."""
    _, W, C = x_HWC.shape
    for r in range(first, last):
        for x in range(W):
            for c in range(C):
                padded[at + r - first, x + 1, c] = _silu(x_HWC[r, x, c] * scale_C[c] + shift_C[c])


@_compiled
def doubled_rows(x_HWC, first, last, padded, at):  # type: ignore[no-untyped-def]
    """Rows [first, last) of the map with every cell repeated 2×2, into rows `at`… of `padded`."""
    _, W, C = x_HWC.shape
    for r in range(first, last):
        for x in range(W):
            for c in range(C):
                value = x_HWC[r // 2, x, c]
                padded[at + r - first, 2 * x + 1, c] = value
                padded[at + r - first, 2 * x + 2, c] = value


@numba.njit(inline="always")
def _transform_input(source, begin, step, target, to, to_step):  # type: ignore[no-untyped-def]
    """Six groups of lanes → six: Bᵀ·d along one axis."""
    for lane in range(LANES):
        d0 = source[begin + lane]
        d1 = source[begin + step + lane]
        d2 = source[begin + 2 * step + lane]
        d3 = source[begin + 3 * step + lane]
        d4 = source[begin + 4 * step + lane]
        d5 = source[begin + 5 * step + lane]
        even, odd = d4 - _F(4) * d2, d3 - _F(4) * d1
        outer, inner = d4 - d2, _F(2) * (d3 - d1)
        target[to + lane] = _F(4) * (d0 - d2) + outer
        target[to + to_step + lane] = even + odd
        target[to + 2 * to_step + lane] = even - odd
        target[to + 3 * to_step + lane] = outer + inner
        target[to + 4 * to_step + lane] = outer - inner
        target[to + 5 * to_step + lane] = d5 - d3 - _F(2) * inner


@_compiled
def tiles_from_rows(padded, tile_rows, tile_columns, V_PTC, one, two):  # type: ignore[no-untyped-def]
    """Padded rows [4·tile_rows + 2, ≥ 4·tile_columns + 2, C] → Bᵀ·d·B of every tile: [36, ≥ tiles, C].

    one, two: buffers of 36·LANES.
    """
    C = padded.shape[2]
    for row in range(tile_rows):
        for column in range(tile_columns):
            tile = row * tile_columns + column
            for c in range(0, C, LANES):
                for i in range(PATCH):
                    for j in range(PATCH):
                        for lane in range(LANES):
                            one[(i * PATCH + j) * LANES + lane] = padded[TILE * row + i, TILE * column + j, c + lane]
                for i in range(PATCH):
                    _transform_input(one, i * PATCH * LANES, LANES, two, i * PATCH * LANES, LANES)
                for j in range(PATCH):
                    _transform_input(two, j * LANES, PATCH * LANES, one, j * LANES, PATCH * LANES)
                for plane in range(PLANES):
                    for lane in range(LANES):
                        V_PTC[plane, tile, c + lane] = one[plane * LANES + lane]


@numba.njit(inline="always")
def _transform_output(source, begin, step, target, to, to_step):  # type: ignore[no-untyped-def]
    """Six groups of lanes → four: Aᵀ·m along one axis."""
    for lane in range(LANES):
        m1 = source[begin + step + lane]
        m2 = source[begin + 2 * step + lane]
        m3 = source[begin + 3 * step + lane]
        m4 = source[begin + 4 * step + lane]
        sum_1, difference_1, sum_2, difference_2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
        target[to + lane] = source[begin + lane] + sum_1 + sum_2
        target[to + to_step + lane] = difference_1 + _F(2) * difference_2
        target[to + 2 * to_step + lane] = sum_1 + _F(4) * sum_2
        target[to + 3 * to_step + lane] = difference_1 + _F(8) * difference_2 + source[begin + 5 * step + lane]


@_compiled
def rows_from_tiles(  # type: ignore[no-untyped-def]
    M_PTC, tile_rows, tile_columns, bias_C, residual_rWC, added, out_rWC, sums_2C, one, two
):
    """Products [36, ≥ tiles, C] → rows [r, W, C] of the next map: Aᵀ·m·A + bias, + residual where `added`.

    Tiles may reach beyond r and W; what lies there is dropped. The sums of values and of their squares over what is
    written are added to sums [2, C], float64.
    """
    r, W, C = out_rWC.shape
    for row in range(tile_rows):
        for column in range(tile_columns):
            tile = row * tile_columns + column
            for c in range(0, C, LANES):
                for plane in range(PLANES):
                    for lane in range(LANES):
                        one[plane * LANES + lane] = M_PTC[plane, tile, c + lane]
                for i in range(PATCH):
                    _transform_output(one, i * PATCH * LANES, LANES, two, i * TILE * LANES, LANES)
                for j in range(TILE):
                    _transform_output(two, j * LANES, TILE * LANES, one, j * LANES, TILE * LANES)
                # Sums of what a tile's values differ by from its first one: of a map far from zero float32 would keep
                # nothing of its variance.
                for lane in range(LANES):
                    two[lane] = _F(0)
                    two[LANES + lane] = _F(0)
                    pivot = one[lane] + bias_C[c + lane]
                    if added:
                        pivot += residual_rWC[TILE * row, TILE * column, c + lane]
                    two[2 * LANES + lane] = pivot
                rows, columns = min(TILE, r - TILE * row), min(TILE, W - TILE * column)
                for i in range(rows):
                    for j in range(columns):
                        y, x, cell = TILE * row + i, TILE * column + j, (i * TILE + j) * LANES
                        if added:
                            for lane in range(LANES):
                                one[cell + lane] += residual_rWC[y, x, c + lane]
                        for lane in range(LANES):
                            value = one[cell + lane] + bias_C[c + lane]
                            out_rWC[y, x, c + lane] = value
                            rest = value - two[2 * LANES + lane]
                            two[lane] += rest
                            two[LANES + lane] += rest * rest
                cells = np.float64(rows * columns)
                for lane in range(LANES):
                    pivot_64, rest_64 = np.float64(two[2 * LANES + lane]), np.float64(two[lane])
                    sums_2C[0, c + lane] += cells * pivot_64 + rest_64
                    sums_2C[1, c + lane] += (cells * pivot_64 + 2 * rest_64) * pivot_64 + two[LANES + lane]


@_compiled
def transformed_weights(weight_OC33, first, last, U_PCO):  # type: ignore[no-untyped-def]
    """G·w·Gᵀ of a convolution [O, C, 3, 3] for input channels [first, last): [36, C, ≥ O]."""
    quarter, sixth, twelfth, twenty_fourth = _F(1 / 4), _F(1 / 6), _F(1 / 12), _F(1 / 24)
    half = np.empty((PATCH, 3), dtype=np.float32)
    for c in range(first, last):
        for o in range(weight_OC33.shape[0]):
            for j in range(3):
                w0, w1, w2 = weight_OC33[o, c, 0, j], weight_OC33[o, c, 1, j], weight_OC33[o, c, 2, j]
                half[0, j] = quarter * w0
                half[1, j] = -sixth * (w0 + w1 + w2)
                half[2, j] = -sixth * (w0 - w1 + w2)
                half[3, j] = twenty_fourth * w0 + twelfth * w1 + sixth * w2
                half[4, j] = twenty_fourth * w0 - twelfth * w1 + sixth * w2
                half[5, j] = w2
            for i in range(PATCH):
                w0, w1, w2 = half[i, 0], half[i, 1], half[i, 2]
                U_PCO[PATCH * i, c, o] = quarter * w0
                U_PCO[PATCH * i + 1, c, o] = -sixth * (w0 + w1 + w2)
                U_PCO[PATCH * i + 2, c, o] = -sixth * (w0 - w1 + w2)
                U_PCO[PATCH * i + 3, c, o] = twenty_fourth * w0 + twelfth * w1 + sixth * w2
                U_PCO[PATCH * i + 4, c, o] = twenty_fourth * w0 - twelfth * w1 + sixth * w2
                U_PCO[PATCH * i + 5, c, o] = w2
