"""Pictures and tokens that commands read from files, and pictures that they write."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import RequestError
from ..images import image_grid
from ..output_file import replacing
from ..recipe import Recipe, png_info

#: What is read: no format whose reader starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: Of a file of tokens: some hundred thousand images.
MAX_TOKEN_BYTES = 1 << 30

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_from_file(path: Path) -> Image.Image:
    """A picture file, read. Raises RequestError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, which is no matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
            image.load()
            getattr(image, "n_frames", 1)  # counted when first asked for, from the file
    except UnidentifiedImageError:
        raise RequestError(f"{path}: no picture format that is read; give PNG, JPEG or WebP") from None
    except Exception as error:  # decoders of files from anywhere raise many kinds
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read as a picture ({reason}); give another file") from error
    return image


def tokens_from_file(path: Path) -> list[Any]:
    """Arrays that the command encode wrote. Raises RequestError."""
    try:
        with zipfile.ZipFile(path) as archive:  # before NumPy, which would take other files for pickles
            if sum(member.file_size for member in archive.infolist()) > MAX_TOKEN_BYTES:
                raise ValueError(f"more than {MAX_TOKEN_BYTES / 1e6:.0f} MB")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # damaged archives and headers raise many kinds
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read as tokens ({reason}); write it with the command encode") from error
    expected = [f"scale_{k:02d}" for k in range(len(arrays))]
    if not arrays or sorted(arrays) != expected:
        found = ", ".join(sorted(arrays)[:5]) or "nothing"
        raise RequestError(f"{path}: holds {found!r}, expected scale_00, scale_01, …")
    return [arrays[name] for name in expected]


def write_pictures(out: Path, images: list[Image.Image], names: list[str], recipes: Sequence[Recipe] = ()) -> None:
    """One picture of all, or one each in a directory; a PNG says how it was made, where there are recipes."""
    if out.suffix and not out.is_dir():
        picture = images[0] if len(images) == 1 else image_grid(images)
        with replacing(out) as partial:
            picture.save(partial, **(_says(recipes) if out.suffix.lower() == ".png" else {}))
        print(out)
        return
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        path = out / f"{index:03d}{'_' if name else ''}{name}.png"
        with replacing(path) as partial:
            image.save(partial, **_says(recipes[index : index + 1]))
        print(path)


def _says(recipes: Sequence[Recipe]) -> dict[str, Any]:
    return {"pnginfo": png_info(recipes)} if recipes else {}


def check_picture(out: Path) -> None:
    """Refuses an unknown picture format before an image is computed."""
    if not out.suffix or out.is_dir():
        return
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        known = ", ".join(PICTURE_SUFFIXES)
        raise RequestError(f"{out}: unknown picture format {out.suffix!r}; use {known}, or a directory name")
