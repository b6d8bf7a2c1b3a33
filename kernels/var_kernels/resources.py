"""What every kernel takes on each generation of GPUs: registers, spills and shared memory. Needs Triton, but no GPU.

    python -m var_kernels.resources [--quick] [--json FILE] [--markdown FILE]

Launches at the published sizes are recorded instead of started, specialised as Triton's launcher would specialise them,
and compiled for each compute capability. Exit status 1 if a kernel breaks a limit of the hardware or does not compile.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .launch import OPTIONS, Launch, recording
from .ops import OPERATIONS
from .resource_cases import CASES, POINTERS
from .result_file import refuse_unwritable, replace_file

#: Compute capability → bytes of shared memory that a block may use. What is compiled for 8.0 also runs on 8.6 and 8.9,
#: which have the least.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255  # per thread
TENSOR_MEMORY_LIMIT = 512  # columns; capability 100 only


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one launch takes on one capability. Numbers are None where nothing was compiled; then `note` says why."""

    operation: str
    case: str
    kernel: str
    capability: int
    warps: int | None = None
    registers: int | None = None  #: per thread
    spill_bytes: int | None = None  #: stored and loaded per thread
    shared_bytes: int | None = None  #: per block
    tensor_memory: int | None = None  #: columns
    note: str = ""
    failed: bool = False  #: the note is an error

    def violations(self) -> Iterator[str]:
        """One line per broken limit."""
        where = f"{self.operation} ({self.case}) {self.kernel} on capability {self.capability}"
        if self.failed:
            yield f"{where}: {self.note}"
        limits = {"registers": REGISTER_LIMIT, "spill_bytes": 0, "shared_bytes": SHARED_LIMIT[self.capability]}
        for name, limit in {**limits, "tensor_memory": TENSOR_MEMORY_LIMIT}.items():
            if (value := getattr(self, name)) is not None and value > limit:
                yield f"{where}: {value} {name.replace('_', ' ')}, limit {limit}"


def rows_of(operation: str, capability: int, quick: bool) -> list[Row]:
    """Compiles the launches of an operation's cases, equal ones once."""
    rows: list[Row] = []
    compiled: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if case.operation != operation or (quick and not case.quick):
            continue
        names: dict[str, Any] = {"operation": operation, "case": case.name, "capability": capability}
        # Whatever is wrong with one case is reported as its row, so that the table names every failure at once.
        try:
            with recording() as launches:
                getattr(import_module(f".{operation}", __package__), operation)(**case.arguments())
        except Exception as error:
            rows.append(Row(**names, kernel="–", **_failure(error)))
            continue
        for launch in launches:
            signature, constants, attributes = specialised(launch)
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
            kernel = launch.kernel.__name__.strip("_")
            key = repr((kernel, signature, constants, attributes, options))
            if key not in compiled:
                try:
                    compiled[key] = _compiled(launch.kernel, signature, constants, attributes, options, capability)
                except Exception as error:
                    compiled[key] = _failure(error)
            rows.append(Row(**names, kernel=kernel, warps=launch.num_warps, **compiled[key]))
    return rows


def _failure(error: Exception) -> dict[str, Any]:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # A compiler's error quotes the source between its place and its reason.
    return {"note": text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}", "failed": True}


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes as Triton's launcher chooses them.

    None and an integer 1 are constants; addresses and integers divisible by 16 are marked so.
    """
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments.get(parameter.name)
        multiple: int | None = None  # what may be divisible by 16
        if name in constants:
            signature[name] = "constexpr"
        elif value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], multiple = f"*{POINTERS[value.dtype]}", value.data_ptr()
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name], multiple = "i32" if -(2**31) <= value < 2**31 else "i64", value
        else:
            signature[name] = "fp32"
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if multiple is not None and multiple % 16 == 0 and not fixed:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[tuple[int], list[list[Any]]],
    options: dict[str, int],
    capability: int,
) -> dict[str, Any]:
    if capability < 89 and "*fp8e4nv" in signature.values():
        return {"note": "not for this capability: float8 e4m3 needs 89"}
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, target = ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", capability, 32)
    with _ptxas_log() as log:
        metadata = triton.compile(source, target=target, options=options).metadata
    registers, spill_bytes = registers_and_spills(log.getvalue())
    memory = {"shared_bytes": metadata.shared, "tensor_memory": getattr(metadata, "tmem_size", None) or 0}
    return {"registers": registers, "spill_bytes": spill_bytes, **memory}


@contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """Collects what the assembler says, which Triton runs with -v; past its cache, or there would be nothing to say."""
    from triton import knobs

    with knobs.cache.scope(), knobs.nvidia.scope(), tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with redirect_stdout(io.StringIO()) as log:
            yield log


def registers_and_spills(log: str) -> tuple[int, int]:
    """Registers per thread, and bytes spilled by stores and loads together, from the output of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"ptxas -v: expected registers and spills, got {log[:200]!r}")
    return max(map(int, registers)), sum(int(stores) + int(loads) for stores, loads in spills)


# --- What is reported ---

TITLES = ("operation", "case", "kernel", "warps", "registers", "spill bytes", "shared KiB", "note")


def _cells(rows: tuple[Row, ...]) -> list[str]:
    """One launch on all capabilities."""
    shared = [None if row.shared_bytes is None else f"{row.shared_bytes / 1024:.1f}" for row in rows]
    columns = ([row.registers for row in rows], [row.spill_bytes for row in rows], shared)
    numbers = [" / ".join("–" if value is None else str(value) for value in column) for column in columns]
    notes = [f"{row.capability}: {'failed' if row.failed else row.note}" for row in rows if row.note]
    return [rows[0].operation, rows[0].case, rows[0].kernel, str(rows[0].warps or "–"), *numbers, "; ".join(notes)]


def _heading(violations: list[str]) -> str:
    """What the page says above its table."""
    capabilities = " / ".join(f"{capability / 10:.1f}" for capability in SHARED_LIMIT)
    shared = " / ".join(str(limit // 1024) for limit in SHARED_LIMIT.values())
    found = "None is broken." if not violations else "Broken: " + "; ".join(violations) + "."
    return (
        f"# What the kernels take\n\nCompiled ahead of time by Triton {version('triton')} for compute capabilities "
        f"{capabilities}; no GPU was needed, and nothing here says how\nfast a kernel is. Limits: {REGISTER_LIMIT} "
        f"registers per thread, no spilled byte, {shared} KiB of shared memory per block.\n{found} Again: `make "
        f"kernels`.\n\n"
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Only a few cases: every kernel and branch once.")] = False,
    capability: Annotated[
        list[int] | None, typer.Option(help="Of a GPU, 90 is 9.0; repeat for more; default all.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number here, too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = min(os.cpu_count() or 1, 8),
) -> None:
    """Compile every kernel for every capability and print what it takes."""
    refuse_unwritable(json_file, markdown)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set, so no kernel can be compiled; unset it", file=sys.stderr)
        raise typer.Exit(2)
    if find_spec("triton") is None:
        print("Triton is not installed; get it with: pip install triton", file=sys.stderr)
        raise typer.Exit(2)
    if unknown := set(capability or ()) - set(SHARED_LIMIT):
        print(f"capability {min(unknown)} is unknown; known: {', '.join(map(str, SHARED_LIMIT))}", file=sys.stderr)
        raise typer.Exit(2)
    capabilities = [known for known in SHARED_LIMIT if known in (capability or SHARED_LIMIT)]
    if markdown is not None and len(capabilities) < len(SHARED_LIMIT):
        print("the page is of every capability; leave --capability out", file=sys.stderr)
        raise typer.Exit(2)
    work = [(operation, known, quick) for operation in OPERATIONS for known in capabilities]
    if jobs == 1:
        parts = [rows_of(*part) for part in work]
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(rows_of, *zip(*work, strict=True)))
    rows = [row for part in parts for row in part]
    violations = [line for row in rows for line in row.violations()]
    violations += [f"{name}: no case" for name in OPERATIONS if name not in {row.operation for row in rows}]
    by_capability = ([row for row in rows if row.capability == known] for known in capabilities)
    table = [_cells(launch) for launch in zip(*by_capability, strict=True)]

    shown = Table(*TITLES, title=f"Triton {version('triton')}; capabilities {' / '.join(map(str, capabilities))}")
    for cells in table:
        shown.add_row(*cells)
    Console().print(shown)
    if markdown is not None:
        lines = (TITLES, ["---"] * len(TITLES), *table)
        replace_file(markdown, _heading(violations) + "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    if json_file is not None:
        report = {"triton": version("triton"), "rows": [asdict(row) for row in rows], "violations": violations}
        replace_file(json_file, json.dumps(report, indent=1) + "\n")
    for line in violations:
        print(line, file=sys.stderr)
    raise typer.Exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
