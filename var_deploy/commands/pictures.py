"""Pictures and tokens that commands read from files, and pictures that they write."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import RequestError
from ..images import image_grid
from ..output_file import replacing

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_from_file(path: Path) -> Image.Image:
    """A picture file, read. Raises RequestError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except UnidentifiedImageError:
        raise RequestError(f"{path}: no picture format that Pillow knows; give PNG, JPEG or WebP") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read as a picture ({reason}); give another file") from error
    return image


def tokens_from_file(path: Path) -> list[Any]:
    """Arrays that the command encode wrote. Raises RequestError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: cannot be read as tokens ({error}); write it with the command encode") from error
    expected = [f"scale_{k:02d}" for k in range(len(arrays))]
    if sorted(arrays) != expected:
        raise RequestError(f"{path}: holds {', '.join(arrays) or 'nothing'}, expected scale_00, scale_01, …")
    return [arrays[name] for name in expected]


def write_pictures(
    out: Path,
    images: list[Image.Image],
    names: list[str],
    together: dict[str, Any],
    apart: list[dict[str, Any]] | None = None,
) -> None:
    """together, apart: what the PNG of all, or of each, is saved with."""
    if out.suffix and not out.is_dir():
        picture = images[0] if len(images) == 1 else image_grid(images)
        with replacing(out) as partial:
            picture.save(partial, **(together if out.suffix.lower() == ".png" else {}))
        print(out)
        return
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        path = out / f"{index:03d}{'_' if name else ''}{name}.png"
        with replacing(path) as partial:
            image.save(partial, **(apart[index] if apart else {}))
        print(path)


def check_picture(out: Path) -> None:
    """Refuses an unknown picture format before an image is computed."""
    if not out.suffix or out.is_dir():
        return
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        known = ", ".join(PICTURE_SUFFIXES)
        raise RequestError(f"{out}: unknown picture format {out.suffix!r}; use {known}, or a directory name")
