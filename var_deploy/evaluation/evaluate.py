"""Samples beside a reference → FID, sFID, Inception score, precision and recall, and under which protocol they hold.

The file to read first. Features of the samples are held whole, 16 kB an image; images are not. Axes: N images,
D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from ..prepared import PreparedCache
from .bootstrap import bootstrap_interval
from .features import FeatureNetwork, load_features
from .metrics import NEIGHBOURS, FrechetDistance, Gaussian, inception_score, precision_recall
from .protocol import describe, differences_from_paper, read_notes
from .reference import load_reference, require_enough
from .samples import ImageSet, open_images

#: hears (what, done, total) while images are read and numbers are computed.
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured, and how surely."""

    few: bool = False  #: also with fewer images than a covariance of full rank needs
    bootstrap: int = 20  #: repeats of the confidence interval; 0: none
    manifolds: bool = True  #: precision and recall
    seed: int = 0  #: of the bootstrap

    def __post_init__(self) -> None:
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise RequestError(f"bootstrap: got {self.bootstrap}, expected 0 (off) or at least 2 repeats")


def evaluate(
    samples: Path,
    reference: Path,
    features: Path,
    *,
    options: Options,
    features_sha256: str | None = None,
    device: str = "auto",
    cache: PreparedCache | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """JSON-ready: the measures, each with a 95 % interval where there is one, and the protocol.

    samples, reference: folder of PNG files, or .npz; features: weights of FID's Inception. Raises RequestError and
    CheckpointError, for samples before anything is computed.
    """
    images = open_images(samples)
    notes = read_notes(images)
    require_enough(images, options.few, "samples")
    account = describe(images, notes)
    network = load_features(features, sha256=features_sha256, device=device)
    compared = load_reference(
        reference,
        network,
        size=images.size,
        few=options.few,
        manifold=options.manifolds,
        cache=cache,
        on_images=lambda done, total: progress("features of the reference", done, total),
    )
    pooled_ND, spatial_ND = _features(images, network, progress)
    measured = _Measured(options, progress)
    measured.distance("fid", pooled_ND, compared.pooled)
    measured.distance("sfid", spatial_ND, compared.spatial)
    logits_NK = pooled_ND @ network.classifier_KD.T
    measured.add("inception_score", len(logits_NK), lambda rows_N: inception_score(logits_NK[rows_N]))
    measured.manifolds(compared.manifold_ND, pooled_ND)
    differences = differences_from_paper(account)
    if not network.published:
        differences.append("features of other weights than the published ones")
    if compared.notes["statistics"] == "computed":
        differences.append("reference statistics computed from the images given")
    return {
        "measures": measured.values,
        "left_out": measured.left_out,
        "samples": account,
        "reference": compared.notes,
        "features": {"path": str(features), "sha256": network.sha256, "published": network.published},
        "device": str(network.device),
        "bootstrap": options.bootstrap,
        "differences_from_paper": differences,
    }


def _features(images: ImageSet, network: FeatureNetwork, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 2048] and [N, 2023]."""
    arrays: list[np.ndarray] = []
    start = 0
    for blocks in network.batches(images, lambda done: progress("features of the samples", done, images.count)):
        # One place for all of them: joining blocks at the end would take the memory twice.
        arrays = arrays or [np.empty((images.count, block_BD.shape[1]), dtype=np.float32) for block_BD in blocks]
        for array_ND, block_BD in zip(arrays, blocks, strict=True):
            array_ND[start : start + len(block_BD)] = block_BD
        start += len(blocks[0])
    pooled_ND, spatial_ND = arrays
    return pooled_ND, spatial_ND


class _Measured:
    """Values by name, and for what is left out the reason."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self._options, self._progress = options, progress

    def add(self, name: str, count: int, measure: Callable[[np.ndarray], float]) -> None:
        """measure(rows) of all rows, with its interval."""
        repeats, done = self._options.bootstrap, 0

        def counted(rows_N: np.ndarray) -> float:
            nonlocal done
            self._progress(f"{name}, with its interval" if repeats else name, done, repeats + 1)
            done += 1
            return measure(rows_N)

        value = counted(np.arange(count))
        interval = None
        if repeats:
            interval = list(bootstrap_interval(counted, count, value, repeats=repeats, seed=self._options.seed))
        self.values[name] = {"value": value, "interval": interval}

    def distance(self, name: str, features_ND: np.ndarray, reference: Gaussian | None) -> None:
        """Fréchet distance to the reference's Gaussian."""
        if reference is None:
            self.left_out[name] = "the reference has no statistics of spatial features (mu_s, sigma_s)"
            return
        distance_to = FrechetDistance(reference)
        self.add(name, len(features_ND), lambda rows_N: distance_to(Gaussian.of_rows(features_ND, rows_N)))

    def manifolds(self, reference_ND: np.ndarray | None, features_ND: np.ndarray) -> None:
        """Precision and recall."""
        if not self._options.manifolds:
            why = "not asked for"
        elif reference_ND is None:
            why = "the reference has statistics alone, no images"
        elif min(len(reference_ND), len(features_ND)) <= NEIGHBOURS:
            why = f"they need more than {NEIGHBOURS} images on both sides"
        else:
            self._progress("precision and recall", 0, 1)
            precision, recall = precision_recall(reference_ND, features_ND)
            # A resampled image is its own neighbour, which shrinks the balls: no interval that way.
            self.values["precision"] = {"value": precision, "interval": None}
            self.values["recall"] = {"value": recall, "interval": None}
            return
        self.left_out |= {"precision": why, "recall": why}
