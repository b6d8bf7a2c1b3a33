"""The graphs of the VQVAE's convolutions: decoder (f_hat → pixels) and encoder (pixels → feature map).

Pixels are in [0, 1]; the VQVAE's own range is [−1, 1]. In half precision convolutions, products and the sums between
residual blocks are halves; norms, SiLU and softmax are float32.

Axes: B images, C code width, h side of the feature map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from var_deploy.config import GROUPS, VQVAEConfig
from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec
from var_train.vqvae import NORM_EPS

from .graph_builder import GraphBuilder
from .precision import narrow, wide
from .weights_file import WeightsLayout


def decoder_graph(
    vqvae: VQVAEConfig, spec: GraphSpec, layout: WeightsLayout, precision: Precision = Precision.FP32
) -> ir.Model:
    """f_hat [B, C, h, h] → pixels [B, 3, R, R], clamped to [0, 1]."""
    b = GraphBuilder(spec, layout, precision)
    widths = [vqvae.ch * m for m in vqvae.ch_mult]
    deepest = len(widths) - 1
    x = b.conv(b.conv(narrow(b, b.input("f_hat")), "post_quant_conv"), "decoder.conv_in")
    x = _middle(b, x, "decoder.mid", widths[-1], vqvae.latent_size)
    for level in reversed(range(len(widths))):
        c_in, side = widths[min(level + 1, deepest)], vqvae.latent_size * 2 ** (deepest - level)
        name = f"decoder.up.{level}"
        x = _level(b, x, name, c_in, widths[level], vqvae.num_res_blocks + 1, side if level == deepest else None)
        if level != 0:
            double = b.constant([1, 1, 2, 2], "float32")
            nearest: dict[str, Any] = {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            }
            x = b.conv(b.op("Resize", x, None, double, **nearest), f"{name}.upsample.conv")
    x = wide(b, b.conv(_norm_silu(b, x, "decoder.norm_out", widths[0]), "decoder.conv_out"))
    half = b.constant(0.5, "float32")
    unit = b.op("Add", b.op("Mul", x, half), half)
    return b.model({"pixels": b.op("Clip", unit, b.constant(0, "float32"), b.constant(1, "float32"))})


def encoder_graph(
    vqvae: VQVAEConfig, spec: GraphSpec, layout: WeightsLayout, precision: Precision = Precision.FP32
) -> ir.Model:
    """pixels [B, 3, R, R] → feature map [B, C, h, h] for the quantiser."""
    b = GraphBuilder(spec, layout, precision)
    widths = [vqvae.ch * m for m in vqvae.ch_mult]
    deepest = len(widths) - 1
    signed = b.op("Sub", b.op("Mul", b.input("pixels"), b.constant(2, "float32")), b.constant(1, "float32"))
    x = b.conv(narrow(b, signed), "encoder.conv_in")
    for level, (c_in, c_out) in enumerate(zip([vqvae.ch, *widths], widths, strict=False)):
        name = f"encoder.down.{level}"
        side = vqvae.latent_size if level == deepest else None
        x = _level(b, x, name, c_in, c_out, vqvae.num_res_blocks, side)
        if level != deepest:
            x = b.conv(x, f"{name}.downsample.conv", stride=2, pads=(0, 0, 1, 1))
    x = _middle(b, x, "encoder.mid", widths[-1], vqvae.latent_size)
    x = b.conv(_norm_silu(b, x, "encoder.norm_out", widths[-1]), "encoder.conv_out")
    return b.model({"features": wide(b, b.conv(x, "quant_conv"))})


def _level(
    b: GraphBuilder, x: ir.Value, name: str, c_in: int, c_out: int, blocks: int, attention_side: int | None
) -> ir.Value:
    """Residual blocks of one resolution, each followed by attention at the deepest level."""
    for j in range(blocks):
        x = _residual(b, x, f"{name}.block.{j}", c_in if j == 0 else c_out, c_out)
        if attention_side is not None:
            x = _attention(b, x, f"{name}.attn.{j}", c_out, attention_side)
    return x


def _middle(b: GraphBuilder, x: ir.Value, name: str, width: int, side: int) -> ir.Value:
    x = _residual(b, x, f"{name}.block_1", width, width)
    x = _attention(b, x, f"{name}.attn_1", width, side)
    return _residual(b, x, f"{name}.block_2", width, width)


def _residual(b: GraphBuilder, x: ir.Value, name: str, c_in: int, c_out: int) -> ir.Value:
    y = b.conv(_norm_silu(b, x, f"{name}.norm1", c_in), f"{name}.conv1")
    y = b.conv(_norm_silu(b, y, f"{name}.norm2", c_out), f"{name}.conv2")
    shortcut = x if c_in == c_out else b.conv(x, f"{name}.nin_shortcut", kernel=1)
    return b.op("Add", shortcut, y)


def _attention(b: GraphBuilder, x: ir.Value, name: str, width: int, side: int) -> ir.Value:
    """Single-head attention over all cells; plain products, since a head of the full width has no fused kernel."""
    normed = narrow(b, _group_norm(b, x, f"{name}.norm", width))
    qkv_B3Cl = b.reshape(b.conv(normed, f"{name}.qkv", kernel=1), 0, 3 * width, -1)
    q_BCl, k_BCl, v_BCl = b.op("Split", qkv_B3Cl, outputs=3, axis=1, num_outputs=3)
    scaled_BlC = b.op("Mul", b.op("Transpose", q_BCl, perm=[0, 2, 1]), b.constant(width**-0.5, b.activation))
    weights_Bll = narrow(b, b.op("Softmax", wide(b, b.op("MatMul", scaled_BlC, k_BCl)), axis=-1))
    y_BCl = b.op("MatMul", v_BCl, b.op("Transpose", weights_Bll, perm=[0, 2, 1]))
    y = b.conv(b.reshape(y_BCl, 0, 0, side, side), f"{name}.proj_out", kernel=1)
    return b.op("Add", x, y)


def _norm_silu(b: GraphBuilder, x: ir.Value, name: str, width: int) -> ir.Value:
    normed = _group_norm(b, x, name, width)
    return narrow(b, b.op("Mul", normed, b.op("Sigmoid", normed)))


def _group_norm(b: GraphBuilder, x_BChw: ir.Value, name: str, width: int) -> ir.Value:
    """GroupNorm as instance normalisation over groups: ONNX Runtime has no CPU kernel for GroupNormalization.

    The result is float32.
    """
    grouped = wide(b, b.reshape(x_BChw, 0, GROUPS, -1))
    ones, zeros = b.constant(np.ones(GROUPS), "float32"), b.constant(np.zeros(GROUPS), "float32")
    normed = b.op("InstanceNormalization", grouped, ones, zeros, epsilon=NORM_EPS)
    like = b.op("Reshape", normed, b.op("Shape", x_BChw))
    axes = b.ints(1, 2)
    weight = b.op("Unsqueeze", b.weight(f"{name}.weight"), axes)
    bias = b.op("Unsqueeze", b.weight(f"{name}.bias"), axes)
    return b.op("Add", b.op("Mul", like, weight), bias)
