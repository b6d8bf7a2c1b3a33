"""Pixels [B, 3, R, R] in [0, 1] ↔ pictures, grids and animations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import RequestError


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
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def fitted(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """The middle square of a picture, resized.

    Training enlarges a picture by an eighth before it cuts, which would take the border away: an edit keeps all.
    """
    return ImageOps.fit(image, (size, size), resampling)


def one_frame(image: Image.Image, what: str) -> Image.Image:
    """The picture upright, as its EXIF tag says. Raises RequestError for an animation."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise RequestError(f"{what}: an animation of {frames} frames, expected a still picture; save one of them")
    return ImageOps.exif_transpose(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright: 16-bit grey keeps its high byte, what is transparent lies on white. Raises RequestError."""
    image = one_frame(image, "images")
    if image.mode == "F":
        raise RequestError("images: a picture of floats, expected 8 or 16 bits; give an array in [0, 1]")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


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
