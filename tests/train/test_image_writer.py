"""A new data set is as `image_files` reads it, the same bytes every time, and whole or not there at all."""

from __future__ import annotations

import errno
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import DataError
from var_train import image_writer
from var_train.image_data import decode
from var_train.image_files import ImageFolder, TarShards, open_images
from var_train.image_writer import Format, Sample, new_image_set

NAMES = ("apple", "pear", "quince")


def samples(count: int, *, first: int = 0) -> Iterator[Sample]:
    """`count` images of every class, 7×5 pixels of noise that the label and the number decide."""
    for label in range(len(NAMES)):
        for index in range(count):
            random = np.random.default_rng((label, first + index))
            pixels_573 = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            yield Sample(label=label, index=index, image=Image.fromarray(pixels_573))


def written(out: Path, format: Format, *, train: int = 4, val: int = 2) -> Path:
    with new_image_set(out, NAMES, format) as add:
        add("train", samples(train))
        add("val", samples(val, first=100))
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("format", "kind"), [(Format.FOLDER, ImageFolder), (Format.SHARDS, TarShards)])
def test_what_is_read_is_what_was_written(tmp_path, format, kind):
    out = written(tmp_path / "deeper" / "out", format)
    for split, count, first in (("train", 4, 0), ("val", 2, 100)):
        images = open_images(out, split=split)
        assert type(images) is kind
        assert images.class_names == NAMES
        wanted = list(samples(count, first=first))
        assert images.labels_N.tolist() == [sample.label for sample in wanted]
        for index, sample in enumerate(wanted):
            assert np.array_equal(np.asarray(decode(images.read(index))), np.asarray(sample.image))
    assert oct(out.stat().st_mode & 0o777) == "0o755"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_per_class(tmp_path):
    found = contents(written(tmp_path / "out", Format.FOLDER, train=2, val=1))
    expected = {f"train/{name}/00000{index}.png" for name in NAMES for index in (0, 1)}
    assert set(found) == expected | {f"val/{name}/000000.png" for name in NAMES}


def test_shards_are_full_but_for_the_last_and_name_the_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_writer, "SHARD_SIZE", 5)
    found = contents(written(tmp_path / "out", Format.SHARDS, train=4, val=1))
    assert set(found) == {"classes.txt", *(f"train/shard_0000{i}.tar" for i in range(3)), "val/shard_00000.tar"}
    assert found["classes.txt"].decode().splitlines() == list(NAMES)
    members = [
        tarfile.open(fileobj=io.BytesIO(found[f"train/shard_0000{i}.tar"])).getnames()  # noqa: SIM115
        for i in range(3)
    ]
    assert [len(names) for names in members] == [10, 10, 4]  # an image and its class each
    assert members[0][:2] == ["apple_000000.png", "apple_000000.cls"]
    assert len({name for names in members for name in names}) == 24


@pytest.mark.parametrize("format", Format)
def test_bytes_repeat(tmp_path, format):
    assert contents(written(tmp_path / "a", format)) == contents(written(tmp_path / "b", format))


def test_both_formats_hold_the_same_files(tmp_path):
    folder, shards = (open_images(written(tmp_path / format, format)) for format in Format)
    assert [folder.read(index) for index in range(12)] == [shards.read(index) for index in range(12)]


def test_names_that_a_folder_would_put_in_another_order_are_for_shards_alone(tmp_path):
    names = ("one", "two", "three")
    with pytest.raises(AssertionError), new_image_set(tmp_path / "out", names, Format.FOLDER):
        pass
    with new_image_set(tmp_path / "out", names, Format.SHARDS) as add:
        add("train", samples(1))
    assert open_images(tmp_path / "out").class_names == names


@pytest.mark.parametrize(
    "occupy", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")], ids=["directory", "file", "dead link"]
)
def test_nothing_is_overwritten(tmp_path, occupy: Callable[[Path], None]):
    occupy(tmp_path / "out")
    with pytest.raises(DataError, match=r"out: exists already; nothing is overwritten, choose another name or remove"):
        written(tmp_path / "out", Format.FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_puts_in_place_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(DataError, match="out: exists already"), new_image_set(tmp_path / "out", NAMES, Format.FOLDER):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/out: cannot write \((File exists|Not a directory)\); free space or"):
        written(tmp_path / "file" / "out", Format.FOLDER)


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(143), SystemExit),
    ],
    ids=["disk full", "Ctrl-C", "SIGTERM"],
)
def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch, format, raised, expected):
    encode, calls = image_writer._png, 0

    def fails_later(image: Image.Image) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 14:  # in the second split
            raise raised
        return encode(image)

    monkeypatch.setattr(image_writer, "_png", fails_later)
    with pytest.raises(expected) as error:
        written(tmp_path / "new" / "out", format)
    if expected is DataError:
        assert str(error.value).endswith(
            "out: cannot write (No space left on device); free space or choose another place"
        )
    assert calls == 14
    assert list(tmp_path.iterdir()) == []
