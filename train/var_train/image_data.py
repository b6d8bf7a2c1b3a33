"""Training images → batches: decoded, cropped and put together by workers.

A sample is a function of (seed, epoch, index), and the samples of a global batch are one of (seed, iteration), so a run
continues anywhere, in any number of processes and workers, with the same images.
Axes: N images of the data set, B images of a batch, R side of the square, C = 3 colours.
"""

from __future__ import annotations

import atexit
import io
import itertools
import math
import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from var_deploy.errors import DataError

from .image_files import ImageFiles
from .processes import rank, world

#: Decoders that may be tried. ImageNet has files with another format's suffix; what would start a program stays out.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")

#: Images in a row that are tried before the data set is given up as corrupt.
MAX_TRIES = 100

#: Philox keys are (seed, use), so that no two uses share numbers.
CROPS, ORDER, ROWS = 0, 1, 2


def decode(content: bytes) -> Image.Image:
    """An encoded image → RGB, upright as its EXIF tag says; 16-bit grey keeps its high byte, transparency is dropped.

    Raises whatever the decoders do, and DecompressionBombWarning for more than Pillow's MAX_IMAGE_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, which is no matter of training
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            raise OSError("no known image format") from None  # Pillow's text names an address in memory
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """How an image becomes a square: its shorter side to round(enlarge·R) by Lanczos, then R×R of it."""

    side: int
    random: bool  #: cut anywhere, for training; else in the middle
    flip: bool = False  #: mirror half of the images
    enlarge: float = 1.125  #: as published; at least 1

    def __call__(self, image: Image.Image, draws_3: tuple[int, int, int]) -> np.ndarray:
        """RGB image and three random 64-bit numbers (left, top, mirrored) → uint8 [R, R, 3]."""
        shorter = round(self.enlarge * self.side)
        width, height = (shorter * length // min(image.size) for length in image.size)
        if self.random:
            left, top = ((width - self.side + 1) * draws_3[0]) >> 64, ((height - self.side + 1) * draws_3[1]) >> 64
        else:
            left, top = round((width - self.side) / 2), round((height - self.side) / 2)
        square_RRC = np.asarray(self._resized(image, (width, height), (left, top)))
        return square_RRC[:, ::-1] if self.flip and draws_3[2] >> 63 else square_RRC

    def _resized(self, image: Image.Image, size: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
        """`image.resize(size)` cut at `corner`, to within rounding; only what is kept is computed.

        So a very long image costs no more than a square. Pillow computes boxes with 24 bits, which suffices once the
        image is cut to what the filter reaches. The passes are apart because Pillow chooses their order by the size,
        and would take another than for the whole image.
        """
        (x0, x1, begin_x, end_x), (y0, y1, begin_y, end_y) = (
            _source_span(*lengths, self.side) for lengths in zip(image.size, size, corner, strict=True)
        )
        part = image.crop((begin_x, begin_y, end_x, end_y))
        lanczos = Image.Resampling.LANCZOS
        part = part.resize((self.side, part.height), lanczos, box=(x0, 0, x1, part.height))
        return part.resize((self.side, self.side), lanczos, box=(0, y0, self.side, y1))


def _source_span(source: int, resized: int, offset: int, side: int) -> tuple[float, float, int, int]:
    """Where pixels offset … offset + side of a resized axis lie in the source: (x0, x1) from `begin`, and begin, end.

    Begin … end holds all that a Lanczos filter of three lobes reaches from there.
    """
    scale = source / resized
    reach = 3 * max(scale, 1.0) + 1
    x0, x1 = offset * scale, (offset + side) * scale
    begin, end = max(0, math.floor(x0 - reach)), min(source, math.ceil(x1 + reach))
    return x0 - begin, min(x1, source) - begin, begin, end


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatches:
    """Which images an iteration takes: each epoch is a permutation, whose last incomplete batch is dropped."""

    count: int  #: images of the data set
    size: int  #: images of a global batch, all processes together
    seed: int

    def __post_init__(self) -> None:
        if self.count < self.size:
            raise DataError(
                f"got {self.count} images, expected at least the {self.size} of a global batch; "
                "add images or make the batch smaller"
            )

    @property
    def iterations_per_epoch(self) -> int:
        return self.count // self.size

    def indices(self, iteration: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 [B] indices of the global batch), for any iteration from 0, without those before it."""
        epoch, position = divmod(iteration, self.iterations_per_epoch)
        permutation_N = _permutation(self.count, self.seed, epoch)
        return epoch, permutation_N[position * self.size : (position + 1) * self.size]


def _philox(seed: int, use: int, epoch: int, index: int) -> np.random.Philox:
    """Random numbers by place. Only raw words are taken of it: they alone never change between numpy versions."""
    key, counter = np.array([seed, use], dtype=np.uint64), np.array([0, index, epoch, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [N], read only."""
    permutation_N = np.argsort(_philox(seed, ORDER, epoch, 0).random_raw(count), kind="stable")
    permutation_N.flags.writeable = False
    return permutation_N


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """What one process takes of an iteration."""

    images_BCRR: Tensor  #: uint8
    labels_B: Tensor  #: int64
    iteration: int
    epoch: int
    corrupt: tuple[str, ...]  #: names of the images that could not be decoded; the next one that can stands for them


@dataclass(frozen=True, slots=True)
class _Task:
    """A batch that a worker is to make."""

    iteration: int
    epoch: int
    indices_B: np.ndarray


class _BatchMaker(Dataset[ImageBatch | DataError]):
    """Makes whole batches in a worker. An error is returned: raised there, it would arrive wrapped in a trace."""

    def __init__(self, images: ImageFiles, crop: Crop, seed: int) -> None:
        self._images, self._crop, self._seed = images, crop, seed

    def __getitem__(self, task: _Task) -> ImageBatch | DataError:
        side = self._crop.side
        images_BRRC = np.empty((len(task.indices_B), side, side, 3), dtype=np.uint8)
        labels_B = np.empty(len(task.indices_B), dtype=np.int64)
        corrupt: list[str] = []
        for row, index in enumerate(task.indices_B.tolist()):
            try:
                image, label = self._first_readable(index, corrupt)
            except DataError as error:
                return error
            left, top, mirrored = _philox(self._seed, CROPS, task.epoch, index).random_raw(3).tolist()
            images_BRRC[row] = self._crop(image, (left, top, mirrored))
            labels_B[row] = label
        return ImageBatch(
            images_BCRR=torch.from_numpy(images_BRRC).permute(0, 3, 1, 2).contiguous(),
            labels_B=torch.from_numpy(labels_B),
            iteration=task.iteration,
            epoch=task.epoch,
            corrupt=tuple(corrupt),
        )

    def _first_readable(self, index: int, corrupt: list[str]) -> tuple[Image.Image, int]:
        """The first image from `index` on that can be decoded, with its label; adds the others' names to `corrupt`."""
        tries = min(MAX_TRIES, len(self._images))
        first: Exception | None = None
        for position in ((index + step) % len(self._images) for step in range(tries)):
            try:
                return decode(self._images.read(position)), int(self._images.labels_N[position])
            except Exception as error:  # decoders raise nearly anything on damaged files
                corrupt.append(self._images.name(position))
                first = first or error
        raise DataError(
            f"{self._images.name(index)}: cannot be read ({first}), and this is the first of {tries} in a row; "
            "check the data set"
        )


def training_batches(
    images: ImageFiles, crop: Crop, batches: GlobalBatches, *, rows: slice, start: int, workers: int, seed: int
) -> Iterator[ImageBatch]:
    """Endless, from iteration `start` on: the `rows` of each global batch that this process takes.

    Workers, where there are any, live as long as the iterator and work ahead. Raises DataError.
    """

    def task(iteration: int) -> _Task:
        epoch, indices_B = batches.indices(iteration)
        return _Task(iteration, epoch, indices_B[rows])

    return _made(images, crop, seed, map(task, itertools.count(start)), workers)


def evaluation_batches(
    images: ImageFiles,
    crop: Crop,
    size: int,
    *,
    workers: int = 0,
    seed: int = 0,
    epoch: int = 0,
    span: tuple[int, int] | None = None,
) -> Iterator[ImageBatch]:
    """All images once, in order, or those of a half-open span; the last batch may be smaller.

    A random crop is the one of (seed, epoch, index).
    """
    taken = np.arange(*(span or (0, len(images))), dtype=np.int64)
    tasks = (_Task(t, epoch, taken[begin : begin + size]) for t, begin in enumerate(range(0, len(taken), size)))
    return _made(images, crop, seed, tasks, workers)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process takes of a batch that all measure together; as many batches in every process."""

    indices_B: np.ndarray  #: int64, at least one
    counted: int  #: the first of them that count; 0 where there was nothing left for this process


def evaluation_shares(count: int, size: int) -> list[Share]:
    """Every image of `count` once, `size` at a time, shared out among the processes."""
    shares = []
    for begin in range(0, count, size):
        indices_B = np.arange(begin, min(begin + size, count), dtype=np.int64)[rank() :: world()]
        shares.append(Share(indices_B if len(indices_B) else np.array([begin]), len(indices_B)))
    return shares


def share_batches(images: ImageFiles, crop: Crop, shares: list[Share], *, workers: int) -> Iterator[ImageBatch]:
    """The images of `evaluation_shares`."""
    tasks = [_Task(t, 0, share.indices_B) for t, share in enumerate(shares)]
    return _made(images, crop, 0, tasks, workers)


def _made(images: ImageFiles, crop: Crop, seed: int, tasks: Iterable[_Task], workers: int) -> Iterator[ImageBatch]:
    loader = DataLoader(
        _BatchMaker(images, crop, seed),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else it would draw from the global one, whose state a checkpoint holds
    )
    stream = _without_errors(loader)
    _streams.add(stream)
    return stream


def _without_errors(loader: DataLoader[ImageBatch | DataError]) -> Generator[ImageBatch]:
    batches = _started(loader)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # the loader's; a worker returns its own as DataError
        why = str(error) or "its queue closed"
        raise DataError(
            f"a worker that decodes images ended ({why}), for lack of memory perhaps; start again, with fewer workers"
        ) from error
    finally:
        del batches  # it ends its workers, and an error that is kept would keep this frame and what it holds


#: What a scheduler and Ctrl-C send to the whole group: the trainer acts on it, and ends its workers when it is done.
_GROUP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def _started(loader: DataLoader[ImageBatch | DataError]) -> Iterator[ImageBatch | DataError]:
    """The loader's iterator. Its workers are born with the group's signals held back, so none can end them early."""
    before = set(multiprocessing.active_children())
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        _workers.update(set(multiprocessing.active_children()) - before)


def _outlive_signals(worker: int) -> None:
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


_streams: weakref.WeakSet[Generator[ImageBatch]] = weakref.WeakSet()
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Without it Python would at its end send the workers SIGTERM, which they ignore, and wait for them forever."""
    for stream in list(_streams):
        stream.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for worker in list(_workers):  # of a stream that an error ended, and that something still holds
        with suppress(ValueError):  # it is closed
            worker.kill()
