"""A GPU through cuda-python: memory, one stream, CUDA graphs, events, kernels. Every call is checked.

All work goes to one stream in the order of the calls. Memory is given back when its object is no longer held.
"""

from __future__ import annotations

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np

from ...gpu import Gpu, checked, cuda_runtime
from ...signature import TensorSpec

#: One capture at a time in the process.
_CAPTURING = Lock()

#: Bytes that a packed tensor begins at a multiple of.
ALIGNMENT = 256


class Memory:
    """Bytes on the device."""

    def __init__(self, runtime: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address: int = checked(runtime, runtime.cudaMalloc(max(nbytes, 1)), f"{nbytes / 1e6:.1f} MB on the GPU")
        weakref.finalize(self, runtime.cudaFree, self.address).atexit = False  # at exit the driver takes it back


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """An array on the device: contiguous, row-major."""

    address: int
    dtype: np.dtype
    shape: tuple[int, ...]
    memory: Memory  #: which it keeps alive

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int) -> Tensor:
        """A part along the first axis."""
        inner = self.shape[1:]
        step = math.prod(inner) * self.dtype.itemsize
        return Tensor(self.address + index * step, self.dtype, inner, self.memory)

    def front(self, *shape: int) -> Tensor:
        """The same memory from its beginning in another, not larger, shape."""
        assert math.prod(shape) <= math.prod(self.shape), (shape, self.shape)
        return Tensor(self.address, self.dtype, shape, self.memory)


class Device:
    """One GPU and the stream on which everything runs."""

    def __init__(self, index: int) -> None:
        """Raises EngineError."""
        self._runtime = cuda_runtime()
        self.gpu = Gpu.at(index)  #: its free memory is that before this process takes any
        self.index = index
        flags = self._runtime.cudaStreamNonBlocking
        self._stream = self._check(self._runtime.cudaStreamCreateWithFlags(flags), "a stream")
        self.stream = int(self._stream)  #: as other libraries take it
        weakref.finalize(self, self._runtime.cudaStreamDestroy, self._stream).atexit = False

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def make_current(self) -> None:
        """Of the calling thread, which all calls below need."""
        self._check(self._runtime.cudaSetDevice(self.index), f"device 'cuda:{self.index}'")

    def free_memory(self) -> int:
        """Bytes."""
        free, _ = self._check(self._runtime.cudaMemGetInfo(), "memory")
        return int(free)

    def allocate(self, nbytes: int) -> Memory:
        """Raises OutOfMemoryError."""
        return Memory(self._runtime, nbytes)

    def tensors(self, specs: list[TensorSpec]) -> dict[str, Tensor]:
        """One block of memory for all of them. Raises OutOfMemoryError."""
        offsets, size = _offsets(specs)
        block = self.allocate(size)
        return {
            spec.name: Tensor(block.address + offset, numpy_dtype(spec.dtype), _shape(spec), block)
            for spec, offset in zip(specs, offsets, strict=True)
        }

    def packed(self, specs: list[TensorSpec]) -> Packed:
        """Tensors with a twin on the host, zero at first. Raises OutOfMemoryError."""
        return Packed(self, specs)

    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked bytes on the host, uint8, zero at first."""
        flags = self._runtime.cudaHostAllocDefault
        address = self._check(self._runtime.cudaHostAlloc(max(nbytes, 1), flags), f"{nbytes / 1e6:.1f} MB on the host")
        buffer = (ctypes.c_uint8 * max(nbytes, 1)).from_address(int(address))
        weakref.finalize(buffer, self._runtime.cudaFreeHost, address).atexit = False
        array = np.frombuffer(memoryview(buffer), np.uint8)[:nbytes]
        array[:] = 0
        return array

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Between any two addresses, in stream order; of the host's memory only what is page-locked, or waited for."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._check(self._runtime.cudaMemcpyAsync(target, source, nbytes, kind, self._stream), "copying")

    def zero(self, tensor: Tensor) -> None:
        """In stream order."""
        self._check(self._runtime.cudaMemsetAsync(tensor.address, 0, tensor.nbytes, self._stream), "clearing")

    def upload(self, target: Tensor, array: np.ndarray) -> None:
        """An array of the same type and size, which is copied when this returns."""
        source = np.ascontiguousarray(array, target.dtype)
        assert source.nbytes == target.nbytes, (source.shape, target.shape)
        self.copy(target.address, source.ctypes.data, source.nbytes)
        self.synchronize()

    def download(self, source: Tensor) -> np.ndarray:
        """A copy on the host, there when this returns."""
        array = np.empty(source.shape, source.dtype)
        self.copy(array.ctypes.data, source.address, array.nbytes)
        self.synchronize()
        return array

    def synchronize(self) -> None:
        """Waits for the stream; here errors of what was launched come out."""
        self._check(self._runtime.cudaStreamSynchronize(self._stream), "what was launched on the GPU failed")

    def captured(self, launch: Callable[[], object]) -> Callable[[], object]:
        """What a call launches, as one CUDA graph: returns its replay. It must have run once before.

        Raises EngineError where something in it cannot be captured.
        """
        runtime, what = self._runtime, "capturing a CUDA graph"
        with _CAPTURING, _no_collection():
            mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._check(runtime.cudaStreamBeginCapture(self._stream, mode), what)
            graph = None
            try:
                try:
                    launch()
                finally:
                    ended = runtime.cudaStreamEndCapture(self._stream)  # after an error too, or it stays captured
                    graph = ended[1]
                self._check(ended, what)
                executable = self._check(runtime.cudaGraphInstantiate(graph, 0), what)
            finally:
                if graph is not None:
                    runtime.cudaGraphDestroy(graph)
        return _Replay(self, executable)

    def launch_graph(self, executable: Any) -> None:
        """In stream order."""
        self._check(self._runtime.cudaGraphLaunch(executable, self._stream), "a CUDA graph")

    def clock(self) -> Clock:
        """Begins to measure at this place of the stream."""
        return Clock(self._runtime, self._stream)

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        return checked(self._runtime, result, what)


class Clock:
    """Seconds between marks, by events in stream order, so that marking waits for nothing."""

    def __init__(self, runtime: Any, stream: Any) -> None:
        self._runtime, self._stream = runtime, stream
        self._names: list[str] = []
        self._events = [self._event()]

    def mark(self, name: str) -> None:
        """Ends the stage `name`, which began at the mark before."""
        self._names.append(name)
        self._events.append(self._event())

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, those of one name added up; the stream must have been waited for."""
        total: dict[str, float] = {}
        for name, pair in zip(self._names, pairwise(self._events), strict=True):
            elapsed = checked(self._runtime, self._runtime.cudaEventElapsedTime(*pair), "an event")
            total[name] = total.get(name, 0.0) + elapsed / 1000
        return total

    def _event(self) -> Any:
        event = checked(self._runtime, self._runtime.cudaEventCreate(), "an event")
        weakref.finalize(self, self._runtime.cudaEventDestroy, event).atexit = False
        checked(self._runtime, self._runtime.cudaEventRecord(event, self._stream), "an event")
        return event


class _Replay:
    """A captured graph; calling it launches it."""

    def __init__(self, device: Device, executable: Any) -> None:
        self._device, self._executable = device, executable
        weakref.finalize(self, device._runtime.cudaGraphExecDestroy, executable).atexit = False

    def __call__(self) -> None:
        self._device.launch_graph(self._executable)


class Packed:
    """Tensors in one block of device memory with a page-locked twin on the host, so that one copy moves them."""

    def __init__(self, device: Device, specs: list[TensorSpec]) -> None:
        offsets, size = _offsets(specs)
        self._device, self._block, self._host_block = device, device.allocate(size), device.pinned(size)
        self.device: dict[str, Tensor] = {}
        self.host: dict[str, np.ndarray] = {}
        for spec, offset in zip(specs, offsets, strict=True):
            dtype, shape = numpy_dtype(spec.dtype), _shape(spec)
            self.device[spec.name] = Tensor(self._block.address + offset, dtype, shape, self._block)
            host = self._host_block[offset : offset + math.prod(shape) * dtype.itemsize]
            self.host[spec.name] = host.view(dtype).reshape(shape)

    def upload(self) -> None:
        """Host → device, in stream order."""
        self._device.copy(self._block.address, self._host_block.ctypes.data, self._block.nbytes)

    def download(self) -> None:
        """Device → host, in stream order; read the host's side after synchronising."""
        self._device.copy(self._host_block.ctypes.data, self._block.address, self._block.nbytes)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's collector, which could give back memory in the middle of a capture: CUDA allows none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def numpy_dtype(name: str) -> np.dtype:
    """NumPy has no bfloat16: its bits."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(side) for side in spec.shape)


def _offsets(specs: list[TensorSpec]) -> tuple[list[int], int]:
    offsets, size = [], 0
    for spec in specs:
        offsets.append(size)
        size += -(-math.prod(_shape(spec)) * numpy_dtype(spec.dtype).itemsize // ALIGNMENT) * ALIGNMENT
    return offsets, size
