"""Precisions of one model × batch sizes → one record, each engine given back before the next is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..pipeline import Pipeline
from .device import Rates, cuda_clock, free, measured_ceilings
from .run import BenchRow, Progress, bench, bench_record


def sweep(
    load: Callable[[str], Pipeline],
    precisions: Sequence[str],
    *,
    floor: bool | None = None,
    reference: bool = True,
    compiled: bool | None = None,
    progress: Progress = lambda _: None,
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """The record of all; `on_record` hears it after every row.

    load: a precision → the pipeline to time. floor, compiled: None for yes on a GPU (compiled: if the reference runs at
    all). options: of `bench`. Raises RequestError and EngineError.
    """
    done: list[BenchRow] = []
    record: dict[str, Any] = {}
    ceilings: Rates | None = None

    def on_rows(rows: list[BenchRow], pipe: Pipeline, before: list[BenchRow], ceilings: Rates | None) -> None:
        record.update(bench_record(pipe, before + rows, ceilings))
        on_record(record)

    for precision in dict.fromkeys(precisions):
        progress(f"loading, precision {precision}")
        pipe = load(precision)
        on_gpu = cuda_clock(pipe.engine) is not None
        if ceilings is None and (on_gpu if floor is None else floor):
            progress("measuring the ceilings")
            ceilings = measured_ceilings(str(getattr(pipe.engine, "device", "cpu")))

        done += bench(
            pipe,
            reference=reference,
            compiled=on_gpu and reference if compiled is None else compiled,
            ceilings=ceilings,
            progress=progress,
            on_rows=partial(on_rows, pipe=pipe, before=list(done), ceilings=ceilings),
            **options,
        )
        free(pipe.engine)
        del pipe
    return record
