"""Folders and tar shards as lists of labelled images; what is wrong with them is one clear line."""

from __future__ import annotations

import gzip
import io
import logging
import pickle
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.errors import DataError
from var_train.image_files import ImageFolder, TarShards, open_images, split_key, splits_in

#: WebDataset's own rule for a member's name (webdataset/tariterators.py, base_plus_ext).
WEBDATASET_RULE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

Members = Sequence[tuple[str, bytes]]


def write_files(root: Path, *names: str) -> None:
    """Files that hold their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def tar_bytes(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, format))


def test_a_folder_per_class_in_the_order_of_names(tmp_path):
    write_files(tmp_path, "dog/b.PNG", "dog/a.jpeg", "cat/deep/er/1.webp", "cat/0.jpg", "äpfel/ü.bmp")
    write_files(tmp_path, "dog/notes.txt", "dog/._a.jpeg", ".cache/x.jpg", "dog/.hidden/x.jpg", "readme.md")
    images = ImageFolder(tmp_path)
    assert images.class_names == ("cat", "dog", "äpfel")
    assert images.labels_N.tolist() == [0, 0, 1, 1, 2]
    assert images.labels_N.dtype == np.int64
    expected = ["cat/0.jpg", "cat/deep/er/1.webp", "dog/a.jpeg", "dog/b.PNG", "äpfel/ü.bmp"]
    assert [images.read(index).decode() for index in range(len(images))] == expected
    assert images.name(4) == str(tmp_path / "äpfel/ü.bmp")


def test_imagenet_s_layout_is_taken_as_it_is(tmp_path):
    write_files(tmp_path, "train/n01/0.JPEG", "train/n02/1.JPEG", "val/n02/3.JPEG", "val/n01/2.JPEG")
    assert splits_in(tmp_path) == ("train", "val")
    assert [open_images(tmp_path).read(index) for index in (0, 1)] == [b"train/n01/0.JPEG", b"train/n02/1.JPEG"]
    val = open_images(tmp_path, split="val")
    assert [val.read(index) for index in (0, 1)] == [b"val/n01/2.JPEG", b"val/n02/3.JPEG"]
    assert val.class_names == ("n01", "n02")


def test_a_class_may_be_called_train(tmp_path):
    write_files(tmp_path, "bus/0.jpg", "train/1.jpg")
    assert splits_in(tmp_path) == ()
    assert open_images(tmp_path).class_names == ("bus", "train")


def test_shards_give_the_bytes_of_their_images_and_the_classes_beside_them(tmp_path):
    write_tar(tmp_path / "b-000001.tar", [("k.jpg", b"four"), ("k.cls", b"2\n")])
    write_tar(
        tmp_path / "b-000000.tar",
        [
            ("x/00.1.cls", b"7"),
            ("x.y/00.cls", b"1"),
            ("x.y/00.PNG", b"two"),
            ("a.jpeg", b"one"),
            ("a.json", b"{}"),
            ("a.seg.png", b"mask"),
            ("a.cls", b" 0 "),
            ("x.y/0.webp", b"three" * 1000),
            ("x.y/0.cls", b"2"),
        ],
    )
    images = open_images(tmp_path)
    assert [images.read(index) for index in range(4)] == [b"two", b"one", b"three" * 1000, b"four"]
    assert images.labels_N.tolist() == [1, 0, 2, 2]
    assert images.class_names == ("0", "1", "2")
    assert images.name(0) == f"{tmp_path / 'b-000000.tar'}:x.y/00"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names(tmp_path, format):
    key = "/".join(["folder" * 5] * 3) + "/" + "ü" * (20 if format == tarfile.USTAR_FORMAT else 150)
    write_tar(tmp_path / "0.tar", [(f"{key}.jpg", b"image"), (f"{key}.cls", b"0")], format)
    images = TarShards(tmp_path)
    assert images.read(0) == b"image"
    assert images.name(0).endswith(key)


def test_folders_links_and_hidden_files_in_a_shard_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, type in (("d.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("d/.jpg", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type = type
            archive.addfile(member)
        for name, data in (("d/1.jpg", b"image"), ("d/1.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    images = TarShards(tmp_path)
    assert [images.read(index) for index in range(len(images))] == [b"image"]


def test_shards_lie_in_splits_too_and_have_one_list_of_names(tmp_path):
    for split, label in (("train", b"1"), ("val", b"0")):
        write_tar(tmp_path / split / "0.tar", [("0.jpg", split.encode()), ("0.cls", label)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    for split in ("train", "val"):
        images = open_images(tmp_path, split=split)
        assert images.read(0) == split.encode()
        assert images.class_names == ("cat", "dog")


def test_a_class_file_without_an_image_is_left_out_and_said(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("0.jpg", b""), ("0.cls", b"0"), ("1.cls", b"0")])
    with caplog.at_level(logging.WARNING, "var_train"):
        assert len(TarShards(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path / '0.tar'}: 1 .cls files have no image beside them and are left out"]


def test_lists_travel_to_other_processes(tmp_path):
    write_files(tmp_path / "folder", "a/0.jpg", "b/1.jpg")
    write_tar(tmp_path / "shards" / "0.tar", [("0.jpg", b"image"), ("0.cls", b"0")])
    for root in (tmp_path / "folder", tmp_path / "shards"):
        images = open_images(root)
        copy = pickle.loads(pickle.dumps(images))
        assert [copy.read(index) for index in range(len(copy))] == [images.read(index) for index in range(len(images))]


GOOD = [("0.jpg", b"image"), ("0.cls", b"0")]


def cut_tar(path: Path, end: int) -> None:
    path.write_bytes(tar_bytes([*GOOD, ("1.jpg", b"image"), ("1.cls", b"1")])[:end])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"data: no such folder; give one"),
        (lambda root: root.mkdir(), r"data: got no sub-folders, expected one per class with its images; sort them so"),
        (lambda root: write_files(root, "0.jpg"), r"data: got no sub-folders"),
        (
            lambda root: write_files(root, "a/0.jpg", "b/0.txt"),
            r"data/b: got no images \(\.jpg .*\), expected some; fill",
        ),
        (lambda root: write_files(root, "train/0.jpg", "val/0.jpg"), r"data/train: got no sub-folders"),
        (lambda root: (root / "train").mkdir(parents=True), r"data/train: got no sub-folders"),
        (lambda root: write_tar(root / "0.tar", []), r"data: got no images in 1 shards, expected pairs like 0001\.jpg"),
        (lambda root: write_tar(root / "0.tar", [("a.txt", b"")]), r"data: got no images in 1 shards"),
        (
            lambda root: write_tar(root / "0.tar", [*GOOD, ("x.y/1.jpg", b"")]),
            r"data/0\.tar: 1 images have no class, the first is x\.y/1; add its \.cls file",
        ),
        (
            lambda root: write_tar(root / "0.tar", [*GOOD, ("0.png", b"")]),
            r"data/0\.tar: got two images for the key 0, expected one; rename one",
        ),
        (
            lambda root: write_tar(root / "0.tar", [("0.jpg", b""), ("0.cls", b"cat")]),
            r"data/0\.tar:0\.cls: got class 'cat', expected a number from 0 to 999999; write it so",
        ),
        (lambda root: write_tar(root / "0.tar", [("0.jpg", b""), ("0.cls", b"-1")]), r"0\.cls: got class '-1'"),
        (lambda root: write_tar(root / "0.tar", [("0.jpg", b""), ("0.cls", b"\xff")]), r"0\.cls: got class '\ufffd'"),
        (
            lambda root: write_files(root, "0.tar"),
            r"data/0\.tar: not a readable tar file \(.+\); make or fetch it again",
        ),
        (
            lambda root: [root.mkdir(), (root / "0.tar").touch()],
            r"data/0\.tar: not a readable tar file \(empty file\); make or fetch it again",
        ),
        (lambda root: [root.mkdir(), cut_tar(root / "0.tar", 2048)], r"data/0\.tar: cut off or damaged at byte 2048"),
        (lambda root: [root.mkdir(), cut_tar(root / "0.tar", 2100)], r"data/0\.tar: cut off or damaged at byte 2048"),
        (
            lambda root: [root.mkdir(), cut_tar(root / "0.tar", 2561)],
            r"data/0\.tar: not a readable tar file \(unexpected end of data\)",
        ),
        (
            lambda root: [root.mkdir(), (root / "0.tar.gz").write_bytes(gzip.compress(tar_bytes(GOOD)))],
            r"data/0\.tar\.gz: compressed, so its images cannot be reached directly; unpack it with gunzip",
        ),
        (
            lambda root: [root.mkdir(), (root / "0.tar").write_bytes(gzip.compress(tar_bytes(GOOD)))],
            r"data/0\.tar: compressed",
        ),
        (
            lambda root: [
                write_tar(root / "0.tar", [("0.jpg", b""), ("0.cls", b"2")]),
                write_files(root, "classes.txt"),
            ],
            r"data/classes\.txt: got 1 class names, expected at least 3; give one per class",
        ),
        (
            lambda root: [write_tar(root / "0.tar", GOOD), (root / "classes.txt").write_bytes(b"\xff\n")],
            r"data/classes\.txt: cannot read class names \(.+\); write them as UTF-8 text",
        ),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, make: Callable[[Path], object], message: str):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(DataError, match=message) as error:
        open_images(root)
    assert "\n" not in str(error.value)


def test_shards_asked_for_by_name_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r": got no \.tar shards, expected at least one; give the folder"):
        TarShards(tmp_path)


def test_a_split_that_is_not_there_is_never_replaced_by_another(tmp_path):
    write_files(tmp_path, "train/a/0.jpg", "flat/a/0.jpg")
    for root in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match="got no split 'val', expected a folder of this name beside train; add it"):
            open_images(root, split="val")


def test_every_split_has_the_classes_of_train(tmp_path):
    write_files(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg")
    with pytest.raises(
        DataError, match="val: got 1 classes that only it or only train has, the first is 'b', expected"
    ):
        open_images(tmp_path, split="val")


@given(st.text(st.sampled_from("ab./Ü"), max_size=12))
def test_keys_are_split_as_webdataset_does(name):
    key, suffix = split_key(name)
    assert (key + suffix).lower() == name.lower()
    match = WEBDATASET_RULE.match(name)
    hidden = key == "" or key.endswith("/")  # no sample of ours
    if match and not hidden and suffix:
        assert (key, suffix) == (match[1], "." + match[2].lower())
    assert bool(match) or hidden or not suffix


@given(st.data())
def test_a_damaged_shard_is_read_or_refused(tmp_path_factory, data):
    """Whatever bytes a shard holds: labelled images, or one line."""
    content = bytearray(tar_bytes([*GOOD, ("1.jpg", b"image"), ("1.cls", b"1")], data.draw(st.sampled_from([0, 1, 2]))))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, 3000))
        content[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # with a header's sum made right again, so that its fields are read
            header = content[place // 512 * 512 :][:512]
            total = sum(header[:148]) + sum(header[156:]) + 8 * 32
            content[place // 512 * 512 + 148 : place // 512 * 512 + 156] = b"%06o\0 " % total
    root = tmp_path_factory.mktemp("fuzz")
    (root / "0.tar").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        images = TarShards(root)
    except DataError:
        return
    assert len(images) == len(images.labels_N) > 0
    for index in range(len(images)):
        assert images.name(index).startswith(str(root))
        images.read(index)
