"""Every kernel against the PyTorch a user would write, eager and compiled, and against the ceilings of the device.

    python -m var_kernels.benchmark [--out docs/results] [--only adaln] [--quick] [--budget SECONDS]

A row is one operation at one size. Every provider is first compared with the reference on fresh inputs; one that is
wrong, or fails, gets no time and makes the run fail at its end. Compiling takes long, so only the first row of each
operation has it. Writes gpu-<name>-kernels.json and the page gpu-kernels.md after every row, so that a run cut short
still counts.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import reference
from .benchmark_cases import cases, quick_cases
from .benchmark_page import page
from .benchmark_report import BenchmarkError, Measured, Report, Row, machine, print_report
from .benchmark_setup import COMPILE, EAGER, LIBRARY, PROVIDERS, Case, Inputs, Results, Setup, check
from .nvml import opened
from .ops import OPERATIONS, Ops, triton_ops
from .result_file import refuse_unwritable, replace_file, slug
from .timing import Call, Ceilings, Timing, ceilings, time_cuda, type_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

PAGE = "gpu-kernels.md"  # of the last run, whatever the GPU

SETS = 8  # of buffers, where they fit
SETS_BYTES = 2 << 30

#: Makes a provider's call on a setup; None where the operation has no such provider.
Bind = Callable[[Setup], Call | None]


def run(
    device: torch.device,
    cases: Iterable[Case],
    ops: Ops,
    providers: Sequence[str] = PROVIDERS,
    *,
    repeats: int = 100,
    budget: float | None = None,
    limits: Ceilings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    on_row: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Measures the cases in turn, until `budget` seconds are spent; a row begun is ended.

    The first provider is `ops`, under its own name; `COMPILE` runs in the first row of an operation. `on_row` hears
    the report after every row and at the end. Raises BenchmarkError at the end if one was wrong or failed.
    """
    begin = time.monotonic()
    report = Report(ceilings=limits or ceilings(device), machine=machine(device))
    stopped, compiled = None, set()
    for case in cases:
        if not stopped and budget is not None and time.monotonic() - begin >= budget:
            stopped = "budget spent"
        if stopped:
            report.left_out.append(f"{case.name}: {stopped}")
            continue
        progress(case.name)
        chosen = [name for name in providers if name != COMPILE or case.operation not in compiled]
        compiled.add(case.operation)
        try:
            report.attempt(case.name, partial(_measure, case, device, ops, chosen, repeats, report))
        except torch.AcceleratorError:
            stopped = "the device failed before"
        on_row(report)
        if device.type == "cuda" and not stopped:
            torch.cuda.empty_cache()
    on_row(report)
    if report.failures:
        raise BenchmarkError(report)
    return report


def _measure(
    case: Case, device: torch.device, ops: Ops, providers: Sequence[str], repeats: int, report: Report
) -> None:
    """Adds the row of the providers that are right."""
    binds = {ops.name: _ours(getattr(ops, case.operation)), **{name: _baseline(name) for name in providers}}
    errors = _errors(case, device, binds, report)
    setups = _setups(case, device)
    floor = report.ceilings.floor_seconds(case.bytes, case.flops, case.dtype)
    measured = {}
    for name, error in errors.items():
        timing = report.attempt(f"{case.name}: {name}", partial(_timing, binds[name], setups, device, repeats))
        if timing is not None:
            measured[name] = Measured(timing=timing, share=floor / timing.median, error=error)
    if measured:
        with opened(device) as nvml:
            clocks = nvml.clocks()
        row = Row(
            operation=case.operation,
            variant=case.variant,
            shape=case.shape,
            dtype=type_name(case.dtype),
            bytes=case.bytes,
            flops=case.flops,
            floor_seconds=floor,
            providers=measured,
            clocks=clocks,
        )
        report.rows.append(row)


def _errors(case: Case, device: torch.device, binds: dict[str, Bind], report: Report) -> dict[str, float]:
    """Error of every provider that there is and that is right; each works on tensors of its own."""
    seed = zlib.crc32(case.name.encode())

    def results(bind: Bind) -> Results | None:
        setup = case.build(Inputs(device, seed))
        call = bind(setup)
        return None if call is None else setup.comparable(call())

    expected = results(_ours(getattr(reference, case.operation)))
    assert expected is not None

    def error_of(bind: Bind) -> float | None:
        got = results(bind)
        return None if got is None else check(case, got, expected)

    errors = {name: report.attempt(f"{case.name}: {name}", partial(error_of, bind)) for name, bind in binds.items()}
    return {name: error for name, error in errors.items() if error is not None}


def _setups(case: Case, device: torch.device) -> list[Setup]:
    """Several sets of buffers, as far as they fit, so that a call's inputs were not used a moment ago."""
    seed = zlib.crc32(case.name.encode()) + 1
    first = Inputs(device, seed)
    setups = [case.build(first)]
    more = max(0, min(SETS, SETS_BYTES // max(first.allocated, 1)) - 1)
    return setups + [case.build(Inputs(device, seed + i)) for i in range(1, more + 1)]


def _timing(bind: Bind, setups: Sequence[Setup], device: torch.device, repeats: int) -> Timing:
    calls = [call for setup in setups if (call := bind(setup))]
    return time_cuda(calls, device=device, repeats=repeats, warmup=min(repeats, 10))


def _ours(op: Callable[..., Any]) -> Bind:
    return lambda setup: lambda: setup.ours(op)


def _baseline(name: str) -> Bind:
    """A provider that is no implementation of ours, by name."""
    if name == EAGER:
        return lambda setup: lambda: setup.eager(*setup.arguments)
    if name == COMPILE:
        torch.compiler.reset()  # else the sizes of earlier rows use up the recompilations that PyTorch allows
        compiled: dict[Any, Callable[..., Results]] = {}

        def bind(setup: Setup) -> Call:
            if setup.eager not in compiled:
                compiled[setup.eager] = torch.compile(setup.eager, dynamic=False, fullgraph=True)
            return lambda: compiled[setup.eager](*setup.arguments)

        return bind
    return lambda setup: setup.library


def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where JSON and page go.")] = Path("docs/results"),
    only: Annotated[list[str] | None, typer.Option(help="Operation to measure; repeat for several.")] = None,
    quick: Annotated[bool, typer.Option(help="One size per operation, fewer repeats, nothing compiled.")] = False,
    budget: Annotated[float | None, typer.Option(help="Seconds after which no further row starts.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Storage type: {' or '.join(DTYPES)}.")] = "bf16",
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure nothing, write the page alone.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="JSON", help="Of --table: what was measured, if any.")] = None,
) -> None:
    """Time the kernels on this machine's GPU."""
    for name in only or ():
        if name not in OPERATIONS:
            raise typer.BadParameter(f"operation {name!r} is unknown; known: {', '.join(OPERATIONS)}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"type {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    planned = list(cases(DTYPES[dtype]))
    if table is not None:
        refuse_unwritable(table)
        replace_file(table, page(_read(record) if record else None, planned))
        return
    if record is not None:
        raise typer.BadParameter("--record without --table, which says where its page goes; add --table FILE")
    refuse_unwritable(out / PAGE)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured; run this on a machine with an NVIDIA GPU", file=sys.stderr)
        raise typer.Exit(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    chosen = [case for case in (quick_cases(DTYPES[dtype]) if quick else planned) if not only or case.operation in only]
    name = slug(torch.cuda.get_device_name())

    def write(report: Report) -> None:
        report.write(out / f"gpu-{name}-kernels.json")
        replace_file(out / PAGE, page(report.record(), planned))

    try:
        report = run(
            torch.device("cuda"),
            chosen,
            triton_ops(),
            (EAGER, LIBRARY) if quick else PROVIDERS,
            repeats=20 if quick else 100,
            budget=budget,
            progress=lambda name: print(name, file=sys.stderr, flush=True),
            on_row=write,
        )
    except BenchmarkError as failed:
        print_report(failed.report, Console())
        raise typer.Exit(1) from None
    print_report(report, Console())


def _read(record: Path) -> dict[str, Any]:
    """A record written by an earlier run."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{record}: {error}; expected what a run of this benchmark wrote") from None
    if not isinstance(found, dict) or not {"rows", "ceilings", "machine"} <= found.keys():
        raise typer.BadParameter(f"{record}: got no rows, expected what a run of this benchmark wrote")
    return found


if __name__ == "__main__":
    typer.run(main)
