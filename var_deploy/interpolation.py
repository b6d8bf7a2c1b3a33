"""Resampling between token-map sizes, mostly as small matrices: y = M·x along rows, then along columns.

Both interpolations of the multi-scale quantiser are separable, so a scale's enlargement and shrinking are two matrix
products each. Exporter and runtime take the matrices from here; tests hold them to PyTorch's `interpolate`.
"""

from __future__ import annotations

import numpy as np

CUBIC_A = -0.75  # PyTorch's cubic coefficient


def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Bicubic enlargement, align_corners false, edges repeated: float32 [n_out, n_in]."""
    if n_in == n_out:
        return np.eye(n_in, dtype=np.float32)

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = (CUBIC_A + 2) * x**3 - (CUBIC_A + 3) * x**2 + 1
        far = CUBIC_A * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    centre_O = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    matrix_OI = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        source_O = np.floor(centre_O).astype(int) + tap
        np.add.at(matrix_OI, (np.arange(n_out), source_O.clip(0, n_in - 1)), kernel(centre_O - source_O))
    return matrix_OI.astype(np.float32)


def bilinear(maps: np.ndarray, n_out: int) -> np.ndarray:
    """Bilinear resizing of [..., n, n] to [..., n_out, n_out], no low-pass filter, align_corners false: float32.

    Rounded where PyTorch rounds: masks of an edit are compared with ½, which some values are all but exactly.
    """
    n_in = maps.shape[-1]
    scale = np.float64(np.float32(n_in) / np.float32(n_out))
    # One rounding of product and sum together, as processors with fused multiply-adds do it.
    centre_O = np.maximum(scale * (np.arange(n_out) + 0.5) - 0.5, 0).astype(np.float32)
    low_O = np.minimum(centre_O.astype(int), n_in - 1)
    high_O = np.minimum(low_O + 1, n_in - 1)
    of_high_O = (centre_O - low_O.astype(np.float32)).clip(0, 1)
    of_low_O = 1 - of_high_O
    maps = maps.astype(np.float32)
    rows = of_low_O * maps[..., low_O] + of_high_O * maps[..., high_O]
    return of_low_O[:, None] * rows[..., low_O, :] + of_high_O[:, None] * rows[..., high_O, :]


def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Area shrinking (mean over the cells that an output cell touches): float32 [n_out, n_in]."""
    matrix_OI = np.zeros((n_out, n_in))
    for o in range(n_out):
        begin, end = o * n_in // n_out, -((o + 1) * n_in // -n_out)
        matrix_OI[o, begin:end] = 1 / (end - begin)
    return matrix_OI.astype(np.float32)
