"""CUDA on the host's memory: what cuda.bindings offers and the engines use, with the real signatures.

Device memory is the host's, filled with poison, and known: a copy from or to what was never allocated, or was given
back, is an error. Work runs when it is submitted, or, while a stream is captured, when the graph is launched; what CUDA
refuses during a capture is refused. Kernels are the references, at the addresses that a launch passes.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from var_kernels import reference
from var_kernels.ahead_of_time import Compiled, signature_of

try:  # the real ones, whose signatures count; they need no GPU to be imported
    from cuda.bindings import driver, runtime

    REAL: dict[str, Any] = {"runtime": runtime, "driver": driver}
except ImportError:
    REAL = {"runtime": None, "driver": None}


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_FOUND = 500


class HostCuda:
    """The state of one device; `runtime` and `driver` stand in for the modules of cuda.bindings."""

    def __init__(self) -> None:
        self.device_memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.limit = 10**9  #: bytes on the device
        self.name, self.capability = b"NVIDIA H200\0\0", (9, 0)
        self.launches: list[str] = []  #: kernels that ran
        self.graph_launches = 0
        self.capturing: list[Callable[[], None]] | None = None
        self.invalidated = False
        self._handles: dict[int, Any] = {}
        self._counter = count(1)
        self.runtime, self.driver = _bound(self, "runtime"), _bound(self, "driver")
        self.runtime.cudaError_t = Error
        self.runtime.cudaStreamNonBlocking, self.runtime.cudaHostAllocDefault = 1, 0
        self.runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
        self.runtime.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.driver.CUresult, self.driver.CUstream = Result, int
        attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
        self.driver.CUfunction_attribute = attribute

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the modules in the place of cuda.bindings'."""
        bindings = SimpleNamespace(runtime=self.runtime, driver=self.driver)
        for name, module in (
            ("cuda", SimpleNamespace(bindings=bindings)),
            ("cuda.bindings", bindings),
            ("cuda.bindings.runtime", self.runtime),
            ("cuda.bindings.driver", self.driver),
        ):
            monkeypatch.setitem(sys.modules, name, module)

    def submit(self, work: Callable[[], None]) -> None:
        """Now, or as part of the graph."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    @property
    def allocated(self) -> int:
        return sum(block.nbytes for block in self.device_memory.values())

    def is_device(self, address: int, nbytes: int = 1) -> bool:
        """Whether these bytes are allocated on the device."""
        return any(a <= address and address + nbytes <= a + block.nbytes for a, block in self.device_memory.items())

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return any(a <= address and address + nbytes <= a + block.nbytes for a, block in self.pinned.items())

    def _handle(self, value: Any) -> int:
        self._handles[handle := next(self._counter)] = value
        return handle

    # ---- cuda.bindings.runtime ---------------------------------------------------------------------------------------

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, 0

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, 1

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return ((Error.cudaSuccess if device == 0 else Error.cudaErrorInvalidValue),)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.capability
        return Error.cudaSuccess, SimpleNamespace(name=self.name, major=major, minor=minor)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.limit - self.allocated, self.limit

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.capturing is not None:
            return self._invalid()
        if self.allocated + size > self.limit:
            return Error.cudaErrorMemoryAllocation, None
        block, address = _aligned(size)
        words = block[: size // 4 * 4].view(np.uint32)
        words[:] = 0x7FFFFFFF  # NaN in every float, far beyond every table in an integer
        self.device_memory[address] = block
        return Error.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess if self.device_memory.pop(devPtr, None) is not None else Error.cudaErrorInvalidValue,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        block, address = _aligned(size)
        self.pinned[address] = block
        return Error.cudaSuccess, address

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess if self.pinned.pop(ptr, None) is not None else Error.cudaErrorInvalidValue,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[Any, ...]:
        sides = [self.is_device(a, count) or self._is_pinned(a, count) for a in (dst, src)]
        if not any(self.is_device(a, count) for a in (dst, src)):
            return (Error.cudaErrorInvalidValue,)
        if self.capturing is not None and not all(sides):
            return self._invalid()
        self.submit(lambda: ctypes.memmove(dst, src, count) and None)
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        if not self.is_device(devPtr, count):
            return (Error.cudaErrorInvalidValue,)
        self.submit(lambda: ctypes.memset(devPtr, value, count) and None)
        return (Error.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self._handle("stream")

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return self._invalid() if self.capturing is not None else (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        assert self.capturing is None, "a capture within a capture"
        self.capturing, self.invalidated = [], False
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        work, self.capturing = self.capturing, None
        if self.invalidated:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, self._handle(work)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self._handle(self._handles[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        self._handles.pop(graph)
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        assert self.capturing is None
        self.graph_launches += 1
        for work in self._handles[graphExec]:
            work()
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        self._handles[graphExec] = None
        return (Error.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self._handle("event")

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, 0.5

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def _invalid(self) -> tuple[Any, ...]:
        self.invalidated = True
        return Error.cudaErrorStreamCaptureUnsupported, None

    # ---- cuda.bindings.driver ----------------------------------------------------------------------------------------

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        try:
            return Result.CUDA_SUCCESS, self._handle(json.loads(image))
        except ValueError:
            return Result.CUDA_ERROR_INVALID_IMAGE, None

    def cuModuleUnload(self, hmod: int) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, hmod: int, name: bytes) -> tuple[Any, ...]:
        kernel = self._handles[hmod]
        if kernel["entry"] != name.decode():
            return Result.CUDA_ERROR_NOT_FOUND, None
        return Result.CUDA_SUCCESS, self._handle(kernel)

    def cuFuncSetAttribute(self, hfunc: int, attrib: int, value: int) -> tuple[Any, ...]:
        self._handles[hfunc]["shared"] = value
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(
        self,
        f: int,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: int,
        kernelParams: tuple[tuple[Any, ...], tuple[Any, ...]],
        extra: int,
    ) -> tuple[Any, ...]:
        kernel, (values, types) = self._handles[f], kernelParams
        for kind, value in zip(types, values, strict=True):
            kind(value)  # TypeError
        names = [name for name, _ in kernel["arguments"]]
        assert list(values[len(names) :]) == [0, 0], "spare pointers"
        arguments = dict(zip(names, values, strict=False))
        for name, kind in kernel["arguments"]:
            assert kind != "pointer" or self.is_device(arguments[name]), name
            assert name not in kernel["aligned"] or arguments[name] % 16 == 0, name
        run = {
            "_uniforms_kernel": _uniforms,
            "_draw_kernel": _draw,
            "_mix_codes_kernel": _mix_codes,
            "_keep_given_kernel": _keep_given,
        }[kernel["entry"]]

        def work() -> None:
            self.launches.append(kernel["entry"])
            run(kernel["constants"], arguments, gridDimX, gridDimY)

        self.submit(work)
        return (Result.CUDA_SUCCESS,)


def _bound(cuda: HostCuda, module: str) -> Any:
    """The methods as functions of a module, held to the signatures of the real one where that is installed."""
    prefix = {"runtime": "cuda", "driver": "cu"}[module]
    found = SimpleNamespace()
    for name, method in inspect.getmembers(cuda, inspect.ismethod):
        if name.startswith(prefix) and (module == "runtime" or not name.startswith("cuda")):
            real = REAL[module] and inspect.signature(getattr(REAL[module], name))
            setattr(found, name, method if real is None else partial(_held_to, real, method))
    return found


def _held_to(real: inspect.Signature, method: Callable[..., Any], *arguments: Any) -> Any:
    real.bind(*arguments)  # TypeError
    return method(*arguments)


def _aligned(size: int) -> tuple[np.ndarray, int]:
    """Bytes at a multiple of 256, as CUDA gives them."""
    raw = np.zeros(size + 256, np.uint8)
    begin = -raw.ctypes.data % 256
    block = raw[begin : begin + size]
    return block, block.ctypes.data


def host_compiled(launch: Any, capability: int, aligned: Any, **_: Any) -> Compiled:
    """In the place of `ahead_of_time.compiled`: what the kernel is, for `cuLaunchKernel` above to read."""
    signature = signature_of(launch, aligned)
    entry = launch.kernel.__name__
    content = {
        "entry": entry,
        "arguments": signature.arguments,
        "constants": {key: value for key, value in signature.constants.items() if isinstance(value, int | None)},
        "aligned": sorted(aligned),
    }
    return Compiled(
        entry=entry,
        capability=capability,
        cubin=json.dumps(content).encode(),
        ptx="",
        arguments=signature.arguments,
        threads=32 * launch.num_warps,
        shared_bytes=60_000 if entry == "_mix_codes_kernel" else 128,
    )


def at(address: int, dtype: str, *shape: int, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """An array of what lies at an address."""
    itemsize = np.dtype(dtype).itemsize
    steps = strides or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    extent = sum((side - 1) * step for side, step in zip(shape, steps, strict=True)) + 1
    block = (ctypes.c_uint8 * (extent * itemsize)).from_address(address)
    flat = np.frombuffer(memoryview(block), dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(step * itemsize for step in steps))


def _tensor(address: int, dtype: str, *shape: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    return torch.from_numpy(at(address, dtype, *shape, strides=strides))


def _uniforms(constants: dict[str, Any], a: dict[str, Any], B: int, blocks: int) -> None:
    assert (blocks - 1) * constants["BLOCK"] < constants["L"] <= blocks * constants["BLOCK"]
    reference.uniforms(_tensor(a["seeds_ptr"], "int64", B), out_BL=_tensor(a["out_ptr"], "float64", B, constants["L"]))


def _draw(constants: dict[str, Any], a: dict[str, Any], n: int, B: int) -> None:
    V, C, guided, smooth = constants["V"], constants["C"], bool(constants["GUIDED"]), bool(constants["SMOOTH"])
    ratio = a["sharpening"] - 1
    assert not smooth or a["tau"] == pytest.approx(reference.smooth_temperature(ratio))
    reference.draw(
        _tensor(a["logits_ptr"], "float32", 2 * B if guided else B, n, V),
        _tensor(a["uniforms_ptr"], "float64", B, n, strides=(a["uniforms_stride"], 1)),
        *(_tensor(a[f"{name}_ptr"], "float32", B) for name in ("strength", "temperature")),
        _tensor(a["top_k_ptr"], "int32", B),
        _tensor(a["top_p_ptr"], "float32", B),
        _tensor(a["codebook_ptr"], "float32", V, C),
        guided=guided,
        tokens_out_Bn=_tensor(a["tokens_ptr"], "int64", B, n, strides=(a["tokens_stride"], 1)),
        codes_out_BnC=_tensor(a["codes_ptr"], "float32", B, n, C),
        invalid_out_B=_tensor(a["invalid_ptr"], "int32", B),
        smooth_weights_out_BnV=_tensor(a["smooth_ptr"], "float32", B, n, V) if smooth else None,
        seeds_B=_tensor(a["seeds_ptr"], "int64", B) if smooth else None,
        begin=a["begin"],
        ratio=ratio,
    )


def _keep_given(constants: dict[str, Any], a: dict[str, Any], blocks: int, B: int) -> None:
    n, C, block = a["n"], constants["C"], constants["BLOCK_N"]
    assert (blocks - 1) * block < n <= blocks * block
    reference.keep_given(
        _tensor(a["given_tokens_ptr"], "int64", B, n, strides=(a["given_tokens_stride"], 1)),
        _tensor(a["given_codes_ptr"], "float32", B, n, C, strides=(a["given_codes_stride"], C, 1)),
        tokens_out_Bn=_tensor(a["tokens_ptr"], "int64", B, n, strides=(a["tokens_stride"], 1)),
        codes_out_BnC=_tensor(a["codes_ptr"], "float32", B, n, C),
    )


def _mix_codes(constants: dict[str, Any], a: dict[str, Any], programs: int, _: int) -> None:
    V, C, M = constants["V"], constants["C"], a["M"]
    assert (programs - 1) * constants["BLOCK_M"] < M <= programs * constants["BLOCK_M"]
    reference.mix_codes(
        _tensor(a["weights_ptr"], "float32", 1, M, V),
        _tensor(a["codebook_ptr"], "float32", V, C),
        codes_out_BnC=_tensor(a["codes_ptr"], "float32", 1, M, C),
    )
