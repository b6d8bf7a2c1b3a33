"""All PNG files of a directory of samples → one .npz, as the public evaluators read it.

guided-diffusion's layout: `arr_0` uint8 [N, H, W, 3], stored and not compressed, and `arr_1` int64 [N], the classes. It
is written image by image, as 50,000 of 256 px have 10 GB. Axes: N images, H and W pixels.
"""

from __future__ import annotations

import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import RequestError
from ..locks import waiting
from ..output_file import replacing
from .folder import ARCHIVE, SampleFolder

_READERS = 4


def write_npz(folder: SampleFolder) -> Path:
    """DIR/samples.npz, replaced by one step. Raises RequestError where samples are missing, or one cannot be read."""
    plan, path = folder.plan, folder.path / ARCHIVE
    if missing := folder.missing(range(plan.count)):
        raise RequestError(
            f"{folder.path}: {len(missing):,} of {plan.count:,} samples are missing, so no {ARCHIVE}; sample them first"
        )
    shape = (plan.count, plan.image_size, plan.image_size, 3)
    # Members of a fixed date, so that the same samples give the same file.
    with (
        waiting(folder.path / ".npz.lock"),  # shards may end together
        replacing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image_HW3 in _images(folder):
                file.write(image_HW3.data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, plan.labels(range(plan.count)), version=(1, 0), allow_pickle=False)
    return path


def _images(folder: SampleFolder) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] in order, the next few read meanwhile."""
    with ThreadPoolExecutor(_READERS) as pool:
        reading: deque[Future[np.ndarray]] = deque()
        for index in range(folder.plan.count):
            reading.append(pool.submit(_pixels, folder.file(index), folder.plan.image_size))
            if len(reading) > 2 * _READERS:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def _pixels(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB" or image.size != (size, size):
                raise ValueError(f"{image.width}×{image.height} {image.mode}, not {size}×{size} RGB")
            return np.ascontiguousarray(image)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise RequestError(
            f"{path}: not the sample that was written ({error}); remove it, then sample again"
        ) from error
