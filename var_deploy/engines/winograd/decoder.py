"""f_hat → pixels on a CPU, without ONNX Runtime: the deepest level directly, all finer ones by minimal filtering.

The network is that of `decoder.onnx`. Every finer convolution reads its input through GroupNorm and SiLU, or doubled,
and leaves the sums that the next GroupNorm needs, so a map is written once and read once or twice.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np
from safetensors.numpy import save_file

from ...config import GROUPS, VQVAEConfig
from ...errors import BundleError
from ...mapped_weights import mapped_weights
from ...prepared import PreparedCache
from .convolution import Convolution, Doubled, Normed, Residual, transformed
from .deep_level import NORM_EPS, DeepLevel
from .workers import Workers, products

#: File of the transformed weights.
KEPT = "decoder.safetensors"

#: Of the transformed weights: count up when `transformed` changes.
FORM = "1"


class WinogradDecoder:
    """The decoder of one bundle; one image after the other, each with all workers."""

    def __init__(
        self, vqvae: VQVAEConfig, weights_file: Path, threads: int, cache: PreparedCache | None = None, sha256: str = ""
    ) -> None:
        """weights_file: of the bundle, with its digest; the deepest level's weights are used in place.

        cache: where the transformed weights of the finer levels are kept and mapped. Without it they are made here.
        Raises BundleError where one of those is missing or does not fit.
        """
        self._vqvae, self._weights = vqvae, mapped_weights(weights_file)
        self._widths = [vqvae.ch * m for m in vqvae.ch_mult]
        self._workers = Workers(threads)
        self._deep = DeepLevel(self._workers, self._weights, vqvae)
        U_PCO = self._transformed_or_kept(weights_file, cache, sha256)
        self._convolutions = {name: Convolution(self._workers, U, self._bias(name)) for name, U in U_PCO.items()}
        self._slots = [np.empty(cells, dtype=np.float32) for cells in self._slot_sizes()]
        self._lock = Lock()  # the buffers are there once

    def __call__(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1] of f_hat [B, C, h, h]."""
        with self._lock, products.single_threaded():  # the workers are the threads
            return np.stack([self._image(f_hat_Chh) for f_hat_Chh in np.asarray(f_hat_BChh, dtype=np.float32)])

    def _finer_convolutions(self) -> dict[str, tuple[int, int]]:
        """Name → outputs and inputs of every convolution above the deepest level, in the order they run."""
        widths, found = self._widths, {}
        for level in reversed(range(len(widths) - 1)):
            below, width = widths[level + 1], widths[level]
            found[f"decoder.up.{level + 1}.upsample.conv"] = below, below
            for j in range(self._vqvae.num_res_blocks + 1):
                found[f"decoder.up.{level}.block.{j}.conv1"] = width, (below if j == 0 else width)
                found[f"decoder.up.{level}.block.{j}.conv2"] = width, width
        found["decoder.conv_out"] = 3, widths[0]
        return found

    def _transformed_or_kept(
        self, weights_file: Path, cache: PreparedCache | None, sha256: str
    ) -> dict[str, np.ndarray]:
        if cache is None:
            return self._transformed(weights_file)
        made: dict[str, np.ndarray] = {}

        def make(directory: Path) -> None:
            made.update(self._transformed(weights_file))
            save_file(made, directory / KEPT)

        size = 4 * weights_file.stat().st_size  # 36 planes for 9 taps
        directory = cache.entry("decoder", [FORM, sha256], size, make)
        if directory is not None and not made:
            try:
                found = mapped_weights(directory / KEPT)
                if found.keys() != self._finer_convolutions().keys():
                    raise BundleError(f"{directory / KEPT}: holds other weights")
                return found
            except BundleError as error:  # deleted meanwhile, or damaged where digests are not compared
                cache.discard(directory, error)
        return made or self._transformed(weights_file)

    def _transformed(self, weights_file: Path) -> dict[str, np.ndarray]:
        """U of every finer convolution."""
        # A mapping of its own: what is read once does not stay in this process.
        once, found = mapped_weights(weights_file), {}
        for name, shape_OC in self._finer_convolutions().items():
            weight_OC33 = once.get(f"{name}.weight", np.empty(0))
            if weight_OC33.shape != (*shape_OC, 3, 3) or weight_OC33.dtype != np.float32:
                got = f"{weight_OC33.dtype} {weight_OC33.shape}" if weight_OC33.size else "none"
                raise BundleError(
                    f"{weights_file}: {name}.weight: got {got}, expected float32 {(*shape_OC, 3, 3)}; export it again"
                )
            found[name] = transformed(self._workers, weight_OC33)
        return found

    def _bias(self, name: str) -> np.ndarray:
        """With that of the shortcut which the convolution's result is added to."""
        bias_O = self._weights[f"{name}.bias"]
        shortcut = f"{name.removesuffix('.conv2')}.nin_shortcut.bias"
        if name.endswith(".conv2") and shortcut in self._weights:
            bias_O = bias_O + self._weights[shortcut]
        return bias_O

    def _slot_sizes(self) -> tuple[int, int, int]:
        """Elements of the largest map in each buffer: two that change places, one for what a shortcut leads to."""
        deepest, size = len(self._widths) - 1, self._vqvae.image_size
        sides = [size >> level for level in range(deepest + 1)]
        wide = [max(width, self._widths[min(level + 1, deepest)]) for level, width in enumerate(self._widths)]
        shortcuts = [
            sides[level] ** 2 * self._widths[level]
            for level in range(deepest)
            if self._widths[level] != self._widths[level + 1]
        ]
        largest = max(side**2 * width for side, width in zip(sides, wide, strict=True))
        return largest, largest, max(shortcuts, default=0)

    def _image(self, f_hat_Chh: np.ndarray) -> np.ndarray:
        """One image: pixels [3, R, R]."""
        deepest = len(self._widths) - 1
        side, x_slot, y_slot = self._vqvae.latent_size, 0, 1
        x_HWC = self._map(x_slot, side, self._widths[-1])
        x_HWC[...] = self._deep(np.ascontiguousarray(f_hat_Chh)).transpose(1, 2, 0)
        sums_2C = np.stack([x_HWC.sum(axis=(0, 1), dtype=np.float64), np.square(x_HWC, dtype=np.float64).sum((0, 1))])
        for level in reversed(range(deepest)):
            side, below = 2 * side, x_HWC
            x_slot, y_slot = y_slot, 1 - y_slot
            x_HWC = self._map(x_slot, side, self._widths[level + 1])
            sums_2C = self._convolutions[f"decoder.up.{level + 1}.upsample.conv"](Doubled(below), x_HWC)
            for j in range(self._vqvae.num_res_blocks + 1):
                name, width = f"decoder.up.{level}.block.{j}", self._widths[level]
                y_HWC = self._map(y_slot, side, width)
                y_sums = self._convolutions[f"{name}.conv1"](self._normed(x_HWC, sums_2C, f"{name}.norm1"), y_HWC)
                residual, out_HWC = Residual(x_HWC), x_HWC
                if x_HWC.shape[-1] != width:
                    weight_OC = self._weights[f"{name}.nin_shortcut.weight"].reshape(width, -1)
                    residual, x_slot = Residual(x_HWC, weight_OC.T), 2
                    out_HWC = self._map(x_slot, side, width)
                source = self._normed(y_HWC, y_sums, f"{name}.norm2")
                sums_2C = self._convolutions[f"{name}.conv2"](source, out_HWC, residual)
                x_HWC = out_HWC
        out = self._convolutions["decoder.conv_out"]
        pixels_RRC = self._map(y_slot, side, out.width)
        out(self._normed(x_HWC, sums_2C, "decoder.norm_out"), pixels_RRC)
        return np.clip(pixels_RRC[..., :3].transpose(2, 0, 1) * np.float32(0.5) + np.float32(0.5), 0, 1)

    def _map(self, slot: int, side: int, width: int) -> np.ndarray:
        return self._slots[slot][: side * side * width].reshape(side, side, width)

    def _normed(self, x_HWC: np.ndarray, sums_2C: np.ndarray, name: str) -> Normed:
        """GroupNorm as a scale and a shift per channel, from the sums of a map's values and squares."""
        H, W, C = x_HWC.shape
        group = C // GROUPS
        mean_G, square_G = sums_2C.reshape(2, GROUPS, group).sum(axis=2) / (H * W * group)
        rstd_G = 1 / np.sqrt(np.maximum(square_G - mean_G**2, 0) + NORM_EPS)
        scale_C = np.repeat(rstd_G, group) * self._weights[f"{name}.weight"]
        shift_C = self._weights[f"{name}.bias"] - np.repeat(mean_G, group) * scale_C
        return Normed(x_HWC, scale_C.astype(np.float32), shift_C.astype(np.float32))
