"""What is sampled: class and seed of image i, a pure function of the plan and i, whoever makes it in whatever batch.

`DIR/samples.json` is the plan as data, beside how its images were computed. Axes: n images of a batch, N all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import numpy as np

from .. import philox, schedules
from ..bundle import Bundle, Manifest
from ..errors import RequestError
from ..request import MAX_SEED, is_integer, label_ids
from ..schedules import Sampling

#: Of samples.json: counts up when the same plan would give other images.
VERSION = 1
#: More than anyone evaluates, and what the counter of the random numbers holds.
MAX_COUNT = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """All images of one directory."""

    bundle: str  #: its digest
    count: int
    balanced: bool  #: every class equally often, in turn; else classes are drawn uniformly
    seed: int  #: image i has seed + i
    classes: tuple[int, ...] | None  #: ids to take, ascending; None: all
    num_classes: int  #: of the bundle
    image_size: int  #: pixels of a side
    settings: Mapping[str, Any]  #: as `Pipeline.generate` takes them, none left to defaults

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        count: int,
        balanced: bool = False,
        seed: int = 0,
        classes: Sequence[int | str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> SamplePlan:
        """Checked. classes: ids or names, to take only those. Raises RequestError."""
        manifest = bundle.manifest
        if not is_integer(count) or not 1 <= count <= MAX_COUNT:
            raise RequestError(f"count: got {count!r}, expected 1 to {MAX_COUNT:,} images")
        if not is_integer(seed) or not 0 <= seed <= MAX_SEED - count + 1:
            raise RequestError(
                f"seed: got {seed!r}, expected 0 to 2⁶⁴ − {count}: every image has its own, seed + index"
            )
        taken = None if classes is None else tuple(sorted(set(label_ids(classes, manifest).tolist())))
        among = manifest.var.num_classes if taken is None else len(taken)
        if balanced and (left := count % among):
            around = [n for n in (count - left, count - left + among) if n]
            raise RequestError(
                f"count: got {count} balanced over {among} classes, expected as many of each: "
                f"{' or '.join(map(str, around))}"
            )
        return cls(
            bundle=bundle.digest,
            count=int(count),
            balanced=balanced,
            seed=int(seed),
            classes=taken,
            num_classes=manifest.var.num_classes,
            image_size=manifest.vqvae.image_size,
            settings=_options(manifest, **sampling),
        )

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Class ids int64 [n] of images: by turns, so that any first images are nearly balanced, or uniform."""
        indices_n = np.asarray(indices, dtype=np.int64)
        among = self.num_classes if self.classes is None else len(self.classes)
        places_n = indices_n % among if self.balanced else philox.integers(self.seed, indices_n, among)
        return places_n if self.classes is None else np.array(self.classes, dtype=np.int64)[places_n]

    def seeds(self, indices: Sequence[int]) -> list[int]:
        """Seeds of images."""
        return [self.seed + index for index in indices]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        return {"version": VERSION} | data | {"classes": None if self.classes is None else list(self.classes)}


def _options(manifest: Manifest, **sampling: Unpack[Sampling]) -> dict[str, Any]:
    """The options that give these settings, in one form however they were asked for: lists only where scales differ."""
    settings = schedules.settings(manifest, **sampling)
    options: dict[str, Any] = {}
    for name, values in schedules.options_of(settings).items():
        assert isinstance(values, tuple)
        options[name] = values[0] if len(set(values)) == 1 else list(values)
    # One value of guidance is the last one of a ramp.
    last = settings.strengths[-1]
    is_ramp = schedules.settings(manifest, guidance=last).strengths == settings.strengths
    return options | {"guidance": last if is_ramp else list(settings.strengths)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Part `index` of `total`, from 1: images one after the other, of which a balanced plan's are nearly balanced."""

    index: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.total:
            raise RequestError(f"shard: got {self.index}/{self.total}, expected I/N with 1 ≤ I ≤ N, like 1/4")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "I/N". Raises RequestError."""
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            raise RequestError(f"shard: got {text!r}, expected I/N with 1 ≤ I ≤ N, like 1/4")
        return cls(index=int(parts[0]), total=int(parts[1]))

    def of(self, count: int) -> range:
        """Its images among `count`."""
        return range(count * (self.index - 1) // self.total, count * self.index // self.total)

    def __str__(self) -> str:
        return f"{self.index} of {self.total}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images that are made at a time."""

    indices: tuple[int, ...]
    labels: tuple[int, ...]
    seeds: tuple[int, ...]


def batches(plan: SamplePlan, indices: Sequence[int], size: int) -> Iterator[Batch]:
    """Of images in this order, all but the last one full."""
    for start in range(0, len(indices), size):
        part = tuple(indices[start : start + size])
        yield Batch(indices=part, labels=tuple(plan.labels(part).tolist()), seeds=tuple(plan.seeds(part)))
