"""What the torch engine allocates once per batch size and keeps: every buffer's shape and type, as data.

The engine allocates from these lists and `inspect` adds them up, so the plan is what is allocated. Axes: B images, R
rows (2B under guidance), n tokens of the widest scale, M = R·n, D width, F hidden width, H heads of d = 64 channels, L
all positions, i blocks, N outputs of one product (all modulations; q, k and v), K scales (in `quantized_MK`: the inputs
of a product), V codebook entries, C code width, l = h² cells; [B, 3, R, R] and [B, R, R, 3] are pictures of R pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from .config import HEAD_DIM, VARConfig, VQVAEConfig
from .given import DRAWN, Given
from .precision import Precision
from .sampling import Settings
from .signature import TensorSpec

_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}
#: Batch sizes that have graphs on a GPU; beyond the last, a batch runs in a multiple of it.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)

#: Elements of a map that kernels and libraries count in 32 bits.
_MAX_MAP_ELEMENTS = 2**31 - 1

_ACTIVATION = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


def activation_dtype(precision: Precision) -> str:
    """Type of activations and caches."""
    return _ACTIVATION[precision.activation]


def bucket_of(batch: int) -> int:
    """The batch size that a batch runs as on a GPU."""
    return next((size for size in BUCKETS if size >= batch), -(-batch // BUCKETS[-1]) * BUCKETS[-1])


def decoded_at_once(vqvae: VQVAEConfig, batch: int, decode_slice: int | None) -> int:
    """Images that the decoder takes at a time: all, or a slice, and no more than its widest map can count."""
    return min(batch, decode_slice or batch, max(1, _MAX_MAP_ELEMENTS // _widest_map(vqvae)))


def input_specs(var: VARConfig, batch: int, rows: int) -> list[TensorSpec]:
    """What a request changes between two replays; packed, so that one copy uploads it."""
    return [
        TensorSpec("labels_R", "int64", (rows,)),
        TensorSpec("seeds_B", "int64", (batch,)),
        TensorSpec("strength_KB", "float32", (var.num_scales, batch)),
        TensorSpec("temperature_KB", "float32", (var.num_scales, batch)),
        TensorSpec("top_k_KB", "int32", (var.num_scales, batch)),
        TensorSpec("top_p_KB", "float32", (var.num_scales, batch)),
    ]


def fill_request(
    host: Mapping[str, np.ndarray],
    var: VARConfig,
    batch: int,
    labels_B: np.ndarray,
    seeds: list[int],
    settings: Settings,
) -> None:
    """Writes a request into the host's side of `input_specs` of a batch size; images beyond it are drawn greedily
    from class 0.
    """
    B = len(labels_B)
    host["labels_R"][:] = 0
    host["labels_R"][:B] = labels_B
    host["labels_R"][batch:] = var.null_class  # none, where there are no null rows
    host["seeds_B"][:B] = np.array(seeds, dtype=np.uint64).view(np.int64)
    host["strength_KB"][:] = np.array(settings.strengths, dtype=np.float32)[:, None]
    host["temperature_KB"][:] = np.array(settings.temperatures, dtype=np.float32)[:, None]
    host["top_k_KB"][:] = 1
    host["top_k_KB"][:, :B] = np.array([min(top_k, var.vocab_size) for top_k in settings.top_ks])[:, None]
    host["top_p_KB"][:] = np.array(settings.top_ps, dtype=np.float32)[:, None]


def given_specs(var: VARConfig, batch: int) -> list[TensorSpec]:
    """Tokens that are not drawn (−1 elsewhere) and their codes: 92 kB an image at 256 px.

    Allocated by the first request that gives tokens, and no part of the plan.
    """
    L = var.num_tokens
    return [
        TensorSpec("tokens_BL", "int64", (batch, L)),
        TensorSpec("codes_BLC", "float32", (batch, L, var.z_channels)),
    ]


def fill_given(host: Mapping[str, np.ndarray], given: Given) -> None:
    """Writes given tokens into the host's side of `given_specs`; images beyond them are drawn."""
    B = len(given.tokens_BL)
    host["tokens_BL"][:B], host["tokens_BL"][B:] = given.tokens_BL, DRAWN
    host["codes_BLC"][:B] = given.codes_BLC


def output_specs(var: VARConfig, batch: int) -> list[TensorSpec]:
    """What comes back besides the picture; packed likewise."""
    return [
        TensorSpec("tokens_BL", "int64", (batch, var.num_tokens)),
        TensorSpec("invalid_KB", "int32", (var.num_scales, batch)),
    ]


def work_specs(var: VARConfig, batch: int, rows: int, precision: Precision, smooth: bool) -> list[TensorSpec]:
    """Caches and intermediate results, on the device only."""
    D, F, H, L = var.embed_dim, var.ffn_dim, var.num_heads, var.num_tokens
    n, C, cells, act = var.tokens_per_scale[-1], var.z_channels, var.latent_size**2, activation_dtype(precision)
    M = rows * n
    specs = [
        TensorSpec("modulation_RN", "float32", (rows, 6 * var.depth * D + 2 * D)),
        TensorSpec("caches_i2RHLd", act, (var.depth, 2, rows, H, L, HEAD_DIM)),
        TensorSpec("uniforms_BL", "float64", (batch, L)),
        TensorSpec("x_MD", "float32", (M, D)),
        TensorSpec("normed_MD", act, (M, D)),
        TensorSpec("qkv_MN", act, (M, 3 * D)),
        TensorSpec("attended_MD", act, (M, D)),
        TensorSpec("hidden_MF", act, (M, F)),
        TensorSpec("branch_MD", act, (M, D)),
        TensorSpec("logits_MV", "float32", (M, var.vocab_size)),
        *(TensorSpec(f"codes_BnC.{k}", "float32", (batch, n_k, C)) for k, n_k in enumerate(var.tokens_per_scale)),
        TensorSpec("f_hat_2BlC", "float32", (2, batch, cells, C)),
    ]
    if precision is Precision.FP8:
        specs.append(TensorSpec("quantized_MK", "float8_e4m3fn", (M, max(D, F))))
        specs.append(TensorSpec("row_scale_M1", "float32", (M, 1)))
    if smooth:
        specs.append(TensorSpec("smooth_BnV", "float32", (batch, n, var.vocab_size)))
    return specs


def decode_specs(vqvae: VQVAEConfig, batch: int) -> list[TensorSpec]:
    """The decoder's input and results."""
    side = vqvae.image_size
    return [
        TensorSpec("f_hat_BlC", "float32", (batch, vqvae.latent_size**2, vqvae.z_channels)),
        TensorSpec("pixels_B3RR", "float32", (batch, 3, side, side)),
        TensorSpec("bytes_BRR3", "uint8", (batch, side, side, 3)),
    ]


def decoder_activation_bytes(vqvae: VQVAEConfig, images: int, precision: Precision) -> int:
    """What the decoder holds at its widest level: shortcut, normed map, a convolution's result and its scratch."""
    return 4 * precision.activation_bytes * images * _widest_map(vqvae)


def _widest_map(vqvae: VQVAEConfig) -> int:
    """Elements of the largest map of one image; on its way to a level a map still has the channels of the one below."""
    widths = [vqvae.ch * mult for mult in vqvae.ch_mult]
    reaching = [max(pair) for pair in zip(widths, [*widths[1:], 0], strict=True)]
    return max(width * (vqvae.image_size // 2**level) ** 2 for level, width in enumerate(reaching))


def generation_bytes(
    var: VARConfig,
    vqvae: VQVAEConfig,
    batch: int,
    precision: Precision,
    *,
    guided: bool = True,
    smooth: bool = False,
    decode_slice: int | None = None,
) -> int:
    """All buffers of one batch size and the decoder's activations (an estimate), in bytes."""
    rows = 2 * batch if guided else batch
    inputs, outputs = input_specs(var, batch, rows), output_specs(var, batch)
    work = work_specs(var, batch, rows, precision, smooth)
    buffers = nbytes([*inputs, *outputs, *work, *decode_specs(vqvae, batch)])
    return buffers + decoder_activation_bytes(vqvae, decoded_at_once(vqvae, batch, decode_slice), precision)


def nbytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all tensors together."""
    return sum(_BYTES[spec.dtype] * math.prod(int(side) for side in spec.shape) for spec in specs)
