"""What a request gives back: images, tokens and how they were made; and previews while it runs.

Axes: B images, n_k tokens of scale k, C code width, h side of the feature map, R side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from .engines import Engine
from .images import images_from_pixels
from .recipe import Recipe


@dataclass(frozen=True, eq=False)
class Preview:
    """What `on_scale` hears after scale `scale` was drawn and added to the feature map."""

    scale: int
    num_scales: int
    tokens_Bn: np.ndarray
    f_hat_BChh: np.ndarray
    _engine: Engine = field(repr=False)
    #: Position in the request of the first image that it covers: 0, but for the later parts of a batch that was split.
    first: int = 0

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images so far; the decoder runs when this is first read, so it costs nothing unless looked at."""
        return images_from_pixels(self._engine.decode(self.f_hat_BChh))


@dataclass(frozen=True, eq=False)
class Generation:
    """The result of one request."""

    #: Per scale, int64 [B, n_k]: the tokens, drawn or given. With `smooth`, drawn ones stand for mixtures of codes.
    tokens: list[np.ndarray]
    #: Seconds per stage: condition, scale_00 …, draw, finish, decode; of a CUDA graph: upload, replay, download.
    timings: dict[str, float]
    _pixels: Callable[[], np.ndarray] = field(repr=False)
    _bytes_BRR3: np.ndarray | None = field(default=None, repr=False)
    #: Runs that the batch took, one after the other, to fit in memory.
    parts: int = 1
    #: Per image, what it can be made from again; `Recipe.png_info` stores it in a picture.
    recipes: tuple[Recipe, ...] = field(default=(), repr=False)

    @cached_property
    def pixels(self) -> np.ndarray:
        """float32 [B, 3, R, R] in [0, 1]; fetched from a GPU when first read, pictures are a quarter."""
        return self._pixels()

    @cached_property
    def images(self) -> list[Image.Image]:
        """8-bit pictures."""
        if self._bytes_BRR3 is None:
            return images_from_pixels(self.pixels)
        return [Image.fromarray(image) for image in self._bytes_BRR3]
