"""Photographs that lie inside scikit-learn and scikit-image → a colour data set: random crops, one class a photograph.

Training and validation take theirs from two parts of a photograph that share no pixel. Crop number i is a function of
(seed, part, class, i) alone, so a larger data set begins with the smaller one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image

from var_deploy.config import require
from var_deploy.errors import DataError, run_command

from .image_writer import Format, Sample, new_image_set


class Edge(StrEnum):
    """Where the third of a photograph lies that validation takes its crops from."""

    LEFT = "left"
    RIGHT = "right"
    BOTTOM = "bottom"


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """A class: its name, and the file in an installed package."""

    name: str
    package: str  #: as it is imported
    file: str  #: below the package
    validation: Edge  #: chosen by eye: the motif stays with training, and validation still shows the class


#: In the order of their names, which `ImageFolder` numbers classes by. China and flower are licensed CC BY 2.0 (by
#: danielbuechele and vultilion, on Flickr); the others are in the public domain, CC0 or without known restrictions.
PHOTOS = (
    Photo(name="astronaut", package="skimage", file="data/astronaut.png", validation=Edge.BOTTOM),
    Photo(name="cat", package="skimage", file="data/chelsea.png", validation=Edge.LEFT),
    Photo(name="coffee", package="skimage", file="data/coffee.png", validation=Edge.LEFT),
    Photo(name="dahlia", package="sklearn", file="datasets/images/flower.jpg", validation=Edge.BOTTOM),
    Photo(name="galaxies", package="skimage", file="data/hubble_deep_field.jpg", validation=Edge.RIGHT),
    Photo(name="pagoda", package="sklearn", file="datasets/images/china.jpg", validation=Edge.BOTTOM),
    Photo(name="rocket", package="skimage", file="data/rocket.jpg", validation=Edge.LEFT),
    Photo(name="tissue", package="skimage", file="data/ihc.png", validation=Edge.RIGHT),
)
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

MAX_SIDE = 1024
MAX_COUNT = 999_999  #: of a class, which six digits number


class Box(NamedTuple):
    """Pixels of a photograph, in Pillow's order; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoSummary:
    """What was written; the counts are of all classes together."""

    class_names: tuple[str, ...]
    side: int
    train: int
    validation: int


def write_photos(
    out: Path,
    *,
    side: int = 72,
    per_class: int = 300,
    validation: int = 40,
    format: Format = Format.FOLDER,
    seed: int = 0,
) -> PhotoSummary:
    """Writes a new directory `out` with `per_class` training and `validation` validation images of each class.

    Images are side×side RGB as PNG, equal in both formats. Raises ConfigError for a number that is out of range, and
    DataError for photographs that are missing or for an `out` that exists or cannot be written; then nothing is left.
    """
    require(8 <= side <= MAX_SIDE, "side", side, f"pixels from 8 to {MAX_SIDE}")
    for field, count in (("per_class", per_class), ("validation", validation)):
        require(1 <= count <= MAX_COUNT, field, count, f"images of a class from 1 to {MAX_COUNT}")
    require(0 <= seed < 2**64, "seed", seed, "a number from 0 to 2⁶⁴ − 1")
    class_names = tuple(photo.name for photo in PHOTOS)
    with new_image_set(out, class_names, format) as add:
        images = [load(photo) for photo in PHOTOS]
        for part, (split, count) in enumerate((("train", per_class), ("val", validation))):
            add(split, _samples(images, part, count, side, seed))
    return PhotoSummary(
        class_names=class_names,
        side=side,
        train=per_class * len(PHOTOS),
        validation=validation * len(PHOTOS),
    )


def load(photo: Photo) -> Image.Image:
    """The photograph in RGB, from the installed package; nothing is downloaded. Raises DataError."""
    distribution = DISTRIBUTIONS[photo.package]
    spec = importlib.util.find_spec(photo.package)  # does not import it
    if spec is None or spec.origin is None:
        raise DataError(
            f"the photographs lie in {distribution}, which is not installed; run: pip install var-deploy[photos]"
        )
    path = Path(spec.origin).parent / photo.file
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path}: cannot be read ({reason}), expected a photograph that {distribution} brings; "
            "install it again: pip install --force-reinstall var-deploy[photos]"
        ) from error
    image.info.clear()  # a colour profile would be written into every crop
    return image


def parts(width: int, height: int, validation: Edge) -> tuple[Box, Box]:
    """A photograph in two: what training takes its crops from, and the third at an edge that validation does."""
    if validation is Edge.LEFT:
        cut = width // 3
        return Box(cut, 0, width, height), Box(0, 0, cut, height)
    if validation is Edge.RIGHT:
        cut = width - width // 3
        return Box(0, 0, cut, height), Box(cut, 0, width, height)
    cut = height - height // 3
    return Box(0, 0, width, cut), Box(0, cut, width, height)


def crop_box(part: Box, shortest: int, draws_3: Sequence[int]) -> Box:
    """A square in `part` by three random 64-bit numbers (size, left, top).

    Its side is uniform from `shortest` to the shorter side of the part, its place uniform among those that it has.
    """
    side = shortest + _below(min(part.width, part.height) - shortest + 1, draws_3[0])
    left = part.left + _below(part.width - side + 1, draws_3[1])
    top = part.top + _below(part.height - side + 1, draws_3[2])
    return Box(left, top, left + side, top + side)


def _below(count: int, draw: int) -> int:
    """A random 64-bit number → 0 … count − 1."""
    return (count * draw) >> 64


def _samples(images: Sequence[Image.Image], part: int, count: int, side: int, seed: int) -> Iterator[Sample]:
    """The crops of training (part 0) or validation (1), classes in turn, as those who read shards in order like it."""
    boxes = [parts(*image.size, photo.validation)[part] for photo, image in zip(PHOTOS, images, strict=True)]
    for index in range(count):
        for label, (image, box) in enumerate(zip(images, boxes, strict=True)):
            key, counter = np.array([seed, part], dtype=np.uint64), np.array([0, index, label, 0], dtype=np.uint64)
            # Only raw words are taken: they alone never change between numpy versions.
            draws_3 = np.random.Philox(key=key, counter=counter).random_raw(3).tolist()
            # Cut first: resize(box=…) would take in pixels around the box, which may be the other part's.
            crop = image.crop(crop_box(box, min(image.size) // 4, draws_3))
            square = crop.resize((side, side), Image.Resampling.LANCZOS)
            yield Sample(label=label, index=index, image=square)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def photos(
    out: Annotated[Path, typer.Argument(help="New directory for the data set.")],
    side: Annotated[int, typer.Option(help="Of the images; training at R pixels resizes to 1.125·R.")] = 72,
    per_class: Annotated[int, typer.Option(help="Training images of each class.")] = 300,
    validation: Annotated[int, typer.Option(help="Validation images of each class.")] = 40,
    format: Annotated[Format, typer.Option(help="A folder per class, or tar shards (WebDataset).")] = Format.FOLDER,
    seed: Annotated[int, typer.Option(help="Of sizes and places of the crops.")] = 0,
) -> None:
    """Makes a colour data set from photographs that scikit-learn and scikit-image bring along."""
    made = write_photos(out, side=side, per_class=per_class, validation=validation, format=format, seed=seed)
    typer.echo(
        f"wrote {out}: {made.train} training and {made.validation} validation images, {side}×{side}, of "
        f"{len(made.class_names)} classes ({', '.join(made.class_names)})"
    )


def main() -> None:
    """The command line; errors that a user can mend end it in one line."""
    run_command(app)


if __name__ == "__main__":
    main()
