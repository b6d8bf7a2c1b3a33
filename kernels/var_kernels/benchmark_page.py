"""The kernel benchmark's record as a page: every planned row with its traffic, and "not measured" where nothing ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .benchmark_setup import COMPILE, EAGER, LIBRARY, PROVIDERS, Case, row_name
from .timing import type_name

NOT_MEASURED = "not measured"

_COLUMNS = (
    "operation, size",
    "type",
    "MB",
    "GFLOP",
    "kernel µs, median (p10–p90)",
    "floor µs",
    "share of floor",
    "error",
    EAGER,
    "ratio",
    COMPILE,
    "ratio",
    LIBRARY,
    "ratio",
    "SM MHz",
)
_FACTS = {
    "driver": "driver",
    "cuda": "CUDA",
    "torch": "torch",
    "triton": "triton",
    "sm_clock_limit_mhz": "SM clock limit in MHz",
    "power_limit_watts": "power limit in W",
}
_AGAIN = "`make bench-gpu` on a machine with an NVIDIA GPU"


def page(record: dict[str, Any] | None, planned: Sequence[Case]) -> str:
    """Markdown of a record (None: nothing was measured) with all rows planned."""
    rows, failures, left_out = (record[key] if record else [] for key in ("rows", "failures", "left_out"))
    lines = {}
    for case in planned:
        failed = any(failure.startswith(f"{case.name}: ") for failure in failures)
        cells = ["failed" if failed else NOT_MEASURED]
        lines[case.name, type_name(case.dtype)] = _line(case.name, type_name(case.dtype), case.bytes, case.flops, cells)
    for row in rows:
        name = row_name(row["operation"], row["variant"], row["shape"])
        lines[name, row["dtype"]] = _line(name, row["dtype"], row["bytes"], row["flops"], _cells(row))
    table = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS), *lines.values()]
    parts = ["# Kernels on a GPU", _about(record), "\n".join(table)]
    for title, entries in (("Failed", failures), ("Left out", left_out)):
        if entries:
            parts += [f"## {title}", "\n".join(f"- {entry}" for entry in entries)]
    return "\n\n".join(parts) + "\n"


def _about(record: dict[str, Any] | None) -> str:
    how = (
        "Every kernel at the published sizes, beside what a user of PyTorch would write, eager and compiled, in µs. "
        "MB: every input read once, every output written once; GFLOP: products. Floor: the larger of moving at the "
        "rate of a copy and computing at the rate of a large product. Ratio: times as long as the kernel. Compile: the "
        "first row of each operation alone; library: one call of PyTorch that does all of it. An empty cell: no such "
        "provider."
    )
    if record is None:
        return (
            f"{how} Nothing is measured yet: {_AGAIN} fills this table in and writes `gpu-<name>-kernels.json` beside "
            "it."
        )
    machine, rates = record["machine"], record["ceilings"]
    facts = [machine["device"]]
    facts += [f"{label} {machine[key]}" for key, label in _FACTS.items() if machine.get(key) is not None]
    products = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates["flops_per_second"].items() if rate)
    return (
        f"{how} {', '.join(facts)}. Ceilings measured in this run: copy {rates['bytes_per_second'] / 1e12:.2f} TB/s; "
        f"products in TFLOP/s: {products}. Timed: {record['timed']}. Written by {_AGAIN}."
    )


def _line(name: str, dtype: str, moved: int, flops: int, cells: Sequence[str]) -> str:
    filled = [name, dtype, _short(moved / 1e6), _short(flops / 1e9) if flops else "", *cells]
    return f"| {' | '.join(filled + [''] * (len(_COLUMNS) - len(filled)))} |"


def _cells(row: dict[str, Any]) -> list[str]:
    """The columns from the kernel's time on; it failed where only others were measured."""
    providers, clock = row["providers"], row["clocks"]["sm_clock_mhz"]
    ours = next((one for name, one in providers.items() if name not in PROVIDERS), None)
    cells = ["failed", "", "", ""]
    if ours is not None:
        low, high = (_us(ours, level) for level in ("p10", "p90"))
        floor = f"{row['floor_seconds'] * 1e6:.1f}"
        cells = [f"{_us(ours)} ({low}–{high})", floor, f"{ours['share']:.0%}", f"{ours['error']:.1e}"]
    for name in PROVIDERS:
        other = providers.get(name)
        cells.append(_us(other) if other else "")
        cells.append(f"{other['timing']['median'] / ours['timing']['median']:.2f}×" if other and ours else "")
    return [*cells, "" if clock is None else str(clock)]


def _short(value: float) -> str:
    """Three digits, more where they lie before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _us(provider: dict[str, Any], level: str = "median") -> str:
    return f"{provider['timing'][level] * 1e6:.1f}"
