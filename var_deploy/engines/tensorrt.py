"""TensorRT engine: runs a bundle's plans; only numpy, cuda-python and tensorrt are needed.

Plans hold no weights: they are refitted from the bundle when a plan is loaded. A cache's input and output are one
buffer, which is checked plan by plan. Written against TensorRT 11.4; checked against its API, not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import EngineError
from ..gpu import OutOfMemoryError
from ..plans import Layout, PlanSet, find_plans, memory_needed, plan_names
from ..signature import cache_names
from .cuda.buffers import Launch
from .cuda.device import ALIGNMENT, Device, Memory, Tensor
from .cuda.engine import CudaEngine, CudaLoopEngine
from .cuda.kernels import Kernels
from .tensorrt_library import parser_errors, tensorrt_logger, tensorrt_module

log = logging.getLogger("var_deploy")


def tensorrt_engine(
    bundle: Bundle, device_index: int, *, plans: str | None, draw_on_host: bool, reason: str = "asked for"
) -> CudaEngine:
    """The engine on a GPU. plans: name of the directory to take; None chooses. Raises EngineError."""
    trt = tensorrt_module()
    device = Device(device_index)
    found = find_plans(bundle, device.gpu, trt.__version__, plans)
    draws = "on the host" if draw_on_host else "by compiled kernels"
    log.info("engine tensorrt (%s) on %s, plans %s, draws %s", reason, device.gpu.name, found.directory, draws)
    step = "build --layout profiles, or free some" if found.layout is Layout.PER_SCALE else "free some"
    if (needed := memory_needed(bundle, found.batch, found.layout)) > (free := device.gpu.free_memory):
        raise EngineError(
            f"{found.directory}: needs {needed / 1e9:.1f} GB for weights and caches, {free / 1e9:.1f} GB of the GPU's "
            f"memory are free; {step}"
        )
    remedy = "build the plans again on this machine"
    kernels = None if draw_on_host else Kernels(device, found.kernels(), bundle.manifest, remedy)
    try:
        runner = PlanRunner(trt, bundle, device, found)
    except OutOfMemoryError as error:
        raise EngineError(f"{found.directory}: the plans do not fit into the GPU's memory ({error}); {step}") from error
    if kernels is None:
        return CudaEngine("tensorrt", bundle, device, runner)
    return CudaLoopEngine("tensorrt", bundle, device, runner, kernels, captures=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Execution:
    """A context that is bound to its inputs and outputs, and what it reads and writes beside them."""

    runner: PlanRunner
    graph: str
    context: Any
    scratch: Memory
    on_host: list[np.ndarray]

    def __call__(self) -> None:
        with self.runner._watched(self.graph):
            if not self.context.execute_async_v3(self.runner._device.stream):
                raise EngineError(f"{self.graph}: TensorRT did not run it: {self.runner._said()}")


class PlanRunner:
    """The plans of a bundle on a device; see `GraphRunner`."""

    def __init__(self, trt: ModuleType, bundle: Bundle, device: Device, plans: PlanSet) -> None:
        self.symbolic = plans.layout is Layout.PROFILES
        self.least_rows, self.most_images = plans.batch.least, plans.batch.most
        self._trt, self._bundle, self._device, self._plans = trt, bundle, device, plans
        self._raised: list[BaseException] = []
        self._logger = tensorrt_logger(trt, self._raised)
        self._runtime = trt.Runtime(self._logger)
        self._engines: dict[str, Any] = {}
        self._lock = Lock()
        for name in plan_names(bundle.manifest.var.num_scales, plans.layout):
            if name != "encoder":  # loaded at the first encode: few callers need it
                self._engine(name)
        self._scratch = device.allocate(max(engine.device_memory_size_v2 for engine in self._engines.values()))

    def bound(self, graph: str, k: int | None, tensors: dict[str, Tensor]) -> Launch:
        """A context of its own, never changed later, as captured graphs refer to it.

        All share one scratch buffer, as none run at once.
        """
        engine = self._engine(graph)
        with self._watched(graph):
            return self._bound(graph, k, tensors, engine)

    def _bound(self, graph: str, k: int | None, tensors: dict[str, Tensor], engine: Any) -> _Execution:
        trt = self._trt
        scratch, size = self._scratch, engine.device_memory_size_v2
        if size > scratch.nbytes:  # of the encoder, which was not asked when it was allocated
            scratch = self._device.allocate(size)
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise OutOfMemoryError(f"{graph}: no context could be made; take fewer images at a time: {self._said()}")
        context.set_device_memory(scratch.address, scratch.nbytes)
        profile = k if graph == "scales" and k is not None else 0
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise EngineError(f"{graph}: profile {profile} was refused: {self._said()}")
        self._device.synchronize()
        on_host: list[np.ndarray] = []
        for name, tensor in tensors.items():
            assert tensor.address % ALIGNMENT == 0, name
        for spec in self._bundle.manifest.graphs[graph].inputs:
            tensor = tensors[spec.name]
            if not context.set_input_shape(spec.name, tensor.shape):
                least, most = self._plans.batch.least, self._plans.batch.most
                raise EngineError(
                    f"{graph}: {spec.name} of shape {tensor.shape} was refused by plans for {least} to {most} images: "
                    f"{self._said()}"
                )
        for name, tensor in tensors.items():
            address = tensor.address
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:  # lengths are computed from it
                on_host.append(self._device.pinned(tensor.nbytes))  # as aligned as the device's
                on_host[-1][:] = self._device.download(tensor).view(np.uint8).ravel()
                address = on_host[-1].ctypes.data
            if not context.set_tensor_address(name, address):
                raise EngineError(f"{graph}: the address of {name} was refused: {self._said()}")
        if unknown := context.infer_shapes():
            raise EngineError(f"{graph}: TensorRT does not know the shapes of {', '.join(unknown)}: {self._said()}")

        return _Execution(self, graph, context, scratch, on_host)

    def _engine(self, name: str) -> Any:
        with self._lock:
            if name not in self._engines:
                with self._watched(name):
                    self._engines[name] = self._loaded(name)
            return self._engines[name]

    def _loaded(self, name: str) -> Any:
        """A plan with the bundle's weights in it."""
        trt, file = self._trt, self._plans.directory / f"{name}.plan"
        engine = self._runtime.deserialize_cuda_engine(self._plans.read(name))
        if engine is None:
            raise EngineError(f"{file}: TensorRT {trt.__version__} does not take it: {self._said()} ({self._free()})")
        spec = self._bundle.manifest.graphs[name]
        expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if (found := {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}) != expected:
            raise EngineError(
                f"{file}: takes and returns {', '.join(sorted(found))}, expected {', '.join(sorted(expected))}; "
                "build the plans again"
            )
        caches = set(cache_names(self._bundle.manifest.var.depth))
        for tensor in spec.outputs:
            cache = tensor.name.removesuffix(".out")
            if cache in caches and (alias := engine.get_aliased_input_tensor(tensor.name)) != cache:
                raise EngineError(
                    f"{file}: {tensor.name} is not written in place (aliased with {alias or 'nothing'}, expected "
                    f"{cache}); this TensorRT does not keep caches as the engine needs them"
                )
        self._refit(engine, name)
        return engine

    def _refit(self, engine: Any, name: str) -> None:
        trt, path = self._trt, self._bundle.file(self._bundle.manifest.graphs[name].file)
        refitter = trt.Refitter(engine, self._logger)
        reader = trt.OnnxParserRefitter(refitter, self._logger)
        if not reader.refit_from_file(str(path)):
            raise EngineError(f"{path}: its weights could not be read for the plan: {parser_errors(reader)}")
        if missing := refitter.get_missing_weights():
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise EngineError(f"{path}: has no weights named {shown}, which the plan needs; build the plans again")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"{path}: its weights could not be put into the plan: {self._said()} ({self._free()})")

    def _free(self) -> str:
        return f"{self._device.free_memory() / 1e9:.1f} GB of the GPU's memory are free"

    def _said(self) -> str:
        """TensorRT's newest error."""
        return self._logger.last_error or "it gave no reason"

    @contextmanager
    def _watched(self, graph: str) -> Iterator[None]:
        """What TensorRT raises becomes an EngineError; what its callbacks raised, Ctrl-C among it, goes on."""
        self._logger.last_error = None
        try:
            yield
        except RuntimeError as error:
            raise EngineError(f"{graph}: TensorRT failed: {error}") from error
        finally:
            if self._raised:
                raise self._raised.pop()
