"""The static buffers of one batch size: allocated once from `static_buffers`, never moved, so a graph can replay.

What a request changes lies in one block of memory, with a twin on the host, so that one copy uploads it; likewise what
comes back. Axes as in `static_buffers`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...config import VARConfig, VQVAEConfig
from ...given import Given
from ...precision import Precision
from ...sampling import Settings
from ...signature import TensorSpec
from ...static_buffers import decode_specs, fill_given, fill_request, given_specs, input_specs, output_specs, work_specs
from .weights import dtype_of

_ALIGNMENT = 16  # of a packed tensor's first byte, for wide loads


class Packed:
    """Tensors in one block of device memory with a twin on the host (page-locked, where there is a GPU)."""

    def __init__(self, specs: list[TensorSpec], device: torch.device) -> None:
        size = sum(_padded_size(spec) for spec in specs)
        # Zeros: rows that pad a batch to its bucket run too, and every value must be one that can run.
        self._device_block = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host_block = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = _views(self._device_block, specs)
        self.host = {name: view.numpy() for name, view in _views(self._host_block, specs).items()}

    def upload(self) -> None:
        """Host → device, in stream order."""
        self._device_block.copy_(self._host_block, non_blocking=True)

    def download(self) -> None:
        """Device → host, in stream order; read the host's side after synchronising."""
        self._host_block.copy_(self._device_block, non_blocking=True)


class Buffers:
    """Everything one generation of up to `batch` images works on."""

    def __init__(
        self, var: VARConfig, *, batch: int, guided: bool, precision: Precision, device: torch.device, smooth: bool
    ) -> None:
        self.config, self.batch, self.rows = var, batch, 2 * batch if guided else batch
        self.inputs = Packed(input_specs(var, batch, self.rows), device)
        self.outputs = Packed(output_specs(var, batch), device)
        work = {spec.name: _empty(spec, device) for spec in work_specs(var, batch, self.rows, precision, smooth)}
        self.labels_R = self.inputs.device["labels_R"]
        self.seeds_B = self.inputs.device["seeds_B"]
        self.strength_KB = self.inputs.device["strength_KB"]
        self.temperature_KB = self.inputs.device["temperature_KB"]
        self.top_k_KB = self.inputs.device["top_k_KB"]
        self.top_p_KB = self.inputs.device["top_p_KB"]
        self.temperature_KB.fill_(1)  # a capture runs once before any request is there
        self.tokens_BL = self.outputs.device["tokens_BL"]
        self.invalid_KB = self.outputs.device["invalid_KB"]
        self.modulation_RN = work["modulation_RN"]
        self.caches_i2RHLd = work["caches_i2RHLd"]
        self.uniforms_BL = work["uniforms_BL"]
        self.x_MD = work["x_MD"]
        self.normed_MD = work["normed_MD"]
        self.qkv_MN = work["qkv_MN"]
        self.attended_MD = work["attended_MD"]
        self.hidden_MF = work["hidden_MF"]
        self.branch_MD = work["branch_MD"]
        self.logits_MV = work["logits_MV"]
        self.quantized_MK = work.get("quantized_MK")
        self.row_scale_M1 = work.get("row_scale_M1")
        self.smooth_BnV = work.get("smooth_BnV")
        self._codes_BnC = [work[f"codes_BnC.{k}"] for k in range(var.num_scales)]
        self._f_hat_2BlC = work["f_hat_2BlC"]
        self._given: Packed | None = None
        self._device = device

    def fill(self, labels_B: np.ndarray, seeds: list[int], settings: Settings) -> None:
        """Writes a request into the host's side of the inputs; images beyond it are drawn greedily from class 0."""
        fill_request(self.inputs.host, self.config, self.batch, labels_B, seeds, settings)

    @property
    def given(self) -> Packed:
        """`given_specs`: in the place of what is drawn. Made when first asked for, as few requests give tokens; a
        capture may not be the first.
        """
        if self._given is None:
            self._given = Packed(given_specs(self.config, self.batch), self._device)
        return self._given

    def fill_given(self, given: Given) -> None:
        """Writes what a request gives into the host's side; images beyond it are drawn."""
        fill_given(self.given.host, given)

    def tokens_in(self, k: int, rows: int) -> Tensor:
        """Input tokens of scale k, [rows·n_k, D]: where its residual stream starts."""
        return self.x_MD[: rows * self.config.tokens_per_scale[k]]

    def logits(self, k: int, rows: int) -> Tensor:
        """Logits of scale k: [rows, n_k, V]."""
        n = self.config.tokens_per_scale[k]
        return self.logits_MV[: rows * n].view(rows, n, -1)

    def codes(self, k: int) -> Tensor:
        """Codes of scale k: [B, n_k, C]."""
        return self._codes_BnC[k]

    def smooth_weights(self, k: int) -> Tensor | None:
        """Mixture weights of scale k, [B, n_k, V], where they are drawn."""
        if self.smooth_BnV is None:
            return None
        return _front(self.smooth_BnV, self.batch, self.config.tokens_per_scale[k], self.config.vocab_size)

    def f_hat_BlC(self, scales: int) -> Tensor:
        """f_hat of the first `scales` scales; two buffers take turns, so it lasts until two scales later."""
        return self._f_hat_2BlC[scales % 2]


class DecodeBuffers:
    """The decoder's input and results for up to `batch` images."""

    def __init__(self, vqvae: VQVAEConfig, batch: int, device: torch.device) -> None:
        f_hat, pixels, pictures = decode_specs(vqvae, batch)
        self.batch = batch
        self.f_hat_BlC = _empty(f_hat, device).zero_()
        self.pixels_B3RR = _empty(pixels, device)
        self.pictures = Packed([pictures], device)
        self.bytes_BRR3 = self.pictures.device["bytes_BRR3"]


def _empty(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.empty(_sides(spec), dtype=dtype_of(spec.dtype), device=device)


def _sides(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(side) for side in spec.shape)


def _front(tensor: Tensor, *shape: int) -> Tensor:
    """The first elements of a buffer in another shape."""
    return tensor.view(-1)[: math.prod(shape)].view(shape)


def _padded_size(spec: TensorSpec) -> int:
    size = dtype_of(spec.dtype).itemsize * math.prod(_sides(spec))
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _views(block: Tensor, specs: list[TensorSpec]) -> dict[str, Tensor]:
    views, begin = {}, 0
    for spec in specs:
        shape, dtype = _sides(spec), dtype_of(spec.dtype)
        end = begin + dtype.itemsize * math.prod(shape)
        views[spec.name] = block[begin:end].view(dtype).view(shape)
        begin += _padded_size(spec)
    return views
