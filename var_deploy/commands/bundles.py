"""Commands that make, check and show bundles: export, build, triton-repo, inspect, verify, cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from ..precision import Precision
from .console import needs, output, stderr
from .options import AsJson, BundlePath, DecodeSlice, Device, EngineName, PrecisionName, VaeFile, VarFile, size_in_bytes


def export(
    var: VarFile,
    vae: VaeFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Bundle directory to make; must not exist.")],
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one per line; default the checkpoint's.")
    ] = None,
    license: Annotated[str, typer.Option(help="Licence of the weights, noted in the bundle.")] = "not stated",
    znorm: Annotated[bool, typer.Option(help="The VQVAE picks codes by cosine (using_znorm).")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32; int8 for CPUs; fp16, bf16 for GPUs; auto: int8 where it is faster and faithful.")
    ] = "fp32",
    calibration: Annotated[
        str | None,
        typer.Option(metavar="CLASSES_OR_DIR", help="What auto measures on: 0,5,9 or a folder per class in DIR."),
    ] = None,
) -> None:
    """Turn a checkpoint pair into a bundle."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import report
    from ..bundle import Bundle

    exporter = needs("var_export.bundle", "export")
    names = _class_names(classes) if classes else None
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading checkpoints", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        exporter.bundle_from_checkpoint(
            var,
            vae,
            out,
            class_names=names,
            license_note=license,
            using_znorm=znorm,
            precision=precision,
            calibration=calibration,
            progress=on_progress,
        )
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {len(list(out.iterdir()))} files, {size / 1e6:.1f} MB")
    if precision == "auto":
        manifest = Bundle.open(out, verify_digests=False).manifest
        report.precision_plan(str(manifest.precision), manifest.source["precision"])


def build(
    bundle: BundlePath,
    precision: Annotated[
        str | None, typer.Option(help="Of the bundle, to be sure of it: plans compute as it was exported.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="MIN:OPT:MAX", help="Images per request.")] = "1:1:8",
    layout: Annotated[
        str, typer.Option(help="per-scale: a plan and a copy of the weights for each; profiles: one for all scales.")
    ] = "per-scale",
    workspace: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Scratch memory of a kernel, in MB or as 4GB; default TensorRT's."),
    ] = None,
    optimization_level: Annotated[int, typer.Option(min=0, max=5, help="Higher builds longer.")] = 3,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="With Triton kernels inside; not measured yet, so not the default.")
    ] = False,
    trtexec: Annotated[bool, typer.Option("--trtexec", help="Build nothing, print the lines for trtexec.")] = False,
) -> None:
    """Build TensorRT plans of a bundle on this machine's GPU; what is there already stays."""
    from rich.progress import Progress

    from ..bundle import Bundle
    from ..plans import Batch, Layout

    asked = Batch.parse(batch), Layout.parse(layout)
    opened = Bundle.open(bundle, verify_digests=False)
    if precision is not None and precision != opened.manifest.precision:
        raise RequestError(
            f"precision: the bundle has {opened.manifest.precision}, got {precision!r}; "
            f"export --precision {precision} first"
        )
    if trtexec:
        print("\n".join(needs("var_export.tensorrt_plans", "export").trtexec_lines(opened, *asked)))
        return
    builder = needs("var_export.tensorrt", "export")
    with Progress(console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading TensorRT", total=None)
        directory = builder.build_plans(
            bundle,
            batch=asked[0],
            layout=asked[1],
            workspace=size_in_bytes(workspace),
            optimization_level=optimization_level,
            plugins=needs("var_export.tensorrt_plugins", "export,gpu").register_plugins if plugins else None,
            progress=lambda plan, what, done, total: bar.update(
                task, description=f"{plan}: {what}", completed=done, total=total or None
            ),
        )
    print(directory)


def triton_repo(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Model repository to make; must not exist.")],
    name: Annotated[str, typer.Option(help="Name of the model in requests.")] = "var",
    engine: EngineName = "auto",
    device: Annotated[
        str, typer.Option(help="auto: the server's GPUs, or its CPU; cpu, cuda (every GPU) or cuda:N.")
    ] = "auto",
    precision: PrecisionName = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Images of one batch, and of one request.")] = 8,
    queue_delay: Annotated[
        int, typer.Option(min=0, metavar="MICROSECONDS", help="How long a request waits for others.")
    ] = 5_000,
    instances: Annotated[int, typer.Option(min=1, help="Per GPU, or on the CPU; each has its own weights.")] = 1,
    link: Annotated[bool, typer.Option("--link", help="Hard links to the bundle's files, no copies.")] = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server."""
    from ..triton_repository import ServedModel, write_repository

    model = ServedModel(
        name=name,
        engine=engine,
        device=device,
        precision=precision,
        max_batch=max_batch,
        queue_delay_us=queue_delay,
        instances=instances,
    )
    print(write_repository(bundle, out, model, link=link) / name)


def inspect(
    path: Annotated[Path, typer.Argument(help="Bundle directory or checkpoint.")],
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes of the memory plan.")] = [1, 8, 64],  # noqa: B006
    precision: Annotated[
        Precision | None, typer.Option(help="Of the torch engine's plan, for a bundle; default bf16.")
    ] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Plan for mixing codes instead of drawing.")] = False,
    decode_slice: DecodeSlice = None,
    as_json: AsJson = False,
) -> None:
    """Show configuration, parameters, sizes and the memory plan of a bundle or checkpoint."""
    from .. import report
    from ..inspection import inspect_bundle

    plan = {"--precision": precision, "--smooth": smooth or None, "--decode-slice": decode_slice}
    if path.is_dir() and not _of_a_run(path):
        data = inspect_bundle(path, batch, precision, smooth=smooth, decode_slice=decode_slice)
    elif given := [name for name, value in plan.items() if value is not None]:
        raise RequestError(f"{path}: the torch engine's plan needs a bundle; export first, or leave out {given[0]}")
    else:
        data = needs("var_export.inspection", "export").inspect_checkpoint(path, batch)
    output(data, as_json, report.inspection)


def verify(
    bundle: BundlePath,
    var: VarFile,
    vae: VaeFile,
    classes: Annotated[
        list[int] | None, typer.Option("--class", help="Class ids to run; default first and last.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0)] = 1.5,
    tolerance: Annotated[float | None, typer.Option(help="Largest logit and pixel error that passes.")] = None,
    engine: Annotated[str, typer.Option(help="Engine: onnx, torch or tensorrt.")] = "onnx",
    device: Device = "auto",
    precision: PrecisionName = "auto",
    digits: Annotated[bool, typer.Option("--digits", help="Judge 1,000 samples too; for the digits example.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle with the reference model; exit status 1 beyond the tolerance or the fidelity gate."""
    from .. import report

    verifier = needs("var_export.verify", "export")
    with stderr().status("verifying") as status:
        parity = verifier.verify_bundle(
            bundle,
            var,
            vae,
            labels=classes or None,
            guidance=guidance,
            tolerance=verifier.TOLERANCE if tolerance is None else tolerance,
            engine=engine,
            device=device,
            precision=precision,
            digits=digits,
            progress=lambda what: status.update(f"verifying: {what}"),
        )
    output(parity.to_dict(), as_json, report.parity)
    if not parity.passed:
        raise typer.Exit(1)


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything; it is made again when needed.")] = False,
) -> None:
    """Show or delete the weights that are kept in this machine's form."""
    from ..prepared import default_directory, entries, remove_entries

    directory = default_directory()
    if directory is None:
        raise RequestError("cache: no home directory and no XDG_CACHE_HOME, so nothing is kept; set one of them")
    found = entries(directory)
    for name, size in found.items():
        print(f"{name}: {size / 1e6:,.1f} MB")
    print(f"{directory}: {len(found)} entries, {sum(found.values()) / 1e6:,.1f} MB")
    if clear:
        remove_entries(directory)
        print("deleted")


def _of_a_run(directory: Path) -> bool:
    """Whether it is a checkpoint of a training run, or the run, whose reader says which checkpoint to give."""
    return any((directory / name).is_file() for name in ("manifest.json", "run.json"))


def _class_names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot read class names ({error})") from error
    return [name.strip() for name in names if name.strip()]
