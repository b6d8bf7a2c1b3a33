"""Which tokens an edit keeps: a box or a mask → per scale, the positions that keep the given picture's tokens.

Zero-shot editing of the VAR paper (section 5.3): tokens of a picture stay where a mask says so and are drawn elsewhere,
scale by scale. A region is what is redrawn by in-painting and kept by out-painting. Axes: B images, h side of the
feature map and of the last scale, p side of a scale, L positions of all scales, R side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image

from .config import VQVAEConfig
from .errors import RequestError
from .images import fitted, upright_mask
from .interpolation import area_matrix, bilinear
from .request import is_number, listed

#: A scale of so few positions is kept whole, as published: it holds the picture's mean colour.
SMALLEST_MAP = 3


class Mode(StrEnum):
    """What becomes of the region inside a box, or where a mask is set."""

    INPAINT = "inpaint"  #: redrawn; the rest is kept
    OUTPAINT = "outpaint"  #: kept; the rest is redrawn

    @classmethod
    def parse(cls, text: str) -> Mode:
        """Raises RequestError."""
        try:
            return cls(text)
        except ValueError:
            raise RequestError(f"mode: got {text!r}, expected inpaint or outpaint") from None


def region(
    box: Sequence[float] | None, mask: Any | None, sizes: list[tuple[int, int]] | None, config: VQVAEConfig
) -> np.ndarray:
    """The region of every picture on the last scale's grid: float32 [B or 1, h, h] from 0 to 1.

    box: (y0, x0, y1, x1) as parts of the picture's sides, rounded to tokens as published. mask: one, or one per
    picture; each a picture or an array, bool, 8-bit or float from 0 to 1, of h×h, R×R or the picture's own size, to
    which what cuts the picture is applied too. sizes: (width, height) of the pictures; None where they came as an
    array. Raises RequestError.
    """
    if (box is None) == (mask is None):
        raise RequestError(f"edit: got {'neither' if box is None else 'both'}, expected either a box or a mask")
    if box is not None:
        return _box_region(box, config.latent_size)[None]
    several = isinstance(mask, list | tuple) or (isinstance(mask, np.ndarray) and mask.ndim == 3)
    masks: list[Any] = list(mask) if mask is not None and several else [mask]
    if not masks:
        raise RequestError("mask: got none, expected one, or one per image")
    # A mask for several pictures is of their own size only where they have the same.
    own: list[tuple[int, int] | None] = [sizes[0] if sizes and len(set(sizes)) == 1 else None] * len(masks)
    if sizes is not None and len(sizes) == len(masks):
        own = list(sizes)
    return np.stack([_mask_region(one, size, config) for one, size in zip(masks, own, strict=True)])


def kept_positions(keep_Bhh: np.ndarray, config: VQVAEConfig) -> np.ndarray:
    """Which positions keep their token: bool [B, L].

    At a scale of side p the map is resized bilinearly to p×p, and a position is kept where it exceeds ½; a scale of at
    most three positions is kept whole. Where nothing of the last scale is kept, nothing is: that is not an edit, but
    a generation.
    """
    scales = []
    for p in config.patch_nums:
        kept_Bpp = bilinear(keep_Bhh, p) > 0.5
        if p * p <= SMALLEST_MAP:
            kept_Bpp[:] = True
        scales.append(kept_Bpp.reshape(len(keep_Bhh), -1))
    kept_BL = np.concatenate(scales, axis=1)
    kept_BL[~scales[-1].any(axis=1)] = False
    return kept_BL


def composited(pixels_B3RR: np.ndarray, original_B3RR: np.ndarray, kept_Bhh: np.ndarray) -> np.ndarray:
    """The original's pixels where tokens of the last scale were kept: float32 [B, 3, R, R].

    The seam runs over one token's width, half of it on either side, because a decoder spreads what a token holds.
    """
    share_B1RR = bilinear(kept_Bhh, pixels_B3RR.shape[-1])[:, None]
    blended = pixels_B3RR + share_B1RR * (original_B3RR - pixels_B3RR)
    return np.where(share_B1RR == 1, original_B3RR, blended).astype(np.float32)


def _box_region(box: Sequence[float], h: int) -> np.ndarray:
    values, several = listed(box)
    if not several or len(values) != 4 or not all(is_number(value) and 0 <= value <= 1 for value in values):
        raise RequestError(f"box: got {box!r}, expected (y0, x0, y1, x1), parts of the sides from 0 to 1")
    y0, x0, y1, x1 = (float(value) for value in values)
    if y0 > y1 or x0 > x1:
        raise RequestError(f"box: got {box!r}, expected y0 ≤ y1 and x0 ≤ x1")
    inside_hh = np.zeros((h, h), dtype=np.float32)
    inside_hh[round(y0 * h) : round(y1 * h), round(x0 * h) : round(x1 * h)] = 1
    if y0 < y1 and x0 < x1 and not inside_hh.any():
        raise RequestError(f"box: got {box!r}, which covers no token of {h}×{h}; make it larger")
    return inside_hh


def _mask_region(mask: Any, size: tuple[int, int] | None, config: VQVAEConfig) -> np.ndarray:
    """float32 [h, h]; size: (width, height) of the picture that it belongs to, where that may be the mask's."""
    h, R = config.latent_size, config.image_size
    values_HW = _mask_values(mask)
    H, W = values_HW.shape
    if (h, h) == (H, W):
        return values_HW
    if size == (W, H) and (W, H) != (R, R):
        values_HW = np.asarray(fitted(Image.fromarray(values_HW), R, Image.Resampling.BILINEAR))
    elif (H, W) != (R, R):
        own = "" if size is None else f"the picture's {size[0]}×{size[1]}, "
        raise RequestError(f"mask: got {W}×{H}, expected {own}{R}×{R}, or {h}×{h}, one value per token")
    shrink = area_matrix(R, h)
    region_hh = (shrink @ values_HW @ shrink.T).clip(0, 1).astype(np.float32)
    if values_HW.any() and not (region_hh > 0.5).any():
        raise RequestError(f"mask: sets less than half of every token of {h}×{h}; make it larger")
    return region_hh


def _mask_values(mask: Any) -> np.ndarray:
    """float32 [H, W] in [0, 1]."""
    if isinstance(mask, Image.Image):
        mask = upright_mask(mask)
    try:
        values = np.asarray(mask)
    except ValueError as error:  # rows of several lengths
        raise RequestError(f"mask: expected a picture or an array ({error})") from error
    if values.ndim != 2 or not values.size:
        raise RequestError(f"mask: array of shape {values.shape}, expected two axes, or three for one mask per image")
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255
    if not (values.dtype == bool or np.issubdtype(values.dtype, np.number)):
        raise RequestError(f"mask: array of {values.dtype}, expected bool, uint8, or numbers in [0, 1]")
    values_HW = values.astype(np.float32)
    if not (np.isfinite(values_HW).all() and values_HW.min() >= 0 and values_HW.max() <= 1):
        raise RequestError("mask: values outside [0, 1]; scale 8-bit values by 1/255, or give uint8")
    return values_HW
