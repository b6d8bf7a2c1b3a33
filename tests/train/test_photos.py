"""The photographs' data set: no pixel in two parts, both formats as `image_files` reads them, repeatable bytes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from var_deploy.config import ConfigError
from var_deploy.errors import DataError
from var_train import photos
from var_train.image_data import decode
from var_train.image_files import ImageFolder, TarShards, open_images
from var_train.photos import PHOTOS, Box, Edge, Format, Photo, crop_box, parts, write_photos

pytest.importorskip("skimage", reason="the photographs need the extra 'photos'")
pytest.importorskip("sklearn", reason="the photographs need the extra 'photos'")

NAMES = ("astronaut", "cat", "coffee", "dahlia", "galaxies", "pagoda", "rocket", "tissue")
SPLITS = {"train": 5, "val": 2}  # images of a class
HIGHEST = 2**64 - 1

draws = st.tuples(*[st.integers(0, HIGHEST)] * 3)
lengths = st.integers(4, 3000)


@pytest.fixture(scope="module", params=list(Format))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of the real photographs."""
    out = tmp_path_factory.mktemp("photos") / "deeper" / request.param
    summary = write_photos(out, side=17, per_class=5, validation=2, format=request.param)
    assert (summary.class_names, summary.side, summary.train, summary.validation) == (NAMES, 17, 40, 16)
    return out


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs of one colour per class and part: red is 10·label, green 255 where validation lies."""

    def load(photo: Photo) -> Image.Image:
        image = Image.new("RGB", (61, 47), (10 * NAMES.index(photo.name), 0, 0))
        image.paste((10 * NAMES.index(photo.name), 255, 0), parts(*image.size, photo.validation)[1])
        return image

    monkeypatch.setattr(photos, "load", load)


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def overlap(a: Box, b: Box) -> bool:
    return max(a.left, b.left) < min(a.right, b.right) and max(a.top, b.top) < min(a.bottom, b.bottom)


def inside(a: Box, b: Box) -> bool:
    return b.left <= a.left < a.right <= b.right and b.top <= a.top < a.bottom <= b.bottom


@given(lengths, lengths, st.sampled_from(Edge))
@example(4, 4, Edge.LEFT)
def test_parts_are_the_whole_photograph_and_share_no_pixel(width, height, edge):
    train, validation = parts(width, height, edge)
    assert inside(train, Box(0, 0, width, height))
    assert inside(validation, Box(0, 0, width, height))
    assert not overlap(train, validation)
    assert train.width * train.height + validation.width * validation.height == width * height
    third = height // 3 if edge is Edge.BOTTOM else width // 3
    assert (validation.height if edge is Edge.BOTTOM else validation.width) == third


def test_parts_lie_at_their_edge():
    assert parts(10, 7, Edge.LEFT) == (Box(3, 0, 10, 7), Box(0, 0, 3, 7))
    assert parts(10, 7, Edge.RIGHT) == (Box(0, 0, 7, 7), Box(7, 0, 10, 7))
    assert parts(10, 7, Edge.BOTTOM) == (Box(0, 0, 10, 5), Box(0, 5, 10, 7))


@given(lengths, lengths, st.sampled_from(Edge), draws, draws)
@example(4, 3000, Edge.RIGHT, (HIGHEST, HIGHEST, HIGHEST), (HIGHEST, 0, 0))
@example(512, 512, Edge.LEFT, (HIGHEST, 0, 0), (HIGHEST, HIGHEST, HIGHEST))
def test_crops_of_training_and_validation_share_no_pixel(width, height, edge, train_draws, validation_draws):
    train, validation = parts(width, height, edge)
    shorter = min(width, height)
    boxes = [
        crop_box(part, shorter // 4, drawn) for part, drawn in ((train, train_draws), (validation, validation_draws))
    ]
    assert inside(boxes[0], train)
    assert inside(boxes[1], validation)
    assert not overlap(*boxes)
    for box in boxes:
        assert box.width == box.height
        assert shorter // 4 <= box.width <= shorter


def test_crops_reach_every_size_and_corner():
    part = Box(10, 20, 17, 25)
    assert crop_box(part, 2, (0, 0, 0)) == Box(10, 20, 12, 22)
    assert crop_box(part, 2, (0, HIGHEST, HIGHEST)) == Box(15, 23, 17, 25)
    assert crop_box(part, 2, (HIGHEST, HIGHEST, 0)) == Box(12, 20, 17, 25)
    quarters = [crop_box(part, 2, (k * 2**62, 0, 0)).width for k in range(4)]
    assert quarters == [2, 3, 4, 5]


@pytest.mark.parametrize("format", Format)
@pytest.mark.usefixtures("painted")
def test_no_colour_of_one_part_is_in_the_other_and_every_class_is_its_own(tmp_path, format):
    """Also what a filter takes in from around a crop would show here."""
    write_photos(tmp_path / "out", side=19, per_class=12, validation=12, format=format)
    for split, green in (("train", 0), ("val", 255)):
        images = open_images(tmp_path / "out", split=split)
        for index, label in enumerate(images.labels_N.tolist()):
            pixels_RRC = np.asarray(decode(images.read(index)))
            assert np.unique(pixels_RRC.reshape(-1, 3), axis=0).tolist() == [[10 * label, green, 0]], images.name(index)


def test_both_formats_are_read_with_the_same_classes_and_counts(made):
    kind = TarShards if made.name == Format.SHARDS else ImageFolder
    for split, count in SPLITS.items():
        images = open_images(made, split=split)
        assert type(images) is kind
        assert images.class_names == NAMES
        assert np.bincount(images.labels_N).tolist() == [count] * len(NAMES)
        for index in range(len(images)):
            image = Image.open(io.BytesIO(images.read(index)))
            assert (image.size, image.mode, image.info) == ((17, 17), "RGB", {})
    assert oct(made.stat().st_mode & 0o777) == "0o755"
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_both_formats_hold_the_same_images(tmp_path):
    contents = []
    for format in Format:
        write_photos(tmp_path / format, side=8, per_class=3, validation=1, format=format)
        images = open_images(tmp_path / format)
        contents.append(sorted((label, images.read(index)) for index, label in enumerate(images.labels_N.tolist())))
    assert contents[0] == contents[1]
    assert len({content for _, content in contents[0]}) == 24


def test_bytes_repeat_with_the_seed_and_differ_without(made, tmp_path):
    arguments: dict[str, Any] = {"side": 17, "per_class": 5, "validation": 2, "format": Format(made.name)}
    write_photos(tmp_path / "again", **arguments, seed=0)
    write_photos(tmp_path / "other", **arguments, seed=HIGHEST)
    again, other = files(tmp_path / "again"), files(tmp_path / "other")
    assert again == files(made)
    assert again.keys() == other.keys()
    assert [name for name in again if again[name] == other[name]] in ([], ["classes.txt"])


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    write_photos(tmp_path / "small", side=8, per_class=2, validation=1)
    write_photos(tmp_path / "large", side=8, per_class=3, validation=4)
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    assert small == {name: large[name] for name in small}


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_photographs_are_in_colour_and_large_enough(photo):
    image = photos.load(photo)
    assert image.mode == "RGB"
    assert min(image.size) >= 300
    pixels_HWC = np.asarray(image).astype(int)
    assert np.abs(pixels_HWC[..., 0] - pixels_HWC[..., 2]).mean() > 3


def test_classes_are_in_the_order_of_their_names():
    assert tuple(photo.name for photo in PHOTOS) == tuple(sorted(NAMES)) == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 7}, r"side: got 7, expected pixels from 8 to 1024"),
        ({"side": 1025}, r"side: got 1025, expected pixels from 8 to 1024"),
        ({"per_class": 0}, r"per_class: got 0, expected images of a class from 1 to 999999"),
        ({"per_class": 1_000_000}, r"per_class: got 1000000, expected"),
        ({"validation": 0}, r"validation: got 0, expected images of a class from 1 to 999999"),
        ({"seed": -1}, r"seed: got -1, expected a number from 0 to 2⁶⁴ − 1"),
        ({"seed": 2**64}, r"seed: got 18446744073709551616, expected"),
    ],
)
def test_numbers_out_of_range_are_one_line(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        write_photos(tmp_path / "out", **arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "distribution"), [("skimage", "scikit-image"), ("sklearn", "scikit-learn")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, distribution):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"lie in {distribution}, which is not installed; run: pip install var-deploy\[photos\]$"
    with pytest.raises(DataError, match=message):
        write_photos(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "reason"), [("data/absent.png", "No such file or directory"), ("__init__.py", "cannot identify image")]
)
def test_a_photograph_that_cannot_be_read_is_one_line(file, reason):
    photo = Photo(name="cat", package="skimage", file=file, validation=Edge.LEFT)
    message = rf"skimage/{file}: cannot be read \({reason}.*\), expected a photograph that scikit-image brings; install"
    with pytest.raises(DataError, match=message) as error:
        photos.load(photo)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("painted")
def test_command_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ["--side", "9", "--per-class", "2", "--validation", "1", "--format", "shards", "--seed", "5"]
    result = CliRunner().invoke(photos.app, [str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == (
        f"wrote {out}: 16 training and 8 validation images, 9×9, of 8 classes ({', '.join(NAMES)})\n"
    )
    assert decode(open_images(out, split="val").read(0)).size == (9, 9)
    monkeypatch.setattr(sys, "argv", ["photos", str(out)])
    with pytest.raises(SystemExit) as ended:
        photos.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {out}: exists already; nothing is overwritten, choose another name or remove it"
    ]
