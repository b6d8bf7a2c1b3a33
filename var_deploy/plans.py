"""TensorRT plans beside a bundle: where they lie, what they were built from, and whether they are whole.

`BUNDLE/plans/<GPU>-<TensorRT>/<layout>[-plugins]-<batch>/` holds `plans.json`, a `.plan` for every graph, and compiled
kernels of the draw. A plan runs on that model of GPU with that version of TensorRT, and with the bundle it was built
from, alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .bundle import Bundle, FileSeal
from .errors import EngineError, RequestError, VarDeployError
from .gpu import Gpu
from .precision import Precision
from .signature import GraphSpec, TensorSpec, scale_graph_name

#: The record of a directory of plans, and its compiled kernels.
RECORD, KERNELS_DIRECTORY = "plans.json", "kernels"


class Layout(StrEnum):
    """How the scales are laid out in plans."""

    PER_SCALE = "per-scale"
    PROFILES = "profiles"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Raises RequestError."""
        if text not in list(cls):
            raise RequestError(f"layout: got {text!r}, expected {' or '.join(cls)}")
        return cls(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images per request: the fewest, those that kernels are tuned for, the most."""

    least: int
    tuned: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Of "1:1:8", or of one number for all three. Raises RequestError."""
        parts = text.split(":")
        if len(parts) in (1, 3) and all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            least, tuned, most = map(int, parts * 3 if len(parts) == 1 else parts)
            if 1 <= least <= tuned <= most:
                return cls(least=least, tuned=tuned, most=most)
        raise RequestError(f"batch: got {text!r}, expected MIN:OPT:MAX of images with 1 ≤ MIN ≤ OPT ≤ MAX, like 1:1:8")

    def __str__(self) -> str:
        return f"{self.least}:{self.tuned}:{self.most}"


Shape = tuple[int, ...]


def input_ranges(
    spec: GraphSpec, batch: Batch, pinned: Mapping[str, int] | None = None
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Least, tuned and largest shape of every input of a graph; pinned: symbolic axes that are fixed.

    Rows run from one unguided image to the largest guided batch.
    """
    open_axes = {
        "R": (batch.least, 2 * batch.tuned, 2 * batch.most),
        "B": (batch.least, batch.tuned, batch.most),
        **{name: (length,) * 3 for name, length in (pinned or {}).items()},
    }

    def shape(tensor: TensorSpec, which: int) -> Shape:
        return tuple(axis if isinstance(axis, int) else open_axes[axis][which] for axis in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in spec.inputs}


def plan_names(num_scales: int, layout: Layout) -> list[str]:
    """Names of all plans of a bundle, which are those of their graphs, in the order in which they run."""
    scales = ["scales"] if layout is Layout.PROFILES else [scale_graph_name(k) for k in range(num_scales)]
    return ["condition", *scales, "finish", "decoder", "encoder"]


def plans_directory(
    bundle: Bundle, gpu: Gpu, version: str, layout: Layout, batch: Batch, *, plugins: bool = False
) -> Path:
    """Where plans of a bundle lie; plugins: those with kernels of ours inside, beside the plain ones."""
    kind = f"{layout}-plugins" if plugins else str(layout)
    return bundle.path / "plans" / gpu.directory(version) / f"{kind}-{batch}".replace(":", "-")


def weight_copies(layout: Layout, num_scales: int) -> int:
    """How often the transformer's weights lie in GPU memory."""
    return num_scales if layout is Layout.PER_SCALE else 1


def memory_needed(bundle: Bundle, batch: Batch, layout: Layout) -> int:
    """Bytes on the GPU that are there for certain when all plans are loaded: weights and caches.

    Activations and scratch memory come on top; only TensorRT knows them, once it has built.
    """
    manifest = bundle.manifest
    once = ("decoder.", "encoder.", "quant_conv.", "post_quant_conv.", "quantize.", "class_emb.")
    sizes = bundle.weight_bytes()
    # AdaLN projections and the embedding of classes are read by `condition` alone.
    transformer = sum(size for name, size in sizes.items() if not name.startswith(once) and "ada_" not in name)
    rest = sum(sizes.values()) - transformer
    var, cache_bytes = manifest.var, 4 if manifest.precision is Precision.FP32 else 2
    caches = cache_bytes * 2 * var.depth * 2 * batch.most * var.num_tokens * var.embed_dim
    return weight_copies(layout, var.num_scales) * transformer + rest + caches


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSet:
    """All plans of one layout and batch, as their record says."""

    bundle: Path
    directory: Path
    layout: Layout
    batch: Batch
    seals: dict[str, FileSeal]
    plugins: bool  #: kernels of ours inside
    kernels_sha256: str | None  #: of kernels.json; None: built without kernels

    def read(self, name: str) -> bytes:
        """A plan, checked against its seal. Raises EngineError."""
        file, seal = self.directory / f"{name}.plan", self.seals[name]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise EngineError(f"{file}: cannot be read ({error.strerror}); {_build(self.bundle)}") from error
        if len(data) != seal.size or hashlib.sha256(data).hexdigest() != seal.sha256:
            raise EngineError(f"{file}: damaged, it is not what was built; {_build(self.bundle)}")
        return data

    def kernels(self) -> Path:
        """The directory of the compiled kernels. Raises EngineError."""
        directory = self.directory / KERNELS_DIRECTORY
        record = directory / "kernels.json"
        if self.kernels_sha256 is None:
            raise EngineError(
                f"{self.directory}: built without kernels of the draw; install triton and {_build(self.bundle)}, "
                "or draw on the host"
            )
        try:
            digest = hashlib.sha256(record.read_bytes()).hexdigest()
        except OSError as error:
            raise EngineError(f"{record}: cannot be read ({error.strerror}); {_build(self.bundle)}") from error
        if digest != self.kernels_sha256:
            raise EngineError(f"{record}: damaged, it is not what was built; {_build(self.bundle)}")
        return directory


def find_plans(bundle: Bundle, gpu: Gpu, version: str, asked: str | None = None) -> PlanSet:
    """The plans of a bundle for this GPU and TensorRT: those asked for by the name of their directory, or of those that
    are whole the ones for the largest batch, plain ones before those with plugins, a plan per scale before one for all.
    Raises EngineError, saying what to build.
    """
    here, root = gpu.directory(version), bundle.path / "plans"
    place = root / here
    if not place.is_dir():
        others = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not others:
            raise EngineError(f"{bundle.path}: has no TensorRT plans; {_build(bundle.path)}")
        raise EngineError(f"{bundle.path}: has plans for {', '.join(others)}, this is {here}; {_build(bundle.path)}")
    found = sorted(path.name for path in place.iterdir() if (path / RECORD).is_file())
    if asked is not None and asked not in found:
        known = ", ".join(found) or "none"
        raise EngineError(f"{place}: has no plans {asked!r}, only {known}; {_build(bundle.path)}")
    problems, whole = [], []
    for name in found if asked is None else [asked]:
        try:
            whole.append(_plan_set(bundle, place / name))
        except EngineError as error:
            problems.append(str(error))
    if not whole:
        raise EngineError("; ".join(problems) or f"{place}: holds no finished plans; {_build(bundle.path)}")
    return max(whole, key=lambda plans: (plans.batch.most, not plans.plugins, plans.layout is Layout.PER_SCALE))


def _plan_set(bundle: Bundle, directory: Path) -> PlanSet:
    path = directory / RECORD
    try:
        record = json.loads(path.read_text())
        layout, batch = Layout.parse(record["layout"]), Batch.parse(record["batch"])
        seals = {name: FileSeal(size=seal["size"], sha256=seal["sha256"]) for name, seal in record["plans"].items()}
        kernels, plugins = record.get("kernels"), bool(record.get("plugins"))
        made_from = record["bundle"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, VarDeployError) as error:
        raise EngineError(f"{path}: damaged ({error}); {_build(bundle.path)}") from error
    if made_from != bundle.digest:
        raise EngineError(f"{directory}: built from another export of this bundle; {_build(bundle.path)}")
    if missing := [name for name in plan_names(bundle.manifest.var.num_scales, layout) if name not in seals]:
        raise EngineError(f"{directory}: not finished, {', '.join(missing)} missing; {_build(bundle.path)}")
    return PlanSet(
        bundle=bundle.path,
        directory=directory,
        layout=layout,
        batch=batch,
        seals=seals,
        plugins=plugins,
        kernels_sha256=kernels,
    )


def _build(bundle: Path) -> str:
    return f"run var-deploy build {bundle} on this machine"
