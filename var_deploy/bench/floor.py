"""The least time one generation can take on given hardware, counted from the two configurations.

Two numbers per scale, bytes that must move and floating-point operations that must be done, each over the rate that
the hardware was measured to reach; the larger of the two times is the floor of that scale, since scales run in turn.

Counted: matrix products of the blocks and the head, attention, the decoder's convolutions and attention; matrices read
once per scale, keys and values of earlier scales read and new ones written, logits written by the head and read by the
draw, AdaLN once per request. Not counted: activations between layers, which may stay on the chip; biases, norms, the
word embedding and φ, which are small; the decoder's bytes, which take less time than its operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import VARConfig, VQVAEConfig, require
from ..precision import Precision

LOGIT_BYTES = 4  # logits are float32 whatever the precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Operations to do and bytes to move, before anything that depends on them can start."""

    flops: int
    bytes: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The longer of moving and computing."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleWork:
    """One pass of the transformer: `rows`·`tokens` tokens attend to `visible` positions."""

    rows: int
    tokens: int
    visible: int
    product_flops: int  #: of blocks and head
    attention_flops: int
    weight_bytes: int
    cache_bytes: int
    logit_bytes: int

    @property
    def work(self) -> Work:
        return Work(
            flops=self.product_flops + self.attention_flops,
            bytes=self.weight_bytes + self.cache_bytes + self.logit_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """One generation: AdaLN of the class, the scales, the decoder."""

    batch: int
    precision: Precision
    condition: Work
    scales: tuple[ScaleWork, ...]
    decoder_flops: int  #: of the whole batch

    @property
    def flops(self) -> int:
        """Total operations."""
        return self.condition.flops + sum(scale.work.flops for scale in self.scales) + self.decoder_flops

    @property
    def bytes(self) -> int:
        """Total bytes; the decoder's are not counted."""
        return self.condition.bytes + sum(scale.work.bytes for scale in self.scales)

    def transformer_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Σ_k max(bytes/bandwidth, operations/rate), and the same of the condition."""
        parts = [self.condition, *(scale.work for scale in self.scales)]
        return sum(part.seconds(bytes_per_second, flops_per_second) for part in parts)

    def decoder_seconds(self, flops_per_second: float) -> float:
        """Operations/rate."""
        return self.decoder_flops / flops_per_second

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Class id in, pixels out. The rates are measured ones, of matrix products in this precision.

        A rate that only 8-bit products reach is given to attention, head and decoder too: still a bound, a looser one.
        """
        transformer = self.transformer_seconds(bytes_per_second, flops_per_second)
        return transformer + self.decoder_seconds(flops_per_second)


def floor(
    var: VARConfig,
    vqvae: VQVAEConfig | None,
    *,
    batch: int,
    rows: int | Sequence[int] | None = None,
    precision: Precision = Precision.BF16,
) -> Floor:
    """Counts one generation of `batch` images. Without a VQVAE: transformer alone.

    `rows` that a scale computes: 2·batch under guidance (the default), batch without, or one number per scale for a
    guidance schedule. Raises ConfigError.
    """
    require(batch >= 1, "batch", batch, "at least 1")
    per_scale = [2 * batch] * var.num_scales if rows is None else rows
    per_scale = [per_scale] * var.num_scales if isinstance(per_scale, int) else list(per_scale)
    ok = len(per_scale) == var.num_scales and min(per_scale) >= 1
    require(ok, "rows", rows, f"a positive number, or one for each of {var.num_scales} scales")
    return Floor(
        batch=batch,
        precision=precision,
        condition=_condition_work(var, max(per_scale), precision),
        scales=tuple(_scale_work(var, k, R, precision) for k, R in enumerate(per_scale)),
        decoder_flops=0 if vqvae is None else batch * decoder_flops(vqvae),
    )


def _condition_work(var: VARConfig, rows: int, precision: Precision) -> Work:
    """The projections [D, 6D] of the blocks, or the one they share, and [D, 2D] of the head."""
    D = var.embed_dim
    weights = (6 * (1 if var.shared_aln else var.depth) + 2) * D * D
    return Work(flops=2 * rows * weights, bytes=precision.activation_bytes * weights)  # kept whole at 8 bits


def _scale_work(var: VARConfig, k: int, rows: int, precision: Precision) -> ScaleWork:
    D, n, (_, visible) = var.embed_dim, var.tokens_per_scale[k], var.span(k)
    blocks, head = var.depth * (4 * D * D + 2 * D * var.ffn_dim), D * var.vocab_size
    return ScaleWork(
        rows=rows,
        tokens=n,
        visible=visible,
        product_flops=2 * rows * n * (blocks + head),
        attention_flops=4 * rows * n * visible * D * var.depth,
        weight_bytes=precision.weight_bytes * blocks + precision.activation_bytes * head,
        # Keys and values: those of earlier scales are read, those of this one written.
        cache_bytes=precision.activation_bytes * 2 * rows * visible * D * var.depth,
        logit_bytes=2 * LOGIT_BYTES * rows * n * var.vocab_size,
    )


def decoder_flops(vqvae: VQVAEConfig) -> int:
    """Operations to decode one image: every layer from `post_quant_conv` on, in the order in which it runs."""
    widths = [vqvae.ch * m for m in vqvae.ch_mult]
    deepest, side = len(widths) - 1, vqvae.latent_size
    cells, width = side * side, widths[-1]
    flops = _conv(3, vqvae.z_channels, vqvae.z_channels, cells) + _conv(3, vqvae.z_channels, width, cells)
    flops += 2 * _residual_block(width, width, cells) + _attention_block(width, cells)
    for level in reversed(range(len(widths))):
        for _ in range(vqvae.num_res_blocks + 1):
            flops += _residual_block(width, widths[level], cells)
            width = widths[level]
            if level == deepest:
                flops += _attention_block(width, cells)
        if level != 0:
            cells *= 4
            flops += _conv(3, width, width, cells)
    return flops + _conv(3, width, 3, cells)


def _conv(kernel: int, c_in: int, c_out: int, cells: int) -> int:
    return 2 * kernel * kernel * c_in * c_out * cells


def _residual_block(c_in: int, c_out: int, cells: int) -> int:
    shortcut = 0 if c_in == c_out else _conv(1, c_in, c_out, cells)
    return _conv(3, c_in, c_out, cells) + _conv(3, c_out, c_out, cells) + shortcut


def _attention_block(width: int, cells: int) -> int:
    return _conv(1, width, 4 * width, cells) + 4 * cells * cells * width
