"""Numbers of the published models, at which kernels are timed and compiled."""

from __future__ import annotations

from .reference import HEAD_DIM

V, C = 4096, 32  # codebook
PLAIN_SCALE = 0.25 / HEAD_DIM**0.5  # softmax scale of attention whose queries and keys are not of unit length
WIDTH = {"d16": 1024, "d30": 1920, "d36-s": 2304}
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
#: Sides of the token maps.
SCALES = {"d16": SCALES_256, "d30": SCALES_256, "d36-s": SCALES_512}


def positions(scales: tuple[int, ...]) -> int:
    """Tokens of these scales together."""
    return sum(side**2 for side in scales)
