"""The one place where a kernel starts, so that what would start can also be recorded and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel."""

    kernel: Any  #: a function decorated with triton.jit
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]  #: what may change between starts; None is a constant
    constants: dict[str, Any]  #: compile-time constants
    num_warps: int
    num_stages: int


#: Options of every kernel. Products and sums may fuse: Triton's default, which it has announced to change.
OPTIONS = {"enable_fp_fusion": True}

#: Of this thread alone: another's launches go on.
_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("recorder", default=None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Tensor | int | float | None],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Starts a kernel on the current stream of its tensors' device."""
    record = _recorder.get()
    if record is not None:
        record(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    kernel[grid](**arguments, **constants, num_warps=num_warps, num_stages=num_stages, **OPTIONS)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches instead of starting them; for ahead-of-time compilation, where tensors may be on any device."""
    launches: list[Launch] = []
    token = _recorder.set(launches.append)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def require_contiguous(**tensors: Tensor | None) -> None:
    """Kernels index plain memory; raises ValueError naming what is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)}, expected contiguous")


def require_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raises ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raises ValueError unless the tensor has one of these types."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
