"""Decoder and encoder of the VQVAE on channels-last maps: library convolutions, fused norms.

A map is [B, C, h, w] in channels-last memory; the norms see the same memory as [B, h·w, C]. Same layers as the
published VQGAN-style model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import VQVAEConfig
from .weights import WeightReader

#: The library's settings are the process's: two threads that set and restore them must not overlap.
_SETTINGS = Lock()


@contextmanager
def library_convolutions() -> Iterator[None]:
    """The library times its algorithms when a shape is first seen, and float32 is computed in float32."""
    with _SETTINGS, torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


class Convolutions:
    """Weights of one direction and the walk through them."""

    def __init__(self, config: VQVAEConfig, read: WeightReader, *, encoder: bool) -> None:
        self._config, self._ops, self._type = config, read.ops, read.activation
        self._weights: dict[str, Tensor] = {}
        prefixes = ("encoder.", "quant_conv.") if encoder else ("decoder.", "post_quant_conv.")
        for name in read.names(prefixes):
            if ".norm" in name:
                self._weights[name] = read.float32(name)
            elif name.endswith(".bias"):
                self._weights[name] = read.half(name)
            else:
                self._weights[name] = read.half(name).contiguous(memory_format=torch.channels_last)
        self._widths = [config.ch * m for m in config.ch_mult]

    def decode(self, f_hat_BlC: Tensor) -> Tensor:
        """f_hat float32 → pixels [B, R², 3], not yet clamped, channels last."""
        h, deepest = self._config.latent_size, len(self._widths) - 1
        x = _map(f_hat_BlC.to(self._type), h)
        x = self._conv(self._conv(x, "post_quant_conv"), "decoder.conv_in")
        x = self._middle(x, "decoder.mid")
        for level in reversed(range(len(self._widths))):
            name = f"decoder.up.{level}"
            x = self._level(x, name, self._config.num_res_blocks + 1, attention=level == deepest)
            if level != 0:
                x = self._conv(F.interpolate(x, scale_factor=2, mode="nearest"), f"{name}.upsample.conv")
        return _cells(self._conv(self._norm(x, "decoder.norm_out"), "decoder.conv_out"))

    def encode(self, pixels_B3RR: Tensor) -> Tensor:
        """Pixels float32 in [0, 1] → feature map float32 [B, C, h, h]."""
        deepest = len(self._widths) - 1
        x = (2 * pixels_B3RR - 1).to(self._type).contiguous(memory_format=torch.channels_last)
        x = self._conv(x, "encoder.conv_in")
        for level in range(len(self._widths)):
            name = f"encoder.down.{level}"
            x = self._level(x, name, self._config.num_res_blocks, attention=level == deepest)
            if level != deepest:  # zeros right and below only, as published
                x = self._conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2, padding=0)
        x = self._middle(x, "encoder.mid")
        x = self._conv(self._norm(x, "encoder.norm_out"), "encoder.conv_out")
        return self._conv(x, "quant_conv").float().contiguous()

    def _level(self, x: Tensor, name: str, blocks: int, *, attention: bool) -> Tensor:
        for j in range(blocks):
            x = self._residual(x, f"{name}.block.{j}")
            if attention:
                x = self._attention(x, f"{name}.attn.{j}")
        return x

    def _middle(self, x: Tensor, name: str) -> Tensor:
        x = self._attention(self._residual(x, f"{name}.block_1"), f"{name}.attn_1")
        return self._residual(x, f"{name}.block_2")

    def _residual(self, x: Tensor, name: str) -> Tensor:
        y = self._conv(self._norm(x, f"{name}.norm1"), f"{name}.conv1")
        y = self._conv(self._norm(y, f"{name}.norm2"), f"{name}.conv2")
        shortcut = f"{name}.nin_shortcut"
        return (self._conv(x, shortcut, padding=0) if f"{shortcut}.weight" in self._weights else x) + y

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Single-head attention over all cells, whose 1×1 convolutions are products on the cells."""
        weights, side = self._weights, x.shape[-1]
        normed_BlC = _cells(self._norm(x, f"{name}.norm", silu=False))
        qkv_Bl3C = F.linear(normed_BlC, weights[f"{name}.qkv.weight"].flatten(1), weights[f"{name}.qkv.bias"])
        q, k, v = (part[:, None] for part in qkv_Bl3C.chunk(3, dim=-1))
        y_BlC = F.scaled_dot_product_attention(q, k, v)[:, 0]  # its scale is C^−0.5, as published
        y_BlC = F.linear(y_BlC, weights[f"{name}.proj_out.weight"].flatten(1), weights[f"{name}.proj_out.bias"])
        return x + _map(y_BlC, side)

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 1) -> Tensor:
        y = F.conv2d(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], stride, padding)
        return y.contiguous(memory_format=torch.channels_last)  # nothing to do where the library kept the layout

    def _norm(self, x: Tensor, name: str, *, silu: bool = True) -> Tensor:
        x_BlC = _cells(x)
        weight_C, bias_C = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        out_BlC = self._ops.groupnorm_silu(x_BlC, weight_C, bias_C, silu=silu, out_BlC=torch.empty_like(x_BlC))
        return out_BlC.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _cells(x_BChw: Tensor) -> Tensor:
    """A channels-last map as [B, h·w, C], in place."""
    return x_BChw.permute(0, 2, 3, 1).reshape(x_BChw.shape[0], -1, x_BChw.shape[1])


def _map(x_BlC: Tensor, side: int) -> Tensor:
    """[B, l, C] as a channels-last map, in place."""
    assert math.prod((side, side)) == x_BlC.shape[1]
    return x_BlC.unflatten(1, (side, side)).permute(0, 3, 1, 2)
