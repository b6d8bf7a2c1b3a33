"""The commands of training: `var-deploy train …`, or `torchrun … -m var_train …` in many processes."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from var_deploy.config import ConfigError
from var_deploy.errors import run_command

from .configuration import WORKERS, VARRun, VQVAERun, read_run
from .image_data import Crop
from .image_files import open_images
from .parallel import process_group
from .processes import rank, world
from .scaling_law import fit_runs, plot_report, print_report
from .setup import digest_of, frozen_vqvae, train_var, train_vqvae
from .token_writer import store_tokens

app = typer.Typer(
    help="Train a VQVAE and a VAR on images of your own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; see docs/training.md.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="The run's directory; a run that is there goes on.")]
Options = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Wins over the file: optimiser.epochs=10.")
]


@app.command()
def vqvae(config: Config, out: Out, options: Options = None) -> None:
    """Train a multi-scale VQVAE, or go on with it."""
    run = read_run(VQVAERun, config, options or ())
    with process_group() as device:
        _tell(train_vqvae(run, out, device))


@app.command()
def var(config: Config, out: Out, options: Options = None) -> None:
    """Train a VAR on the tokens of a VQVAE, or go on with it."""
    run = read_run(VARRun, config, options or ())
    with process_group() as device:
        _tell(train_var(run, out, device))


@app.command()
def tokens(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images or tar shards.")],
    vqvae: Annotated[Path, typer.Option("--vqvae", metavar="FILE", help="Checkpoint of a trained VQVAE.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make; must not exist.")],
    patch_nums: Annotated[
        str | None, typer.Option(metavar="1,2,…", help="Scales, where the VQVAE's file does not say them.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Crops of every image; epoch e trains on pass e mod PASSES.")] = 1,
    split: Annotated[str, typer.Option(help="train, val or test, where the folder has them.")] = "train",
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images.")] = False,
    centre: Annotated[bool, typer.Option("--centre", help="Crop in the middle, for validation.")] = False,
    enlarge: Annotated[float, typer.Option(min=1, help="Of the shorter side before the crop.")] = 1.125,
    batch: Annotated[int, typer.Option(min=1, help="Images encoded at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = WORKERS,
    seed: Annotated[int, typer.Option(min=0, help="Of the crops; that of the run to come makes its crops.")] = 0,
    using_znorm: Annotated[bool, typer.Option("--znorm", help="The VQVAE picks codes by cosine.")] = False,
) -> None:
    """Store the tokens of images, so that training a VAR need not encode them."""
    with process_group() as device:
        model = frozen_vqvae(vqvae, _sides(patch_nums), device, using_znorm=using_znorm)
        files = open_images(images, split=split)
        crop = Crop(side=model.config.image_size, random=not centre, flip=flip, enlarge=enlarge)
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=rank() != 0 or not console.is_terminal) as bar:
            task = bar.add_task("encoding", total=passes * len(files))
            summary = store_tokens(
                files,
                model,
                out,
                crop=crop,
                passes=passes,
                batch=batch,
                workers=workers,
                seed=seed,
                vqvae_sha256=digest_of(model),
                device=device,
                on_progress=lambda count: bar.advance(task, count * world()),  # the others do about as much
            )
        if rank() == 0:
            print(
                f"{out}: {summary.images} images, {summary.passes} pass(es), {summary.shards} shard(s), "
                f"{summary.bytes / 1e6:.1f} MB, {len(summary.corrupt)} images that cannot be decoded"
            )


@app.command(name="scaling-law")
def scaling_law(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of finished VAR runs.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Fit loss and error against parameters and compute, in log-log."""
    report = fit_runs(runs)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        print_report(report, Console() if sys.stdout.isatty() else Console(width=120))
    if plot is not None:
        plot_report(report, plot)


def _sides(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError:
        raise ConfigError(f"--patch-nums: got {text!r}, expected sides of the scales, like 1,2,3,4") from None


def _tell(path: Path) -> None:
    if rank() == 0:
        print(path)


def main() -> None:
    """Entry point of `python -m var_train`: errors that a user can mend are one line, exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    run_command(app)
