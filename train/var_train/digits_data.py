"""scikit-learn's handwritten digits as training data: a fixed split, enlargement, augmentation, a data set of files.

Axes: N images, B images of a batch, R = 32 image side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from var_deploy.config import require

from .digits_quality import LabelledImages, import_sklearn
from .image_writer import Format, Sample, new_image_set

IMAGE_SIZE = 32
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 500
SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class DigitsSplit:
    """Real images as [N, 3, 32, 32] float32 in [0, 1]; training never sees `held_out`."""

    train: LabelledImages
    held_out: LabelledImages


def load_split() -> DigitsSplit:
    """The 1,797 digits in a fixed split, each digit equally well represented in both parts."""
    digits = import_sklearn("datasets").load_digits()
    images_N3RR = enlarge(torch.from_numpy(digits.images).float() / 16).numpy()
    train_N, held_out_N = import_sklearn("model_selection").train_test_split(
        np.arange(len(images_N3RR)), test_size=HELD_OUT, stratify=digits.target, random_state=SPLIT_SEED
    )
    return DigitsSplit(*(LabelledImages(images_N3RR[index], digits.target[index]) for index in (train_N, held_out_N)))


def enlarge(grey_N88: Tensor) -> Tensor:
    """8×8 grey images in [0, 1] → [N, 3, 32, 32] in [0, 1]: bicubic, then twice the contrast about mid-grey.

    The 8×8 images are block counts of 32×32 black-and-white scans; the contrast gives strokes their edges back.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    smooth_N1RR = F.interpolate(grey_N88[:, None], size=size, mode="bicubic")
    return (2 * smooth_N1RR - 0.5).clamp(0, 1).repeat(1, 3, 1, 1)


def augment(image_B3RR: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 8°, scaled by up to 8 % and moved by up to 1.5 pixels; black comes in from outside."""

    def uniform_B(limit: float) -> Tensor:
        return (2 * torch.rand(len(image_B3RR), generator=generator) - 1) * limit

    angle_B, scale_B = uniform_B(math.radians(8)), 1 + uniform_B(0.08)
    limit = 1.5 * 2 / image_B3RR.shape[-1]  # pixels → the grid's units, where the image is 2 wide
    cos_B, sin_B = scale_B * angle_B.cos(), scale_B * angle_B.sin()
    row_x = torch.stack([cos_B, -sin_B, uniform_B(limit)], dim=1)
    row_y = torch.stack([sin_B, cos_B, uniform_B(limit)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(image_B3RR.shape), align_corners=False)
    return F.grid_sample(image_B3RR, grid, align_corners=False)


def moved(images: LabelledImages, seed: int, passes: int = 1) -> LabelledImages:
    """Every image `passes` times, augmented, the passes one after the other."""
    generator = torch.Generator().manual_seed(seed)
    image_N3RR = torch.from_numpy(images.images_N3RR)
    augmented = [augment(image_N3RR, generator) for _ in range(passes)]
    return LabelledImages(torch.cat(augmented).numpy(), np.tile(images.labels_N, passes))


def write_digits(out: Path, *, variants: int, seed: int) -> tuple[int, int]:
    """Writes tar shards: every training digit `variants` times, augmented, and the held-out ones as they are.

    Returns how many images there are of both. Raises ConfigError, DataError.
    """
    require(variants >= 1, "variants", variants, "at least 1")
    split = load_split()
    train = moved(split.train, seed, variants)
    with new_image_set(out, CLASS_NAMES, Format.SHARDS) as add:
        add("train", _samples(train))
        add("val", _samples(split.held_out))
    return len(train.labels_N), len(split.held_out.labels_N)


def _samples(images: LabelledImages) -> Iterator[Sample]:
    numbers = [0] * len(CLASS_NAMES)
    pixels_NRR3 = np.rint(images.images_N3RR.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    for pixels_RR3, label in zip(pixels_NRR3, images.labels_N.tolist(), strict=True):
        yield Sample(label=label, index=numbers[label], image=Image.fromarray(pixels_RR3))
        numbers[label] += 1
