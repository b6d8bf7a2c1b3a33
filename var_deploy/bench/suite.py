"""The measurements of a GPU release: published sizes with random weights, the most telling rows first.

    python -m var_deploy.bench.suite [--out docs/results] [--budget 450]

Writes gpu-<name>.json after every row, so that a run cut short still counts, and in the end, however it comes, a plot
beside it and the page gpu.md.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..errors import EngineError, RequestError, VarDeployError, run_command
from ..output_file import check_output, write_text
from ..pipeline import Pipeline, load
from ..plans import Batch
from .device import Rates, free, measured_ceilings
from .gpu import gpu_record
from .rows import TIMED, ceilings_record, machine, one_line
from .run import bench
from .table import RowKey, outcomes, page, row_key

#: Repeats of a row: so many pairs of ours and the reference, fewer where they take longer than this.
REPEATS, ROW_SECONDS = 50, 10.0
WARMUP = 2
#: Left of the budget before anything is compiled. Expected, not measured yet; nothing can stop a compilation but the
#: process that started the run.
COMPILE_SECONDS = 60.0
PAGE = "gpu.md"  # of the last run, whatever the GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row of the suite; the references and the split by stage cost time, so only where they tell something.

    compiled: adds the compiled reference to the row of the same name that came before.
    """

    model: str
    engine: str = "torch"
    precision: str = "bf16"
    batch: int
    reference: bool = False
    compiled: bool = False
    stages: bool = False

    @property
    def name(self) -> str:
        engine = "" if self.engine == "torch" else f" {self.engine}"
        compiled = ", compiled reference" if self.compiled else ""
        return f"{self.model}{engine} {self.precision} batch {self.batch}{compiled}"

    @property
    def key(self) -> RowKey:
        """Of its row."""
        return self.model, self.engine, self.precision, self.batch


SUITE = (
    Entry(model="d16", batch=1, reference=True, stages=True),
    Entry(model="d16", batch=64, reference=True, stages=True),
    Entry(model="d30", batch=1, reference=True, stages=True),
    Entry(model="d16", batch=8),
    Entry(model="d30", batch=8),
    Entry(model="d16", precision="fp16", batch=1),
    Entry(model="d16", precision="int8", batch=1),
    Entry(model="d16", precision="fp8", batch=1),
    Entry(model="d30", precision="fp8", batch=1),
    Entry(model="d16", batch=1, compiled=True),  # how long that takes is unknown: after what must not be lost
    Entry(model="d30", precision="fp8", batch=64),
    Entry(model="d30", batch=64),
    Entry(model="d30", precision="int8", batch=1),
    Entry(model="d16", precision="fp8", batch=64),
    Entry(model="d36-s", batch=1, stages=True),
    Entry(model="d20", batch=1),
    Entry(model="d24", batch=1),
    # From bundles on disk, whose plans are built first: minutes, and only where those libraries are.
    Entry(model="d16", engine="onnx", precision="fp16", batch=1, stages=True),
    Entry(model="d16", engine="onnx", precision="fp16", batch=8),
    Entry(model="d16", engine="tensorrt", precision="fp16", batch=1, stages=True),
    Entry(model="d16", engine="tensorrt", precision="fp16", batch=8),
)

#: What plans are built for.
PLANS = Batch(least=1, tuned=1, most=8)

#: What `Entry.compiled` adds to a row.
COMPILED = ("compiled", "compiled_speedup", "reference_how")

#: Hears a row as it stands: once it is timed, and again when the compiled reference was added.
OnRow = Callable[[dict[str, Any]], None]
Measure = Callable[[Entry, OnRow], None]


class Measurement:
    """Makes the model of an entry, kept while the next entry has the same, and times it."""

    def __init__(self, device: str, ceilings: Rates | None, progress: Callable[[str], None] = lambda _: None) -> None:
        self._device, self._ceilings, self._progress = device, ceilings, progress
        self._held: tuple[tuple[str, str, str], Pipeline] | None = None
        self._exported: tuple[tuple[str, str], Path, TemporaryDirectory[str]] | None = None

    def __call__(self, entry: Entry, on_row: OnRow) -> None:
        try:
            bench(
                self._pipeline(entry),
                batches=[entry.batch],
                repeats=REPEATS,
                warmup=WARMUP,
                reference=entry.reference,
                compiled=entry.compiled,
                stages=entry.stages,
                ceilings=self._ceilings,
                limit_seconds=ROW_SECONDS,
                on_rows=lambda rows: on_row(asdict(rows[0])),
            )
        except BaseException:
            self._held = None  # what failed may have left it in any state
            raise
        finally:
            if entry.compiled:
                import torch

                torch.compiler.reset()  # holds on to the model
            gc.collect()

    def _pipeline(self, entry: Entry) -> Pipeline:
        from var_export.random_bundle import random_pipeline

        key = entry.model, entry.engine, entry.precision
        if self._held is not None and self._held[0] != key:
            free(self._held[1].engine)
            self._held = None
        if self._held is None:
            self._progress(f"{entry.name}: making {entry.model}")
            self._free_cache()
            if entry.engine == "torch":
                pipe = random_pipeline(entry.model, device=self._device, precision=entry.precision)
            else:
                pipe = self._from_disk(entry)
            self._held = key, pipe
        return self._held[1]

    def _from_disk(self, entry: Entry) -> Pipeline:
        """For engines that run graphs from files: exported, and for TensorRT built."""
        from var_export.bundle import bundle_from_checkpoint
        from var_train.presets import write_random_checkpoints

        key = entry.model, entry.precision
        if self._exported is None or self._exported[0] != key:
            folder = TemporaryDirectory()
            path = Path(folder.name)
            pair = write_random_checkpoints(entry.model, path)
            bundle = bundle_from_checkpoint(*pair, path / "bundle", precision=entry.precision)
            for checkpoint in pair:
                checkpoint.unlink()
            self._exported = key, bundle, folder
        bundle = self._exported[1]
        if entry.engine == "tensorrt":
            from var_export.tensorrt import build_plans

            self._progress(f"{entry.name}: building plans")
            build_plans(bundle, batch=PLANS)
        return load(bundle, engine=entry.engine, device=self._device, verify_digests=False)

    def _free_cache(self) -> None:
        gc.collect()
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


class SuiteRun:
    """A record that grows row by row; what the budget leaves out is listed."""

    def __init__(
        self,
        record: dict[str, Any],
        out: Path,
        *,
        budget: float,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`record` is written to `out` after every row; `budget` in seconds, counted from now."""
        self.record, self.out = record, out
        self._budget, self._clock, self._progress = budget, clock, progress
        self._begin = clock()
        self._took: list[float] = []  # seconds of the rows so far, except those that compile
        record |= {"budget_seconds": budget, "rows": [], "left_out": []}

    def run(self, suite: Sequence[Entry], measure: Measure) -> None:
        """A row that fails holds its error, and the suite goes on, unless the device itself failed."""
        stopped = None
        for entry in suite:
            left = self._budget - (self._clock() - self._begin)
            needed = self._estimate(entry)
            if stopped or left <= 0 or needed > left:
                why = stopped or f"takes about {needed:.0f} s, {max(left, 0):.0f} s of the budget are left"
                self.record["left_out"].append(f"{entry.name}: {why}")
            else:
                self._progress(f"{entry.name}, {left:.0f} s left")
                stopped = self._row(entry, measure)
            self.write()

    def _estimate(self, entry: Entry) -> float:
        """Seconds, from the rows so far: repeats are limited by time, so that rows take much the same."""
        plain = statistics.median(self._took) if self._took else 0.0
        return plain + (COMPILE_SECONDS if entry.compiled else 0.0)

    def _row(self, entry: Entry, measure: Measure) -> str | None:
        """Measures one row; the reason to stop, if there is one."""
        rows, begin = self.record["rows"], self._clock()
        name = {"model": entry.model, "engine": entry.engine, "precision": entry.precision, "batch": entry.batch}
        earlier = next((row for row in rows if row_key(row) == entry.key), None) if entry.compiled else None
        at = len(rows)

        def on_row(row: dict[str, Any]) -> None:
            if earlier is None:
                rows[at:] = [{"model": entry.model, **row}]
            else:
                earlier.update({key: row[key] for key in COMPILED if row.get(key)})
                earlier.setdefault("failed", {}).update(row["failed"])
            self.write()

        stopped = None
        try:
            measure(entry, on_row)
        except Exception as error:  # whatever went wrong, other rows can tell something
            if earlier is not None:
                earlier.setdefault("failed", {})["compiled"] = one_line(error)
            else:
                if len(rows) == at:
                    rows.append(name)
                rows[at]["error"] = one_line(error)
            if type(error).__name__ == "AcceleratorError" and not _memory_ran_out(error):
                stopped = "the device failed before"
        if not entry.compiled:
            self._took.append(self._clock() - begin)
        return stopped

    def write(self) -> None:
        """Replaces the file by one step, so that it is whole whenever the run is cut short."""
        self.record["targets"] = outcomes(self.record["rows"])
        self.record["spent_seconds"] = self._clock() - self._begin
        write_text(self.out, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")


def _memory_ran_out(error: BaseException) -> bool:
    from ..engines.torch.graphs import out_of_memory  # an accelerator's error: PyTorch is there

    return out_of_memory(error)


def write_page(record: dict[str, Any] | None, out: Path) -> str:
    """Writes the page of a record, or of a suite of which nothing was measured; returns its text."""
    text = page(record, [entry.key for entry in SUITE])
    write_text(out, text)
    return text


def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where JSON, plot and page go.")] = Path("docs/results"),
    budget: Annotated[float, typer.Option(min=0, help="Seconds; a row that would not fit is left out.")] = 450,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure nothing, write the page alone.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="JSON", help="Of --table: what was measured, if any.")] = None,
) -> None:
    """Measure published sizes on this machine's GPU."""
    if table is not None:
        check_output(table)
        write_page(_read(record) if record else None, table)
        return
    if record is not None:
        raise RequestError("--record: got it without --table, which says where its page goes; add --table FILE")
    name = _gpu_name(device)

    def said(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    from var_kernels.result_file import slug

    json_file, plot_file = (out / f"gpu-{slug(name)}{suffix}" for suffix in (".json", ".png"))
    for path in (json_file, plot_file, out / PAGE):
        check_output(path)
    gpu = gpu_record(int(device.partition(":")[2] or 0))
    facts: dict[str, Any] = {"timed": TIMED, "gpu": asdict(gpu) if gpu else {"name": name}, "machine": machine()}
    run = SuiteRun(facts, json_file, budget=budget, progress=said)
    try:
        said("measuring the ceilings")
        ceilings = measured_ceilings(device)
        facts["ceilings"] = ceilings_record(ceilings)
        run.run(SUITE, Measurement(device, ceilings, said))
    finally:
        print(write_page(run.record, out / PAGE))
        _plot(run.record, plot_file, name)


def _read(record: Path) -> dict[str, Any]:
    """A record written by an earlier run."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{record}: not JSON ({error}); expected what a run of this suite wrote") from error
    if not isinstance(found, dict) or not {"rows", "left_out"} <= found.keys():
        raise RequestError(f"{record}: got no rows, expected what a run of this suite wrote; give that file")
    return found


def _gpu_name(device: str) -> str:
    """Name of the GPU that PyTorch sees there. Raises EngineError without one."""
    if not re.fullmatch(r"cuda(:(0|[1-9]\d*))?", device):
        raise EngineError(f"device: got {device!r}, expected cuda or cuda:N; the suite measures a GPU")
    try:
        import torch
    except ImportError as error:
        raise EngineError(f"the suite needs {error.name}; pip install 'var-deploy[gpu]'") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise EngineError("no CUDA device: nothing was measured; run this on a machine with an NVIDIA GPU")
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise EngineError(f"device {device!r}: this machine has {count} GPUs, counted from 0")
    return torch.cuda.get_device_name(index)


def _plot(record: dict[str, Any], path: Path, name: str) -> None:
    from .plot import plot_bench

    try:
        plot_bench(record["rows"], path, f"Whole images on {name}")
    except VarDeployError as error:  # the numbers are written: without matplotlib they go without a picture
        print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
