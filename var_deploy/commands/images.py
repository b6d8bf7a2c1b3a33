"""Commands that make pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..output_file import replacing
from .console import stderr
from .options import BundlePath, EngineChoice, with_engine_options

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@with_engine_options
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
    *,
    run: EngineChoice,
) -> None:
    """Generate images."""
    from rich.progress import Progress

    from ..engines import DeviceLoop
    from ..images import image_grid, save_animation
    from ..pipeline import Preview

    _check_picture(out)
    if steps_gif is not None and steps_gif.suffix.lower() != ".gif":
        raise RequestError(f"{steps_gif}: an animation is written as GIF; give a name that ends in .gif")
    pipe = run.load(bundle)
    names = pipe.bundle.manifest.class_names or ()
    labels = [c if c in names or not re.fullmatch("-?[0-9]+", c) else int(c) for c in classes]
    frames: list[list[Any]] = [[] for _ in range(pipe.bundle.manifest.var.num_scales)]
    with Progress(console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
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
