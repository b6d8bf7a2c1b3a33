"""Latency of a bundle: whole image, class id in, 8-bit picture out, with the reference model timed in the same run.

The two run in turn, repeat by repeat, so that a drifting machine hits both. The reference is plain PyTorch with random
weights of the same shapes, which takes the same time; it is left out where PyTorch is not installed. On a CPU it is
the float32 one whatever our precision, and one in bf16 can run beside it. `rows.py` says what a row holds, `device.py`
asks what only a GPU can tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import EngineError, RequestError
from ..memory import peak_resident_size, proportional_set_size
from ..pipeline import Pipeline
from ..precision import Precision
from ..schedules import settings as settings_of
from . import device as on_device
from .device import Rates, cuda_clock
from .reference import Reference
from .rows import BenchRow, Spread, bench_record, one_line

__all__ = ["BenchRow", "Spread", "bench", "bench_record"]

#: Hears of progress: what is being timed.
Progress = Callable[[str], None]

#: Hears the rows so far after each is done, and again when a compiled reference was added to one.
OnRows = Callable[[list[BenchRow]], None]

#: Repeats whatever the time limit.
MIN_REPEATS = 3


def bench(
    pipe: Pipeline,
    *,
    batches: Sequence[int],
    repeats: int = 5,
    warmup: int = 1,
    guidance: float | None = None,
    reference: bool = True,
    half_reference: bool | None = None,
    compiled: bool = False,
    stages: bool = True,
    ceilings: Rates | None = None,
    threads: int | None = None,
    limit_seconds: float | None = None,
    progress: Progress = lambda _: None,
    on_rows: OnRows = lambda _: None,
) -> list[BenchRow]:
    """Times `generate` for each batch size, smallest first.

    half_reference: also time the reference on a CPU under bf16 autocast with a channels-last decoder; None: if the
    reference runs and ours is not exact. compiled: also time the reference through torch.compile. stages: split the
    time by stage, for which a GPU captures graphs once more. ceilings: what to count a floor with, from
    `device.measured_ceilings`. limit_seconds: fewer repeats, at least three, where they would take longer. Raises
    RequestError.
    """
    if repeats < 1 or warmup < 1 or not batches or min(batches) < 1:
        raise RequestError("bench: expected at least one repeat, one warm-up, and batch sizes of at least 1")
    run = _Run(pipe, sorted(set(batches)), repeats, warmup, guidance, threads, limit_seconds, progress)
    if half_reference and not run.on_cpu:
        raise RequestError("half_reference: for a CPU, on a GPU the reference runs in our precision; leave it out")
    if half_reference is None:
        half_reference = run.on_cpu and reference and not pipe.engine.precision.exact
    return run.rows(reference, half_reference, compiled, stages, ceilings, on_rows)


def in_turn(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    *,
    limit_seconds: float | None = None,
    on_repeat: Callable[[int], None] = lambda _: None,
) -> list[list[float]]:
    """Seconds of every call, repeat by repeat; fewer repeats, at least three, where they would take longer."""
    found: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for repeat in range(repeats):
        spent = time.perf_counter() - start
        if limit_seconds is not None and repeat >= MIN_REPEATS and spent >= limit_seconds:
            break
        on_repeat(repeat)
        for call, seconds in zip(calls, found, strict=True):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return found


class _Run:
    """One call of `bench`: our pipeline, the reference once it is built, and how often they run."""

    def __init__(
        self,
        pipe: Pipeline,
        batches: list[int],
        repeats: int,
        warmup: int,
        guidance: float | None,
        threads: int | None,
        limit_seconds: float | None,
        progress: Progress,
    ) -> None:
        self._pipe, self._batches = pipe, batches
        self._repeats, self._warmup, self._limit_seconds = repeats, warmup, limit_seconds
        self._guidance, self._threads, self._progress = guidance, threads, progress
        self._parts: dict[int, int] = {}  # by batch
        self._clock = cuda_clock(pipe.engine)
        self._manifest = pipe.bundle.manifest
        self._device = str(getattr(pipe.engine, "device", "cpu"))
        self.on_cpu = not self._device.startswith("cuda")

    def rows(
        self, reference: bool, half: bool, compiled: bool, stages: bool, ceilings: Rates | None, on_rows: OnRows
    ) -> list[BenchRow]:
        memory: dict[int, dict[str, Any]] = {batch: self._memory(batch) for batch in self._batches}
        theirs = self._reference(must=compiled or (half and not reference)) if reference or half or compiled else None
        references: dict[str, Reference] = {}
        if theirs is not None and reference:
            references["reference"] = theirs
        if theirs is not None and half:
            references["half_reference"] = theirs.variant(Precision.BF16, channels_last=True)
        rows: list[BenchRow] = []
        for batch in self._batches:
            self._alone(batch)
            row = self._row(batch, references, stages)
            row = replace(row, **memory[batch], **self._on_device(row, stages))
            rows.append(replace(row, **self._floor(row, ceilings)))
            on_rows(rows)
        if theirs is not None and compiled:
            theirs.compile()
            for i, row in enumerate(rows):
                self._alone(row.batch)
                rows[i] = self._with_compiled(row, theirs)
                on_rows(rows)
        return rows

    def _ours(self, batch: int) -> dict[str, float]:
        labels = [i % self._manifest.var.num_classes for i in range(batch)]
        done = self._pipe.generate(labels, seeds=0, guidance=self._guidance)
        assert len(done.images) == batch  # pictures are part of what is timed
        self._parts[batch] = max(done.parts, self._parts.get(batch, 1))
        return done.timings

    def _warm_up(self, batch: int) -> None:
        for _ in range(self._warmup):
            self._ours(batch)

    def _memory(self, batch: int) -> dict[str, Any]:
        """What this batch size takes, measured while it warms up."""
        self._progress(f"warm-up, batch {batch}")
        found: dict[str, Any] = {}
        if self._clock is None:
            self._warm_up(batch)
        else:
            peak = on_device.peak_memory(self._clock, lambda: self._warm_up(batch))
            found["device_peak_bytes"], found["device_reserved_bytes"] = peak
        return {**found, "pss_bytes": proportional_set_size(), "peak_rss_bytes": peak_resident_size()}

    def _alone(self, batch: int) -> None:
        """On a GPU: gives up other batch sizes' buffers and graphs, which were kept since their warm-up."""
        if self._clock is not None and len(self._batches) > 1:
            self._clock.release()
            self._warm_up(batch)

    def _reference(self, *, must: bool) -> Reference | None:
        """The reference model; None where PyTorch is not installed, unless there must be one."""
        if find_spec("torch") is None and not must:
            return None
        self._progress("building the reference")
        precision = Precision.FP32 if self.on_cpu else self._pipe.engine.precision
        return Reference(self._manifest, self._device, precision, guidance=self._guidance, threads=self._threads)

    def _row(self, batch: int, references: Mapping[str, Reference], stages: bool) -> BenchRow:
        """Wall clock of ours and, in turn, of the references."""
        failed, timings = {}, []
        calls: dict[str, Callable[[], object]] = {"ours": lambda: timings.append(self._ours(batch))}
        for name, theirs in references.items():
            self._progress(f"{name.replace('_', ' ')} warm-up, batch {batch}")
            problem = self._warmed(theirs, batch, ("OutOfMemoryError",))
            if problem is None:
                calls[name] = partial(theirs.run, batch)
            else:
                failed[name] = problem
        found = dict(zip(calls, self._in_turn(list(calls.values()), batch), strict=True))
        seconds = found["ours"]
        engine = self._pipe.engine
        spread = Spread.of(seconds)
        row = BenchRow(
            batch=batch,
            engine=engine.name,
            device=self._device,
            precision=engine.precision,
            guidance=self._manifest.sampling.guidance if self._guidance is None else self._guidance,
            seconds=spread,
            images_per_second=batch / spread.median,
            parts=self._parts[batch],
            stages={name: float(np.median([t[name] for t in timings])) for name in timings[0]} if stages else {},
            failed=failed,
        )
        if (eager := found.get("reference")) is not None:
            how = references["reference"].how
            row = replace(row, reference=Spread.of(eager), reference_how=how, speedup=_ratio(eager, seconds))
        if (half := found.get("half_reference")) is not None:
            how = references["half_reference"].how
            row = replace(
                row, half_reference=Spread.of(half), half_reference_how=how, half_speedup=_ratio(half, seconds)
            )
        return row

    def _with_compiled(self, row: BenchRow, theirs: Reference) -> BenchRow:
        """Wall clock of the compiled reference, in turn with ours again."""
        self._progress(f"compiling the reference, batch {row.batch}")
        problem = self._warmed(theirs, row.batch, None)
        if problem is not None:
            return replace(row, failed={**row.failed, "compiled": problem})
        ours, compiled = self._in_turn([lambda: self._ours(row.batch), lambda: theirs.run(row.batch)], row.batch)
        return replace(
            row, compiled=Spread.of(compiled), compiled_speedup=_ratio(compiled, ours), reference_how=theirs.how
        )

    def _warmed(self, theirs: Reference, batch: int, expected: tuple[str, ...] | None) -> str | None:
        """Runs the reference; what went wrong, if it is of an expected kind (None: of any)."""
        try:
            for _ in range(self._warmup):
                theirs.run(batch)
        except Exception as error:
            if expected is not None and type(error).__name__ not in expected:
                raise
            return one_line(error)
        return None

    def _in_turn(self, calls: Sequence[Callable[[], object]], batch: int) -> list[list[float]]:
        """Seconds of every call, repeat by repeat."""
        return in_turn(
            calls,
            self._repeats,
            limit_seconds=self._limit_seconds,
            on_repeat=lambda repeat: self._progress(f"batch {batch}, repeat {repeat + 1} of {self._repeats}"),
        )

    def _on_device(self, row: BenchRow, stages: bool) -> dict[str, Any]:
        """What the GPU's own clock and meters say; nothing without one."""
        if self._clock is None:
            return {}
        batch = row.batch
        settings = settings_of(self._manifest, guidance=self._guidance)
        labels_B = np.arange(batch) % self._manifest.var.num_classes
        asked = on_device.BenchRequest(labels_B=labels_B, seeds=list(range(batch)), settings=settings)
        self._progress(f"batch {batch}, on the device")
        found: dict[str, Any] = {
            "device_seconds": Spread.of(on_device.whole_seconds(self._clock, asked, repeats=self._repeats)),
        }
        joules, reading = on_device.joules_per_image(self._clock, asked)
        found |= {"joules_per_image": joules, "gpu": None if reading is None else asdict(reading)}
        without = on_device.whole_seconds(self._clock, asked, repeats=self._repeats, decode=False)
        found["without_decoder"] = Spread.of(without)
        if stages:  # the copies as in the request, the rest stage by stage instead of as one replay
            upload, download = ({name: row.stages.get(name, 0.0)} for name in ("upload", "download"))
            found["stages"] = {**upload, **on_device.stage_seconds(self._clock, asked), **download}
        return found

    def _floor(self, row: BenchRow, ceilings: Rates | None) -> dict[str, Any]:
        if ceilings is None:
            return {}
        precision = self._pipe.engine.precision
        rate = on_device.product_rate(ceilings, precision)
        if rate is None:
            raise EngineError(f"no ceiling of {precision} products was measured; leave the floor out")
        settings = settings_of(self._manifest, guidance=self._guidance)
        counted = on_device.counted_floor(self._manifest.var, self._manifest.vqvae, row.batch, settings, precision)
        taken = (row.device_seconds or row.seconds).median
        floor_seconds = counted.seconds(ceilings.bytes_per_second, rate)
        return {
            "flops": counted.flops,
            "floor_seconds": floor_seconds,
            "share_of_floor": floor_seconds / taken,
            "flops_share": counted.flops / taken / rate,
        }


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the repeats of theirs/ours."""
    return float(np.median(np.divide(theirs, ours)))
