"""The decoder's output as pixels: float planes and 8-bit RGB in one pass; see `reference.to_pixels`.

    pixel = clamp((x + bias_c + 1)/2, 0, 1);   byte = pixel·255, rounded to nearest, halves to even

Expected to be bound by memory, not measured yet: x is read once, both results are written once. One program per run of
pixels of an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, require_contiguous, require_dtype, require_shape

BLOCK = 512  # pixels of a program: four neighbours per thread, one 16-byte store to a plane; not measured yet


def to_pixels(x_Bl3: Tensor, bias_3: Tensor, *, pixels_out_B3RR: Tensor, bytes_out_BRR3: Tensor) -> None:
    """See `reference.to_pixels`. A pixel that is NaN becomes 0."""
    B, pixels, R = x_Bl3.shape[0], x_Bl3.shape[1], pixels_out_B3RR.shape[-1]
    require_contiguous(x_Bl3=x_Bl3, bias_3=bias_3, pixels_out_B3RR=pixels_out_B3RR, bytes_out_BRR3=bytes_out_BRR3)
    require_shape("x_Bl3", x_Bl3, B, R * R, 3)
    require_shape("bias_3", bias_3, 3)
    require_shape("pixels_out_B3RR", pixels_out_B3RR, B, 3, R, R)
    require_shape("bytes_out_BRR3", bytes_out_BRR3, B, R, R, 3)
    require_dtype("pixels_out_B3RR", pixels_out_B3RR, torch.float32)
    require_dtype("bytes_out_BRR3", bytes_out_BRR3, torch.uint8)
    launch(
        _to_pixels_kernel,
        (cdiv(pixels, BLOCK), B),
        {
            "x_ptr": x_Bl3,
            "bias_ptr": bias_3,
            "pixels_ptr": pixels_out_B3RR,
            "bytes_ptr": bytes_out_BRR3,
            "pixels": pixels,
        },
        {"BLOCK": BLOCK},
    )


@triton.jit
def _to_pixels_kernel(
    x_ptr,  # [B, pixels, 3]
    bias_ptr,  # [3]
    pixels_ptr,  # float32 [B, 3, pixels]
    bytes_ptr,  # uint8 [B, pixels, 3]
    pixels,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    first = image * pixels * 3
    for channel in tl.static_range(3):
        x = tl.load(x_ptr + first + pixel * 3 + channel, mask=inside, other=0.0).to(tl.float32)
        unit = (x + tl.load(bias_ptr + channel).to(tl.float32)) * 0.5 + 0.5
        unit = tl.minimum(tl.where(unit > 0, unit, 0.0), 1.0)  # a comparison with NaN is false, so NaN becomes 0
        tl.store(pixels_ptr + first + channel * pixels + pixel, unit, mask=inside)
        # Adding 2²³ leaves no bits for a fraction, so the addition itself rounds, halves to even. What is rounded must
        # be the float32 product unit·255: 256·unit is exact, so the difference is that product whether or not the
        # compiler fuses it, and nothing is left to fuse with the sum. Only `reassoc` could undo it, which Triton never
        # sets.
        level = unit * 256.0 - unit
        level = (level + 8388608.0) - 8388608.0
        tl.store(bytes_ptr + first + pixel * 3 + channel, level.to(tl.uint8), mask=inside)
