"""Where training images come from: a folder per class, or tar shards in WebDataset's layout → encoded images by number.

Only names and classes are read at the start. Axes: N images of the data set.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from var_deploy.errors import DataError

log = logging.getLogger("var_train")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLITS = ("train", "val", "test")


class ImageFiles(Protocol):
    """Encoded images by number, with a label each. Sent to workers, so it can be pickled."""

    class_names: tuple[str, ...]
    labels_N: np.ndarray  #: int64

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image comes from, for people."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""
        ...


def open_images(root: Path, *, split: str = "train") -> ImageFiles:
    """Tar shards where the folder holds some, else a folder per class. Raises DataError."""
    kind = TarShards if _shards_in(_split_folder(root, split)) else ImageFolder
    return kind(root, split=split)


def splits_in(root: Path) -> tuple[str, ...]:
    """The splits that a folder is divided into, as ImageNet is; () where it holds the images of one split itself."""
    folders = _sub_folders(root)
    return tuple(folders) if "train" in folders and set(folders) <= set(SPLITS) else ()


class ImageFolder:
    """A sub-folder per class, whose images may lie deeper; classes and images in the order of their names.

    Hidden files are left out, and links to folders are not followed below a class.
    Where `root` is divided into splits, `train` says which classes there are, and every split has to have the same.
    """

    def __init__(self, root: Path, *, split: str = "train") -> None:
        self._root = _split_folder(root, split)
        self.class_names = tuple(_sub_folders(self._root))
        if not self.class_names:
            raise DataError(f"{self._root}: got no sub-folders, expected one per class with its images; sort them so")
        if self._root != root:
            different = sorted(set(self.class_names) ^ set(_sub_folders(root / "train")))
            if different:
                raise DataError(
                    f"{self._root}: got {len(different)} classes that only it or only train has, the first is "
                    f"{different[0]!r}, expected the same in both; add or remove these folders"
                )
        files: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            before = len(files)
            files += (os.fsencode(path) for path in _images_below(self._root, name))
            if len(files) == before:
                known = " ".join(SUFFIXES)
                raise DataError(
                    f"{self._root / name}: got no images ({known}), expected some; fill or remove the folder"
                )
            labels += [label] * (len(files) - before)
        # One array, not a list of strings: workers that are forks would copy a list's pages by counting references.
        self._files_N = np.array(files, dtype=np.bytes_)
        self.labels_N = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        return str(self._path(index))

    def read(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._files_N[index])


class TarShards:
    """Tar files with KEY.jpg (or another image type) and KEY.cls, the class id in digits, as WebDataset stores them.

    The headers are read once, so that every image can be reached directly. `classes.txt` in `root`, one class name per
    line, is optional; without it the class ids are the names.
    """

    def __init__(self, root: Path, *, split: str = "train") -> None:
        folder = _split_folder(root, split)
        self._shards = _shards_in(folder)
        if not self._shards:
            raise DataError(f"{folder}: got no .tar shards, expected at least one; give the folder that holds them")
        keys: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        for number, shard in enumerate(self._shards):
            for entry in _entries_of(shard):
                keys.append(os.fsencode(entry.key))
                places.append((number, entry.offset, entry.size))
                labels.append(entry.label)
        if not keys:
            raise DataError(
                f"{folder}: got no images in {len(self._shards)} shards, expected pairs like 0001.jpg and 0001.cls; "
                "fill them or give another folder"
            )
        self._keys_N = np.array(keys, dtype=np.bytes_)
        self._places_N3 = np.array(places, dtype=np.int64)  # shard, offset, size
        self.labels_N = np.array(labels, dtype=np.int64)
        self.class_names = _class_names(root / "classes.txt", int(self.labels_N.max()) + 1)

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        return f"{self._shards[self._places_N3[index, 0]]}:{os.fsdecode(self._keys_N[index])}"

    def read(self, index: int) -> bytes:
        number, offset, size = self._places_N3[index].tolist()
        with self._shards[number].open("rb") as shard:
            shard.seek(offset)
            return shard.read(size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarEntry:
    """An image of a shard: its bytes are `size` from `offset` on."""

    key: str
    offset: int
    size: int
    label: int


def split_key(name: str) -> tuple[str, str]:
    """A tar member's name → (key, suffix): as in WebDataset, the suffix begins at the first dot of the last part.

    `a.b/0001.seg.PNG` → (`a.b/0001`, `.seg.png`).
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _entries_of(shard: Path) -> list[TarEntry]:
    """Every image of a shard, in the shard's order. Raises DataError."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise DataError(f"{shard}: compressed, so its images cannot be reached directly; unpack it with gunzip")
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    key, suffix = split_key(member.name)
                    if not member.isfile() or key.rpartition("/")[2] == "":  # a hidden file is no sample
                        continue
                    if suffix in SUFFIXES:
                        if key in places:
                            raise DataError(f"{shard}: got two images for the key {key}, expected one; rename one")
                        places[key] = member.offset_data, member.size
                    elif suffix == ".cls":
                        stream.seek(member.offset_data)
                        labels[key] = _class_id(stream.read(min(member.size, 32)), f"{shard}:{member.name}")
                # tarfile takes a header that is cut off or damaged for the end, which is a block of zeros.
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise DataError(f"{shard}: cut off or damaged at byte {archive.offset}; make or fetch it again")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shard}: not a readable tar file ({error}); make or fetch it again") from error
    unlabelled = [key for key in places if key not in labels]
    if unlabelled:
        raise DataError(
            f"{shard}: {len(unlabelled)} images have no class, the first is {unlabelled[0]}; add its .cls file"
        )
    if len(labels) > len(places):
        log.warning("%s: %d .cls files have no image beside them and are left out", shard, len(labels) - len(places))
    return [TarEntry(key=key, offset=offset, size=size, label=labels[key]) for key, (offset, size) in places.items()]


def _class_id(content: bytes, place: str) -> int:
    text = content.decode("ascii", "replace").strip()
    if not re.fullmatch("[0-9]{1,6}", text):
        raise DataError(f"{place}: got class {text!r}, expected a number from 0 to 999999; write it so")
    return int(text)


def _class_names(listed: Path, count: int) -> tuple[str, ...]:
    """The lines of a file, where there is one, else the class ids."""
    if not listed.is_file():
        return tuple(str(label) for label in range(count))
    try:
        lines = listed.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed}: cannot read class names ({error}); write them as UTF-8 text") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < count:
        raise DataError(f"{listed}: got {len(names)} class names, expected at least {count}; give one per class")
    return names


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one with a sub-folder of images per class, or with .tar shards")
    splits = splits_in(root)
    if split != "train" and split not in splits:
        raise DataError(f"{root}: got no split {split!r}, expected a folder of this name beside train; add it")
    return root / split if splits else root


def _sub_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIXES) and path.is_file())


def _images_below(root: Path, folder: str) -> Iterator[str]:
    """Paths of images relative to `root`, deeper folders included, in the order of their names."""
    with os.scandir(root / folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _images_below(root, path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield path
