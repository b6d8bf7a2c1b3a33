"""The one place where an engine is chosen; what is taken and why is logged."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from ..bundle import Bundle
from ..cpus import usable_cpus
from ..errors import EngineError
from ..precision import BUNDLE_PRECISIONS, Precision
from ..prepared import PreparedCache
from .engine import Decoder, Draw, Engine, Graphs, Provider

log = logging.getLogger("var_deploy")

ENGINES = ("onnx", "torch", "tensorrt")

#: What the kernels are compiled and checked for: Ampere, the first with bfloat16.
MIN_CAPABILITY = (8, 0)

#: Small images are decoded in a few milliseconds, where sharing out the work costs more than it saves: at 32 px 27 ms
#: instead of 4, while at 256 px it is faster. Where the two meet was not measured.
MIN_WINOGRAD_SIZE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine runs; see `var_deploy.load`."""

    precision: str = "auto"
    graphs: str = "symbolic"
    decoder: str = "auto"
    prepared: PreparedCache | None = None
    threads: int | None = None
    memory_limit: int | None = None
    decode_slice: int | None = None
    compile_decoder: bool = False
    plans: str | None = None
    draw: str = Draw.DEVICE
    provider: str = Provider.CUDA
    allow_cpu: bool = False


def engine_for(bundle: Bundle, engine: str, device: str, options: EngineOptions) -> Engine:
    """The engine asked for, or with "auto" the best that runs here; the choice is logged with its reason.

    Raises EngineError when it is unknown, its library or device is missing, or an option does not apply to it.
    """
    if engine not in ("auto", *ENGINES):
        raise EngineError(f"unknown engine {engine!r}; known: auto, {', '.join(ENGINES)}")
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise EngineError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N")
    if options.precision not in ("auto", *Precision):
        raise EngineError(f"unknown precision {options.precision!r}; known: auto, {', '.join(Precision)}")
    if options.graphs not in set(Graphs):
        raise EngineError(f"unknown graphs {options.graphs!r}; known: {', '.join(Graphs)}")
    if options.decoder not in ("auto", *Decoder):
        raise EngineError(f"unknown decoder {options.decoder!r}; known: auto, {', '.join(Decoder)}")
    if options.draw not in set(Draw):
        raise EngineError(f"unknown draw {options.draw!r}; known: {', '.join(Draw)}")
    if options.provider not in set(Provider):
        raise EngineError(f"unknown provider {options.provider!r}; known: {', '.join(Provider)}")
    for name, value, default in (
        ("threads", options.threads, "one per core"),
        ("memory_limit", options.memory_limit, "what is free"),
        ("decode_slice", options.decode_slice, "all images at once"),
    ):
        if value is not None and value < 1:
            raise EngineError(f"{name}: got {value}, expected at least 1, or none for {default}")
    reason = "asked for"
    if engine == "auto":
        engine, device, reason = _best(device, bundle.manifest.precision)
    on_gpu = engine == "onnx" and device.startswith("cuda")
    _refuse_foreign_options(engine, options, on_gpu=on_gpu)
    _refuse_foreign_precision(engine, bundle.manifest.precision, options.precision)
    start = {"onnx": _onnx_cuda if on_gpu else _onnx, "torch": _torch, "tensorrt": _tensorrt}[engine]
    return start(bundle, device, options, reason)


def _best(device: str, precision: Precision) -> tuple[str, str, str]:
    """Engine, device and reason for "auto": the GPU where everything that it needs is there, else the CPU."""
    halves = precision.graph_dtype != "float32"
    if device.startswith("cuda"):
        engine, reason = ("onnx", f"the engine for {precision} bundles") if halves else ("torch", "the engine for GPUs")
        return engine, device, reason
    if device == "cpu":
        return "onnx", device, "the fastest engine on a CPU"
    if halves and _driver_present() and _installed("onnxruntime-gpu"):
        return "onnx", "cuda", f"a GPU is there, and it is the engine for {precision} bundles"
    if precision is not Precision.FP32:
        return "onnx", device, f"the engine for {precision} bundles"
    if not _driver_present():
        return "onnx", device, "no NVIDIA driver found"
    missing = [package for package in ("torch", "triton") if find_spec(package) is None]
    if missing:
        names = " and ".join(missing)
        return "onnx", device, f"a GPU is there, but {names} is not installed: pip install 'var-deploy[gpu]'"
    import torch

    if not torch.cuda.is_available():
        return "onnx", device, "a GPU is there, but the installed PyTorch has no CUDA"
    if problem := too_old(torch.cuda.get_device_capability(0)):
        return "onnx", device, problem
    return "torch", device, "a GPU is there"


def _installed(distribution: str) -> bool:
    """Whether a distribution is there, by its name; ONNX Runtime's builds share that of the module."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def too_old(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability does not run the kernels; None where it does."""
    if capability >= MIN_CAPABILITY:
        return None
    have, need = (".".join(map(str, number)) for number in (capability, MIN_CAPABILITY))
    return f"the GPU has compute capability {have}, the kernels need {need} or later"


def _driver_present() -> bool:
    """Whether NVIDIA's driver library loads; asked first because importing PyTorch takes seconds."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _refuse_foreign_options(engine: str, options: EngineOptions, *, on_gpu: bool) -> None:
    """An option that the engine would not follow is an error, not a silence. on_gpu: the onnx engine, there."""
    of_onnx: dict[str, object] = {
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "graphs": options.graphs if options.graphs != Graphs.SYMBOLIC else None,
        "decoder": options.decoder if options.decoder != "auto" else None,
    }
    of_onnx_on_gpu: dict[str, object] = {
        "provider": options.provider if options.provider != Provider.CUDA else None,
        "allow_cpu": options.allow_cpu,
    }
    of_torch: dict[str, object] = {"decode_slice": options.decode_slice, "compile_decoder": options.compile_decoder}
    of_tensorrt: dict[str, object] = {"plans": options.plans}
    of_both: dict[str, object] = {"draw": options.draw if options.draw != Draw.DEVICE else None}
    own = {
        "onnx": [of_onnx_on_gpu, of_both] if on_gpu else [of_onnx],
        "torch": [of_torch],
        "tensorrt": [of_tensorrt, of_both],
    }[engine]
    every = (of_onnx, of_onnx_on_gpu, of_torch, of_tensorrt, of_both)
    foreign = [name for group in every if group not in own for name, value in group.items() if value]
    if foreign:
        where = " on a GPU" if on_gpu else ""
        raise EngineError(f"engine {engine!r}{where} has no option {', '.join(foreign)}; leave it out")


def _refuse_foreign_precision(engine: str, bundle: Precision, asked: str) -> None:
    """The onnx engine runs a bundle in its own precision; the torch engine makes any precision of float32."""
    if engine == "torch" and bundle is not Precision.FP32:
        where = {Precision.FP16: "", Precision.BF16: " on a GPU"}.get(bundle, " on a CPU")
        step = f"use engine 'onnx'{where}, or export fp32"
        raise EngineError(f"engine 'torch' reads fp32 bundles, the bundle is {bundle}; {step}")
    if engine == "tensorrt" and bundle is Precision.INT8:
        raise EngineError(
            "engine 'tensorrt': the bundle is int8, which only ONNX Runtime runs; export fp16, bf16 or fp32"
        )
    if engine == "tensorrt" and asked not in ("auto", bundle):
        raise EngineError(
            f"engine 'tensorrt': the bundle is {bundle}, got precision {asked!r}; export that precision and build it"
        )
    if engine == "onnx" and asked not in ("auto", bundle):
        steps = [f"export with --precision {asked}"] if asked in BUNDLE_PRECISIONS else []
        steps += ["use engine 'torch'"] if bundle is Precision.FP32 else []
        step = ", or ".join(steps) or "export fp32 for engine 'torch'"
        raise EngineError(f"engine 'onnx': the bundle is {bundle}, got precision {asked!r}; {step}")


def _onnx(bundle: Bundle, device: str, options: EngineOptions, reason: str) -> Engine:
    try:
        from .onnx import OnnxEngine
    except ImportError as error:
        raise EngineError(f"engine 'onnx' needs onnxruntime ({error}); pip install 'var-deploy[cpu]'") from error
    precision = bundle.manifest.precision
    if precision is Precision.BF16:
        raise EngineError(
            "engine 'onnx': the bundle is bf16, which ONNX Runtime has no CPU kernels for; export int8 or fp32, or use "
            "device 'cuda'"
        )
    if precision is Precision.FP16:
        log.warning("the bundle is fp16: on a CPU it is computed in float32, slower than a bundle of int8 or fp32")
    decoder, why = _decoder(bundle, options.decoder)
    log.info("engine onnx on cpu (%s), %s graphs", reason, options.graphs)
    log.info("decoder %s (%s)", decoder, why)
    return OnnxEngine(
        bundle,
        graphs=Graphs(options.graphs),
        decoder=decoder,
        threads=_threads(options.threads),
        prepared=options.prepared,
    )


def _onnx_cuda(bundle: Bundle, device: str, options: EngineOptions, reason: str) -> Engine:
    if bundle.manifest.precision is Precision.INT8:
        raise EngineError("engine 'onnx' on a GPU: the bundle is int8, for CPUs alone; export fp16, bf16 or fp32")
    try:
        from .onnx_cuda import onnx_cuda_engine
    except ImportError as error:
        raise EngineError(f"engine 'onnx' on a GPU needs onnxruntime-gpu ({error}); pip install it") from error
    return onnx_cuda_engine(
        bundle,
        _index(device),
        provider=Provider(options.provider),
        draw_on_host=options.draw == Draw.HOST,
        allow_cpu=options.allow_cpu,
        prepared=options.prepared,
        reason=reason,
    )


def _index(device: str) -> int:
    """Of a GPU, from "cuda" or "cuda:N"; 0 for "auto"."""
    return int(device.partition(":")[2] or 0)


def _threads(asked: int | None) -> int:
    """Threads asked for, or one per core that this process may use."""
    found = usable_cpus()
    if asked is not None and asked > found.most:
        raise EngineError(
            f"threads: got {asked}, this process may use {found.most} ({found.limit}); more would wait for each other, "
            f"so give at most {found.most}, or none for {found.threads}"
        )
    threads, reason = (found.threads, found.reason) if asked is None else (asked, "asked for")
    log.info("threads %d (%s)", threads, reason)
    return threads


def default_decoder(bundle: Bundle) -> Decoder:
    """The decoder that "auto" takes here."""
    return _decoder(bundle, "auto")[0]


def _decoder(bundle: Bundle, asked: str) -> tuple[Decoder, str]:
    """The decoder asked for, or with "auto" the faster one, and why."""
    missing = [package for package in ("numba", "threadpoolctl") if find_spec(package) is None]
    if asked == Decoder.GRAPH:
        return Decoder.GRAPH, "as asked for"
    if (precision := bundle.manifest.precision).graph_dtype != "float32":
        if asked == Decoder.WINOGRAD:
            raise EngineError(f"decoder 'winograd' reads float32 weights, the bundle is {precision}; use 'graph'")
        return Decoder.GRAPH, f"the one for {precision}"
    if asked == Decoder.WINOGRAD:
        if missing:
            raise EngineError(f"decoder 'winograd' needs {' and '.join(missing)}; pip install 'var-deploy[cpu]'")
        return Decoder.WINOGRAD, "as asked for"
    if missing:
        return Decoder.GRAPH, f"{' and '.join(missing)} not installed: pip install 'var-deploy[cpu]' for a faster one"
    size = bundle.manifest.vqvae.image_size
    if size < MIN_WINOGRAD_SIZE:
        return Decoder.GRAPH, f"the faster one for {size} px"
    return Decoder.WINOGRAD, "a quarter of the multiplications"


def _torch(bundle: Bundle, device: str, options: EngineOptions, reason: str) -> Engine:
    try:
        from .torch import torch_engine
    except ImportError as error:
        raise EngineError(f"engine 'torch' needs torch ({error}); pip install 'var-deploy[gpu]'") from error
    return torch_engine(
        bundle,
        device,
        precision=None if options.precision == "auto" else Precision(options.precision),
        decode_slice=options.decode_slice,
        compile_decoder=options.compile_decoder,
        reason=reason,
    )


def _tensorrt(bundle: Bundle, device: str, options: EngineOptions, reason: str) -> Engine:
    if device == "cpu":
        raise EngineError("engine 'tensorrt' needs an NVIDIA GPU, got device 'cpu'; use engine 'onnx'")
    from .tensorrt import tensorrt_engine

    on_host = options.draw == Draw.HOST
    return tensorrt_engine(bundle, _index(device), plans=options.plans, draw_on_host=on_host, reason=reason)
