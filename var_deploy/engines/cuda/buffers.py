"""Static buffers of one batch size on the device, and which of them every graph reads and writes at every scale.

Axes: B images, R rows (B, or 2B under guidance: conditioned first), n tokens, K scales, L all positions, V codebook
entries, C code width, h side of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ...bundle import Manifest
from ...config import HEAD_DIM
from ...signature import GraphSpec, TensorSpec, cache_names, scale_graph_name
from .device import Device, Tensor

Launch = Callable[[], object]


class GraphRunner(Protocol):
    """Runs a bundle's graphs on a device."""

    @property
    def symbolic(self) -> bool:
        """One graph for all scales, with the input `scale`."""
        ...

    @property
    def least_rows(self) -> int:
        """Fewer are not run."""
        ...

    @property
    def most_images(self) -> int | None:
        """Of a request; None: as many as fit."""
        ...

    def bound(self, graph: str, k: int | None, tensors: dict[str, Tensor]) -> Launch:
        """A launch of a graph on these inputs and outputs, in the device's stream order; k: the scale, if it is one.

        A cache's input and output are one tensor. The tensors' memory stays the caller's to keep.
        """
        ...


def loop_specs(manifest: Manifest, rows: int, images: int, *, smooth: bool) -> list[TensorSpec]:
    """Everything that stays on the device; each begins at a multiple of 256 bytes, as TensorRT asks for."""
    var = manifest.var
    n, C, L = var.tokens_per_scale[-1], var.z_channels, var.num_tokens
    activation, f_hat = manifest.precision.graph_dtype, (rows, C, var.latent_size, var.latent_size)
    cache = (rows, var.num_heads, L, HEAD_DIM)
    outputs = manifest.graphs["condition"].outputs
    specs = [TensorSpec(spec.name, spec.dtype, _resolved(spec.shape, {"R": rows})) for spec in outputs]
    specs += [TensorSpec(name, activation, cache) for name in cache_names(var.depth)]
    specs += [
        *(TensorSpec(f"scale.{k}", "int64", (1,)) for k in range(var.num_scales)),
        TensorSpec("f_hat.0", "float32", f_hat),
        TensorSpec("f_hat.1", "float32", f_hat),
        *(TensorSpec(f"codes.{k}", "float32", (rows, n_k, C)) for k, n_k in enumerate(var.tokens_per_scale)),
        TensorSpec("logits", "float32", (rows, n, var.vocab_size)),
        TensorSpec("uniforms", "float64", (images, L)),
    ]
    if smooth:
        specs.append(TensorSpec("smooth", "float32", (images, n, var.vocab_size)))
    return specs


class Buffers:
    """Memory of `rows` rows, and the launches of all graphs on it, made when first asked for."""

    def __init__(
        self, device: Device, runner: GraphRunner, manifest: Manifest, *, rows: int, images: int, smooth: bool = False
    ) -> None:
        """Raises OutOfMemoryError."""
        self.rows, self.images, self.smooths = rows, images, smooth
        self._runner, self._manifest, self._device = runner, manifest, device
        self.labels = device.tensors([TensorSpec("labels", "int64", (rows,))])["labels"]
        self._tensors = device.tensors(loop_specs(manifest, rows, images, smooth=smooth))
        self._launches: dict[tuple[str, int | None, int], Launch] = {}
        for k in range(manifest.var.num_scales):
            device.upload(self._tensors[f"scale.{k}"], np.array([k]))
            device.zero(self._tensors[f"codes.{k}"])  # rows that nobody fills run too

    def clear(self) -> None:
        """What a generation adds to, or reads before it is written."""
        for name in ("f_hat.0", "f_hat.1", "codes.0"):
            self._device.zero(self._tensors[name])

    # ---- what lies where ---------------------------------------------------------------------------------------------

    def logits(self, k: int, rows: int) -> Tensor:
        """[rows, n_k, V]"""
        return self._front("logits", rows, self._manifest.var.tokens_per_scale[k], self._manifest.var.vocab_size)

    def codes(self, k: int, rows: int) -> Tensor:
        """Codes of scale k: [rows, n_k, C]."""
        return self._front(f"codes.{k}", rows, self._manifest.var.tokens_per_scale[k], self._manifest.var.z_channels)

    def smooth(self, k: int, images: int) -> Tensor:
        """Weights of the mixtures: [images, n_k, V]."""
        return self._front("smooth", images, self._manifest.var.tokens_per_scale[k], self._manifest.var.vocab_size)

    def f_hat(self, scales: int, rows: int) -> Tensor:
        """The map of the first `scales` scales, [rows, C, h, h]; two take turns, so it lasts until two scales later."""
        one = self._tensors[f"f_hat.{scales % 2}"]
        return one.front(rows, *one.shape[1:])

    @property
    def uniforms(self) -> Tensor:
        """float64 [B, L]"""
        return self._tensors["uniforms"]

    def repeat_codes(self, k: int, images: int) -> None:
        """The images' codes of scale k for their null-class rows, too."""
        codes = self.codes(k, images)
        self._device.copy(codes.address + codes.nbytes, codes.address, codes.nbytes)

    # ---- launches ----------------------------------------------------------------------------------------------------

    def condition(self, labels: Tensor) -> Launch:
        """All rows."""
        names = [spec.name for spec in self._manifest.graphs["condition"].outputs]
        outputs = {name: self._tensors[name] for name in names}
        return self._bound("condition", None, self.rows, {"labels": labels, **outputs})

    def scale(self, k: int, rows: int) -> Launch:
        """Scale k for the first rows: reads the codes of scale k − 1, writes logits, map and caches."""
        name = "scales" if self._runner.symbolic else scale_graph_name(k)
        spec, n = self._manifest.graphs[name], self._manifest.var.tokens_per_scale
        axes = {"R": rows, "n": n[k], "n_prev": n[max(k - 1, 0)]}
        tensors = {
            "scale": self._tensors[f"scale.{k}"],
            "codes": self.codes(max(k - 1, 0), rows),
            "f_hat": self.f_hat(k - 1, rows),  # at the first scale the other half, which holds zeros too
            "f_hat.out": self.f_hat(k, rows),
            "logits": self.logits(k, rows),
        }
        return self._bound(name, k, rows, {**self._others(spec, axes), **_named(spec, tensors)})

    def finish(self, images: int) -> Launch:
        """Adds the last scale's codes."""
        K = self._manifest.var.num_scales
        tensors = {
            "codes": self.codes(K - 1, images),
            "f_hat": self.f_hat(K - 1, images),
            "f_hat.out": self.f_hat(K, images),
        }
        return self._bound("finish", None, images, tensors)

    def decode(self, images: int, pixels: Tensor) -> Launch:
        """The finished map → pixels."""
        tensors = {"f_hat": self.f_hat(self._manifest.var.num_scales, images), "pixels": pixels}
        return self._bound("decoder", None, images, tensors)

    def _others(self, spec: GraphSpec, axes: dict[str, int]) -> dict[str, Tensor]:
        """Modulations, start tokens and caches, the latter as input and as output."""
        found = {}
        for tensor in (*spec.inputs, *spec.outputs):
            name = tensor.name.removesuffix(".out")
            held = self._tensors.get(name)
            if held is not None and name not in ("codes", "logits"):
                found[tensor.name] = held.front(*_resolved(tensor.shape, axes))
        return found

    def _bound(self, graph: str, k: int | None, rows: int, tensors: dict[str, Tensor]) -> Launch:
        key = graph, k, rows
        if key not in self._launches:
            self._launches[key] = self._runner.bound(graph, k, tensors)
        return self._launches[key]

    def _front(self, name: str, *shape: int) -> Tensor:
        return self._tensors[name].front(*shape)


def _named(spec: GraphSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that a graph has."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _resolved(shape: tuple[int | str, ...], axes: dict[str, int]) -> tuple[int, ...]:
    return tuple(side if isinstance(side, int) else axes[side] for side in shape)
