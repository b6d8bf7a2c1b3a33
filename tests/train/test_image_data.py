"""Decoding, crops and batches: equal to the published steps, and the same for any number of processes and workers."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from var_deploy.errors import DataError
from var_train import image_data
from var_train.image_data import (
    Crop,
    GlobalBatches,
    ImageBatch,
    decode,
    evaluation_batches,
    training_batches,
)
from var_train.image_files import ImageFiles, open_images

R = 16
TRAINING = Crop(side=R, random=True, flip=True)
EVALUATION = Crop(side=R, random=False)
MAX_DRAW = 2**64 - 1


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """The hardest content for a filter: every pixel another, and a hard edge."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 255 - pixels[:, width // 2 :] // 8
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def whole_then_cut(image: Image.Image, side: int, left: int | None = None, top: int | None = None) -> np.ndarray:
    """The published steps, one after the other; in the middle without a corner: torchvision's Resize and CenterCrop."""
    short = round(1.125 * side)
    if image.width <= image.height:
        size = short, int(short * image.height / image.width)
    else:
        size = int(short * image.width / image.height), short
    left = round((size[0] - side) / 2.0) if left is None else left
    top = round((size[1] - side) / 2.0) if top is None else top
    # Horizontal first, as every Pillow did until 13 and as 13 does for images that do not get lower than wide.
    whole = image.resize((size[0], image.height), Image.Resampling.LANCZOS).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(whole.crop((left, top, left + side, top + side)))


def assert_near(square_RRC: np.ndarray, expected_RRC: np.ndarray) -> None:
    assert square_RRC.shape == expected_RRC.shape
    assert square_RRC.dtype == np.uint8
    difference = np.abs(square_RRC.astype(int) - expected_RRC).max()
    assert difference <= 2, f"{difference} levels"


# --- crops ---


@pytest.mark.parametrize(
    "size",
    [(97, 131), (500, 375), (33, 20), (7, 9), (1, 1), (1, 7), (3, 2500), (7000, 5), (72, 72), (64, 1001), (1500, 1125)],
    ids=str,
)
@pytest.mark.parametrize("side", [16, 63, 64])
def test_a_crop_equals_the_whole_image_resized_then_cut(size, side):
    image = noise(*size)
    assert_near(Crop(side=side, random=False)(image, (0, 0, 0)), whole_then_cut(image, side))
    short = round(1.125 * side)
    rooms = [short * length // min(size) - side for length in size]
    for numerators in ((0, 0), (3, 5), (7, 2), (8, 8)):
        corner = [min(room, (room + 1) * numerator // 8) for room, numerator in zip(rooms, numerators, strict=True)]
        draws = tuple(-(-(at << 64) // (room + 1)) for at, room in zip(corner, rooms, strict=True))
        square_RRC = Crop(side=side, random=True)(image, (*draws, MAX_DRAW))
        assert_near(square_RRC, whole_then_cut(image, side, *corner))


def test_pillow_resizes_a_whole_image_as_the_steps_above():
    """The published code calls `resize` once; this pins that both passes apart are the same."""
    for size in ((500, 375), (97, 131)):
        image = noise(*size)
        short = tuple(72 * length // min(size) for length in size)
        steps = image.resize((short[0], size[1]), Image.Resampling.LANCZOS).resize(short, Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(image.resize(short, Image.Resampling.LANCZOS)), np.asarray(steps))


def test_a_very_long_image_costs_no_more_than_a_square():
    """Resized as a whole this one would have 18 · 18 million pixels."""
    image = Image.new("RGB", (1, 1_000_000), (10, 20, 30))
    for draws in ((0, 0, 0), (MAX_DRAW, MAX_DRAW, MAX_DRAW)):
        assert (TRAINING(image, draws) == (10, 20, 30)).all()


def test_every_corner_is_drawn_equally_often_and_half_are_mirrored():
    image = Image.fromarray(np.tile(np.arange(18, dtype=np.uint8) * 10, (18, 1))).convert("RGB")  # R = 16 → as it is
    random = np.random.default_rng(0)
    seen = np.zeros((2, 3), int)
    for _ in range(600):
        row_R = TRAINING(image, tuple(int(word) for word in random.integers(2**64, size=3, dtype=np.uint64)))[0, :, 0]
        mirrored = int(row_R[0] > row_R[-1])
        seen[mirrored, min(row_R[0], row_R[-1]) // 10] += 1
    assert seen.min() > 70  # of 100 expected; four standard deviations are 37, and the draws never change


def test_no_flip_unless_asked_for():
    image = noise(40, 30)
    plain = Crop(side=R, random=True)
    mirrored_RRC = TRAINING(image, (5, 6, MAX_DRAW))
    assert np.array_equal(plain(image, (5, 6, MAX_DRAW)), plain(image, (5, 6, 0)))
    assert np.array_equal(mirrored_RRC[:, ::-1], plain(image, (5, 6, 0)))
    assert np.array_equal(TRAINING(image, (5, 6, 0)), plain(image, (5, 6, 0)))


# --- decoding ---


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    return encoded(image, exif=exif)


ODD = noise(53, 37)
GREY_16 = np.random.default_rng(1).integers(0, 2**16, (37, 53), dtype=np.uint16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(ODD), ODD),
        (encoded(ODD, "BMP"), ODD),
        (encoded(ODD, "WEBP", lossless=True), ODD),
        (encoded(ODD.quantize(200)), ODD.quantize(200).convert("RGB")),
        (encoded(ODD.convert("L")), ODD.convert("L").convert("RGB")),
        (encoded(ODD.convert("1")), ODD.convert("1").convert("RGB")),
        (encoded(Image.merge("RGBA", (*ODD.split(), ODD.convert("L")))), ODD),
        (encoded(ODD.convert("CMYK"), "TIFF"), ODD.convert("CMYK").convert("RGB")),
        (encoded(Image.fromarray(GREY_16)), Image.fromarray((GREY_16 // 256).astype(np.uint8)).convert("RGB")),
        (encoded(Image.fromarray(GREY_16), "TIFF"), Image.fromarray((GREY_16 // 256).astype(np.uint8)).convert("RGB")),
        (rotated(ODD), ODD.transpose(Image.Transpose.ROTATE_270)),
    ],
    ids=["png", "bmp", "webp", "palette", "grey", "bits", "rgba", "cmyk", "grey16", "grey16-tiff", "exif"],
)
def test_every_kind_of_image_becomes_rgb(content, expected):
    image = decode(content)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert_near(EVALUATION(image, (0, 0, 0)), whole_then_cut(expected, R))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_decoded_in_full_not_at_a_smaller_scale(mode):
    """A draft of a JPEG differs from the whole by more than rounding."""
    content = encoded(noise(640, 480).convert(mode), "JPEG", quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert_near(EVALUATION(decode(content), (0, 0, 0)), whole_then_cut(expected, R))


JPEG = encoded(noise(64, 48), "JPEG")
DAMAGED = {
    "zero bytes": b"",
    "text": b"this is no image",
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated png": encoded(noise(64, 48))[:900],
    "header only": JPEG[:30],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_images_are_refused(content):
    with pytest.raises((OSError, SyntaxError)):
        decode(content)


def test_postscript_is_not_run():
    """Pillow knows the format, and would start an interpreter of it."""
    with pytest.raises(OSError, match=r"^no known image format$"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("limit", [64 * 48 - 1, 64 * 48 // 2 - 1])  # where Pillow warns, where it refuses
def test_decompression_bombs_are_refused_at_pillow_s_limit(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        decode(JPEG)


@given(st.lists(st.tuples(st.integers(0, len(JPEG) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(JPEG)))
def test_a_damaged_jpeg_is_decoded_or_refused_by_an_exception(changes, end):
    content = bytearray(JPEG)
    for place, value in changes:
        content[place] = value
    try:
        image = decode(bytes(content[:end]))
    except Exception:  # which one is the decoder's choice; it must not be anything beyond
        return
    assert TRAINING(image, (1, 2, 3)).shape == (R, R, 3)


# --- which images an iteration takes ---

SIZES = st.integers(1, 60).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))


@given(SIZES, st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation_without_its_last_incomplete_batch(sizes, seed, epoch):
    count, size = sizes
    batches = GlobalBatches(count=count, size=size, seed=seed)
    steps = batches.iterations_per_epoch
    assert steps == count // size
    taken = [batches.indices(epoch * steps + step) for step in range(steps)]
    assert {found for found, _ in taken} == {epoch}
    indices = np.concatenate([indices_B for _, indices_B in taken])
    assert indices.dtype == np.int64
    assert len(indices) == steps * size
    assert len(set(indices.tolist()) & set(range(count))) == len(indices)


@given(SIZES, st.integers(0, 100), st.lists(st.integers(0, 200), max_size=8))
def test_a_jump_lands_where_walking_does(sizes, seed, targets):
    count, size = sizes
    walked = [GlobalBatches(count=count, size=size, seed=seed).indices(t) for t in range(max(targets, default=0) + 1)]
    for t in targets:
        epoch, indices_B = GlobalBatches(count=count, size=size, seed=seed).indices(t)
        assert epoch == walked[t][0]
        assert np.array_equal(indices_B, walked[t][1])


def test_orders_are_the_same_in_every_version():
    """A run continues after an update of numpy; and epochs and seeds differ."""
    orders = {
        (seed, epoch): GlobalBatches(count=8, size=8, seed=seed).indices(epoch)[1].tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 10**6))
    }
    assert orders == {
        (0, 0): [5, 3, 7, 2, 4, 1, 0, 6],
        (0, 1): [4, 3, 0, 1, 5, 6, 2, 7],
        (1, 0): [0, 6, 5, 3, 4, 7, 2, 1],
        (2**64 - 1, 10**6): [4, 6, 0, 1, 2, 7, 5, 3],
    }


def test_an_order_cannot_be_altered_by_who_reads_it():
    with pytest.raises(ValueError, match="read-only"):
        GlobalBatches(count=4, size=4, seed=0).indices(0)[1][0] = 3


def test_fewer_images_than_a_batch():
    with pytest.raises(
        DataError, match=r"^got 3 images, expected at least the 4 of a global batch; add images or make "
    ):
        GlobalBatches(count=3, size=4, seed=0)


# --- batches ---

COUNT = 17


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFiles:
    """17 images of three classes and of all shapes; read only."""
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        folder = root / f"class{number * 3 // COUNT}"
        folder.mkdir(exist_ok=True)
        noise(20 + number, 40 - number, seed=number).save(folder / f"{number:02}.png")
    return open_images(root)


@pytest.fixture
def damaged(images, tmp_path) -> Callable[..., ImageFiles]:
    """`damaged(3, 4)`: the images, with these two overwritten by text."""

    def make(*numbers: int) -> ImageFiles:
        for number in range(COUNT):
            path = tmp_path / Path(images.name(number)).relative_to(Path(images.name(0)).parents[1])
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"no image" if number in numbers else images.read(number))
        return open_images(tmp_path)

    return make


def batches_of(images: ImageFiles, size: int = 6) -> GlobalBatches:
    return GlobalBatches(count=len(images), size=size, seed=3)


def taken(
    images: ImageFiles, count: int, *, rows: slice = slice(None), start: int = 0, workers: int = 0, seed: int = 11
) -> list[ImageBatch]:
    """The first `count` batches of six, two of which are an epoch."""
    stream = training_batches(images, TRAINING, batches_of(images), rows=rows, start=start, workers=workers, seed=seed)
    return list(itertools.islice(stream, count))


def assert_same(batches: list[ImageBatch], expected: list[ImageBatch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images_BCRR, other.images_BCRR)
        assert torch.equal(batch.labels_B, other.labels_B)
        assert (batch.iteration, batch.epoch, batch.corrupt) == (other.iteration, other.epoch, other.corrupt)


def test_a_batch_is_what_seed_epoch_and_index_say(images):
    for batch in taken(images, 5, start=1):
        epoch, indices_B = batches_of(images).indices(batch.iteration)
        assert batch.epoch == epoch == batch.iteration // 2
        assert batch.images_BCRR.dtype == torch.uint8
        assert batch.images_BCRR.is_contiguous()
        assert batch.labels_B.dtype == torch.int64
        assert batch.labels_B.tolist() == images.labels_N[indices_B].tolist()
        assert batch.corrupt == ()
        for image_CRR, index in zip(batch.images_BCRR, indices_B.tolist(), strict=True):
            key, counter = np.array([11, 0], np.uint64), np.array([0, index, epoch, 0], np.uint64)
            draws = np.random.Philox(key=key, counter=counter).random_raw(3).tolist()
            expected_RRC = TRAINING(decode(images.read(index)), tuple(draws))
            assert np.array_equal(image_CRR.permute(1, 2, 0).numpy(), expected_RRC)


@pytest.fixture(scope="module")
def six_iterations(images) -> list[ImageBatch]:
    """One process, no worker."""
    return taken(images, 6)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_a_global_batch_whatever_their_number_and_their_workers(
    images, six_iterations, processes, workers
):
    share = 6 // processes
    parts = [taken(images, 6, rows=slice(p * share, (p + 1) * share), workers=workers) for p in range(processes)]
    for whole, *mine in zip(six_iterations, *parts, strict=True):
        assert torch.equal(torch.cat([batch.images_BCRR for batch in mine]), whole.images_BCRR)
        assert torch.equal(torch.cat([batch.labels_B for batch in mine]), whole.labels_B)
        assert {(batch.iteration, batch.epoch) for batch in mine} == {(whole.iteration, whole.epoch)}


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (2, 0), (5, 0), (3, 2)])
def test_a_run_continues_where_it_was(images, six_iterations, start, workers):
    assert_same(taken(images, 6 - start, start=start, workers=workers), six_iterations[start:])


def test_epochs_and_seeds_crop_otherwise(images, six_iterations):
    assert not torch.equal(taken(images, 1, seed=12)[0].images_BCRR, six_iterations[0].images_BCRR)
    first, second = (
        next(evaluation_batches(images, TRAINING, COUNT, seed=11, epoch=epoch)).images_BCRR for epoch in (0, 1)
    )
    assert (first != second).flatten(1).any(dim=1).sum() > COUNT // 2


def test_spawned_workers_give_the_same(images, six_iterations):
    """They inherit nothing: what they need is sent to them."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        stream = training_batches(images, TRAINING, batches_of(images), rows=slice(None), start=0, workers=1, seed=11)
        batches = [next(stream)]
        assert [worker._popen.method for worker in multiprocessing.active_children()] == ["spawn"]
        assert_same([*batches, next(stream)], six_iterations[:2])
        stream.close()
    finally:
        multiprocessing.set_start_method(default, force=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_numbers_are_not_touched(images, workers):
    """They are in checkpoints: a run that starts again must not have drawn once more."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    taken(images, 2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_workers_outlive_the_signals_that_a_group_of_processes_gets(images, six_iterations, monkeypatch):
    """At any time: the workers are signalled as soon as they exist, before they have run a line of their own."""

    def signal_all() -> None:
        for signum, worker in itertools.product((signal.SIGTERM, signal.SIGINT), multiprocessing.active_children()):
            os.kill(worker.pid, signum)

    start = multiprocessing.Process.start

    def start_and_signal(process: multiprocessing.Process) -> None:
        start(process)
        signal_all()

    monkeypatch.setattr("multiprocessing.Process.start", start_and_signal)
    stream = training_batches(images, TRAINING, batches_of(images), rows=slice(None), start=0, workers=2, seed=11)
    batches = [next(stream)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    signal_all()
    batches += itertools.islice(stream, 5)
    assert_same(batches, six_iterations)
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


#: An error of the loader itself, whose frames hold it, kept until the program ends.
KEPT_ERROR = """
import multiprocessing, os, signal
from var_deploy.errors import DataError
from var_train import image_data
try:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    list(stream)
except (DataError, RuntimeError) as error:  # PyTorch may say so at any line
    kept = error
assert "worker" in str(kept)
"""


@pytest.mark.parametrize(
    ("last", "status"), [("", 0), ("raise RuntimeError", 1), ("sys.exit(143)", 143), (KEPT_ERROR, 0)]
)
def test_a_program_ends_at_once_though_its_workers_ignore_signals(images, last, status):
    program = f"""
import sys
from pathlib import Path
from var_train.image_data import Crop, GlobalBatches, training_batches
from var_train.image_files import open_images
images = open_images(Path({str(Path(images.name(0)).parents[1])!r}))
batches = GlobalBatches(count=len(images), size=6, seed=0)
crop = Crop(side=16, random=True)
stream = training_batches(images, crop, batches, rows=slice(None), start=0, workers=2, seed=0)
next(stream)
{last}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, capture_output=True)
    assert finished.returncode == status, finished.stderr


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "DataLoader worker (pid 7) is killed"),
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by peer"),
        (EOFError(), "its queue closed"),
    ],
)
def test_a_worker_that_ends_amid_a_batch_is_one_error_whatever_it_broke(error, why):
    def batches():
        yield "a batch"
        raise error

    stream = image_data._without_errors(batches())
    assert next(stream) == "a batch"
    with pytest.raises(DataError, match=f"^a worker that decodes images ended \\({re.escape(why)}.*fewer workers$"):
        next(stream)


# --- corrupt images ---


def test_a_corrupt_image_is_named_and_the_next_one_stands_for_it(damaged, images, six_iterations):
    """The random numbers stay those of the place, so all other images of the run stay as they were."""
    broken = damaged(3, 4, 16)
    stand_ins = {3: 5, 4: 5, 16: 0}
    named = {3: (3, 4), 4: (4,), 16: (16,)}
    for workers in (0, 2):
        for batch, whole in zip(taken(broken, 6, workers=workers), six_iterations, strict=True):
            epoch, indices_B = batches_of(images).indices(batch.iteration)
            names = [broken.name(other) for index in indices_B.tolist() for other in named.get(index, ())]
            assert batch.corrupt == tuple(names)
            for row, index in enumerate(indices_B.tolist()):
                if index not in stand_ins:
                    assert torch.equal(batch.images_BCRR[row], whole.images_BCRR[row])
                    continue
                stand_in = stand_ins[index]
                assert batch.labels_B[row] == images.labels_N[stand_in]
                draws = np.random.Philox(
                    key=np.array([11, 0], np.uint64), counter=np.array([0, index, epoch, 0], np.uint64)
                ).random_raw(3)
                expected_RRC = TRAINING(decode(images.read(stand_in)), tuple(draws.tolist()))
                assert np.array_equal(batch.images_BCRR[row].permute(1, 2, 0).numpy(), expected_RRC)


def test_a_file_that_vanished_counts_as_corrupt(damaged):
    images = damaged()
    Path(images.name(2)).unlink()
    (batch,) = evaluation_batches(images, EVALUATION, COUNT)
    assert batch.corrupt == (images.name(2),)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_images_is_an_error_that_names_the_first(damaged, workers):
    images = damaged(*range(COUNT))
    first = images.name(int(batches_of(images).indices(0)[1][0]))
    with pytest.raises(DataError) as error:
        taken(images, 1, workers=workers)
    assert str(error.value) == (
        f"{first}: cannot be read (no known image format), and this is the first of 17 in a row; check the data set"
    )


def test_a_hundred_corrupt_images_in_a_row_are_enough(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(102):
        (tmp_path / "a" / f"{number:03}.jpg").write_bytes(JPEG if number >= 100 else JPEG[:700])
    images = open_images(tmp_path)
    with pytest.raises(
        DataError, match=r"000\.jpg: cannot be read \(image file is truncated.*the first of 100 in a row"
    ):
        list(evaluation_batches(images, EVALUATION, 1))
    Path(images.name(50)).write_bytes(JPEG)
    assert len(next(evaluation_batches(images, EVALUATION, 102)).corrupt) == sum(range(51)) + sum(range(50))


# --- evaluation ---


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_every_image_once_in_order(images, workers):
    batches = list(evaluation_batches(images, EVALUATION, 5, workers=workers))
    assert [len(batch.labels_B) for batch in batches] == [5, 5, 5, 2]
    assert [batch.iteration for batch in batches] == [0, 1, 2, 3]
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == images.labels_N.tolist()
    squares_NCRR = torch.cat([batch.images_BCRR for batch in batches])
    for index, square_CRR in enumerate(squares_NCRR):
        assert_near(square_CRR.permute(1, 2, 0).numpy(), whole_then_cut(decode(images.read(index)), R))
