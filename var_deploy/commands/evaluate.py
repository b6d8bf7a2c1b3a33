"""Commands that judge generated images: evaluate, evaluate-digits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..output_file import check_output, write_text
from .console import json_text, needs, output, stderr
from .options import AsJson, EngineChoice, with_engine_options


def evaluate(
    samples: Annotated[Path, typer.Option(metavar="DIR_OR_NPZ", help="Folder of PNG files, or .npz with arr_0.")],
    reference: Annotated[
        Path,
        typer.Option(metavar="NPZ_OR_DIR", help="The same of real images; an .npz may hold mu, sigma, mu_s, sigma_s."),
    ],
    features: Annotated[
        Path, typer.Option(metavar="FILE", help="Weights of FID's Inception, .pth or .safetensors; never downloaded.")
    ],
    features_sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Digest that FILE has to have: the published weights in another form."),
    ] = None,
    few: Annotated[
        bool, typer.Option("--few", help="Measure with too few images, too: FID comes out too large.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 is off.")] = 20,
    precision_recall: Annotated[bool, typer.Option(help="They take long with very many images.")] = True,
    device: Annotated[str, typer.Option(help="Of the network: auto, cpu, cuda or cuda:N.")] = "auto",
    cache: Annotated[bool, typer.Option(help="Keep the reference's statistics for the next time.")] = True,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON object here, too.")] = None,
) -> None:
    """FID, sFID, Inception score, precision and recall of images, as guided-diffusion's evaluator defines them."""
    from ..prepared import default_cache

    if out is not None:
        check_output(out)
    evaluator = needs("var_deploy.evaluation.evaluate", "evaluate")
    layout = needs("var_deploy.evaluation.layout", "evaluate")
    with _progress() as progress:
        found = evaluator.evaluate(
            samples,
            reference,
            features,
            options=evaluator.Options(few=few, bootstrap=bootstrap, manifolds=precision_recall),
            features_sha256=features_sha256,
            device=device,
            cache=default_cache(verify_digests=True) if cache else None,
            progress=progress,
        )
    if out is not None:
        write_text(out, json_text(found, indent=1) + "\n")
    output(found, as_json, layout.evaluation)


@with_engine_options
def evaluate_digits(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Of the digits example, fp32 first.")],
    count: Annotated[int, typer.Option(min=100, help="Images of each bundle, as many of every digit.")] = 1000,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the table here, and the JSON object beside it.")
    ] = None,
    *,
    run: EngineChoice,
) -> None:
    """Sample bundles of the digits example and judge them by its classifier: fp32 beside every inexact one."""
    if out is not None and out.suffix != ".md":
        raise RequestError(f"{out}: got {out.suffix or 'no suffix'}, expected .md; the JSON object goes beside it")
    if out is not None:
        check_output(out)
    judge = needs("var_export.digits_evaluation", "export,digits")
    with _progress() as progress:
        found = judge.evaluate_digits(bundles, run.load, count=count, progress=progress)
    if out is not None:
        write_text(out, judge.markdown(found))
        write_text(out.with_suffix(".json"), json_text(found, indent=1) + "\n")
    output(found, as_json, judge.layout)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on standard error that hears (what, done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading")

        def hear(what: str, done: int, total: int) -> None:
            if bar.tasks[0].description != what:
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=total)

        yield hear
