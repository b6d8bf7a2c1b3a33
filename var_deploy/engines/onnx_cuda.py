"""ONNX Runtime on a GPU: the static graphs as sessions over one copy of the weights in GPU memory.

The CUDA provider captures a graph for every scale and batch itself; draws run between them on the same stream. Every
node has to run on the GPU: ONNX Runtime puts what a provider lacks on the CPU without a word, so that is asked for and
refused. Checked against ONNX Runtime on a CPU, not yet run on a GPU.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..bundle import WEIGHTS, Bundle
from ..errors import EngineError
from ..gpu import OutOfMemoryError
from ..mapped_weights import weight_bytes
from ..plans import Batch, input_ranges
from ..prepared import PreparedCache, default_directory
from ..signature import TensorSpec
from .cuda.buffers import Launch
from .cuda.device import Device, Tensor
from .cuda.dlpack import SharedTensor
from .cuda.engine import CudaEngine, CudaLoopEngine
from .cuda.kernels import Kernels, kernel_source, write_draw_kernels
from .engine import Provider

log = logging.getLogger("var_deploy")

#: Of the first release whose CUDA provider is known to have Attention and TensorScatter of opset 24.
LEAST_VERSION = (1, 30)

#: Of kept kernels: count up when what is compiled changes without its source.
FORM = "1"

#: Of the engines that TensorRT's provider builds.
TENSORRT_BATCH = Batch(least=1, tuned=1, most=8)

#: Where the device's memory is, as ONNX Runtime calls it.
DEVICE_TYPE = "cuda"

_BFLOAT16 = 16  # TensorProto.BFLOAT16, for which NumPy has no name


#: The names that ONNX Runtime has for them.
_NAMES = {Provider.CUDA: "CUDAExecutionProvider", Provider.TENSORRT: "TensorrtExecutionProvider"}


def onnx_cuda_engine(
    bundle: Bundle,
    device_index: int,
    *,
    provider: Provider,
    draw_on_host: bool,
    allow_cpu: bool,
    prepared: PreparedCache | None,
    reason: str = "asked for",
) -> CudaEngine:
    """The engine on a GPU. allow_cpu: nodes that a provider lacks may run on the CPU. Raises EngineError."""
    _require(provider)
    device = Device(device_index)
    draws = "on the host" if draw_on_host else "by compiled kernels"
    log.info("engine onnx (%s) on %s, provider %s, draws %s", reason, device.gpu.name, provider, draws)
    kernels = None if draw_on_host else _kernels(bundle, device, prepared)
    runner = SessionRunner(bundle, device, provider, allow_cpu=allow_cpu)
    if kernels is None:
        return CudaEngine("onnx", bundle, device, runner)
    return CudaLoopEngine("onnx", bundle, device, runner, kernels, captures=False)  # the provider does it


def _require(provider: Provider) -> None:
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise EngineError(f"engine 'onnx' on a GPU needs onnxruntime-gpu {least} or later, got {ort.__version__}")
    if _NAMES[provider] not in ort.get_available_providers():
        known = ", ".join(ort.get_available_providers())
        raise EngineError(
            f"engine 'onnx' on a GPU needs {_NAMES[provider]}, this ONNX Runtime has {known}: pip uninstall "
            "onnxruntime, then pip install 'var-deploy[onnx-gpu]'"
        )
    ort.preload_dlls()  # CUDA and cuDNN, where they are Python packages


def _providers(
    provider: Provider, bundle: Bundle, device: Device, graph: str, *, captures: bool
) -> list[tuple[str, dict[str, str]]]:
    """The provider for a graph and those that take what it leaves, each with its options."""
    shared = {"device_id": str(device.index), "user_compute_stream": str(device.stream)}
    cuda = {**shared, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}  # float32 keeps all its bits
    if provider is Provider.CUDA:
        return [(_NAMES[provider], {**cuda, "enable_cuda_graph": "1"} if captures else cuda)]
    kept = default_directory()
    if kept is None:
        raise EngineError("provider 'tensorrt' keeps its engines in the user's cache, and there is no home for one")
    kept = kept / "onnxruntime-tensorrt"
    try:
        (kept / bundle.digest[:16]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"{kept}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another place"
        ) from error
    ranges = input_ranges(bundle.manifest.graphs[graph], TENSORRT_BATCH)
    tensorrt = {
        **shared,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(kept / bundle.digest[:16]),
        "trt_engine_cache_prefix": graph,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(kept),
    }
    for which, option in enumerate(("min", "opt", "max")):
        shapes = (f"{name}:{'x'.join(map(str, shapes[which]))}" for name, shapes in ranges.items())
        tensorrt[f"trt_profile_{option}_shapes"] = ",".join(shapes)
    return [(_NAMES[provider], tensorrt), (_NAMES[Provider.CUDA], cuda)]


def _kernels(bundle: Bundle, device: Device, prepared: PreparedCache | None) -> Kernels:
    """Compiled for this GPU, once; kept between runs, after which neither torch nor Triton is loaded any more."""

    def make(directory: Path) -> None:
        write_draw_kernels(directory, bundle.manifest, device.gpu.capability)

    if prepared is not None:
        var = bundle.manifest.var
        sizes = (var.vocab_size, var.z_channels, var.num_tokens, *device.gpu.capability)
        made_from = [FORM, *map(str, sizes), _version_of("triton"), kernel_source()]
        entry = prepared.entry("draw", made_from, 8_000_000, make)
        if entry is not None:
            return Kernels(device, entry, bundle.manifest, "run var-deploy cache --clear")
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        return Kernels(device, Path(directory), bundle.manifest, "install triton again")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


class SessionRunner:
    """Sessions of a bundle's static graphs on a device; see `GraphRunner`."""

    symbolic = False
    least_rows = 1

    def __init__(self, bundle: Bundle, device: Device, provider: Provider, *, allow_cpu: bool) -> None:
        self._bundle, self._device, self._provider, self._allow_cpu = bundle, device, provider, allow_cpu
        # TensorRT's provider knows no graph by its number; and no graph holds what runs on the CPU.
        self._captures = provider is Provider.CUDA and not allow_cpu
        self.most_images = TENSORRT_BATCH.most if provider is Provider.TENSORRT else None
        # ONNX Runtime keeps captured graphs by thread, so all runs are of one, whoever asks.
        self._worker = ThreadPoolExecutor(1, "var-deploy-onnx", device.make_current)
        self._weights = {
            name: SharedTensor(tensor, dtype, DEVICE_TYPE, device.index)
            for name, (tensor, dtype) in _weights_on(device, bundle).items()
        }
        self._shared = {name: ort.OrtValue.from_dlpack(weight) for name, weight in self._weights.items()}
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._numbers = count(1)  # of captured graphs
        for name in bundle.manifest.graphs:
            if name not in ("scales", "encoder"):  # not used here; made at the first encode
                self._session(name)

    def bound(self, graph: str, k: int | None, tensors: dict[str, Tensor]) -> Launch:
        """A binding of its own, and a number for its captured graph."""
        session = self._session(graph)
        binding, spec = session.io_binding(), self._bundle.manifest.graphs[graph]
        for bind, side in ((binding.bind_input, spec.inputs), (binding.bind_output, spec.outputs)):
            for declared in side:
                tensor = tensors[declared.name]
                dtype = _BFLOAT16 if declared.dtype == "bfloat16" else tensor.dtype.type
                bind(declared.name, DEVICE_TYPE, self._device.index, dtype, tensor.shape, tensor.address)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream keeps the order
        number = next(self._numbers)
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", str(number))
        execution = _Execution(self, graph, session, binding, options)
        if self._captures:
            weakref.finalize(execution, _release, self._worker, session, number).atexit = False
        return execution

    def _session(self, name: str) -> ort.InferenceSession:
        if name not in self._sessions:
            self._sessions[name] = self._opened(name)
        return self._sessions[name]

    def _opened(self, name: str) -> ort.InferenceSession:
        try:
            return self._started(name, captures=self._captures)
        except EngineError:
            if self._captures:  # ONNX Runtime refuses to capture beside nodes on the CPU, without a name: say which
                self._started(name, captures=False)
            raise

    def _started(self, name: str, *, captures: bool) -> ort.InferenceSession:
        path = self._bundle.file(self._bundle.manifest.graphs[name].file)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry("session.disable_prepacking", "1")  # on a CPU it would copy every weight
        for weight, value in self._shared.items():
            options.add_initializer(weight, value)
        providers = _providers(self._provider, self._bundle, self._device, name, captures=captures)
        with _told(f"loading {path}"):
            session = ort.InferenceSession(path, options, providers=providers)
        self._require_on_gpu(name, session, [provider for provider, _ in providers])
        return session

    def _require_on_gpu(self, name: str, session: ort.InferenceSession, asked: list[str]) -> None:
        """Raises EngineError for a session whose nodes do not all run on the providers that were asked for."""
        if missing := [given for given in asked if given not in session.get_providers()]:
            raise EngineError(
                f"{name}: ONNX Runtime {ort.__version__} could not start {', '.join(missing)} and fell back to "
                f"{', '.join(session.get_providers())}; its log says why: the driver, CUDA or cuDNN"
            )
        elsewhere = [
            f"{node.name} ({node.op_type}, {part.ep_name})"
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if part.ep_name not in asked
        ]
        if not elsewhere:
            return
        shown = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
        if not self._allow_cpu:
            raise EngineError(
                f"{name}: {len(elsewhere)} nodes do not run on {' or '.join(asked)}: {shown}; update onnxruntime-gpu, "
                "or allow it with allow_cpu"
            )
        log.warning("%s: %d nodes do not run on %s: %s", name, len(elsewhere), " or ".join(asked), shown)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Execution:
    """A session bound to its inputs and outputs."""

    runner: SessionRunner  #: whose weights the session reads
    graph: str
    session: ort.InferenceSession
    binding: Any
    options: ort.RunOptions

    def __call__(self) -> None:
        self.runner._worker.submit(self._run).result()

    def _run(self) -> None:
        with _told(f"{self.graph}: ONNX Runtime {ort.__version__} failed"):
            self.session.run_with_iobinding(self.binding, self.options)


def _release(worker: ThreadPoolExecutor, session: ort.InferenceSession, number: int) -> None:
    """Of a captured graph, by the thread that has it; nothing waits for it."""
    with suppress(RuntimeError):  # the thread has ended
        worker.submit(session.release_captured_graph, number)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises, which has no public base class, into an EngineError."""
    try:
        yield
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        no_memory = re.search("allocate memory|out of memory|ALLOC_FAILED", str(error), re.IGNORECASE)
        raise (OutOfMemoryError if no_memory else EngineError)(f"{what}: {line}") from error


def _weights_on(device: Device, bundle: Bundle) -> dict[str, tuple[Tensor, str]]:
    """Every weight once on the device, and its type."""
    found = weight_bytes(bundle.file(WEIGHTS))
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in found.items()]
    tensors = device.tensors(specs)
    for name, (_, shape, values) in found.items():
        if math.prod(shape):
            device.upload(tensors[name], values.view(tensors[name].dtype))
    return {spec.name: (tensors[spec.name], spec.dtype) for spec in specs}
