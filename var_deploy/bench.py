"""Latency of a bundle: whole image, class id in, pixels out, with the reference model timed in the same run.

The two run in turn, repeat by repeat, so that a drifting machine hits both. The reference is plain eager PyTorch with
random weights of the same shapes, which takes the same time; it is left out where PyTorch is not installed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import RequestError
from .memory import peak_resident_size, proportional_set_size
from .pipeline import Pipeline

#: Hears of progress: what is being timed.
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds over the repeats of one timing."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        return cls(median=statistics.median(seconds), minimum=min(seconds), maximum=max(seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One batch size."""

    batch: int
    seconds: Spread
    images_per_second: float
    stages: dict[str, float]  #: median seconds per stage
    reference: Spread | None
    speedup: float | None  #: median over the repeats of reference/ours
    pss_bytes: int | None  #: after this batch size ran, before the reference was built
    peak_rss_bytes: int | None


def bench(
    pipe: Pipeline,
    *,
    batches: list[int],
    repeats: int = 5,
    warmup: int = 1,
    guidance: float | None = None,
    reference: bool = True,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> list[BenchRow]:
    """Times `generate` for each batch size, smallest first. Raises RequestError."""
    if repeats < 1 or warmup < 1 or not batches or min(batches) < 1:
        raise RequestError("bench: expected at least one repeat, one warm-up, and batch sizes of at least 1")
    batches = sorted(set(batches))
    classes = pipe.bundle.manifest.var.num_classes
    memory: dict[int, tuple[int | None, int | None]] = {}

    def ours(batch: int) -> dict[str, float]:
        return pipe.generate([i % classes for i in range(batch)], seeds=0, guidance=guidance).timings

    for batch in batches:
        progress(f"warm-up, batch {batch}")
        for _ in range(warmup):
            ours(batch)
        memory[batch] = proportional_set_size(), peak_resident_size()
    run_reference = _reference_runner(pipe, guidance, threads) if reference else None
    rows = []
    for batch in batches:
        if run_reference is not None:
            progress(f"reference warm-up, batch {batch}")
            for _ in range(warmup):
                run_reference(batch)
        seconds, reference_seconds, stages = [], [], []
        for repeat in range(repeats):
            progress(f"batch {batch}, repeat {repeat + 1} of {repeats}")
            begin = time.perf_counter()
            stages.append(ours(batch))
            seconds.append(time.perf_counter() - begin)
            if run_reference is not None:
                begin = time.perf_counter()
                run_reference(batch)
                reference_seconds.append(time.perf_counter() - begin)
        spread = Spread.of(seconds)
        ratios = [theirs / mine for mine, theirs in zip(seconds, reference_seconds, strict=False)]
        rows.append(
            BenchRow(
                batch=batch,
                seconds=spread,
                images_per_second=batch / spread.median,
                stages={name: statistics.median(stage[name] for stage in stages) for name in stages[0]},
                reference=Spread.of(reference_seconds) if reference_seconds else None,
                speedup=statistics.median(ratios) if ratios else None,
                pss_bytes=memory[batch][0],
                peak_rss_bytes=memory[batch][1],
            )
        )
    return rows


def bench_record(pipe: Pipeline, rows: list[BenchRow]) -> dict[str, Any]:
    """The rows with the machine, the versions and what was timed: one JSON object."""
    manifest = pipe.bundle.manifest
    return {
        "timed": "generate: class ids in, float pixels out, default sampling; file reading and loading not included",
        "model": {"depth": manifest.var.depth, "width": manifest.var.embed_dim, "image": manifest.vqvae.image_size},
        "precision": manifest.precision,
        "engine": pipe.engine.name,
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """Processor, cores, system and library versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("numpy", "onnxruntime", "torch"):
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


def _reference_runner(pipe: Pipeline, guidance: float | None, threads: int | None) -> Callable[[int], None] | None:
    """Runs the eager reference for a batch size; None where it is not installed."""
    try:
        import torch

        from var_train import VAR, VQVAE, generate
        from var_train.presets import randomise
    except ImportError:
        return None
    if threads is not None:
        torch.set_num_threads(threads)
    manifest = pipe.bundle.manifest
    var, vqvae = VAR(manifest.var).eval(), VQVAE(manifest.vqvae).eval()
    randomise(var)
    randomise(vqvae)
    sampling = manifest.sampling

    def run(batch: int) -> None:
        labels = torch.arange(batch) % manifest.var.num_classes
        strength = sampling.guidance if guidance is None else guidance
        generate(var, vqvae, labels, guidance=strength, top_k=sampling.top_k, top_p=sampling.top_p)

    return run
