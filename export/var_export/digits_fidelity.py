"""Are the digits that a bundle draws still digits? Samples of an engine beside as many of the float32 reference.

For bundles of the digits example alone: the judge is a classifier of digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.errors import RequestError
from var_deploy.pipeline import Pipeline
from var_deploy.schedules import Sampling
from var_train import VAR, VQVAE
from var_train.digits import GUIDANCE, TOP_K, TOP_P, generate_digits
from var_train.digits_data import DigitsSplit, load_split
from var_train.digits_quality import DigitsJudge, LabelledImages, feature_distance

#: Images at a time.
BATCH = 100

#: How much of the reference's accuracy may be lost.
MAX_ACCURACY_LOSS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsFidelity:
    """Guided samples, the same number of every digit."""

    images: int
    accuracy: float  #: share of an engine's images that the judge sees as their digit
    reference_accuracy: float  #: of the reference's
    feature_distance: float  #: Fréchet distance between the two, in the judge's features
    reference_distance: float  #: between two draws of the reference: what chance alone makes

    @property
    def passed(self) -> bool:
        """Whether the accuracy is that of the reference, within one point."""
        return self.accuracy >= self.reference_accuracy - MAX_ACCURACY_LOSS  # a NaN fails too


def digits_split(var: VARConfig, vqvae: VQVAEConfig) -> DigitsSplit:
    """The real digits, to judge samples of a model by.

    Raises RequestError for a model of anything else, VarDeployError where scikit-learn is missing.
    """
    split = load_split()
    classes, side = var.num_classes, split.train.images_N3RR.shape[-1]
    if (classes, vqvae.image_size) != (10, side):
        raise RequestError(
            f"digits: the bundle makes {classes} classes at {vqvae.image_size} px, expected 10 at {side}; "
            "leave --digits out, or give a bundle of the digits example"
        )
    return split


def digits_fidelity(
    pipe: Pipeline,
    var: VAR,
    vqvae: VQVAE,
    split: DigitsSplit,
    *,
    images: int = 1000,
    progress: Callable[[str], None] = lambda _: None,
) -> DigitsFidelity:
    """Draws and judges."""
    classes = var.config.num_classes
    per_class = max(images // classes, 1)
    judge = DigitsJudge(split.train)
    progress(f"{per_class * classes} digits of the reference, twice")
    reference, again = (generate_digits(vqvae, var, per_class=per_class, seed=seed) for seed in (0, 1))
    progress(f"{per_class * classes} digits of the engine")
    ours = engine_digits(pipe, per_class)
    finite = bool(np.isfinite(ours.images_N3RR).all())  # else there is nothing to judge
    return DigitsFidelity(
        images=len(ours.labels_N),
        accuracy=float(judge.right_N(ours).mean()) if finite else np.nan,
        reference_accuracy=float(judge.right_N(reference).mean()),
        feature_distance=feature_distance(ours, reference) if finite else np.nan,
        reference_distance=feature_distance(again, reference),
    )


def engine_digits(
    pipe: Pipeline, per_class: int, *, first_seed: int = 0, on_images: Callable[[int], object] = lambda _: None
) -> LabelledImages:
    """`per_class` images of every class, image i with seed `first_seed` + i, as the shipped model is judged."""
    labels_N = np.arange(pipe.bundle.manifest.var.num_classes).repeat(per_class)
    how: Sampling = {"guidance": GUIDANCE, "top_k": TOP_K, "top_p": TOP_P}
    pixels = []
    for i in range(0, len(labels_N), BATCH):
        labels = labels_N[i : i + BATCH].tolist()
        pixels.append(pipe.generate(labels, seeds=first_seed + i, **how).pixels)
        on_images(i + len(labels))
    return LabelledImages(np.concatenate(pixels), labels_N)
