"""A folder of PNG files, or an .npz as guided-diffusion's evaluator reads it → batches of 8-bit images, in order.

Nothing is held but a batch or two: such an .npz has ten gigabytes. Axes: N images, B images of a batch, H and W pixels.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..bundle import sha256_of
from ..errors import RequestError, printable
from ..recipe import KEY as RECIPE
from ..recipe import recipes_from_text

#: Files of formats that lose something; an evaluation of them measures the format, too.
LOSSY = (".jpg", ".jpeg", ".webp", ".gif")
IMAGES, LABELS = "arr_0", "arr_1"
#: Names of guided-diffusion's statistics: of pooled and of spatial features.
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class PngFolder:
    """PNG files of one size in a folder and those below it, in the order of their paths."""

    path: Path
    files: tuple[Path, ...]
    size: tuple[int, int]  #: height, width
    classes: tuple[int, ...] | None  #: of every image, where each says how it was made

    @property
    def count(self) -> int:
        return len(self.files)

    @property
    def form(self) -> str:
        return "PNG"

    def labels(self) -> np.ndarray | None:
        """A class per image, where the files say so."""
        return None if self.classes is None else np.array(self.classes)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3]; files of the next batch are read while one is in use. Raises RequestError."""
        with ThreadPoolExecutor() as pool:
            coming: list[Future[np.ndarray]] = []
            for start in range(0, self.count, size):
                reading, coming = coming, [pool.submit(_read, file) for file in self.files[start : start + size]]
                if reading:
                    yield np.stack([future.result() for future in reading])
            yield np.stack([future.result() for future in coming])

    def digest(self) -> str:
        """Of the files' content, in order."""
        return hashlib.sha256("".join(sha256_of(file) for file in self.files).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class NpzImages:
    """The images `arr_0` of an .npz, and whatever classes it states."""

    path: Path
    shape: tuple[int, int, int, int]  #: [N, H, W, 3]

    @property
    def count(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    @property
    def form(self) -> str:
        return "npz"

    def labels(self) -> np.ndarray | None:
        """`arr_1`, a class per image, where there is one. Raises RequestError."""
        labels_N = npz_array(self.path, LABELS)
        if labels_N is None:
            return None
        if labels_N.shape != (self.count,) or not np.issubdtype(labels_N.dtype, np.integer):
            raise RequestError(
                f"{self.path}: {LABELS} is {labels_N.dtype} {labels_N.shape}, expected a whole number for each of the "
                f"{self.count} images; leave it out or write it again"
            )
        return labels_N

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3], read from the file one after the other. Raises RequestError."""
        with _reporting(self.path), _member(self.path, IMAGES) as file:
            _header(file)
            for start in range(0, self.count, size):
                shape = (min(size, self.count - start), *self.shape[1:])
                data = file.read(wanted := int(np.prod(shape)))
                if len(data) != wanted:
                    raise EOFError(f"{IMAGES} ends after image {start + len(data) // int(np.prod(shape[1:]))}")
                yield np.frombuffer(data, dtype=np.uint8).reshape(shape)

    def digest(self) -> str:
        """Of the whole file."""
        return sha256_of(self.path)


ImageSet = PngFolder | NpzImages


def open_images(path: Path) -> ImageSet:
    """The images of a folder or an .npz, their form and sizes checked but not their pixels. Raises RequestError."""
    if path.is_dir():
        return _open_folder(path)
    shape = _images_shape(path)
    if shape is None:
        raise RequestError(f"{path}: holds no {IMAGES}; give a folder of PNG files or an .npz with uint8 [N, H, W, 3]")
    return NpzImages(path=path, shape=shape)


def open_reference(path: Path) -> tuple[ImageSet | None, dict[str, np.ndarray]]:
    """(images, statistics by guided-diffusion's names): an .npz may hold either or both. Raises RequestError."""
    if path.is_dir():
        return _open_folder(path), {}
    shape = _images_shape(path)
    arrays = {name: npz_array(path, name) for name in STATISTICS}
    statistics = {name: array for name, array in arrays.items() if array is not None}
    if shape is None and not statistics:
        raise RequestError(
            f"{path}: holds neither {IMAGES} nor statistics {', '.join(STATISTICS)}; give such a reference"
        )
    return None if shape is None else NpzImages(path=path, shape=shape), statistics


def npz_array(path: Path, name: str) -> np.ndarray | None:
    """One array of an .npz, None where it has none of that name. Raises RequestError; executes nothing."""
    with _reporting(path):
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
        _require_data(path, name)
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])


def _require_data(path: Path, name: str) -> None:
    """Refuses a header that claims more than the file holds, before memory is taken for it. Raises ValueError."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, _, dtype = _header(file)
        held = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if not dtype.hasobject and (claimed := math.prod(shape) * dtype.itemsize) != held:  # objects NumPy refuses
        raise ValueError(f"{name} is to have {claimed:,} bytes and has {held:,}")


def _open_folder(path: Path) -> PngFolder:
    found = sorted(file for file in path.rglob("*") if not file.name.startswith("."))  # those are not finished
    for file in found:
        if file.suffix.lower() in LOSSY:
            raise RequestError(
                f"{file}: {file.suffix} loses part of an image, which changes every number; save the images as PNG"
            )
    files = tuple(file for file in found if file.suffix.lower() == ".png")
    if not files:
        raise RequestError(f"{path}: no PNG files; give the folder that sampling wrote, or an .npz")
    size, label = _png_header(files[0])
    classes: list[int | None] = [label]
    for file in files[1:]:
        other, label = _png_header(file)
        classes.append(label)
        if other != size:
            raise RequestError(
                f"{file}: {_text(other)} pixels, expected {_text(size)} as {files[0].name}; "
                "evaluate images of one size at a time"
            )
    known = tuple(label for label in classes if label is not None)
    return PngFolder(path=path, files=files, size=size, classes=known if len(known) == len(files) else None)


def _png_header(file: Path) -> tuple[tuple[int, int], int | None]:
    """(height and width, class if the file says it), without the pixels."""
    with _reporting(file), Image.open(file, formats=["PNG"]) as image:
        bits = _bits_per_channel(file)
        if image.mode not in ("RGB", "L") or bits != 8:
            raise RequestError(
                f"{file}: a PNG of mode {image.mode}, {bits} bits, expected 8-bit RGB or grey; save it as that"
            )
        if getattr(image, "n_frames", 1) > 1:
            raise RequestError(f"{file}: an animation, expected one image; save its frames one by one")
        return (image.height, image.width), _class_of(image.info.get(RECIPE))


def _bits_per_channel(file: Path) -> int:
    """Of a PNG, by its header (W3C PNG specification, section 11.2.1): Pillow reads 16-bit colours as 8-bit ones."""
    with file.open("rb") as stream:
        return stream.read(25)[-1]


def _class_of(text: object) -> int | None:
    """From the recipe that a picture of ours carries, taken as it is: what does not read is not known."""
    try:
        return recipes_from_text(str(text))[0].label
    except ValueError:
        return None


def _read(file: Path) -> np.ndarray:
    with _reporting(file), Image.open(file, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def _images_shape(path: Path) -> tuple[int, int, int, int] | None:
    """Of `arr_0`, None where there is none."""
    with _reporting(path):
        with zipfile.ZipFile(path) as archive:
            if f"{IMAGES}.npy" not in archive.namelist():
                return None
        _require_data(path, IMAGES)
        with _member(path, IMAGES) as file:
            shape, in_fortran_order, dtype = _header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or in_fortran_order:
        order = " in Fortran order" if in_fortran_order else ""
        raise RequestError(
            f"{path}: {IMAGES} is {dtype} {shape}{order}, expected uint8 [N, H, W, 3] with values 0…255; "
            "round the images to 8 bits and write them again"
        )
    return shape


def _header(file: IO[bytes]) -> tuple[Any, bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"an array of format {version}")
    return read[version](file)


@contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        yield file


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """What cannot be read is one line."""
    try:
        yield
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file or folder; check the path") from None
    except RequestError:
        raise
    except Exception as error:  # readers of files from anywhere raise many kinds
        why = getattr(error, "strerror", None) or printable(str(error) or type(error).__name__)
        raise RequestError(f"{path}: cannot be read ({why}); make or copy it again") from error


def _text(size: tuple[int, int]) -> str:
    """As people write it: width×height."""
    return f"{size[1]}×{size[0]}"
