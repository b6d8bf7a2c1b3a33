"""Builds TensorRT plans of a bundle on the GPU that will run them: `BUNDLE/plans/<GPU>-<TensorRT>/<layout>-<batch>/`.

Plans are stripped of their weights, which are refitted from the bundle when a plan is loaded, so that they stay on disk
once. A plan counts when its seal is in `plans.json`; what an interrupted build has finished is not built again. Written
against TensorRT 11.4; networks are strongly typed, so a plan computes in the precision that its graph was exported in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from var_deploy.bundle import Bundle, FileSeal, sha256_of
from var_deploy.engines.cuda.kernels import KERNELS, kernel_source, kernels_are_whole, write_draw_kernels
from var_deploy.engines.tensorrt_library import parser_errors, tensorrt_logger, tensorrt_module
from var_deploy.errors import BundleError, EngineError, RequestError, VarDeployError
from var_deploy.gpu import Gpu
from var_deploy.locks import exclusive
from var_deploy.output_file import replacing
from var_deploy.plans import (
    KERNELS_DIRECTORY,
    RECORD,
    Batch,
    Layout,
    memory_needed,
    plans_directory,
    weight_copies,
)
from var_deploy.staging import put_in_place, staging_directory

from .plugin_graphs import plugin_graphs
from .tensorrt_plans import Plan, plans_of

log = logging.getLogger("var_deploy")

#: Measurements that later builds on this GPU start from, beside the directories of plans; and held by a build.
TIMING_CACHE, LOCK = "timing.cache", ".lock"

#: Makes plugins known to TensorRT, for a GPU of this compute capability.
Register = Callable[[tuple[int, int]], None]

#: Hears of progress: a plan's name, what TensorRT does, steps done and in all.
Progress = Callable[[str, str, int, int], None]


def build_plans(
    path: str | Path,
    *,
    batch: Batch,
    layout: Layout = Layout.PER_SCALE,
    workspace: int | None = None,
    optimization_level: int = 3,
    plugins: Register | None = None,
    gpu: Gpu | None = None,
    progress: Progress = lambda *_: None,
) -> Path:
    """Builds all plans of a bundle that are not there yet and returns their directory.

    workspace: bytes of scratch memory that a kernel may take; None leaves it to TensorRT. plugins: builds the scales
    with kernels of ours inside, which `tensorrt_plugins.register_plugins` makes known. gpu: None asks CUDA. Raises
    BundleError for a bundle that TensorRT cannot run or a directory that cannot be written, EngineError where TensorRT
    or the GPU are missing, too small, or refuse a graph.
    """
    if plugins is not None and layout is not Layout.PER_SCALE:
        raise RequestError(f"plugins: layout {layout} has none, as their kernels are for one scale; use per-scale")
    bundle = Bundle.open(path)
    plans = plans_of(bundle, batch, layout)
    trt = tensorrt_module()
    gpu = gpu or Gpu.at(None)
    if (needed := memory_needed(bundle, batch, layout)) > gpu.free_memory:
        copies = weight_copies(layout, bundle.manifest.var.num_scales)
        raise EngineError(
            f"tensorrt: layout {layout} needs {needed / 1e9:.1f} GB for {copies} copies of the weights and the caches, "
            f"{gpu.name} has {gpu.free_memory / 1e9:.1f} GB free; "
            + ("use layout profiles, or " if layout is Layout.PER_SCALE else "")
            + "make the batch smaller"
        )
    directory = plans_directory(bundle, gpu, trt.__version__, layout, batch, plugins=plugins is not None)
    graphs: dict[str, bytes] = {}
    if plugins is not None:
        plugins(gpu.capability)
        graphs = plugin_graphs(bundle)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with exclusive(directory.parent / LOCK, "plans"):  # builds side by side would spoil each other's timings too
            options = {
                "workspace": workspace,
                "optimization_level": optimization_level,
                "plugins": hashlib.sha256(b"".join(graphs.values())).hexdigest() if graphs else None,
                "compiled": f"{version('triton')} {kernel_source()}" if graphs else None,  # what is in the plans
            }
            record = _Record(directory, bundle, batch, layout, options)
            builder = _Builder(trt, bundle, directory, graphs, workspace, optimization_level, progress)
            for plan in plans:
                if record.holds(plan.name):
                    log.info("%s: built already", directory / f"{plan.name}.plan")
                    continue
                record.add(plan.name, *builder.build(plan))
            if not record.holds_kernels():
                record.add_kernels(_kernels(bundle, directory, gpu))
    except (OSError, RequestError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{directory}: plans cannot be written ({reason})") from error
    return directory


def _kernels(bundle: Bundle, directory: Path, gpu: Gpu) -> str | None:
    """Compiles the kernels of the draw into their directory; the digest of their record, None without Triton."""
    place = directory / KERNELS_DIRECTORY
    with staging_directory(place) as staging:
        try:
            write_draw_kernels(staging, bundle.manifest, gpu.capability)
        except EngineError as error:
            log.warning("%s; without them an engine draws on the host, and only if asked to", error)
            return None
        shutil.rmtree(place, ignore_errors=True)
        put_in_place(staging, place, EngineError)
    return sha256_of(place / KERNELS)


class _Record:
    """plans.json: what the plans of a directory were built from, and a seal for each that is whole."""

    def __init__(
        self, directory: Path, bundle: Bundle, batch: Batch, layout: Layout, options: dict[str, int | str | None]
    ) -> None:
        self._directory, self._path = directory, directory / RECORD
        self._made_from = {
            "bundle": bundle.digest,
            "precision": str(bundle.manifest.precision),
            "batch": str(batch),
            "layout": str(layout),
            **options,
        }
        self._plans: dict[str, dict[str, Any]] = {}
        self._kernels: str | None = None
        try:
            found = json.loads(self._path.read_text())
            if {key: found.get(key) for key in self._made_from} == self._made_from:
                self._plans, self._kernels = dict(found["plans"]), found.get("kernels")
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

    def holds_kernels(self) -> bool:
        """Whether the kernels are there as they were compiled."""
        place = self._directory / KERNELS_DIRECTORY
        return kernels_are_whole(place) and sha256_of(place / KERNELS) == self._kernels

    def add(self, name: str, seal: FileSeal, not_fused: str | None) -> None:
        """not_fused: why attention takes several kernels, if it does."""
        self._plans[name] = {**asdict(seal), "attention_not_fused": not_fused}
        self._write()

    def add_kernels(self, digest: str | None) -> None:
        self._kernels = digest
        self._write()

    def _write(self) -> None:
        with replacing(self._path) as partial:
            record = {**self._made_from, "plans": self._plans, "kernels": self._kernels}
            partial.write_text(json.dumps(record, indent=1))


class _Builder:
    """One builder and one timing cache for all plans."""

    def __init__(
        self,
        trt: ModuleType,
        bundle: Bundle,
        directory: Path,
        graphs: dict[str, bytes],
        workspace: int | None,
        optimization_level: int,
        progress: Progress,
    ) -> None:
        """graphs: what is built in the place of the bundle's own graph, by name."""
        self._trt, self._bundle, self._directory, self._progress = trt, bundle, directory, progress
        self._graphs = graphs
        self._workspace, self._level = workspace, optimization_level
        self._has_attention = False  # the network read last
        self._interrupted: list[BaseException] = []  # by what a callback raised
        self._logger = tensorrt_logger(trt, self._interrupted)
        try:
            self._builder = trt.Builder(self._logger)
        except TypeError as error:  # how the bindings tell that there is none
            raise EngineError(
                "tensorrt: no builder could be made; is there an NVIDIA GPU with a driver for CUDA 13?"
            ) from error

    def build(self, plan: Plan) -> tuple[FileSeal, str | None]:
        """Writes a plan; its seal, and why attention could not be fused, where it could not."""
        not_fused = None
        serialized = self._serialized(plan, decomposed=False)
        if serialized is None and self._has_attention:
            not_fused = self._logger.last_error or "TensorRT gave no reason"
            log.warning("%s: no plan with fused attention (%s); trying with several kernels", plan.name, not_fused)
            serialized = self._serialized(plan, decomposed=True)
        if serialized is None:
            reason = self._logger.last_error or "TensorRT gave no reason"
            raise EngineError(f"tensorrt: {plan.graph} could not be built: {reason}")
        file = self._directory / f"{plan.name}.plan"
        with replacing(file) as partial:
            partial.write_bytes(serialized)
        return FileSeal(size=file.stat().st_size, sha256=sha256_of(file)), not_fused

    def _serialized(self, plan: Plan, *, decomposed: bool) -> Any:
        trt = self._trt
        self._logger.last_error = None
        network = self._builder.create_network(0)
        parser = trt.OnnxParser(network, self._logger)
        path = self._bundle.file(plan.graph)
        graph = self._graphs.get(plan.name)
        read = parser.parse_from_file(str(path)) if graph is None else parser.parse(graph, str(path))
        if not read:
            raise EngineError(f"tensorrt: {path} was not read: {parser_errors(parser)}")
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
        timing = self._directory.parent / TIMING_CACHE
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
