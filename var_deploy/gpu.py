"""Which GPU is at hand, as far as plans and kernels depend on it. Loads no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A device that plans are built on and for."""

    name: str
    capability: tuple[int, int]
    free_memory: int  #: bytes

    @classmethod
    def at(cls, index: int | None) -> Gpu:
        """A device by its number, None: the one that CUDA has chosen. Raises EngineError."""
        runtime = cuda_runtime()
        if index is None:
            index = checked(runtime, runtime.cudaGetDevice(), "no GPU can be used")
        count = checked(runtime, runtime.cudaGetDeviceCount(), "no GPU can be used")
        if index >= count:
            raise EngineError(f"device 'cuda:{index}': this machine has {count} GPUs, counted from 0")
        checked(runtime, runtime.cudaSetDevice(index), f"device 'cuda:{index}' cannot be used")
        properties = checked(runtime, runtime.cudaGetDeviceProperties(index), f"device 'cuda:{index}' cannot be used")
        free, _ = checked(runtime, runtime.cudaMemGetInfo(), f"device 'cuda:{index}' cannot be used")
        name = properties.name.decode().rstrip("\0")
        return cls(name=name, capability=(properties.major, properties.minor), free_memory=free)

    def directory(self, tensorrt_version: str) -> str:
        """Name of the directory for its plans: a plan runs on this model of GPU and with this TensorRT alone."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{name}-sm{self.capability[0]}{self.capability[1]}-{tensorrt_version}"


class OutOfMemoryError(EngineError):
    """The GPU's memory does not suffice; the engine stays usable."""


def cuda_runtime() -> Any:
    """cuda.bindings.runtime. Raises EngineError where cuda-python is missing."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(f"cuda-python cannot be used ({error}): pip install cuda-python") from error
    return runtime


def checked(runtime: Any, result: tuple[Any, ...], what: str) -> Any:
    """The values that a call returned after its status: one, several or none. Raises EngineError, which says `what`."""
    error, *values = result
    if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise OutOfMemoryError(f"{what}: CUDA is out of memory")
    if error != runtime.cudaError_t.cudaSuccess:
        raise EngineError(f"{what}: CUDA says {error.name}; check the driver with nvidia-smi")
    return values[0] if len(values) == 1 else values
