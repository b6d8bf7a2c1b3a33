"""Decoder and encoder of the VQVAE on channels-last maps: library convolutions, fused norms.

A map is [B, C, h, w] in channels-last memory; the norms see the same memory as [B, h·w, C]. Same layers as the
published VQGAN-style model. Large maps are bound by memory, so nothing passes over one just to add to it: biases of
convolutions and residual branches are added by what comes next, as a rule a norm (`Sum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

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
    cudnn: Any = torch.backends.cudnn
    with _SETTINGS:
        before = cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision
        cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision = True, True, "ieee"
        try:
            yield
        finally:
            cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision = before


@dataclass(slots=True)
class Sum:
    """A map that is still to be added up: x + branch + bias, where None counts as 0.

    The next norm adds it up in the memory of `x`, which nothing else may use, and then lets go of the rest.
    """

    x: Tensor
    branch: Tensor | None = None
    bias_C: Tensor | None = None


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

    @property
    def pixel_bias_3(self) -> Tensor:
        """What `decode` leaves to be added."""
        return self._weights["decoder.conv_out.bias"]

    def decode(self, f_hat_BlC: Tensor) -> Tensor:
        """f_hat float32 → pixels [B, R², 3], channels last; `pixel_bias_3` is not yet added, nothing clamped."""
        deepest = len(self._widths) - 1
        x = self._conv(_map(f_hat_BlC.to(self._type), self._config.latent_size), "post_quant_conv", bias=True)
        total = self._sum_of_conv(x, "decoder.conv_in")
        total = self._middle(total, "decoder.mid")
        for level in reversed(range(len(self._widths))):
            name = f"decoder.up.{level}"
            total = self._level(total, name, self._config.num_res_blocks + 1, attention=level == deepest)
            if level != 0:
                total = self._sum_of_conv(self._upsample(total), f"{name}.upsample.conv")
        return _cells(self._conv(self._norm(total, "decoder.norm_out"), "decoder.conv_out"))

    def encode(self, pixels_B3RR: Tensor) -> Tensor:
        """Pixels float32 in [0, 1] → feature map float32 [B, C, h, h]."""
        deepest = len(self._widths) - 1
        x = (2 * pixels_B3RR - 1).to(self._type).contiguous(memory_format=torch.channels_last)
        total = self._sum_of_conv(x, "encoder.conv_in")
        for level in range(len(self._widths)):
            name = f"encoder.down.{level}"
            total = self._level(total, name, self._config.num_res_blocks, attention=level == deepest)
            if level != deepest:  # zeros right and below only, as published
                x = F.pad(_added_up(total), (0, 1, 0, 1))
                total = self._sum_of_conv(x, f"{name}.downsample.conv", stride=2, padding=0)
        total = self._middle(total, "encoder.mid")
        x = self._conv(self._norm(total, "encoder.norm_out"), "encoder.conv_out", bias=True)
        return self._conv(x, "quant_conv", bias=True).float().contiguous()

    def _level(self, total: Sum, name: str, blocks: int, *, attention: bool) -> Sum:
        for j in range(blocks):
            total = self._residual(total, f"{name}.block.{j}")
            if attention:
                total = self._attention(total, f"{name}.attn.{j}")
        return total

    def _middle(self, total: Sum, name: str) -> Sum:
        total = self._attention(self._residual(total, f"{name}.block_1"), f"{name}.attn_1")
        return self._residual(total, f"{name}.block_2")

    def _residual(self, total: Sum, name: str) -> Sum:
        y = self._sum_of_conv(self._norm(total, f"{name}.norm1"), f"{name}.conv1")
        normed = self._norm(y, f"{name}.norm2", keep=False)
        del y  # a map that nobody needs would still take its memory while the convolution runs
        branch = self._sum_of_conv(normed, f"{name}.conv2")
        x, shortcut = total.x, f"{name}.nin_shortcut"
        if f"{shortcut}.weight" in self._weights:
            x = _map(self._linear(_cells(x), shortcut), x.shape[-1])
        return Sum(x, branch.x, branch.bias_C)

    def _attention(self, total: Sum, name: str) -> Sum:
        """Single-head attention over all cells."""
        normed_BlC = _cells(self._norm(total, f"{name}.norm", silu=False))
        q, k, v = (part[:, None] for part in self._linear(normed_BlC, f"{name}.qkv").chunk(3, dim=-1))
        y_BlC = F.scaled_dot_product_attention(q, k, v)[:, 0]  # its scale is C^−0.5, as published
        return Sum(total.x, _map(self._linear(y_BlC, f"{name}.proj_out"), total.x.shape[-1]))

    def _upsample(self, total: Sum) -> Tensor:
        """The sum with every cell repeated 2×2."""
        x_BhwC = total.x.permute(0, 2, 3, 1)
        B, h, w, C = x_BhwC.shape
        out_BHWC = self._ops.upsample_sum(
            x_BhwC,
            branch_BhwC=None if total.branch is None else total.branch.permute(0, 2, 3, 1),
            conv_bias_C=total.bias_C,
            out_BHWC=x_BhwC.new_empty(B, 2 * h, 2 * w, C),
        )
        return out_BHWC.permute(0, 3, 1, 2)

    def _sum_of_conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 1) -> Sum:
        """A 3×3 convolution whose bias, an extra pass of the library's, is still to be added."""
        return Sum(self._conv(x, name, stride=stride, padding=padding), bias_C=self._weights[f"{name}.bias"])

    def _conv(self, x: Tensor, name: str, *, bias: bool = False, stride: int = 1, padding: int = 1) -> Tensor:
        bias_C = self._weights[f"{name}.bias"] if bias else None
        y = F.conv2d(x, self._weights[f"{name}.weight"], bias_C, stride, padding)
        return y.contiguous(memory_format=torch.channels_last)  # nothing to do where the library kept the layout

    def _linear(self, x_BlC: Tensor, name: str) -> Tensor:
        """A 1×1 convolution as a product on the cells, whose bias costs no pass."""
        return F.linear(x_BlC, self._weights[f"{name}.weight"].flatten(1), self._weights[f"{name}.bias"])

    def _norm(self, total: Sum, name: str, *, silu: bool = True, keep: bool = True) -> Tensor:
        """Adds up and normalises; a sum without a branch may be needed for nothing else: then do not `keep` it."""
        x_BlC = _cells(total.x)
        out_BlC = self._ops.groupnorm_silu(
            x_BlC,
            self._weights[f"{name}.weight"],
            self._weights[f"{name}.bias"],
            silu=silu,
            branch_BlC=None if total.branch is None else _cells(total.branch),
            conv_bias_C=total.bias_C,
            sum_out_BlC=x_BlC if keep else None,
            out_BlC=torch.empty_like(x_BlC),
        )
        if keep:
            total.branch = total.bias_C = None
        return out_BlC.unflatten(1, total.x.shape[-2:]).permute(0, 3, 1, 2)


def _cells(x_BChw: Tensor) -> Tensor:
    """A channels-last map as [B, h·w, C], in place."""
    return x_BChw.permute(0, 2, 3, 1).view(x_BChw.shape[0], -1, x_BChw.shape[1])


def _map(x_BlC: Tensor, side: int) -> Tensor:
    """[B, l, C] as a channels-last map, in place."""
    assert math.prod((side, side)) == x_BlC.shape[1]
    return x_BlC.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _added_up(total: Sum) -> Tensor:
    """For what cannot add on its way."""
    x = total.x if total.branch is None else total.x + total.branch
    return x if total.bias_C is None else x + total.bias_C.view(-1, 1, 1)
