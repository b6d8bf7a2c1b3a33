"""A bundle → the facts of a quality report: timed, sampled, edited and compared in one call, part by part.

What was timed comes first, in a process that has loaded nothing else yet. A part that cannot be made is told with its
reason; only a bundle that cannot be opened or run ends the call. Axes: B images, R side of an image in pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from .. import request, schedules
from ..bench.device import free
from ..bench.run import BenchRow, bench, bench_record
from ..bundle import Bundle, Manifest
from ..editing import region
from ..engines.choice import default_decoder
from ..errors import RequestError, VarDeployError
from ..images import images_from_pixels, pixels_from_images
from ..inspection import inspect_bundle
from ..pipeline import Pipeline
from ..recipe import Recipe
from ..results import Generation, Preview
from ..schedules import Sampling
from ..version import __version__
from .again import Spoken, commands
from .facts import Edit, Editing, EngineFacts, Facts, Shot, Strip

Progress = Callable[[str], None]

#: Of the samples: a page of published 256 px images then has some 10 MB.
MAX_SAMPLES = 60
#: Classes that are shown where none are named, that are shown from coarse to fine, and that a picture is edited to.
CLASSES, STRIPS, EDITS = 10, 3, 5
#: (y0, x0, y1, x1): the lower half is redrawn, or all around the middle.
LOWER_HALF, MIDDLE = (0.5, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75)

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a report is to show; checked against the bundle before anything runs."""

    classes: Sequence[int | str] | None = None  #: ids or names; None: up to ten, spread evenly
    per_class: int = 4
    seed: int = 0  #: of the first image
    sampling: Sampling
    batches: Sequence[int] = (1, 8)
    repeats: int = 5
    reference: bool = True  #: time eager PyTorch beside, where it is installed
    threads: int | None = None  #: of the engine and of that
    decoder: str = "auto"  #: of the onnx engine, as it was asked for
    picture: Image.Image | None = None  #: to edit; None: one of the bundle's own
    picture_name: str | None = None
    spoken: Spoken = field(default_factory=Spoken)
    private: Sequence[Path] = ()  #: paths besides the bundle's whose directories stay off the page


#: Compares the bundle with its checkpoints, run by the engine of this name: `Parity.to_dict` of var_export.
Verify = Callable[[str], Mapping[str, Any]]


def gather(
    path: Path,
    load: Callable[[Path], Pipeline],
    asked: Asked,
    *,
    verify: Verify | None = None,
    progress: Progress = lambda _: None,
) -> Facts:
    """Everything that the page says. load: as `var_deploy.load`, with the options that were chosen.

    verify: None where no checkpoints are at hand; what it notes in the manifest is read afterwards. Raises BundleError,
    EngineError and RequestError.
    """
    progress("reading the bundle")
    inspection = inspect_bundle(path, sorted(set(asked.batches)))
    labels = _labels(asked, Bundle.open(path, verify_digests=False).manifest)
    told = _Told([path, *asked.private])
    facts = _run(path, load, asked, labels, inspection, told, progress)  # the pipeline ends here, and gives up memory
    if verify is None:
        return facts
    progress("comparing with the checkpoints")
    parity = told.part("parity", lambda: verify(facts.engine.name))
    noted = Bundle.open(path, verify_digests=False).manifest.fidelity
    return replace(facts, parity=parity, fidelity=noted, missing=told.missing)


def _labels(asked: Asked, manifest: Manifest) -> list[int]:
    """Class ids to show. Raises RequestError for them, and for seeds and settings that no part could run with."""
    if asked.classes:
        labels = list(dict.fromkeys(request.label_ids(asked.classes, manifest).tolist()))
    else:
        labels = _spread(range(manifest.var.num_classes), max(1, min(CLASSES, MAX_SAMPLES // asked.per_class)))
    if not 1 <= asked.per_class <= MAX_SAMPLES // len(labels):
        raise RequestError(
            f"samples: {asked.per_class} of {len(labels)} classes, expected from 1 to {MAX_SAMPLES} in all; "
            "give other classes or another number per class"
        )
    request.seed_list(asked.seed, asked.per_class * len(labels))
    schedules.settings(manifest, **asked.sampling)
    return labels


def _spread(values: Sequence[int], count: int) -> list[int]:
    """As many of them, evenly from the first to the last."""
    places = np.linspace(0, len(values) - 1, min(count, len(values)))
    return [int(values[place]) for place in np.rint(places).astype(int)]


def _run(
    path: Path,
    load: Callable[[Path], Pipeline],
    asked: Asked,
    labels: list[int],
    inspection: Mapping[str, Any],
    told: _Told,
    progress: Progress,
) -> Facts:
    """All but what needs the checkpoints."""
    progress("loading")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    pipe = load(path)
    parts, name, manifest = _Parts(pipe, asked, labels, progress), path.resolve().name, pipe.bundle.manifest
    rows = told.part("timing", parts.timing)
    samples = told.part("samples", parts.samples)
    strips = told.part("strips", parts.strips)
    editing = told.part("editing", parts.editing)
    free(pipe.engine)
    return Facts(
        name=name,
        digest=pipe.bundle.digest,
        version=__version__,
        inspection={key: value for key, value in inspection.items() if key != "path"},
        engine=_engine(pipe, asked.decoder),
        load=load_average,
        bench=bench_record(pipe, rows or []),
        reference_asked=asked.reference,
        settings=schedules.settings(manifest, **asked.sampling),
        samples=samples,
        strips=strips,
        editing=editing,
        parity=None,
        fidelity=manifest.fidelity,
        missing=told.missing,
        commands=commands(
            name,
            manifest,
            asked.spoken,
            engine=pipe.engine.name,
            samples=samples,
            strips=strips,
            editing=editing,
        ),
    )


def _engine(pipe: Pipeline, decoder: str) -> EngineFacts:
    engine, device = pipe.engine, str(getattr(pipe.engine, "device", "cpu"))
    has_decoders = engine.name == "onnx" and device == "cpu"
    return EngineFacts(
        name=engine.name,
        device=device,
        precision=str(engine.precision),
        exact=engine.precision.exact,
        threads=getattr(engine, "threads", None),
        decoder=None if not has_decoders else str(default_decoder(pipe.bundle)) if decoder == "auto" else decoder,
    )


class _Told:
    """Which parts could not be made, and why."""

    def __init__(self, private: Sequence[Path]) -> None:
        """private: paths whose directories are left out of what is told."""
        self._private = private
        self.missing: dict[str, str] = {}

    def part(self, name: str, make: Callable[[], Part]) -> Part | None:
        """What `make` gives, or None and the reason under `missing`."""
        try:
            return make()
        except VarDeployError as error:
            self.missing[name] = self._public(" ".join(str(error).split()))
            return None

    def _public(self, text: str) -> str:
        paths = {str(form): path for path in self._private for form in (path, path.absolute(), path.resolve())}
        for form in sorted(paths, key=len, reverse=True):
            text = text.replace(form, paths[form].resolve().name)
        return text


class _Parts:
    """The parts that the loaded bundle makes."""

    def __init__(self, pipe: Pipeline, asked: Asked, labels: list[int], progress: Progress) -> None:
        self._pipe, self._asked, self._labels, self._progress = pipe, asked, labels, progress

    def timing(self) -> list[BenchRow]:
        asked = self._asked
        return bench(
            self._pipe,
            batches=asked.batches,
            repeats=asked.repeats,
            reference=asked.reference,
            threads=asked.threads,
            progress=self._progress,
        )

    def samples(self) -> tuple[tuple[Shot, ...], ...]:
        """A row per class. A seed's images are one request, so `generate` makes them again with one command each."""
        columns = []
        for column in range(self._asked.per_class):
            self._progress(f"samples, {column + 1} of {self._asked.per_class} a class")
            seed = self._asked.seed + column * len(self._labels)
            columns.append(_shots(self._pipe.generate(self._labels, seeds=seed, **self._asked.sampling)))
        return tuple(zip(*columns, strict=True))

    def strips(self) -> tuple[Strip, ...]:
        self._progress("coarse to fine")
        labels, asked = self._labels[:STRIPS], self._asked
        frames: list[list[Image.Image]] = [[] for _ in range(self._pipe.bundle.manifest.var.num_scales)]

        def on_scale(preview: Preview) -> None:
            frames[preview.scale] += preview.images  # of a part, where the batch is split

        self._pipe.generate(labels, seeds=asked.seed, on_scale=on_scale, **asked.sampling)
        by_image = zip(*frames, strict=True)
        return tuple(
            Strip(pngs=tuple(map(_png, images)), label=label, seed=asked.seed + index)
            for index, (label, images) in enumerate(zip(labels, by_image, strict=True))
        )

    def editing(self) -> Editing:
        pipe, asked, config = self._pipe, self._asked, self._pipe.bundle.manifest.vqvae
        self._progress("editing")
        picture, label, seed = asked.picture, None, None
        if picture is None:
            label, seed = self._labels[0], asked.seed
            picture = pipe.generate([label], seeds=seed, **asked.sampling).images[0]
        given_13RR = pixels_from_images([picture], config.image_size)
        rebuilt_13RR = pipe.reconstruct([picture])
        labels = _spread(self._labels, EDITS)
        seeds = [asked.seed + index for index in range(len(labels))]
        edits = []
        for mode, box in (("inpaint", LOWER_HALF), ("outpaint", MIDDLE)):
            self._progress(f"editing, {mode}")
            made = pipe.edit([picture], labels, box=box, mode=mode, seeds=seeds, **asked.sampling)
            bounds = _bounds(region(box, None, None, config)[0])
            edits.append(Edit(kind=mode, box=bounds, from_scale=None, shots=_shots(made)))
        self._progress("editing, vary")
        middle = config.num_scales // 2
        made = pipe.vary([picture], labels, from_scale=middle, seeds=seeds, **asked.sampling)
        edits.append(Edit(kind="vary", box=None, from_scale=middle, shots=_shots(made)))
        mean_square = float(np.square(rebuilt_13RR.astype(np.float64) - given_13RR).mean())
        return Editing(
            given=_png(images_from_pixels(given_13RR)[0]),
            given_name=asked.picture_name if asked.picture is not None else None,
            label=label,
            seed=seed,
            reconstruction=_png(images_from_pixels(rebuilt_13RR)[0]),
            psnr=float(-10 * np.log10(max(mean_square, 1e-20))),
            edits=tuple(edits),
        )


def _bounds(region_hh: np.ndarray) -> tuple[float, float, float, float]:
    """(y0, x0, y1, x1) of the tokens that are set, as parts of the side."""
    rows, columns = (np.flatnonzero(region_hh.any(axis=axis)) for axis in (1, 0))
    h = len(region_hh)
    return tuple(float(edge) / h for edge in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))  # type: ignore[return-value]


def _shots(made: Generation) -> tuple[Shot, ...]:
    return tuple(
        Shot(png=_png(image, recipe), label=recipe.label, seed=recipe.seed)
        for image, recipe in zip(made.images, made.recipes, strict=True)
    )


def _png(image: Image.Image, recipe: Recipe | None = None) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True, pnginfo=None if recipe is None else recipe.png_info())
    return file.getvalue()
