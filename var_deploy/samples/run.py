"""Samples a plan into a directory: what is missing is made, by one engine here or by workers of a cluster.

Killed at any moment and started again, it goes on: a file is there whole or not at all, and an image is the same
whoever makes it. The .npz comes from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..bundle import Bundle
from ..errors import RequestError
from .folder import SampleFolder
from .maker import Maker, Order
from .npz import write_npz
from .plan import Batch, SamplePlan, Shard, batches
from .writer import Writer

#: Takes image `index` and how to get its PNG file.
Put = Callable[[int, Callable[[], bytes]], None]
#: Hears how many of the shard's images are there, and how many there will be; from several threads, one at a time.
Progress = Callable[[int, int], object]


class Source(Protocol):
    """What makes images."""

    @property
    def computed(self) -> Mapping[str, str]:
        """Precision and engine."""
        ...

    @property
    def batch(self) -> int:
        """Images at a time."""
        ...

    def run(self, batches: Iterator[Batch], put: Put) -> None:
        """Makes all batches, in any order; every image is put once. Raises EngineError and RequestError."""
        ...


class _Here:
    """One engine in this process."""

    def __init__(self, order: Order) -> None:
        self._maker = Maker(order)
        self.computed: Mapping[str, str] = self._maker.computed
        self.batch = self._maker.batch

    def run(self, batches: Iterator[Batch], put: Put) -> None:
        for batch in batches:
            for made in self._maker.make(batch):
                put(made.index, made.png)


@contextmanager
def here(order: Order) -> Iterator[Source]:
    """One engine in this process."""
    yield _Here(order)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a run has done."""

    made: int  #: images, in this run
    archive: Path | None  #: the .npz, if it was written
    missing: int  #: images of other shards, counted where they keep an .npz from being written


def sample(
    bundle: Bundle,
    out: Path,
    plan: SamplePlan,
    *,
    load: Mapping[str, Any],
    batch: int | None = None,
    shard: Shard | None = None,
    npz: bool = False,
    source: Callable[[Order], AbstractContextManager[Source]] = here,
    progress: Progress = lambda done, total: None,
) -> Sampled:
    """Makes what is missing of a shard, by default of all. Nothing is loaded where nothing is.

    load: what `var_deploy.load` takes. batch: images at a time, by default what suits the engine. npz: write the .npz
    too; with several shards the last one to end does. Raises BundleError, EngineError and RequestError.
    """
    shard = shard or Shard()
    if batch is not None and batch < 1:
        raise RequestError(f"batch: got {batch}, expected at least 1")
    folder = SampleFolder(path=out, plan=plan)
    folder.check()
    with folder.held(shard):
        folder.remove_leftovers()
        indices = shard.of(plan.count)
        missing = folder.missing(indices)
        if missing:
            order = Order(
                bundle=str(bundle.path.resolve()), digest=plan.bundle, load=load, settings=plan.settings, batch=batch
            )
            with source(order) as makers:
                folder.note(makers.computed)
                _make(folder, missing, len(indices), makers, progress)
        if not npz:
            return Sampled(made=len(missing), archive=None, missing=0)
        elsewhere = len(folder.missing(range(plan.count))) if shard.total > 1 else 0
        archive = None if elsewhere else write_npz(folder)
        return Sampled(made=len(missing), archive=archive, missing=elsewhere)


def _make(folder: SampleFolder, missing: list[int], total: int, makers: Source, progress: Progress) -> None:
    done = total - len(missing)
    progress(done, total)

    def more() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with Writer(folder, more) as writer:
        makers.run(batches(folder.plan, missing, makers.batch), writer.put)
