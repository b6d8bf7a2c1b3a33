"""What a benchmark's row holds, and the record around the rows: machine, versions, and what was timed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline import Pipeline
from .device import Rates, cuda_clock
from .gpu import gpu_record

TIMED = (
    "seconds: wall clock of generate and .images: class ids in, 8-bit pictures on the host out, top-k and top-p of the "
    "bundle; file reading and loading, warm-up and graph capture not included. reference, compiled: the same by "
    "var_train with random weights, in turn with ours, on a CPU in float32, on a GPU in our precision; half_reference: "
    "the same on a CPU under bf16 autocast with a channels-last decoder; speedup: median over the repeats of "
    "theirs/ours. "
    "device_seconds: CUDA events around the replayed graph, inputs and results on the GPU; without_decoder: the same "
    "without the decoder. stages: each a graph of its own on a GPU, host clock elsewhere. floor_seconds: counted bytes "
    "and operations over ceilings measured in this run; share_of_floor: floor/device_seconds (seconds without a GPU); "
    "flops_share (MFU): operations per second over the ceiling of products. joules_per_image: whole GPU over "
    "back-to-back generations. device_peak_bytes: tensors, weights among them, before the reference was built"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds over the repeats of one timing."""

    median: float
    minimum: float
    maximum: float
    p10: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Quantiles linear between neighbours."""
        median, p10, p90, p99 = (float(np.quantile(seconds, q)) for q in (0.5, 0.1, 0.9, 0.99))
        return cls(
            median=median, minimum=min(seconds), maximum=max(seconds), p10=p10, p90=p90, p99=p99, count=len(seconds)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One batch size; see `TIMED`. None: not asked for, or not to be had here."""

    batch: int
    engine: str
    device: str
    precision: str
    guidance: float
    seconds: Spread
    images_per_second: float
    parts: int  #: runs that the batch took, to fit in memory
    stages: dict[str, float]  #: median seconds per stage
    device_seconds: Spread | None = None
    without_decoder: Spread | None = None
    reference: Spread | None = None
    reference_how: str | None = None  #: its precision
    speedup: float | None = None
    half_reference: Spread | None = None  #: on a CPU: under autocast to bf16, with a channels-last decoder
    half_reference_how: str | None = None
    half_speedup: float | None = None
    compiled: Spread | None = None
    compiled_speedup: float | None = None
    failed: dict[str, str] = field(default_factory=dict)  #: what of the row could not be measured → why
    flops: int | None = None  #: counted, of the whole batch
    floor_seconds: float | None = None
    share_of_floor: float | None = None
    flops_share: float | None = None
    joules_per_image: float | None = None
    gpu: dict[str, Any] | None = None  #: clocks, power and temperature right after the replays
    device_peak_bytes: int | None = None
    device_reserved_bytes: int | None = None
    pss_bytes: int | None = None  #: after this batch size ran, before the reference was built
    peak_rss_bytes: int | None = None


def bench_record(pipe: Pipeline, rows: Sequence[BenchRow], ceilings: Rates | None = None) -> dict[str, Any]:
    """The rows with the machine, the versions and what was timed: one JSON object."""
    manifest, clock = pipe.bundle.manifest, cuda_clock(pipe.engine)
    gpu = None if clock is None else gpu_record(clock.device.index or 0)
    return {
        "timed": TIMED,
        "model": {"depth": manifest.var.depth, "width": manifest.var.embed_dim, "image": manifest.vqvae.image_size},
        "precision": ", ".join(dict.fromkeys(row.precision for row in rows)),
        "engine": pipe.engine.name,
        "machine": machine(),
        "gpu": None if gpu is None else asdict(gpu),
        "ceilings": ceilings_record(ceilings),
        "rows": [asdict(row) for row in rows],
    }


def ceilings_record(ceilings: Rates | None) -> dict[str, Any] | None:
    """Rates as they go into a record, with how they were measured where they say."""
    if is_dataclass(ceilings) and not isinstance(ceilings, type):
        return asdict(ceilings)
    return None


def machine() -> dict[str, Any]:
    """Processor, cores, system and library versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("var-deploy", "numpy", "onnxruntime", "torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names) or None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def one_line(error: BaseException) -> str:
    """An error as it goes into a record."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
