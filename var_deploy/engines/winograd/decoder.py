"""f_hat → pixels on a CPU, without ONNX Runtime: the deepest level directly, all finer ones by minimal filtering.

The network is that of `decoder.onnx`. Every finer convolution reads its input through GroupNorm and SiLU, or doubled,
and leaves the sums that the next GroupNorm needs, so a map is written once and read once or twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numba
import numpy as np
from safetensors.numpy import save_file

from ...config import GROUPS, VQVAEConfig
from ...errors import BundleError
from ...mapped_weights import mapped_weights
from ...prepared import PreparedCache
from ...products import single_threaded
from ...workspace import Workspace
from .convolution import Convolution, Doubled, Normed, Residual, filled, transformed
from .deep_level import NORM_EPS, DeepLevel
from .kernels import PLANES
from .layout import decoder_shapes, finer_convolutions
from .workers import Workers

#: File of the transformed weights.
KEPT = "decoder.safetensors"

#: Of the transformed weights: count up when `transformed` changes.
FORM = "1"


class WinogradDecoder:
    """The decoder of one bundle; one image after the other, each with all workers."""

    def __init__(
        self,
        vqvae: VQVAEConfig,
        weights_file: Path,
        threads: int,
        *,
        cache: PreparedCache | None = None,
        sha256: str = "",
        workspace: Workspace | None = None,
    ) -> None:
        """weights_file: of the bundle, with its digest; the deepest level's weights are used in place.

        cache: where the transformed weights of the finer levels are kept and mapped. Without it they are made here.
        workspace: where the maps are taken from, so that they share their memory with what runs before.
        Raises BundleError where one is missing or does not fit the configuration.
        """
        self._vqvae, self._weights = vqvae, _checked(vqvae, weights_file)
        self._widths = [vqvae.ch * m for m in vqvae.ch_mult]
        self._workers = Workers(threads)
        self._deep = DeepLevel(self._workers, self._weights, vqvae)
        U_PCO = self._transformed_or_kept(weights_file, cache, sha256)
        self._convolutions = {name: Convolution(self._workers, U, self._bias(name)) for name, U in U_PCO.items()}
        self._workspace = workspace or Workspace()
        self._lock = Lock()  # the workers' buffers are there once

    def __call__(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1] of f_hat [B, C, h, h]."""
        with self._lock, single_threaded(), self._maps() as slots:  # the workers are the threads
            images = np.asarray(f_hat_BChh, dtype=np.float32)
            return np.stack([self._image(f_hat_Chh, slots) for f_hat_Chh in images])

    @contextmanager
    def _maps(self) -> Iterator[list[np.ndarray]]:
        """Room for the largest map in each of three slots."""
        ends = np.cumsum(self._slot_sizes())
        block = self._workspace.take(int(4 * ends[-1]))
        yield np.split(np.frombuffer(block, np.float32, int(ends[-1])), ends[:-1])
        self._workspace.give(block)  # after an error it is let go instead: a worker may still write to it

    def _transformed_or_kept(
        self, weights_file: Path, cache: PreparedCache | None, sha256: str
    ) -> dict[str, np.ndarray]:
        if cache is None:
            return self._transformed(weights_file)
        shapes_OC = {name: self._weights[f"{name}.weight"].shape[:2] for name in finer_convolutions(self._vqvae)}
        shapes_PCO = {name: (PLANES, inputs, filled(outputs)) for name, (outputs, inputs) in shapes_OC.items()}
        size = sum(4 * math.prod(shape) for shape in shapes_PCO.values())
        directory = cache.entry(
            "decoder",
            [FORM, numba.__version__, sha256],
            size,
            lambda into: save_file(self._transformed(weights_file), into / KEPT),
        )
        if directory is not None:
            try:
                found = mapped_weights(directory / KEPT)
                if {name: U_PCO.shape for name, U_PCO in found.items()} != shapes_PCO:
                    raise BundleError(f"{directory / KEPT}: holds other weights")
                return found
            except BundleError as error:  # deleted meanwhile, or damaged where digests are not compared
                cache.discard(directory, error)
        return self._transformed(weights_file)

    def _transformed(self, weights_file: Path) -> dict[str, np.ndarray]:
        """U of every finer convolution."""
        once = mapped_weights(weights_file)  # a mapping of its own: what is read once does not stay in this process
        return {name: transformed(self._workers, once[f"{name}.weight"]) for name in finer_convolutions(self._vqvae)}

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

    def _image(self, f_hat_Chh: np.ndarray, slots: list[np.ndarray]) -> np.ndarray:
        """One image: pixels [3, R, R]."""

        def map_of(slot: int, side: int, width: int) -> np.ndarray:
            return slots[slot][: side * side * width].reshape(side, side, width)

        deepest = len(self._widths) - 1
        side, x_slot, y_slot = self._vqvae.latent_size, 0, 1
        x_HWC = map_of(x_slot, side, self._widths[-1])
        x_HWC[...] = self._deep(np.ascontiguousarray(f_hat_Chh)).transpose(1, 2, 0)
        sums_2C = np.stack([x_HWC.sum(axis=(0, 1), dtype=np.float64), np.square(x_HWC, dtype=np.float64).sum((0, 1))])
        for level in reversed(range(deepest)):
            side, below = 2 * side, x_HWC
            x_slot, y_slot = y_slot, 1 - y_slot
            x_HWC = map_of(x_slot, side, self._widths[level + 1])
            sums_2C = self._convolutions[f"decoder.up.{level + 1}.upsample.conv"](Doubled(below), x_HWC)
            for j in range(self._vqvae.num_res_blocks + 1):
                name, width = f"decoder.up.{level}.block.{j}", self._widths[level]
                y_HWC = map_of(y_slot, side, width)
                y_sums = self._convolutions[f"{name}.conv1"](self._normed(x_HWC, sums_2C, f"{name}.norm1"), y_HWC)
                residual, out_HWC = Residual(x_HWC), x_HWC
                if x_HWC.shape[-1] != width:
                    weight_OC = self._weights[f"{name}.nin_shortcut.weight"].reshape(width, -1)
                    residual, x_slot = Residual(x_HWC, weight_OC.T), 2
                    out_HWC = map_of(x_slot, side, width)
                source = self._normed(y_HWC, y_sums, f"{name}.norm2")
                sums_2C = self._convolutions[f"{name}.conv2"](source, out_HWC, residual)
                x_HWC = out_HWC
        out = self._convolutions["decoder.conv_out"]
        pixels_RRC = map_of(y_slot, side, out.width)
        out(self._normed(x_HWC, sums_2C, "decoder.norm_out"), pixels_RRC)
        return np.clip(pixels_RRC[..., :3].transpose(2, 0, 1) * np.float32(0.5) + np.float32(0.5), 0, 1)

    def _normed(self, x_HWC: np.ndarray, sums_2C: np.ndarray, name: str) -> Normed:
        """GroupNorm as a scale and a shift per channel, from the sums of a map's values and squares."""
        H, W, C = x_HWC.shape
        group = C // GROUPS
        mean_G, square_G = sums_2C.reshape(2, GROUPS, group).sum(axis=2) / (H * W * group)
        rstd_G = 1 / np.sqrt(np.maximum(square_G - mean_G**2, 0) + NORM_EPS)
        scale_C = np.repeat(rstd_G, group) * self._weights[f"{name}.weight"]
        shift_C = self._weights[f"{name}.bias"] - np.repeat(mean_G, group) * scale_C
        return Normed(x_HWC, scale_C.astype(np.float32), shift_C.astype(np.float32))


def _checked(vqvae: VQVAEConfig, weights_file: Path) -> dict[str, np.ndarray]:
    """The decoder's weights, mapped. Raises BundleError."""
    found = mapped_weights(weights_file)
    for name, shape in decoder_shapes(vqvae).items():
        weight = found.get(name)
        if weight is None or weight.shape != shape or weight.dtype != np.float32:
            got = "none" if weight is None else f"{weight.dtype} {weight.shape}"
            raise BundleError(f"{weights_file}: {name}: got {got}, expected float32 {shape}; export it again")
    return found
