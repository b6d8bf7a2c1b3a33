"""How many kernels and library calls one generation of the torch engine replays, counted from the configuration.

At a batch of one this number is expected to decide, as every launch inside a CUDA graph takes its time whatever it
computes; how much is not measured yet. A library call counts once; where a library splits one into several kernels, the
graph has more nodes than said here.
"""

from __future__ import annotations

from .config import VARConfig, VQVAEConfig
from .precision import Precision


def launch_counts(
    var: VARConfig, vqvae: VQVAEConfig, precision: Precision, *, smooth: bool = False, decode_slices: int = 1
) -> dict[str, int]:
    """Launches by stage: condition, scale (all of them together), draw, finish, decode."""
    K = var.num_scales
    # Two buffers cleared, uniforms; embedding, SiLU, projections, first tokens; with one projection for all blocks, its
    # sum with their tables and the copy of the head's.
    condition = 3 + 4 + (2 if var.shared_aln else 0)
    product = 2 if precision is Precision.FP8 else 1  # rows are quantised first
    gelu = 1 if precision is Precision.FP8 else 0  # elsewhere the GELU rides in the product
    block = 3 + 4 * product + gelu  # two norms and the attention; qkv, proj, fc1, fc2
    scale = var.depth * block + 2  # then the head's norm and product
    return {
        "condition": condition,
        "scale": K * scale + K - 1,  # the first scale has no codes to embed
        "draw": K * (2 if smooth else 1),
        "finish": 1,
        "decode": decode_slices * _decoder_launches(vqvae, precision),
    }


def _decoder_launches(vqvae: VQVAEConfig, precision: Precision) -> int:
    norm, conv = 2, 1  # a norm is two launches: sum and statistics, then the rest
    residual = 2 * (norm + conv)  # the next norm adds
    attention = norm + 3  # qkv, attention, projection
    widths = [vqvae.ch * m for m in vqvae.ch_mult]
    blocks = len(widths) * (vqvae.num_res_blocks + 1)
    width, shortcuts = widths[-1], 0
    for c_out in reversed(widths):
        shortcuts += width != c_out  # in the first block of a level
        width = c_out
    total = 2 * conv + 2 * residual + attention  # post_quant_conv, conv_in, middle
    total += blocks * residual + shortcuts + (vqvae.num_res_blocks + 1) * attention
    total += (len(widths) - 1) * 2  # upsampling: sum and nearest, convolution
    cast = 0 if precision is Precision.FP32 else 1
    return cast + total + norm + conv + 1  # the last: to pixels
