"""Builds TensorRT plans of a bundle on the GPU that will run them: `BUNDLE/plans/<GPU>-<TensorRT>/<layout>-<batch>/`.

Plans are stripped of their weights, which are refitted from the bundle when a plan is loaded, so that they stay on disk
once. A plan counts when its seal is in `plans.json`; what an interrupted build has finished is not built again. Written
against TensorRT 11.4; networks are strongly typed, so a plan computes in the precision that its graph was exported in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from var_deploy.bundle import Bundle, FileSeal, sha256_of
from var_deploy.errors import BundleError, EngineError, RequestError, VarDeployError
from var_deploy.output_file import replacing

from .tensorrt_plans import Batch, Layout, Plan, memory_needed, plans_of, weight_copies

log = logging.getLogger("var_deploy")

#: The record of a directory of plans, and the measurements that later builds of it start from.
RECORD, TIMING_CACHE = "plans.json", "timing.cache"

#: Hears of progress: a plan's name, what TensorRT does, steps done and in all.
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The device that plans are built on and for."""

    name: str
    capability: tuple[int, int]
    free_memory: int  #: bytes

    @classmethod
    def current(cls) -> Gpu:
        """The one that CUDA has chosen. Raises EngineError."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EngineError(
                f"tensorrt: cuda-python cannot be used ({error}): pip install 'var-deploy[tensorrt]'"
            ) from error

        def checked(result: tuple[Any, ...]) -> Any:
            error, *values = result
            if error != runtime.cudaError_t.cudaSuccess:
                raise EngineError(f"tensorrt: no GPU can be used ({error.name}); building needs the one that will run")
            return values[0] if len(values) == 1 else values

        device = checked(runtime.cudaGetDevice())
        properties = checked(runtime.cudaGetDeviceProperties(device))
        free, _ = checked(runtime.cudaMemGetInfo())
        return cls(
            name=properties.name.decode().rstrip("\0"),
            capability=(properties.major, properties.minor),
            free_memory=free,
        )

    def directory(self, tensorrt_version: str) -> str:
        """Name of the directory for its plans: a plan runs on this model of GPU and with this TensorRT alone."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{name}-sm{self.capability[0]}{self.capability[1]}-{tensorrt_version}"


def build_plans(
    path: str | Path,
    *,
    batch: Batch,
    layout: Layout = Layout.PER_SCALE,
    workspace: int | None = None,
    optimization_level: int = 3,
    gpu: Gpu | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Builds all plans of a bundle that are not there yet and returns their directory.

    workspace: bytes of scratch memory that a kernel may take; None leaves it to TensorRT. gpu: None asks CUDA. Raises
    BundleError for a bundle that TensorRT cannot run or a directory that cannot be written, EngineError where TensorRT
    or the GPU are missing, too small, or refuse a graph.
    """
    bundle = Bundle.open(path)
    plans = plans_of(bundle, batch, layout)
    trt = _tensorrt()
    gpu = gpu or Gpu.current()
    if (needed := memory_needed(bundle, batch, layout)) > gpu.free_memory:
        copies = weight_copies(layout, bundle.manifest.var.num_scales)
        raise EngineError(
            f"tensorrt: layout {layout} needs {needed / 1e9:.1f} GB for {copies} copies of the weights and the caches, "
            f"{gpu.name} has {gpu.free_memory / 1e9:.1f} GB free; "
            + ("use layout profiles, or " if layout is Layout.PER_SCALE else "")
            + "make the batch smaller"
        )
    directory = bundle.path / "plans" / gpu.directory(trt.__version__) / f"{layout}-{batch}".replace(":", "-")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        options = {"workspace": workspace, "optimization_level": optimization_level}
        record = _Record(directory, bundle, batch, layout, options)
        builder = _Builder(trt, bundle, directory, workspace, optimization_level, progress)
        for plan in plans:
            if record.holds(plan.name):
                log.info("%s: built already", directory / f"{plan.name}.plan")
                continue
            record.add(plan.name, *builder.build(plan))
    except (OSError, RequestError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{directory}: plans cannot be written ({reason})") from error
    return directory


def _tensorrt() -> ModuleType:
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"tensorrt: cannot be used ({error}): pip install 'var-deploy[tensorrt]' where there is an NVIDIA GPU"
        ) from error
    version: str = tensorrt.__version__
    if int(version.split(".")[0]) != 11:
        raise EngineError(f"tensorrt: got version {version}, expected 11.4 or later, before 12; install that")
    module: ModuleType = tensorrt
    return module


class _Record:
    """plans.json: what the plans of a directory were built from, and a seal for each that is whole."""

    def __init__(
        self, directory: Path, bundle: Bundle, batch: Batch, layout: Layout, options: dict[str, int | None]
    ) -> None:
        self._directory, self._path = directory, directory / RECORD
        self._made_from = {
            "bundle": _digest(bundle),
            "precision": str(bundle.manifest.precision),
            "batch": str(batch),
            "layout": str(layout),
            **options,
        }
        self._plans: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(self._path.read_text())
            if {key: found.get(key) for key in self._made_from} == self._made_from:
                self._plans = dict(found["plans"])
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s: damaged (%s); building everything again", self._path, error)

    def holds(self, name: str) -> bool:
        """Whether that plan is there as it was built."""
        file, entry = self._directory / f"{name}.plan", self._plans.get(name)
        try:
            return entry is not None and file.stat().st_size == entry["size"] and sha256_of(file) == entry["sha256"]
        except (OSError, TypeError, KeyError):
            return False

    def add(self, name: str, seal: FileSeal, decomposed: bool) -> None:
        """decomposed: whether attention takes several kernels."""
        self._plans[name] = {**asdict(seal), "decomposed_attention": decomposed}
        with replacing(self._path) as partial:
            partial.write_text(json.dumps({**self._made_from, "plans": self._plans}, indent=1))


def _digest(bundle: Bundle) -> str:
    """Of everything that plans are made from: graphs and weights, but not what verify notes in the manifest."""
    files = sorted((name, seal.sha256) for name, seal in bundle.manifest.files.items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


class _Builder:
    """One builder and one timing cache for all plans."""

    def __init__(
        self,
        trt: ModuleType,
        bundle: Bundle,
        directory: Path,
        workspace: int | None,
        optimization_level: int,
        progress: Progress,
    ) -> None:
        self._trt, self._bundle, self._directory, self._progress = trt, bundle, directory, progress
        self._workspace, self._level = workspace, optimization_level
        self._has_attention = False  # the network read last
        self._interrupted: list[BaseException] = []  # by what a callback raised
        self._logger = _logger(trt, self._interrupted)
        try:
            self._builder = trt.Builder(self._logger)
        except TypeError as error:  # how the bindings tell that there is none
            raise EngineError(
                "tensorrt: no builder could be made; is there an NVIDIA GPU with a driver for CUDA 13?"
            ) from error

    def build(self, plan: Plan) -> tuple[FileSeal, bool]:
        """Writes a plan; its seal, and whether attention had to be decomposed."""
        decomposed = False
        serialized = self._serialized(plan, decomposed)
        if serialized is None and self._has_attention:
            decomposed = True
            log.warning("%s: no plan; trying with several kernels for attention instead of a fused one", plan.name)
            serialized = self._serialized(plan, decomposed)
        if serialized is None:
            raise EngineError(f"tensorrt: {plan.graph} could not be built; TensorRT's messages are above this line")
        file = self._directory / f"{plan.name}.plan"
        with replacing(file) as partial:
            partial.write_bytes(serialized)
        return FileSeal(size=file.stat().st_size, sha256=sha256_of(file)), decomposed

    def _serialized(self, plan: Plan, decomposed: bool) -> Any:
        trt = self._trt
        network = self._builder.create_network(0)
        parser = trt.OnnxParser(network, self._logger)
        path = self._bundle.file(plan.graph)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            told = "; ".join(f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors)
            raise EngineError(f"tensorrt: {path} was not read: {told}")
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        attention = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        self._has_attention = bool(attention)
        if decomposed:
            for layer in attention:
                layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
                layer.attention.decomposable = True
        config = self._builder.create_builder_config()
        config.builder_optimization_level = self._level
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        config.clear_flag(trt.BuilderFlag.TF32)  # what is float32, in halves too, keeps all bits of its mantissa
        if self._workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._workspace)
        for index, profile in enumerate(plan.profiles):
            made = self._builder.create_optimization_profile()
            for name, shapes in profile.shapes.items():
                if name not in profile.values:
                    made.set_shape(name, *shapes)
            for name, value in profile.values.items():
                made.set_shape_input(name, [value], [value], [value])
            if index:
                made.extra_memory_target = 0.0  # the weights as the first profile has them
            if config.add_optimization_profile(made) != index:
                raise EngineError(f"tensorrt: {plan.graph}: profile {index} was refused; report the model's shapes")
        timing = self._directory / TIMING_CACHE
        kept = timing.read_bytes() if timing.is_file() else b""
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            log.warning("%s: of no use here; timing everything anew", timing)
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        config.progress_monitor = _monitor(trt, plan.name, self._progress, self._interrupted)
        serialized = self._builder.build_serialized_network(network, config)
        try:
            with replacing(timing) as partial:
                partial.write_bytes(config.get_timing_cache().serialize())
        except VarDeployError as error:  # a plan is worth more
            log.warning("%s: not kept (%s)", timing, error)
        if self._interrupted:
            raise self._interrupted[0]
        return serialized


def _logger(trt: ModuleType, interrupted: list[BaseException]) -> Any:
    """TensorRT's messages to the log of this package.

    What is raised in a callback, Ctrl-C among it, does not get past the bindings: it is kept for later.
    """
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.INFO,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            try:
                log.log(levels[severity], "TensorRT: %s", msg)
            except BaseException as error:
                interrupted.append(error)

    return Log()


def _monitor(trt: ModuleType, plan: str, progress: Progress, interrupted: list[BaseException]) -> Any:
    """Passes steps on, and ends the build once something was raised in a callback."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress(plan, phase_name, step + 1, self._steps.get(phase_name, 0))
            except BaseException as error:
                interrupted.append(error)
            return not interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
