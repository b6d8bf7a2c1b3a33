"""Pixels [B, 3, R, R] in [0, 1] ↔ pictures, grids and animations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps

from .errors import RequestError

#: What turns a picture upright, by its EXIF orientation.
_UPRIGHT = {
    value: partial(Image.Image.transpose, method=method)
    for value, method in {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.items()
}


def images_from_pixels(pixels_B3RR: np.ndarray) -> list[Image.Image]:
    """One 8-bit RGB image per row, rounded to nearest."""
    bytes_BRR3 = np.rint(pixels_B3RR.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image) for image in bytes_BRR3]


def pixels_from_images(images: Sequence[Image.Image] | np.ndarray, size: int) -> np.ndarray:
    """float32 [B, 3, size, size] in [0, 1]: pictures scaled and centre-cropped to a square, arrays checked."""
    if not isinstance(images, Sequence | Image.Image):  # an array of any library
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not len(images):
            raise RequestError(f"images: array of shape {images.shape}, expected (B, 3, {size}, {size}) with B ≥ 1")
        if not np.issubdtype(images.dtype, np.number):
            raise RequestError(f"images: array of {images.dtype}, expected numbers in [0, 1]")
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise RequestError("images: array values outside [0, 1]; scale 8-bit values by 1/255")
        return images.astype(np.float32)
    if isinstance(images, Image.Image) or not all(isinstance(image, Image.Image) for image in images):
        raise RequestError("images: expected a list of PIL images or one array")
    if not images:
        raise RequestError("images: got none, expected at least one")
    squares = [fitted(upright_rgb(image), size, Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 for image in squares])


def picture_sizes(images: Sequence[Image.Image] | np.ndarray) -> list[tuple[int, int]] | None:
    """(width, height) of pictures as they are seen, upright; None of an array."""
    if not isinstance(images, Sequence):
        return None
    return [_upright_size(image) for image in images if isinstance(image, Image.Image)]


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size


def _orientation(image: Image.Image) -> int:
    """As the EXIF tag says; 1, which is upright, where that cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata from anywhere, whose reader raises many kinds
        return 1


def fitted(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """The middle square of a picture, resized.

    Training enlarges a picture by an eighth before it cuts, which would take the border away: an edit keeps all.
    """
    return ImageOps.fit(image, (size, size), resampling)


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright: 16-bit grey keeps its high byte, what is transparent lies on white. Raises RequestError."""
    image = _eight_bits(image, "images")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def upright_mask(image: Image.Image) -> Image.Image:
    """8-bit grey, upright: 16-bit grey keeps its high byte, what is transparent is not set. Raises RequestError."""
    image = _eight_bits(image, "mask")
    if not image.has_transparency_data:
        return image.convert("L")
    *_, alpha = image.convert("RGBA").split()
    return ImageChops.multiply(image.convert("RGBA").convert("L"), alpha)


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """One still picture, upright as its EXIF tag says, of 8 bits a channel. Raises RequestError."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with another beside it, as telephones make them
        kind = "a file of {} pages" if image.format == "TIFF" else "an animation of {} frames"
        raise RequestError(f"{what}: {kind.format(frames)}, expected a still picture; save one of them")
    if image.mode == "F":
        raise RequestError(f"{what}: a picture of floats, expected 8 or 16 bits; give an array in [0, 1]")
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image if turn is None else turn(image)


def image_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """One picture of many, row by row; as square as it gets unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def save_animation(frames: Sequence[Image.Image], path: str | Path, *, milliseconds: int = 400) -> None:
    """Looping GIF of the frames, the last one held three times as long."""
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
