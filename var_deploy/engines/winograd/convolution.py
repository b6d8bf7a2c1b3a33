"""One 3×3 convolution with what stands before and after it: norm and SiLU or doubling, bias, residual, sums.

A worker takes a band of the map and goes through it strip by strip, so that a strip's tiles stay in its cache:
rows → padded rows → tiles [36, T, C] → 36 products with U [36, C, O] → rows of the next map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .kernels import (
    LANES,
    PLANES,
    TILE,
    doubled_rows,
    normed_rows,
    rows_from_tiles,
    tiles_from_rows,
    transformed_weights,
)
from .workers import Workers

#: Tiles per strip: products of fewer rows are slower, more take memory. At d16's maps on an AMD EPYC (Zen 3), CPU time
#: grows below 128 by up to a half, and is the same within noise from 256 to 1024.
STRIP_TILES = 256


@dataclass(frozen=True, eq=False, slots=True)
class Normed:
    """SiLU(x·scale + shift) of a map."""

    x_HWC: np.ndarray
    scale_C: np.ndarray
    shift_C: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x_HWC.shape

    def fill(self, first: int, last: int, padded: np.ndarray, at: int) -> None:
        normed_rows(self.x_HWC, self.scale_C, self.shift_C, first, last, padded, at)


@dataclass(frozen=True, eq=False, slots=True)
class Doubled:
    """A map with every cell repeated 2×2."""

    x_HWC: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        H, W, C = self.x_HWC.shape
        return 2 * H, 2 * W, C

    def fill(self, first: int, last: int, padded: np.ndarray, at: int) -> None:
        doubled_rows(self.x_HWC, first, last, padded, at)


@dataclass(frozen=True, eq=False, slots=True)
class Residual:
    """What is added to the result: a map, or its product with a 1×1 convolution [C, O]."""

    x_HWC: np.ndarray
    weight_CO: np.ndarray | None = None


def filled(outputs: int) -> int:
    """The least width of whole LANES that holds so many outputs."""
    return -(-outputs // LANES) * LANES


def transformed(workers: Workers, weight_OC33: np.ndarray) -> np.ndarray:
    """A convolution's weights as the products take them: U [36, C, width], the outputs filled up to whole LANES."""
    outputs, C = weight_OC33.shape[:2]
    U_PCO = np.zeros((PLANES, C, filled(outputs)), dtype=np.float32)
    workers.share(C, lambda _, first, last: transformed_weights(weight_OC33, first, last, U_PCO))
    return U_PCO


class Convolution:
    """A 3×3 convolution, padded with zeros to the same size."""

    def __init__(self, workers: Workers, U_PCO: np.ndarray, bias_O: np.ndarray) -> None:
        """U_PCO: of `transformed`, used in place."""
        self._workers, self._U_PCO, self.width = workers, U_PCO, U_PCO.shape[-1]
        self._bias_O = np.zeros(self.width, dtype=np.float32)
        self._bias_O[: len(bias_O)] = bias_O

    def __call__(self, source: Normed | Doubled, out_HWO: np.ndarray, residual: Residual | None = None) -> np.ndarray:
        """Writes the convolution of `source` to out [H, W, width]; may write over the residual's map.

        Returns the sums of its values and of their squares, float64 [2, width].
        """
        H, W, _ = source.shape
        rows = -(-H // TILE)
        sums_2O = np.zeros((self._workers.count, 2, self.width))

        def band(worker: int, first: int, last: int) -> None:
            columns = -(-W // TILE)
            height = max(1, min(last - first, STRIP_TILES // columns))
            for row in range(first, last, height):
                self._strip(worker, source, row, min(height, last - row), out_HWO, residual, sums_2O[worker])

        self._workers.share(rows, band)
        return sums_2O.sum(axis=0)

    def _strip(
        self,
        worker: int,
        source: Normed | Doubled,
        row: int,
        tile_rows: int,
        out_HWO: np.ndarray,
        residual: Residual | None,
        sums_2O: np.ndarray,
    ) -> None:
        """Tile rows [row, row + tile_rows) of the result."""
        H, W, C = source.shape
        scratch, columns = self._workers.scratch, -(-W // TILE)
        tiles = tile_rows * columns
        padded = scratch(worker, "padded", TILE * tile_rows + 2, TILE * columns + 2, C)
        above = TILE * row - 1
        first, last = max(above, 0), min(above + len(padded), H)
        padded[: first - above] = 0
        padded[last - above :] = 0
        padded[:, 0] = 0
        padded[:, W + 1 :] = 0
        source.fill(first, last, padded, first - above)

        V_PTC = scratch(worker, "tiles", PLANES, tiles, C)
        M_PTO = scratch(worker, "products", PLANES, tiles, self.width)
        one, two = scratch(worker, "one", PLANES * LANES), scratch(worker, "two", PLANES * LANES)
        tiles_from_rows(padded, tile_rows, columns, V_PTC, one, two)
        np.matmul(V_PTC, self._U_PCO, out=M_PTO)

        out_rWO = out_HWO[TILE * row : min(TILE * (row + tile_rows), H)]
        residual_rWO = out_rWO
        if residual is not None:
            residual_rWO = residual.x_HWC[TILE * row : TILE * row + len(out_rWO)]
            if residual.weight_CO is not None:
                x_nC = residual_rWO.reshape(-1, residual_rWO.shape[-1])
                residual_rWO = scratch(worker, "shortcut", *out_rWO.shape)
                np.matmul(x_nC, residual.weight_CO, out=residual_rWO.reshape(-1, self.width))
        rows_from_tiles(
            M_PTO, tile_rows, columns, self._bias_O, residual_rWO, residual is not None, out_rWO, sums_2O, one, two
        )
