"""Commands that measure: bench."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EngineError, RequestError
from ..output_file import check_output, replacing, write_text
from .console import json_text, needs, output, stderr
from .options import AsJson, EngineChoice, with_engine_options

#: Options of an engine that a preset, which runs on engine torch, has too.
PRESET_OPTIONS = ("engine", "device", "precision", "decode_slice", "compile_decoder")


@with_engine_options
def bench(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="Bundle directory.")] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published size, random weights: d16…d36-s.")
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Batch size; repeat for more.")] = [1],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    warmup: Annotated[int, typer.Option(min=1)] = 1,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    reference: Annotated[bool, typer.Option(help="Time eager PyTorch in the same run, where installed.")] = True,
    half_reference: Annotated[
        bool | None, typer.Option(help="And in bf16 on a CPU; by default beside what is not exact.")
    ] = None,
    compiled: Annotated[bool | None, typer.Option(help="And through torch.compile; on a GPU by default.")] = None,
    stages: Annotated[bool, typer.Option(help="Split the time by scale, draw and decoder.")] = True,
    floor: Annotated[bool | None, typer.Option(help="Measure ceilings, count the floor; on a GPU by default.")] = None,
    precision: Annotated[list[str], typer.Option(help="As of generate; repeat for more.")] = ["auto"],  # noqa: B006
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The JSON object, rewritten after each row.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency and throughput as .png, .svg, .pdf.")
    ] = None,
    *,
    run: EngineChoice,
) -> None:
    """Time whole images: medians with spread, stages, memory, floor, and the reference in the same run."""
    from .. import report
    from ..bench.plot import check_plot, plot_bench
    from ..bench.sweep import sweep
    from ..pipeline import Pipeline

    if (bundle is None) == (preset is None):
        got = "neither" if preset is None else "both"
        raise RequestError(f"bench: got {got}, expected either a bundle directory or --preset NAME")
    defaults = EngineChoice()
    others = [f.name for f in fields(EngineChoice) if f.name not in PRESET_OPTIONS]
    if preset is not None and any(getattr(run, name) != getattr(defaults, name) for name in others):
        raise EngineError(f"a preset runs on engine 'torch', without options {', '.join(others)}; leave them out")
    if out is not None:
        check_output(out)
    if plot is not None:
        check_plot(plot)

    def loaded(precision: str) -> Pipeline:
        asked = replace(run, precision=precision)
        if bundle is not None:
            return asked.load(bundle)
        known = {name: getattr(asked, name) for name in PRESET_OPTIONS}
        pipe: Pipeline = needs("var_export.random_bundle", "export").random_pipeline(preset, **known)
        return pipe

    def on_record(record: dict[str, Any]) -> None:
        if out is not None:
            write_text(out, json_text(record, indent=1) + "\n")

    with stderr().status("loading") as status:
        record = sweep(
            loaded,
            precision,
            batches=batch,
            repeats=repeats,
            warmup=warmup,
            guidance=guidance,
            reference=reference,
            half_reference=half_reference,
            compiled=compiled,
            stages=stages,
            floor=floor,
            threads=run.threads,
            progress=status.update,
            on_record=on_record,
        )
    output(record, as_json, report.bench)
    if plot is not None:
        with replacing(plot) as partial:
            plot_bench(record["rows"], partial, f"{preset or bundle}, engine {record['engine']}", form=plot.suffix[1:])
