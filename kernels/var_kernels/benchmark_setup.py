"""What a case of the benchmark is: an operation at one size, its traffic, and how its tensors are made.

Building a case allocates fresh random inputs, and outputs that hold no result yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]

FP32 = torch.float32

#: Type → largest relative error in norm, and of one element relative to the largest. Library calls round between steps,
#: kernels at the end; a wrong tile or row is far outside.
TOLERANCE = {FP32: (1e-3, 5e-3), torch.float16: (5e-3, 2e-2), torch.bfloat16: (2e-2, 8e-2)}

MISMATCHES = 0.005  # share of integers that may differ: a number on the border of two may go either way

GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96  # of every draw

EAGER, COMPILE = "eager", "compile"
LIBRARY = "library"  # one call of PyTorch that does all of it, where there is one
PROVIDERS = (EAGER, COMPILE, LIBRARY)  # beside the kernels


class Inputs:
    """Draws a case's tensors on a device; the same seed gives the same ones."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.allocated = 0  #: bytes so far
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return self.counted(torch.randn(shape, generator=self._generator, device=self.device).to(dtype))

    def uniform(self, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, device=self.device, dtype=torch.float64)
        return self.counted(drawn)

    def integers(self, *shape: int) -> Tensor:
        """Weights in 8 bits."""
        options: dict[str, Any] = {"generator": self._generator, "device": self.device, "dtype": torch.int8}
        return self.counted(torch.randint(-127, 128, shape, **options))

    def seeds(self, count: int) -> Tensor:
        options: dict[str, Any] = {"generator": self._generator, "device": self.device, "dtype": torch.int64}
        return self.counted(torch.randint(0, 2**63 - 1, (count,), **options))

    def unwritten(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        """An output: NaN, or for integers a number that no result has in all its places."""
        poison = math.nan if dtype.is_floating_point else 77
        return self.counted(torch.full(shape, poison, device=self.device, dtype=FP32).to(dtype))

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype = FP32) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype)

    def counted(self, tensor: Tensor) -> Tensor:
        """Adds a tensor to the bytes."""
        self.allocated += tensor.numel() * tensor.element_size()
        return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A case's tensors, and what runs on them."""

    ours: Callable[[Callable[..., Any]], Results]  #: runs an implementation of the operation, returns its results
    eager: Callable[..., Results]
    arguments: tuple[Any, ...]  #: of `eager`
    library: Callable[[], Results] | None = None  #: runs `LIBRARY`; None where there is no such call
    comparable: Callable[[Results], Results] = lambda results: results  #: results in a form that has one right value


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One operation at one size."""

    operation: str
    variant: str = ""
    shape: dict[str, int]
    dtype: torch.dtype  #: storage type, and that of the products that count as operations
    bytes: int  #: every input read once, every output written once
    flops: int = 0  #: of products; 0 where they do not matter
    build: Callable[[Inputs], Setup]
    tolerance: tuple[float, float] | None = None  #: None: that of the storage type

    @property
    def name(self) -> str:
        """`linear gelu M=512 K=1024 N=4096`."""
        return row_name(self.operation, self.variant, self.shape)


def row_name(operation: str, variant: str, shape: dict[str, int]) -> str:
    """Of a case, and of the row that was measured of it."""
    sizes = " ".join(f"{axis}={size}" for axis, size in shape.items())
    return " ".join(part for part in (operation, variant, sizes) if part)


class WrongResultError(Exception):
    """A provider computes something else than the reference."""


def check(case: Case, got: Results, expected: Results) -> float:
    """Largest relative error in norm over the results. Raises WrongResultError."""
    if len(got) != len(expected):
        raise WrongResultError(f"{len(got)} results, expected {len(expected)}")
    largest = 0.0
    for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if mine.numel() != right.numel():
            raise WrongResultError(f"result {i} has shape {tuple(mine.shape)}, expected {tuple(right.shape)}")
        if right.numel() == 0:
            continue
        mine = mine.reshape(right.shape)
        if not right.is_floating_point():
            differing = (mine != right).float().mean().item()
            if not differing <= MISMATCHES:
                raise WrongResultError(
                    f"result {i}: {differing:.2%} differ from the reference, at most {MISMATCHES:.1%} may"
                )
            continue
        norm_limit, peak_limit = case.tolerance or TOLERANCE[case.dtype]
        difference, scale = mine.float() - right.float(), right.float()
        norm = (difference.norm() / scale.norm().clamp_min(1e-30)).item()
        peak = (difference.abs().amax() / scale.abs().amax().clamp_min(1e-30)).item()
        if not (norm <= norm_limit and peak <= peak_limit):  # false for NaN: an output that was not written
            raise WrongResultError(
                f"result {i}: relative error {norm:.1e} in norm, {peak:.1e} at the worst element, "
                f"at most {norm_limit:.0e} and {peak_limit:.0e}"
            )
        largest = max(largest, norm)
    return largest
