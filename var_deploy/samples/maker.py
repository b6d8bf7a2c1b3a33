"""A bundle on an engine, in this process: batches of a plan → images, and those as PNG with what they were made from.

The same for one process and for a worker of a cluster, which gets an order and nothing else.
"""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..engines import Planned
from ..errors import BundleError, RequestError
from ..pipeline import Pipeline, load
from ..recipe import Recipe
from ..version import __version__
from .plan import Batch

#: Images at a time where nothing is asked for. On a CPU an image takes as long in any batch, and a small one loses less
#: to a kill; a GPU takes the largest that the torch engine has a bucket for.
CPU_BATCH, GPU_BATCH = 8, 64
#: Threads that compress, while the engine computes.
ENCODERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a maker needs; plain data, to be sent to other machines."""

    bundle: str  #: path, the same on every machine
    digest: str  #: of the bundle that the plan is of
    load: Mapping[str, Any]  #: what `var_deploy.load` takes besides the path
    settings: Mapping[str, Any]  #: what `Pipeline.generate` takes besides labels and seeds
    batch: int | None  #: images at a time; None: what suits the engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """One image, not yet compressed."""

    index: int
    image: Image.Image
    recipe: Recipe

    def png(self) -> bytes:
        """The file: the image, and in its text what it can be made from again."""
        stream = io.BytesIO()
        self.image.save(stream, format="PNG", pnginfo=self.recipe.png_info())
        return stream.getvalue()


class Maker:
    """Opens the bundle when it is made. Raises BundleError, EngineError and RequestError."""

    def __init__(self, order: Order) -> None:
        self._settings = dict(order.settings)
        self._pipe: Pipeline = load(order.bundle, **order.load)
        engine, found = self._pipe.engine, self._pipe.bundle.digest
        if found != order.digest:
            raise BundleError(
                f"{order.bundle}: is {found[:12]}… here, expected {order.digest[:12]}…; copy the bundle to this "
                "machine, or wait until nobody changes it"
            )
        self.computed = {"precision": str(engine.precision), "engine": engine.name}
        most = engine.max_batch
        self.batch = order.batch or (CPU_BATCH if isinstance(engine, Planned) else min(GPU_BATCH, most or GPU_BATCH))
        if most is not None and self.batch > most:
            raise RequestError(f"batch: got {self.batch}, engine {engine.name!r} takes at most {most} images here")
        # The batch size may change how an image is rounded, so there is only one. Engines that plan their memory are
        # those of CPUs, where an image is the same in any batch.
        self._always_full = not isinstance(engine, Planned)

    def make(self, batch: Batch) -> list[Made]:
        """Its images. Raises EngineError and RequestError."""
        extra = max(0, self.batch - len(batch.indices)) if self._always_full else 0
        result = self._pipe.generate(
            [*batch.labels, *batch.labels[-1:] * extra],
            seeds=[*batch.seeds, *batch.seeds[-1:] * extra],
            **self._settings,
        )
        made = zip(batch.indices, result.images, result.recipes, strict=False)  # without what was only to fill it
        return [Made(index=index, image=image, recipe=recipe) for index, image, recipe in made]


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a worker that has loaded computes with, and where it is."""

    version: str  #: of var_deploy
    batch: int
    precision: str
    engine: str
    process: int
    host: str


class Worker:
    """A maker in a process of a cluster. Two calls at a time: one computes while the other compresses and sends."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._maker: Maker | None = None
        self._computing = threading.Lock()
        self._encoders = ThreadPoolExecutor(ENCODERS)

    def start(self) -> Started:
        """Opens the bundle. Not done when the process starts, so that errors reach the caller."""
        maker = self._loaded()
        return Started(
            version=__version__,
            batch=maker.batch,
            precision=maker.computed["precision"],
            engine=maker.computed["engine"],
            process=os.getpid(),
            host=socket.gethostname(),
        )

    def make(self, batch: Batch) -> list[bytes]:
        """PNG files of a batch."""
        maker = self._loaded()
        with self._computing:
            made = maker.make(batch)
        return list(self._encoders.map(Made.png, made))

    def _loaded(self) -> Maker:
        with self._computing:
            if self._maker is None:
                self._maker = Maker(self._order)
            return self._maker
