"""Images → a data set that `image_files` reads: a folder per class, or tar shards in WebDataset's layout, whole or not.

Files are PNG, the same bytes in both layouts, and repeat from one run to the next.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

from PIL import Image

from var_deploy.errors import DataError
from var_deploy.staging import put_in_place, require_absent, staging_directory

SHARD_SIZE = 1000  #: images


class Format(StrEnum):
    """Files per class, or tar shards in WebDataset's layout; `image_files` reads both."""

    FOLDER = "folder"
    SHARDS = "shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image of a data set."""

    label: int
    index: int  #: within its class
    image: Image.Image  #: RGB


#: Writes the samples of a split, "train" or "val".
AddSplit = Callable[[str, Iterable[Sample]], None]


@contextmanager
def new_image_set(out: Path, class_names: Sequence[str], format: Format) -> Iterator[AddSplit]:
    """A function that adds splits to a new directory, which is there once the block succeeds. Raises DataError.

    Labels count the class names; a folder per class keeps their order only if it is that of the alphabet.
    """
    assert format is Format.SHARDS or list(class_names) == sorted(class_names)
    with _new_directory(out) as staging:

        def add(split: str, samples: Iterable[Sample]) -> None:
            if format is Format.FOLDER:
                _write_folder(staging / split, class_names, samples)
            else:
                _write_shards(staging / split, class_names, iter(samples))

        yield add
        if format is Format.SHARDS:
            (staging / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def _write_folder(folder: Path, class_names: Sequence[str], samples: Iterable[Sample]) -> None:
    for name in class_names:
        (folder / name).mkdir(parents=True)
    for sample in samples:
        (folder / class_names[sample.label] / f"{sample.index:06d}.png").write_bytes(_png(sample.image))


def _write_shards(folder: Path, class_names: Sequence[str], samples: Iterator[Sample]) -> None:
    folder.mkdir()
    number = 0
    while shard := list(islice(samples, SHARD_SIZE)):
        with tarfile.open(folder / f"shard_{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for sample in shard:
                key = f"{class_names[sample.label]}_{sample.index:06d}"
                for suffix, content in ((".png", _png(sample.image)), (".cls", str(sample.label).encode())):
                    member = tarfile.TarInfo(key + suffix)  # with no time and no owner, so that bytes repeat
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        number += 1


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` if the block succeeds and vanishes if it does not."""
    require_absent(out, DataError)
    try:
        with staging_directory(out) as staging:
            yield staging
            put_in_place(staging, out, DataError)
    except OSError as error:
        raise DataError(
            f"{out}: cannot write ({error.strerror or error}); free space or choose another place"
        ) from error
