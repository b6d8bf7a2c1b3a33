"""Reference images → what samples are compared with: Gaussians of features, and features for precision and recall.

Statistics that an .npz brings are used as they are; what is computed from images is kept for the next time. Axes: N
images, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..errors import RequestError
from ..prepared import PreparedCache
from ..products import single_threaded
from .features import FeatureNetwork
from .inception import POOL, SPATIAL
from .metrics import Gaussian, Moments
from .samples import ImageSet, open_reference

#: Images that precision and recall are measured against: so many are in guided-diffusion's references. Of more, as many
#: are taken at equal steps.
MANIFOLD_IMAGES = 10_000
#: Counts up when the same images would give other features or statistics.
VERSION = 1
FILE = "reference.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Reference:
    """What samples are compared with."""

    pooled: Gaussian
    spatial: Gaussian | None
    manifold_ND: np.ndarray | None  #: pooled features, float32
    #: For the record: images, size, where the statistics are from, images of the manifold.
    notes: dict[str, Any]


def load_reference(
    path: Path,
    network: FeatureNetwork,
    *,
    size: tuple[int, int],
    few: bool = False,
    manifold: bool = True,
    cache: PreparedCache | None = None,
    on_images: Callable[[int, int], object] = lambda done, total: None,
) -> Reference:
    """From a folder of PNG files or an .npz with images, statistics or both.

    size: height and width of the samples, which the reference's images must have; few: accept statistics of too few
    images; manifold: features are wanted. on_images(done, total) hears of progress. Raises RequestError.
    """
    images, statistics = open_reference(path)
    if images is not None and images.size != size:
        ours, theirs = (f"{width}×{height}" for height, width in (size, images.size))
        raise RequestError(
            f"{path}: reference images of {theirs} pixels, samples of {ours}; compare images of one size"
        )
    given = _given(path, statistics)
    if given and not network.published:
        raise RequestError(
            f"{path}: its statistics are of the published network's features, {network.path} is another file (sha256 "
            f"{network.sha256[:16]}…); give the published weights, say with --features-sha256 that these are the same, "
            "or give reference images without statistics"
        )
    if not given and images is not None:
        require_enough(images, few, "reference")
    notes: dict[str, Any] = {
        "path": str(path),
        "images": None if images is None else images.count,
        "statistics": "of the file" if given else "computed",
    }
    computed: dict[str, np.ndarray] = {}
    if images is not None and (manifold or not given):
        computed, kept = _computed(images, network, wanted=not given, cache=cache, on_images=on_images)
        notes["features"] = "kept" if kept else "computed"
    gaussians = given or {name: _gaussian(computed, name) for name in ("pooled", "spatial")}
    return Reference(
        pooled=gaussians["pooled"],
        spatial=gaussians.get("spatial"),
        manifold_ND=computed.get("manifold") if manifold else None,
        notes=notes | {"manifold": len(computed["manifold"]) if manifold and computed else 0},
    )


def require_enough(images: ImageSet, few: bool, what: str) -> None:
    """Refuses sets whose covariance cannot have full rank, unless `few`. Raises RequestError."""
    if images.count <= POOL and not (few and images.count > 1):
        raise RequestError(
            f"{images.path}: {images.count} images of the {what}, expected more than {POOL}: with fewer a covariance "
            f"of {POOL} features has no full rank, and the fewer images the larger the FID (papers take 50,000); "
            "sample more, or add --few to see the numbers all the same"
        )


def _given(path: Path, statistics: dict[str, np.ndarray]) -> dict[str, Gaussian]:
    """The statistics of a file, checked: pooled, and spatial where they are there."""
    if not statistics:
        return {}
    found = {}
    for part, suffix, width in (("pooled", "", POOL), ("spatial", "_s", SPATIAL)):
        mean_D, covariance_DD = (statistics.get(f"{name}{suffix}") for name in ("mu", "sigma"))
        if part == "spatial" and mean_D is None and covariance_DD is None:
            continue
        for name, array, shape in (("mu", mean_D, (width,)), ("sigma", covariance_DD, (width, width))):
            if array is None or array.shape != shape or not np.issubdtype(array.dtype, np.floating):
                got = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise RequestError(
                    f"{path}: {name}{suffix}: got {got}, expected float {shape}: statistics of other features, or "
                    "damaged; give those of FID's Inception, or reference images"
                )
            if not np.isfinite(array).all():
                raise RequestError(f"{path}: {name}{suffix} holds NaN or infinity; make or copy it again")
        assert mean_D is not None
        assert covariance_DD is not None
        if problem := _no_covariance(covariance_DD.astype(np.float64)):
            raise RequestError(f"{path}: sigma{suffix} is no covariance: {problem}; make or copy it again")
        found[part] = Gaussian(mean_D=mean_D.astype(np.float64), covariance_DD=covariance_DD.astype(np.float64))
    return found


def _no_covariance(covariance_DD: np.ndarray) -> str | None:
    """What a covariance is not, beyond rounding; None: it may be one."""
    largest = np.abs(covariance_DD).max()
    if largest > 1e12:
        return f"it holds {largest:.1e}"
    if np.abs(covariance_DD - covariance_DD.T).max() > 1e-6 * largest:
        return "it is not symmetric"
    with single_threaded():
        values_D = np.linalg.eigvalsh(covariance_DD)
    return f"its eigenvalue {values_D[0]:.1e} is negative" if values_D[0] < -1e-6 * largest * len(values_D) else None


def _computed(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    wanted: bool,
    cache: PreparedCache | None,
    on_images: Callable[[int, int], object],
) -> tuple[dict[str, np.ndarray], bool]:
    """(arrays of `FILE`, whether they were kept from an earlier time); `wanted`: with statistics."""
    if cache is None:
        return _compute(images, network, wanted, on_images), False
    made_from = (str(VERSION), network.sha256, network.device.type, images.digest(), str(images.size), str(wanted))
    if (entry := cache.find("reference", made_from)) is not None:
        return load_file(entry / FILE), True
    arrays = _compute(images, network, wanted, on_images)
    size = sum(array.nbytes for array in arrays.values())
    cache.entry("reference", made_from, size, lambda directory: save_file(arrays, directory / FILE))
    return arrays, False


def _compute(
    images: ImageSet, network: FeatureNetwork, wanted: bool, on_images: Callable[[int, int], object]
) -> dict[str, np.ndarray]:
    """Reads the images once; memory does not depend on their number."""
    total = images.count
    # With `wanted` off an image that is not in the manifold has its features computed for nothing; such files have few.
    chosen_N = np.zeros(total, dtype=bool)
    chosen_N[np.linspace(0, total - 1, min(total, MANIFOLD_IMAGES)).round().astype(int)] = True
    moments = {"pooled": Moments(POOL), "spatial": Moments(SPATIAL)}
    manifold, done = [], 0
    for features in network.batches(images, lambda count: on_images(count, total)):
        if wanted:
            for part, block_BD in zip(moments.values(), features, strict=True):
                part.add(block_BD)
        pooled_BD = features[0]
        manifold.append(pooled_BD[chosen_N[done : done + len(pooled_BD)]])
        done += len(pooled_BD)
    arrays = {"manifold": np.concatenate(manifold)}
    if wanted:
        for name, part in moments.items():
            gaussian = part.gaussian()
            arrays |= {f"{name}_mean": gaussian.mean_D, f"{name}_covariance": gaussian.covariance_DD}
    return arrays


def _gaussian(arrays: dict[str, np.ndarray], name: str) -> Gaussian:
    return Gaussian(mean_D=arrays[f"{name}_mean"], covariance_DD=arrays[f"{name}_covariance"])
