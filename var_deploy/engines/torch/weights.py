"""weights.safetensors → tensors on a device in the precision asked for.

Axes: K and N sides of a matrix, D width, C code width, V codebook entries, n_0 tokens of the first scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_kernels import Ops
from var_kernels.reference import FP8_MAX

from ...bundle import Bundle
from ...precision import Precision
from ...static_buffers import activation_dtype

INT8_MAX = 127


def dtype_of(name: str) -> torch.dtype:
    """A torch type by its name."""
    found: torch.dtype = getattr(torch, name)
    return found


class WeightReader:
    """Reads single weights of a bundle to a device; each is held once."""

    def __init__(self, bundle: Bundle, device: torch.device, precision: Precision, ops: Ops) -> None:
        self._bundle = bundle
        self.device = device
        self.precision = precision
        self.activation = dtype_of(activation_dtype(precision))
        self.ops = ops

    def names(self, prefixes: tuple[str, ...]) -> list[str]:
        """Names of the weights that begin with one of the prefixes."""
        return [name for name in self._bundle.weight_sizes() if name.startswith(prefixes)]

    def float32(self, name: str) -> Tensor:
        """A weight as it is stored."""
        return torch.from_numpy(self._bundle.weight(name)).to(self.device)

    def half(self, name: str) -> Tensor:
        """A weight in the type of the activations."""
        return torch.from_numpy(self._bundle.weight(name)).to(self.device, self.activation)

    def product(self, name: str) -> Product:
        """The matrix and bias of one of a block's products, in the precision asked for."""
        weight_KN, bias_N = self.float32(f"{name}.weight"), self.half(f"{name}.bias")
        if self.precision is Precision.INT8:
            scale_N, quantized_KN = _quantized_columns(weight_KN, INT8_MAX)
            return Int8Product(quantized_KN.round().to(torch.int8), scale_N, bias_N, self.ops)
        if self.precision is Precision.FP8:
            scale_N, quantized_KN = _quantized_columns(weight_KN, FP8_MAX)
            # Hopper's float8 product takes the right matrix column by column.
            weight_NK = quantized_KN.t().contiguous().to(torch.float8_e4m3fn)
            return Fp8Product(weight_NK.t(), scale_N.view(1, -1), bias_N, self.ops)
        return LibraryProduct(weight_KN.to(self.activation), bias_N)


def _quantized_columns(weight_KN: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scale per column, and the matrix divided by it so that every column's largest magnitude is `largest`."""
    peak_N = weight_KN.abs().amax(0)
    scale_N = torch.where(peak_N > 0, peak_N / largest, torch.ones_like(peak_N))
    return scale_N, weight_KN / scale_N


@dataclass(frozen=True, slots=True)
class LibraryProduct:
    """x·W + b by the library; on a GPU the GELU rides in the product's epilogue."""

    weight_KN: Tensor
    bias_N: Tensor

    def __call__(self, x_MK: Tensor, out_MN: Tensor, buffers: Any, *, gelu: bool = False) -> Tensor:
        if not gelu:
            return torch.addmm(self.bias_N, x_MK, self.weight_KN, out=out_MN)
        if x_MK.is_cuda:  # tanh-approximated there; on a CPU the same call is the exact GELU
            return torch._addmm_activation(self.bias_N, x_MK, self.weight_KN, use_gelu=True, out=out_MN)
        torch.addmm(self.bias_N, x_MK, self.weight_KN, out=out_MN)
        return _gelu_in_place(out_MN)


@dataclass(frozen=True, slots=True)
class Int8Product:
    """x·(W·scale) + b with 8-bit weights: half the bytes of bf16, for small batches, which are bound by them."""

    weight_KN: Tensor  # int8
    column_scale_N: Tensor
    bias_N: Tensor
    ops: Ops

    def __call__(self, x_MK: Tensor, out_MN: Tensor, buffers: Any, *, gelu: bool = False) -> Tensor:
        return self.ops.linear(
            x_MK, self.weight_KN, self.bias_N, column_scale_N=self.column_scale_N, gelu=gelu, out_MN=out_MN
        )


@dataclass(frozen=True, slots=True)
class Fp8Product:
    """(x/rows)·(W/columns) in float8, times both scales, + b."""

    weight_KN: Tensor  # float8, column-major
    column_scale_1N: Tensor
    bias_N: Tensor
    ops: Ops

    def __call__(self, x_MK: Tensor, out_MN: Tensor, buffers: Any, *, gelu: bool = False) -> Tensor:
        M, K = x_MK.shape
        quantized_MK = buffers.quantized_MK.view(-1)[: M * K].view(M, K)
        scale_M1 = buffers.row_scale_M1[:M]
        self.ops.quantize_rows(x_MK, out_MK=quantized_MK, scale_out_M1=scale_M1)
        scaled_product(quantized_MK, self.weight_KN, scale_M1, self.column_scale_1N, self.bias_N, out_MN)
        return _gelu_in_place(out_MN) if gelu else out_MN


def scaled_product(
    x_MK: Tensor, weight_KN: Tensor, row_scale_M1: Tensor, column_scale_1N: Tensor, bias_N: Tensor, out_MN: Tensor
) -> Tensor:
    """The library's float8 product; its matrix lies column by column."""
    return torch._scaled_mm(
        x_MK,
        weight_KN,
        scale_a=row_scale_M1,
        scale_b=column_scale_1N,
        bias=bias_N,
        out_dtype=out_MN.dtype,
        use_fast_accum=True,
        out=out_MN,
    )


Product = LibraryProduct | Int8Product | Fp8Product


def _gelu_in_place(x: Tensor) -> Tensor:
    gelu: Callable[..., Tensor] = torch.ops.aten.gelu.out
    return gelu(x, approximate="tanh", out=x)
