"""What a run of the benchmark found: rows, what was left out, what failed; as a record, a file and a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .benchmark_setup import WrongResultError
from .nvml import opened
from .result_file import replace_file
from .timing import Ceilings, Timing

T = TypeVar("T")

TIMED = (
    "seconds of one call on the device: buffers exist, results stay on the device, inputs are not in its L2 cache; "
    "share = max(bytes/bandwidth, operations/rate) / median, with the ceilings measured in the same run and the "
    "kernel's bytes for all providers; error = relative error of the worst result against the reference"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One provider of a row."""

    timing: Timing
    share: float  #: of the ceiling
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One operation at one size."""

    operation: str
    variant: str
    shape: dict[str, int]
    dtype: str
    bytes: int
    flops: int
    floor_seconds: float
    providers: dict[str, Measured]
    clocks: dict[str, int | None]  #: in MHz, right after the last call


@dataclass(kw_only=True, slots=True)
class Report:
    """All that a run found, so far."""

    ceilings: Ceilings
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The action's result; None where it fails, which goes into the report.

        Raises torch.AcceleratorError, after which the device answers nothing more.
        """
        try:
            return action()
        except WrongResultError as error:
            self.failures.append(f"{what}: {error}")
        except Exception as error:  # whatever a provider raises, the others can go on
            first_line = (str(error).strip().splitlines() or [""])[0]
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in first_line:  # of the driver, of Triton
                self.left_out.append(f"{what}: out of memory")
                return None
            self.failures.append(f"{what}: {type(error).__name__}: {first_line}")
            if isinstance(error, torch.AcceleratorError):
                raise
        return None

    def record(self) -> dict[str, Any]:
        """One JSON object."""
        return {"timed": TIMED, **asdict(self)}

    def write(self, path: Path) -> None:
        """Replaces the file by one step, so that it is whole whenever the run is cut short."""
        replace_file(path, json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n")


class BenchmarkError(Exception):
    """Providers were wrong or failed; the message lists them, `report` holds what was measured."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(report.failures))
        self.report = report


def machine(device: torch.device) -> dict[str, Any]:
    """Device, its limits, and versions; None where it cannot be read."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    found: dict[str, Any] = {"device": device.type, "torch": torch.__version__, "triton": triton}
    with opened(device) as nvml:
        found |= {"python": platform.python_version(), **nvml.limits()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def print_report(report: Report, console: Console) -> None:
    """A table for people: microseconds and share of the ceiling per provider."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.providers))
    table = Table("operation", "size", title="median µs (share of the ceiling)")
    for title in ("floor", *names):
        table.add_column(title, justify="right")
    for row in report.rows:
        sizes = " ".join(f"{axis}={size}" for axis, size in row.shape.items())
        cells = [f"{row.floor_seconds * 1e6:.1f}"]
        for name in names:
            one = row.providers.get(name)
            cells.append(f"{one.timing.median * 1e6:.1f} ({one.share:.0%})" if one else "")
        table.add_row(f"{row.operation} {row.variant}".strip(), sizes, *cells)
    console.print(table)
    products = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in report.ceilings.flops_per_second.items() if rate)
    console.print(f"ceilings: copy {report.ceilings.bytes_per_second / 1e12:.2f} TB/s; products TFLOP/s: {products}")
    for title, entries in (("left out", report.left_out), ("[bold red]FAILED[/bold red]", report.failures)):
        for entry in entries:
            console.print(f"{title}: {escape(entry)}", soft_wrap=True)
