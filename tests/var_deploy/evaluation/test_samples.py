"""Folders and .npz files as batches of images, and what is refused."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import RequestError
from var_deploy.evaluation.samples import NpzImages, PngFolder, open_images, open_reference
from var_deploy.recipe import Recipe
from var_deploy.sampling import Settings

IMAGES_NHW3 = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


def png_folder(path: Path, images_NHW3: np.ndarray = IMAGES_NHW3) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images_NHW3):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


@pytest.mark.parametrize("form", ["PNG", "npz", "compressed"])
def test_images_come_in_order_and_in_batches(form, tmp_path):
    name = "PNG" if form == "PNG" else "npz"
    if form == "PNG":
        path = png_folder(tmp_path / "images")
        (path / ".partial-000007.png").write_bytes(b"half")
        (path / "samples.json").write_text("{}")
    else:
        path = tmp_path / "images.npz"
        (np.savez if form == "npz" else np.savez_compressed)(path, arr_0=IMAGES_NHW3)
    images = open_images(path)
    assert isinstance(images, PngFolder if form == "PNG" else NpzImages)
    assert (images.count, images.size, images.form, images.labels()) == (7, (5, 6), name, None)
    batches = list(images.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES_NHW3)


def test_grey_files_are_three_equal_channels_and_folders_may_be_nested(tmp_path):
    png_folder(tmp_path / "b", IMAGES_NHW3[:2])
    (tmp_path / "a").mkdir()
    Image.fromarray(IMAGES_NHW3[3, ..., 0]).save(tmp_path / "a" / "grey.PNG")
    (batch,) = open_images(tmp_path).batches(9)
    np.testing.assert_array_equal(batch, [np.repeat(IMAGES_NHW3[3, ..., :1], 3, axis=2), *IMAGES_NHW3[:2]])


def test_digests_are_those_of_content(tmp_path):
    folders = [open_images(png_folder(tmp_path / name)) for name in "ab"]
    assert folders[0].digest() == folders[1].digest()
    png_folder(tmp_path / "b", IMAGES_NHW3[::-1])
    assert folders[0].digest() != open_images(tmp_path / "b").digest()


def test_classes_come_from_the_files_or_the_npz(tmp_path):
    settings = Settings.constant((0.0,), top_k=0, top_p=0.0)
    for i, label in enumerate([4, 2, 4]):
        recipe = Recipe(bundle="0" * 64, label=label, seed=i, settings=settings, engine="onnx", precision="fp32")
        Image.fromarray(IMAGES_NHW3[i]).save(tmp_path / f"{i}.png", pnginfo=recipe.png_info())
    assert open_images(tmp_path).labels().tolist() == [4, 2, 4]
    Image.fromarray(IMAGES_NHW3[3]).save(tmp_path / "3.png")
    assert open_images(tmp_path).labels() is None  # not of every image
    np.savez(tmp_path / "images.npz", arr_0=IMAGES_NHW3, arr_1=np.arange(7))
    assert open_images(tmp_path / "images.npz").labels().tolist() == list(range(7))
    np.savez(tmp_path / "images.npz", arr_0=IMAGES_NHW3, arr_1=np.arange(6))
    with pytest.raises(
        RequestError, match=r"images.npz: arr_1 is int64 \(6,\), expected a whole number for each of the 7"
    ):
        open_images(tmp_path / "images.npz").labels()


def test_a_reference_may_hold_images_statistics_or_both(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3))
    images, statistics = open_reference(path)
    assert images is None
    assert {name: array.shape for name, array in statistics.items()} == {"mu": (3,), "sigma": (3, 3)}
    np.savez(path, mu=np.arange(3.0), arr_0=IMAGES_NHW3)
    images, statistics = open_reference(path)
    assert images.count == 7
    assert list(statistics) == ["mu"]


def _saved(name: str, **arrays):
    def make(path: Path) -> Path:
        np.savez(path / name, **arrays)
        return path / name

    return make


def _picture(name: str, mode: str, form: str = "PNG", size=(6, 5)):
    def make(path: Path) -> Path:
        png_folder(path / "images", IMAGES_NHW3[:2])
        Image.new(mode, size).save(path / "images" / name, format=form)
        return path / "images"

    return make


def _cut(path: Path) -> Path:
    """An archive whose array ends before its header says."""
    np.savez(path / "whole.npz", arr_0=IMAGES_NHW3)
    with zipfile.ZipFile(path / "whole.npz") as whole, zipfile.ZipFile(path / "cut.npz", "w") as cut:
        cut.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])
    return path / "cut.npz"


def _pickled(path: Path) -> Path:
    class Runs:
        def __reduce__(self):
            return Path.mkdir, (path / "executed",)

    np.savez(path / "x.npz", arr_0=IMAGES_NHW3, arr_1=np.array([Runs()], dtype=object))
    return path / "x.npz"


def _damaged(path: Path) -> Path:
    (png_folder(path / "images") / "000003.png").write_bytes((path / "images" / "000003.png").read_bytes()[:60])
    return path / "images"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(path: Path, width: int, height: int, bits: int, data: bytes) -> Path:
    """Colours of any depth and a header of any size, which Pillow does not write."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")
    (path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    return path


def _deep_colours(path: Path) -> Path:
    return _png(path, 2, 1, 16, b"\0" + bytes(range(12)))


def _bomb(path: Path) -> Path:
    return _png(path, 30_000, 30_000, 8, b"")


def _animated(path: Path) -> Path:
    frames = [Image.new("RGB", (6, 5), shade) for shade in ("black", "white")]
    frames[0].save(path / "x.png", save_all=True, append_images=frames[1:])
    return path


def _huge(path: Path) -> Path:
    """A header that claims more than any memory holds."""
    np.savez(path / "x.npz", arr_0=IMAGES_NHW3)
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + "\n"
    with zipfile.ZipFile(path / "x.npz", "a") as archive:
        archive.writestr("arr_1.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode())
    return path / "x.npz"


def _flipped(path: Path) -> Path:
    """A compressed archive with a damaged stretch."""
    np.savez_compressed(path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (7, 50, 60, 3), dtype=np.uint8))
    content = bytearray((path / "x.npz").read_bytes())
    content[3000:3100] = bytes(100)
    (path / "x.npz").write_bytes(content)
    return path / "x.npz"


FLOATS = np.full((2, 5, 6, 3), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "gone", "gone: no such file or folder; check the path"),
        (lambda path: path, ": no PNG files; give the folder that sampling wrote, or an .npz"),
        (_picture("x.jpg", "RGB", "JPEG"), "x.jpg: .jpg loses part of an image, which changes every number; save the"),
        (_picture("x.png", "RGB", "JPEG"), "x.png: cannot be read ("),
        (_picture("x.png", "P"), "x.png: a PNG of mode P, 1 bits, expected 8-bit RGB or grey; save it as that"),
        (_picture("x.png", "I;16"), "x.png: a PNG of mode I;16, 16 bits, expected 8-bit RGB or grey"),
        (_picture("x.png", "RGB", size=(5, 6)), "x.png: 5×6 pixels, expected 6×5 as 000000.png; evaluate images"),
        (_saved("x.npz", other=np.zeros(3)), "x.npz: holds no arr_0; give a folder of PNG files or an .npz with uint8"),
        (_saved("x.npz", arr_0=FLOATS), "x.npz: arr_0 is float32 (2, 5, 6, 3), expected uint8 [N, H, W, 3] with"),
        (_saved("x.npz", arr_0=IMAGES_NHW3[..., 0]), "x.npz: arr_0 is uint8 (7, 5, 6), expected uint8 [N, H, W, 3]"),
        (_saved("x.npz", arr_0=np.asfortranarray(IMAGES_NHW3)), "arr_0 is uint8 (7, 5, 6, 3) in Fortran order"),
        (_saved("x.npz", arr_0=IMAGES_NHW3[:0]), "x.npz: arr_0 is uint8 (0, 5, 6, 3), expected uint8 [N, H, W, 3]"),
        (_cut, "cut.npz: cannot be read (arr_0 is to have 630 bytes and has 530); make or copy it again"),
        (_deep_colours, "x.png: a PNG of mode RGB, 16 bits, expected 8-bit RGB or grey; save it as that"),
        (_animated, "x.png: an animation, expected one image; save its frames one by one"),
        (_huge, "x.npz: cannot be read (arr_1 is to have 8,000,000,000,000 bytes and has 0); make or copy it again"),
        (_flipped, "x.npz: cannot be read ("),
        (_bomb, "x.png: cannot be read ("),
        (_pickled, "x.npz: cannot be read (Object arrays cannot be loaded when allow_pickle=False); make or copy it"),
        (_damaged, "000003.png: cannot be read ("),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(make, said, tmp_path):
    path = make(tmp_path)

    def read() -> None:
        images = open_images(path)
        list(images.batches(4))
        images.labels()

    with pytest.raises(RequestError, match=re.escape(said)) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "x.npz").write_bytes(pickle.dumps([1]))
    with pytest.raises(RequestError, match=r"x\.npz: cannot be read \(File is not a zip file\); make or copy it again"):
        open_reference(tmp_path / "x.npz")
