"""Benchmarks of whole images: `run.py` times a pipeline, `suite.py` all published sizes on a GPU."""

from .rows import BenchRow, Spread, bench_record
from .run import bench

__all__ = ["BenchRow", "Spread", "bench", "bench_record"]
