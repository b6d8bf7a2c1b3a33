"""The command that shows a bundle from every side on one page: report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from ..output_file import check_output, write_text
from .console import needs, stderr
from .options import (
    BundlePath,
    EngineChoice,
    SamplingChoice,
    class_labels,
    with_engine_options,
    with_sampling_options,
)
from .pictures import picture_from_file

if TYPE_CHECKING:
    from ..quality_report.facts import Facts


@with_engine_options
@with_sampling_options
def report(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page, one HTML file with everything inside.")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="CLASS", help="Class id or name to show; repeat for more; default ten."),
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Samples of every class shown, at most 60 in all.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to edit; default a sample of the bundle.")
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Batch size to time; repeat for more.")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    reference: Annotated[bool, typer.Option(help="Time eager PyTorch in the same run, where installed.")] = True,
    var: Annotated[
        Path | None, typer.Option("--var", metavar="PATH", help="VAR checkpoint to compare with, as of verify.")
    ] = None,
    vae: Annotated[Path | None, typer.Option("--vae", metavar="PATH", help="And VQVAE checkpoint.")] = None,
    *,
    sampling: SamplingChoice,
    run: EngineChoice,
) -> None:
    """Write one HTML page: configuration, parity, latency, samples, edits, and the commands for all of it."""
    from ..bundle import Bundle
    from ..quality_report.again import Spoken
    from ..quality_report.gather import Asked, gather

    check_output(out)
    page = needs("var_deploy.quality_report.page", "report")
    checkpoints = _checkpoints(var, vae)
    source = None if picture is None else picture_from_file(picture)
    manifest = Bundle.open(bundle, verify_digests=False).manifest  # digests are compared when it is described
    own = [word for name in classes or () for word in ("--class", name)]
    own += ["--per-class", str(per_class), "--seed", str(seed)]
    own += [] if picture is None else ["--picture", picture.name]
    timed = [word for size in batch for word in ("--batch", str(size))]
    timed += ["--repeats", str(repeats), *([] if reference else ["--no-reference"])]
    named = [word for option, path in checkpoints.items() for word in (f"--{option}", path.name)]
    asked = Asked(
        classes=class_labels(manifest, classes) if classes else None,
        per_class=per_class,
        seed=seed,
        sampling=sampling.options(manifest.var.num_scales),
        batches=batch,
        repeats=repeats,
        reference=reference,
        threads=run.threads,
        decoder=run.decoder,
        picture=source,
        picture_name=None if picture is None else picture.name,
        private=list(checkpoints.values()),
        spoken=Spoken(
            engine=said(replace(run, engine="auto")),
            verify=said(EngineChoice(device=run.device, precision=run.precision)),
            sampling=said(sampling),
            bench=tuple(timed),
            checkpoints=tuple(named),
            report=tuple(own),
        ),
    )
    with stderr().status("report") as status:

        def progress(what: str) -> None:
            status.update(f"report: {what}")

        verify = _verify(bundle, checkpoints, run, progress) if checkpoints else None
        facts = gather(bundle, run.load, asked, verify=verify, progress=progress)
        write_text(out, page.html(facts))
    print(out)
    _say(facts)


def said(choice: EngineChoice | SamplingChoice) -> tuple[str, ...]:
    """The options that are not at their default, as words of a command line."""
    words: list[str] = []
    for field in fields(choice):
        value, option = getattr(choice, field.name), field.name.replace("_", "-")
        if value != field.default:
            words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return tuple(words)


def _checkpoints(var: Path | None, vae: Path | None) -> dict[str, Path]:
    """By option: both, or none. Raises RequestError."""
    given = {option: path for option, path in (("var", var), ("vae", vae)) if path is not None}
    if len(given) == 1:
        raise RequestError(f"report: got --{next(iter(given))} alone; give --var and --vae, or neither")
    for path in given.values():
        if not path.exists():
            raise RequestError(f"{path}: is not there; give a checkpoint file, or neither --var nor --vae")
    return given


def _verify(
    bundle: Path, checkpoints: dict[str, Path], run: EngineChoice, progress: Callable[[str], None]
) -> Callable[[str], Mapping[str, Any]]:
    """By the engine of a name, as the command verify does it; what it needs is imported when it runs."""

    def verify(engine: str) -> Mapping[str, Any]:
        found: dict[str, Any] = (
            needs("var_export.verify", "export")
            .verify_bundle(
                bundle,
                checkpoints["var"],
                checkpoints["vae"],
                engine=engine,
                device=run.device,
                precision=run.precision,
                progress=lambda what: progress(f"comparing, {what}"),
            )
            .to_dict()
        )
        return found

    return verify


def _say(facts: Facts) -> None:
    """What is not on the page, or failed there, to whoever waits for it."""
    for part, why in facts.missing.items():
        stderr().print(f"{part} is missing: {why}", markup=False, highlight=False, soft_wrap=True)
    if facts.parity is not None and not facts.parity["passed"]:
        stderr().print("the comparison with the checkpoints FAILED; the page shows where", soft_wrap=True)
