"""Commands that make pictures: generate, edit, vary, encode, reconstruct."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from ..output_file import check_output, replacing
from .console import stderr
from .options import (
    BundlePath,
    EngineChoice,
    SamplingChoice,
    class_labels,
    numbers,
    with_engine_options,
    with_sampling_options,
)
from .pictures import check_picture, picture_from_file, tokens_from_file, write_pictures

if TYPE_CHECKING:
    from PIL import Image

    from ..pipeline import Pipeline
    from ..results import Generation, Preview

Picture = Annotated[Path, typer.Argument(metavar="PICTURE", help="Picture file; its middle square is taken.")]
OutPath = Annotated[Path, typer.Option(metavar="FILE_OR_DIR", help="Picture (several: a grid), or a directory.")]
Class = Annotated[list[str] | None, typer.Option("--class", metavar="CLASS", help="Class id or name; repeat for more.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")]
Count = Annotated[int | None, typer.Option(min=1, help="Images, each with a seed of its own; default one per class.")]


@with_engine_options
@with_sampling_options
def generate(
    bundle: BundlePath,
    out: OutPath,
    classes: Class = None,
    seed: Seed = 0,
    like: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make the images of a PNG again, by what it says of itself.")
    ] = None,
    refine: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Another model, which draws the finer scales.")
    ] = None,
    draft_scales: Annotated[int | None, typer.Option(min=1, help="Scales before those, with --refine.")] = None,
    steps_gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Animation from coarse to fine.")] = None,
    *,
    sampling: SamplingChoice,
    run: EngineChoice,
) -> None:
    """Generate images."""
    from ..images import image_grid, save_animation

    check_picture(out)
    if steps_gif is not None and steps_gif.suffix.lower() != ".gif":
        raise RequestError(f"{steps_gif}: an animation is written as GIF; give a name that ends in .gif")
    recipes = None if like is None else _recipes(like)
    if recipes is not None and (classes or seed or draft_scales or steps_gif or sampling != SamplingChoice()):
        raise RequestError("--like: the picture says classes, seeds and settings; leave those options out")
    if recipes is None and not classes:
        raise RequestError("generate: got no class; give --class, once per image, or --like")
    pipe = run.load(bundle)
    refiner = None if refine is None else run.load(refine)
    if recipes is not None:
        made = pipe.remake(recipes, refine=refiner)
        before, now = recipes[0], made.recipes[0]
        if (before.engine, before.precision) != (now.engine, now.precision):
            said = (
                f"made by engine {before.engine!r} in {before.precision!r}, now by {now.engine!r} in {now.precision!r}"
            )
            stderr().print(f"{said}: rounding may change a token", markup=False)
    else:
        num_scales = pipe.bundle.manifest.var.num_scales
        frames: list[list[Image.Image]] = [[] for _ in range(num_scales)]
        labels = class_labels(pipe.bundle.manifest, classes or [])
        with _progress(refiner or pipe, len(labels or ()), None if steps_gif is None else frames) as on_scale:
            made = pipe.generate(
                labels,
                seeds=seed,
                refine=refiner,
                draft_scales=draft_scales,
                on_scale=on_scale,
                **sampling.options(num_scales),
            )
    _save(pipe, made, out)
    if steps_gif is not None:
        with replacing(steps_gif) as partial:
            save_animation([image_grid(images) for images in frames], partial)
        print(steps_gif)


@with_engine_options
@with_sampling_options
def edit(
    bundle: BundlePath,
    picture: Picture,
    out: OutPath,
    box: Annotated[
        str | None, typer.Option(metavar="Y0,X0,Y1,X1", help="Region, as parts of the sides from 0 to 1.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="Or a picture that is white there.")] = None,
    mode: Annotated[str, typer.Option(help="inpaint redraws the region, outpaint all but it.")] = "inpaint",
    classes: Class = None,
    seed: Seed = 0,
    count: Count = None,
    composite: Annotated[bool, typer.Option("--composite", help="Put the original's pixels back elsewhere.")] = False,
    *,
    sampling: SamplingChoice,
    run: EngineChoice,
) -> None:
    """Redraw a part of a picture, once per class; without a class by the model's null class."""
    check_picture(out)
    corners = None if box is None else numbers("box", box, float)
    source, region = picture_from_file(picture), None if mask is None else picture_from_file(mask)
    pipe = run.load(bundle)
    labels, seeds = _labels_and_seeds(pipe, classes, seed, count)
    with _progress(pipe, len(seeds), None) as on_scale:
        made = pipe.edit(
            [source],
            labels,
            box=corners,
            mask=region,
            mode=mode,
            seeds=seeds,
            composite=composite,
            on_scale=on_scale,
            **sampling.options(pipe.bundle.manifest.var.num_scales),
        )
    _save(pipe, made, out)


@with_engine_options
@with_sampling_options
def vary(
    bundle: BundlePath,
    picture: Picture,
    out: OutPath,
    from_scale: Annotated[int, typer.Option(help="Redraw this scale and all finer ones, counted from 0.")],
    classes: Class = None,
    seed: Seed = 0,
    count: Count = None,
    *,
    sampling: SamplingChoice,
    run: EngineChoice,
) -> None:
    """Keep the coarse scales of a picture and redraw the finer ones."""
    check_picture(out)
    source = picture_from_file(picture)
    pipe = run.load(bundle)
    labels, seeds = _labels_and_seeds(pipe, classes, seed, count)
    with _progress(pipe, len(seeds), None) as on_scale:
        made = pipe.vary(
            [source],
            labels,
            from_scale=from_scale,
            seeds=seeds,
            on_scale=on_scale,
            **sampling.options(pipe.bundle.manifest.var.num_scales),
        )
    _save(pipe, made, out)


@with_engine_options
def encode(
    bundle: BundlePath,
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE…", help="Picture files.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Tokens as .npz: scale_00 …, int64 [images, tokens].")],
    *,
    run: EngineChoice,
) -> None:
    """Turn pictures into tokens, scale by scale."""
    import numpy as np

    if out.suffix != ".npz":
        raise RequestError(f"{out}: tokens are written as NumPy's .npz; give a name that ends in .npz")
    check_output(out)
    sources = [picture_from_file(picture) for picture in pictures]
    tokens = run.load(bundle).encode(sources)
    with replacing(out) as partial, partial.open("wb") as file:
        arrays: dict[str, Any] = {f"scale_{k:02d}": tokens_Bn for k, tokens_Bn in enumerate(tokens)}
        np.savez_compressed(file, **arrays)
    print(out)


@with_engine_options
def reconstruct(
    bundle: BundlePath,
    sources: Annotated[
        list[Path], typer.Argument(metavar="PICTURE…", help="Picture files, or one .npz of the command encode.")
    ],
    out: OutPath,
    *,
    run: EngineChoice,
) -> None:
    """What is left of pictures after encoding and decoding, or what tokens decode to."""
    from ..images import images_from_pixels

    check_picture(out)
    if any(source.suffix == ".npz" for source in sources):
        if len(sources) > 1:
            raise RequestError(f"{len(sources)} files, expected pictures, or one .npz alone")
        tokens = tokens_from_file(sources[0])
        pixels_B3RR = run.load(bundle).decode(tokens)
    else:
        opened = [picture_from_file(source) for source in sources]
        pixels_B3RR = run.load(bundle).reconstruct(opened)
    names = [source.stem for source in sources] if len(sources) == len(pixels_B3RR) else [""] * len(pixels_B3RR)
    write_pictures(out, images_from_pixels(pixels_B3RR), names)


# ---- in -------------------------------------------------------------------------------------------------------------


def _labels_and_seeds(
    pipe: Pipeline, classes: list[str] | None, seed: int, count: int | None
) -> tuple[list[int | str] | None, list[int]]:
    """One image per class, or `count` of one class or none."""
    labels = class_labels(pipe.bundle.manifest, classes or []) or None
    B = count or len(labels or [None])
    if labels is not None and len(labels) not in (1, B):
        raise RequestError(f"--count: {count} for {len(labels)} classes; leave it out, or give one class")
    return labels, [seed + i for i in range(B)]


def _recipes(path: Path) -> list[Any]:
    from ..recipe import recipes_from_png

    return recipes_from_png(path)


# ---- out ------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(
    pipe: Pipeline, count: int, frames: list[list[Image.Image]] | None
) -> Iterator[Callable[[Preview], None] | None]:
    """A bar on standard error, and what moves it; frames: filled with previews, by scale."""
    from rich.progress import Progress

    from ..engines import DeviceLoop

    with Progress(console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("scales", total=pipe.bundle.manifest.var.num_scales * count)

        def on_scale(preview: Preview) -> None:
            if frames is not None:
                frames[preview.scale] += preview.images  # of a part, where the batch is split
            bar.advance(task, len(preview.tokens_Bn))

        # A listener makes a device engine stop after every scale; a moving bar is not worth that.
        yield None if frames is None and isinstance(pipe.engine, DeviceLoop) else on_scale


def _save(pipe: Pipeline, made: Generation, out: Path) -> None:
    """One picture of all images, or one each in a directory; a PNG says how it was made."""
    names = []
    for recipe in made.recipes:
        classes = pipe.bundle.manifest.class_names
        label = "null" if recipe.label == pipe.bundle.manifest.var.null_class else str(recipe.label)
        name = classes[recipe.label] if classes and label != "null" else label
        names.append("".join(c if c.isalnum() or c in "-_" else "_" for c in f"{name}_seed{recipe.seed}"))
    write_pictures(out, made.images, names, made.recipes)
