"""The command line `var-deploy`: thin commands over the library; what they print is laid out in `report`.

Errors that a user can mend are one line on standard error and exit status 1; wrong usage exits with 2.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import EngineError, RequestError, run_command
from .output_file import check_output, replacing, write_text
from .precision import Precision

app = typer.Typer(
    help="Deploy VAR image models: checkpoint in, bundle out, images from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory.")]
VarFile = Annotated[
    Path, typer.Option("--var", metavar="PATH", help="VAR checkpoint: .pth, .safetensors, or RUN/checkpoints/step_….")
]
VaeFile = Annotated[
    Path, typer.Option("--vae", metavar="PATH", help="VQVAE checkpoint: .pth, .safetensors, or RUN/checkpoints/step_….")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
EngineName = Annotated[str, typer.Option(help="Engine: auto, onnx, torch or tensorrt.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")]
PrecisionName = Annotated[
    str, typer.Option(help="auto: the bundle's; engine torch makes fp16, bf16, int8, fp8 of fp32.")
]
DecodeSlice = Annotated[int | None, typer.Option(min=1, help="Images the decoder takes at a time (torch engine).")]
CompileDecoder = Annotated[bool, typer.Option("--compile-decoder", help="Decoder by torch.compile (torch engine).")]
Plans = Annotated[str | None, typer.Option(metavar="NAME", help="Directory of plans (tensorrt engine).")]
Draw = Annotated[str, typer.Option(help="Where tokens are drawn: device or host (tensorrt; onnx on a GPU).")]
Provider = Annotated[str, typer.Option(help="cuda or tensorrt (onnx engine on a GPU).")]
AllowCpu = Annotated[bool, typer.Option("--allow-cpu", help="Run there what the provider lacks (onnx on a GPU).")]
Graphs = Annotated[str, typer.Option(help="symbolic: one graph for all scales; static: one per scale.")]
Decoder = Annotated[str, typer.Option(help="auto, graph or winograd: fewer multiplications (onnx engine).")]
Cache = Annotated[
    bool, typer.Option(help="Keep weights in this machine's form for faster starts: see the command cache.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that compute; default one per core (onnx engine).")]
MemoryLimit = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to stay within, in MB or as 4GB; default what is free.")
]


def main() -> None:
    """Entry point: runs the command and turns errors into one line and a status."""
    run_command(app)


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", help="Log what is chosen and why.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command()
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

    from . import report
    from .bundle import Bundle

    exporter = _needs("var_export.bundle", "export")
    names = _class_names(classes) if classes else None
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
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


@app.command()
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

    from .bundle import Bundle
    from .plans import Batch, Layout

    asked = Batch.parse(batch), Layout.parse(layout)
    opened = Bundle.open(bundle, verify_digests=False)
    if precision is not None and precision != opened.manifest.precision:
        raise RequestError(
            f"precision: the bundle has {opened.manifest.precision}, got {precision!r}; "
            f"export --precision {precision} first"
        )
    if trtexec:
        print("\n".join(_needs("var_export.tensorrt_plans", "export").trtexec_lines(opened, *asked)))
        return
    builder = _needs("var_export.tensorrt", "export")
    with Progress(console=_stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading TensorRT", total=None)
        directory = builder.build_plans(
            bundle,
            batch=asked[0],
            layout=asked[1],
            workspace=_bytes(workspace),
            optimization_level=optimization_level,
            plugins=_needs("var_export.tensorrt_plugins", "export,gpu").register_plugins if plugins else None,
            progress=lambda plan, what, done, total: bar.update(
                task, description=f"{plan}: {what}", completed=done, total=total or None
            ),
        )
    print(directory)


@app.command()
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
    from .triton_repository import ServedModel, write_repository

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


@app.command()
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
    from . import report
    from .inspection import inspect_bundle

    plan = {"--precision": precision, "--smooth": smooth or None, "--decode-slice": decode_slice}
    if path.is_dir() and not _of_a_run(path):
        data = inspect_bundle(path, batch, precision, smooth=smooth, decode_slice=decode_slice)
    elif given := [name for name, value in plan.items() if value is not None]:
        raise RequestError(f"{path}: the torch engine's plan needs a bundle; export first, or leave out {given[0]}")
    else:
        data = _needs("var_export.inspection", "export").inspect_checkpoint(path, batch)
    _output(data, as_json, report.inspection)


@app.command()
def generate(
    bundle: BundlePath,
    classes: Annotated[list[str], typer.Option("--class", metavar="CLASS", help="Class id or name; repeat for more.")],
    out: Annotated[Path, typer.Option(metavar="FILE_OR_DIR", help="Picture (several: a grid), or a directory.")],
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    guidance: Annotated[str | None, typer.Option(help="Strength, or one per scale: 0,0.5,1,…")] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Then keep probability p; 0 is off.")] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Mix codes instead of drawing one.")] = False,
    steps_gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Animation from coarse to fine.")] = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    precision: PrecisionName = "auto",
    graphs: Graphs = "symbolic",
    decoder: Decoder = "auto",
    cache: Cache = True,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    decode_slice: DecodeSlice = None,
    compile_decoder: CompileDecoder = False,
    plans: Plans = None,
    draw: Draw = "device",
    provider: Provider = "cuda",
    allow_cpu: AllowCpu = False,
) -> None:
    """Generate images."""
    from rich.progress import Progress

    from .engines import DeviceLoop
    from .images import image_grid, save_animation
    from .pipeline import Preview, load

    _check_picture(out)
    if steps_gif is not None and steps_gif.suffix.lower() != ".gif":
        raise RequestError(f"{steps_gif}: an animation is written as GIF; give a name that ends in .gif")
    pipe = load(
        bundle,
        engine=engine,
        device=device,
        precision=precision,
        graphs=graphs,
        decoder=decoder,
        cache=cache,
        threads=threads,
        memory_limit=_bytes(memory_limit),
        decode_slice=decode_slice,
        compile_decoder=compile_decoder,
        plans=plans,
        draw=draw,
        provider=provider,
        allow_cpu=allow_cpu,
    )
    names = pipe.bundle.manifest.class_names or ()
    labels = [c if c in names or not re.fullmatch("-?[0-9]+", c) else int(c) for c in classes]
    frames: list[list[Any]] = [[] for _ in range(pipe.bundle.manifest.var.num_scales)]
    with Progress(console=_stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("scales", total=len(frames) * len(labels))

        def on_scale(preview: Preview) -> None:
            if steps_gif is not None:
                frames[preview.scale] += preview.images  # of a part, where the batch is split
            bar.advance(task, len(preview.tokens_Bn))

        result = pipe.generate(
            labels,
            seeds=seed,
            guidance=_guidance(guidance),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            smooth=smooth,
            # A listener makes a device engine stop after every scale; a moving bar is not worth that.
            on_scale=None if steps_gif is None and isinstance(pipe.engine, DeviceLoop) else on_scale,
        )
    if out.suffix and not out.is_dir():
        picture = result.images[0] if len(result.images) == 1 else image_grid(result.images)
        with replacing(out) as partial:
            picture.save(partial)
        print(out)
    else:
        for index, (image, label) in enumerate(zip(result.images, classes, strict=True)):
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)
            path = out / f"{index:03d}_{name}_seed{seed + index}.png"
            with replacing(path) as partial:
                image.save(partial)
            print(path)
    if steps_gif is not None:
        with replacing(steps_gif) as partial:
            save_animation([image_grid(images) for images in frames], partial)
        print(steps_gif)


@app.command()
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
    from . import report

    verifier = _needs("var_export.verify", "export")
    with _stderr().status("verifying") as status:
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
    _output(parity.to_dict(), as_json, report.parity)
    if not parity.passed:
        raise typer.Exit(1)


@app.command()
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
    engine: EngineName = "auto",
    device: Device = "auto",
    precision: Annotated[list[str], typer.Option(help="As of generate; repeat for more.")] = ["auto"],  # noqa: B006
    graphs: Graphs = "symbolic",
    decoder: Decoder = "auto",
    cache: Cache = True,
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    decode_slice: DecodeSlice = None,
    compile_decoder: CompileDecoder = False,
    plans: Plans = None,
    draw: Draw = "device",
    provider: Provider = "cuda",
    allow_cpu: AllowCpu = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The JSON object, rewritten after each row.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency and throughput as .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Time whole images: medians with spread, stages, memory, floor, and the reference in the same run."""
    from . import report
    from .bench.plot import check_plot, plot_bench
    from .bench.sweep import sweep
    from .pipeline import Pipeline, load

    if (bundle is None) == (preset is None):
        got = "neither" if preset is None else "both"
        raise RequestError(f"bench: got {got}, expected either a bundle directory or --preset NAME")
    on_cpu: dict[str, Any] = {"threads": threads, "graphs": graphs, "decoder": decoder}
    on_cpu["memory_limit"] = limit = _bytes(memory_limit)
    if preset is not None and (threads or limit or graphs != "symbolic" or decoder != "auto" or plans):
        names = ", ".join([*on_cpu, "plans"])
        raise EngineError(f"a preset runs on engine 'torch', without options {names}; leave them out")
    if out is not None:
        check_output(out)
    if plot is not None:
        check_plot(plot)
    run: dict[str, Any] = {"engine": engine, "device": device}
    run |= {"decode_slice": decode_slice, "compile_decoder": compile_decoder}
    on_gpu: dict[str, Any] = {"plans": plans, "draw": draw, "provider": provider, "allow_cpu": allow_cpu}

    def loaded(precision: str) -> Pipeline:
        if bundle is not None:
            return load(bundle, **run, **on_cpu, **on_gpu, cache=cache, precision=precision)
        pipe: Pipeline = _needs("var_export.random_bundle", "export").random_pipeline(
            preset, **run, precision=precision
        )
        return pipe

    def on_record(record: dict[str, Any]) -> None:
        if out is not None:
            write_text(out, _json(record, indent=1) + "\n")

    with _stderr().status("loading") as status:
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
            threads=threads,
            progress=status.update,
            on_record=on_record,
        )
    _output(record, as_json, report.bench)
    if plot is not None:
        with replacing(plot) as partial:
            plot_bench(record["rows"], partial, f"{preset or bundle}, engine {record['engine']}", form=plot.suffix[1:])


@app.command(name="cache")
def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything; it is made again when needed.")] = False,
) -> None:
    """Show or delete the weights that are kept in this machine's form."""
    from .prepared import default_directory, entries, remove_entries

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


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(context: typer.Context) -> None:
    """Train a VQVAE and a VAR: vqvae, var, tokens, scaling-law (see train --help)."""
    _needs("var_train.command", "train").app(args=context.args, prog_name="var-deploy train")


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _output(data: dict[str, Any], as_json: bool, layout: Any) -> None:
    """Prints data as JSON, or laid out for people."""
    if as_json:
        print(_json(data))
    else:
        layout(data)


def _json(data: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_without_nan(data), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_nan(value: Any) -> Any:
    """The same data with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _needs(module: str, extra: str) -> Any:
    """Imports what a command needs, or says which extra to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(f"this command needs {error.name}; pip install 'var-deploy[{extra}]'") from error


def _of_a_run(directory: Path) -> bool:
    """Whether it is a checkpoint of a training run, or the run, whose reader says which checkpoint to give."""
    return any((directory / name).is_file() for name in ("manifest.json", "run.json"))


def _class_names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot read class names ({error})") from error
    return [name.strip() for name in names if name.strip()]


def _bytes(size: str | None) -> int | None:
    from .memory_budget import bytes_from_text

    return None if size is None else bytes_from_text(size)


def _guidance(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"guidance: got {text!r}, expected a number or one per scale, like 0,0.5,1") from None
    return values if len(values) > 1 else values[0]


def _check_picture(out: Path) -> None:
    """Refuses an unknown picture format before an image is computed."""
    if not out.suffix or out.is_dir():
        return
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        known = ", ".join(PICTURE_SUFFIXES)
        raise RequestError(f"{out}: unknown picture format {out.suffix!r}; use {known}, or a directory name")


if __name__ == "__main__":
    main()
