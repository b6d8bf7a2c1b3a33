"""Quality of generated digits as a pure function of arrays: are they the digits asked for, and are they copies?

Feed it images of any engine. Axes: N images, R image side, P = R² pixels of the grey image.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from var_deploy.errors import RequestError, VarDeployError
from var_deploy.evaluation.metrics import Gaussian, frechet_distance

SVM_SIDE = 8  # scikit-learn's digits are 8×8; every image is shrunk to that before it is classified
SVM_C = 10.0


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images in [0, 1] and what digit each one shows."""

    images_N3RR: np.ndarray  #: float32, or uint8 in 0…255
    labels_N: np.ndarray

    def grey_NRR(self) -> np.ndarray:
        """Mean of the channels as float32 in [0, 1]."""
        images_N3RR = self.images_N3RR
        scale = 255.0 if images_N3RR.dtype == np.uint8 else 1.0
        return images_N3RR.astype(np.float32).mean(axis=1) / np.float32(scale)


def import_sklearn(submodule: str) -> Any:
    """`sklearn.<submodule>`, or an error that names the extra which brings it."""
    try:
        return importlib.import_module(f"sklearn.{submodule}")
    except ImportError as error:
        raise VarDeployError(
            "the digits example needs scikit-learn, which is not installed; run: pip install var-deploy[digits]"
        ) from error


class DigitsJudge:
    """A support vector machine on 8×8 pixels, fitted on real training images alone."""

    def __init__(self, train: LabelledImages) -> None:
        self._classifier = import_sklearn("svm").SVC(kernel="rbf", C=SVM_C).fit(features_NF(train), train.labels_N)

    def right_N(self, images: LabelledImages) -> np.ndarray:
        """Which images are seen as their label."""
        return np.asarray(self._classifier.predict(features_NF(images)) == images.labels_N)


def feature_distance(a: LabelledImages, b: LabelledImages) -> float:
    """Fréchet distance of Gaussians fitted to the features the judge sees, as FID takes those of another network."""
    return frechet_distance(*(Gaussian.of_rows(features_NF(images)) for images in (a, b)))


def quality_report(generated: LabelledImages, train: LabelledImages, held_out: LabelledImages) -> dict[str, Any]:
    """JSON-ready report on generated images beside the same measures on real held-out ones.

    `accuracy`: part of the images that an SVM, fitted on the real training split alone, sees as their label.
    `distance`: root mean square pixel difference (0…1) to the nearest training image, on the grey images.
    """
    for name, images in (("generated", generated), ("train", train), ("held_out", held_out)):
        _check(name, images, train.images_N3RR.shape[-1])
    judge = DigitsJudge(train)
    report: dict[str, Any] = {}
    for name, images in (("generated", generated), ("held_out", held_out)):
        right_N = judge.right_N(images)
        report[name] = {
            "images": len(right_N),
            "accuracy": float(right_N.mean()),
            "accuracy_per_digit": {
                str(digit): float(right_N[images.labels_N == digit].mean()) for digit in np.unique(images.labels_N)
            },
            "distance": distance_summary(images, train),
            "distinct": _count_distinct(images),
        }
    return report


def nearest_distance_N(images: LabelledImages, references: LabelledImages) -> np.ndarray:
    """min over references b of √mean((a − b)²) for every image a, on the grey images."""
    a_NP = images.grey_NRR().reshape(len(images.labels_N), -1)
    b_MP = references.grey_NRR().reshape(len(references.labels_N), -1)
    b_squared_M = (b_MP**2).sum(axis=1)
    nearest_N = np.concatenate(
        [(b_squared_M - 2 * block @ b_MP.T).argmin(axis=1) for block in np.array_split(a_NP, -(-len(a_NP) // 256))]
    )
    # The difference itself, because the expanded square above rounds a distance of zero to something else.
    return np.sqrt(((a_NP - b_MP[nearest_N]) ** 2).mean(axis=1))


def rms(a: LabelledImages, b: LabelledImages) -> float:
    """Root mean square pixel difference (0…1) of images that belong together."""
    return float(np.sqrt(np.mean((a.images_N3RR - b.images_N3RR) ** 2)))


def distance_summary(images: LabelledImages, references: LabelledImages) -> dict[str, float]:
    """Smallest, 5th percentile and median of `nearest_distance_N`."""
    distance_N = nearest_distance_N(images, references)
    return {
        "min": float(distance_N.min()),
        "p5": float(np.percentile(distance_N, 5)),
        "median": float(np.median(distance_N)),
    }


def save_grid(images: LabelledImages, path: Path, columns: int = 20) -> None:
    """PNG with the first `columns` images of every digit, one digit a row."""
    grey_NRR = images.grey_NRR()
    rows = [
        np.concatenate(list(grey_NRR[images.labels_N == digit][:columns]), axis=1)
        for digit in np.unique(images.labels_N)
    ]
    Image.fromarray(np.rint(np.concatenate(rows) * 255).astype(np.uint8)).save(path)


def _check(name: str, images: LabelledImages, side: int) -> None:
    shape, labels = images.images_N3RR.shape, len(images.labels_N)
    if shape != (labels, 3, side, side) or labels == 0 or side % SVM_SIDE:
        raise RequestError(
            f"{name}: images have shape {shape}, expected ({labels}, 3, {side}, {side}) for {labels} labels, "
            f"at least one image, and a side that {SVM_SIDE} divides; pass images of the model's own size"
        )


def features_NF(images: LabelledImages) -> np.ndarray:
    """What the judge sees: grey images shrunk to 8×8 by area, one row each, [N, 64]."""
    grey_NRR = images.grey_NRR()
    block = grey_NRR.shape[-1] // SVM_SIDE
    return grey_NRR.reshape(-1, SVM_SIDE, block, SVM_SIDE, block).mean(axis=(2, 4)).reshape(-1, SVM_SIDE**2)


def _count_distinct(images: LabelledImages) -> int:
    """Number of images that differ from each other after rounding to 8 bits."""
    rounded_NRR = np.rint(images.grey_NRR() * 255).astype(np.uint8)
    return len({image.tobytes() for image in rounded_NRR})
