"""Outlier channels moved from activations into weights before int8 rounds both (SmoothQuant, arXiv 2211.10438, eq. 4).

x·W = (x / s)·(s·W) with a factor s per channel. The inputs of qkv and fc1 come straight from AdaLN, which is
LN(x)·scale + shift, so 1/s goes into the modulations that `condition` computes once per request: no step does more than
before, and in exact arithmetic nothing changes. What follows attention or GELU has no such place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from var_deploy.config import VARConfig

from .deploy_view import LazyWeight

#: Name of the weight [1, depth, 6, D] that the modulations are multiplied by.
SMOOTHING = "smoothing"

#: How much of the difference between channels moves: s = peak(x)^α / peak(W)^(1−α).
ALPHA = 0.5


def smoothed_products(block: int) -> tuple[str, str]:
    """The two products of a block that read modulated norms."""
    return f"blocks.{block}.attn.qkv", f"blocks.{block}.ffn.fc1"


def smoothing_factors(weights: dict[str, LazyWeight], peaks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Product → s [D]. peaks: largest |x| of every input channel [D] of the smoothed products, from calibration."""
    return {name: _factors(weights[f"{name}.weight"].make(), peak_D) for name, peak_D in peaks.items()}


def smoothed_weights(
    weights: dict[str, LazyWeight], var: VARConfig, factors: Mapping[str, Tensor], kept: Collection[str] = ()
) -> dict[str, LazyWeight]:
    """The deploy view with s·W in the place of W, and 1/s for the modulations.

    factors: of `smoothing_factors`. kept: blocks that stay as they are, "blocks.0" and so on.
    """
    factors = {
        name: factors[name]
        for block in range(var.depth)
        if f"blocks.{block}" not in kept
        for name in smoothed_products(block)
    }
    changed = dict(weights)
    for name, factor_D in factors.items():
        weight = weights[f"{name}.weight"]
        changed[f"{name}.weight"] = LazyWeight(weight.shape, partial(_scaled, weight, factor_D))
    changed[SMOOTHING] = LazyWeight((1, var.depth, 6, var.embed_dim), partial(_of_modulations, var, factors))
    return changed


def _factors(weight_DN: Tensor, peak_D: Tensor) -> Tensor:
    """s [D], around 1; 1 where a channel is always zero."""
    column_D = weight_DN.abs().amax(1)
    usable_D = (peak_D > 0) & (column_D > 0)
    log_D = torch.where(usable_D, ALPHA * peak_D.log() - (1 - ALPHA) * column_D.log(), torch.zeros_like(peak_D))
    mean = log_D[usable_D].mean() if usable_D.any() else torch.tensor(0.0)
    return torch.where(usable_D, (log_D - mean).exp(), torch.ones_like(peak_D))


def _scaled(weight: LazyWeight, factor_D: Tensor) -> Tensor:
    return weight.make() * factor_D[:, None]


def _of_modulations(var: VARConfig, factors: Mapping[str, Tensor]) -> Tensor:
    """1/s for scales and shifts; 1 for the gates. Order: gamma1, gamma2, scale1, scale2, shift1, shift2."""
    one_D = torch.ones(var.embed_dim)
    rows = []
    for block in range(var.depth):
        qkv_D, fc1_D = (1 / factors.get(name, one_D) for name in smoothed_products(block))
        rows.append(torch.stack([one_D, one_D, qkv_D, fc1_D, qkv_D, fc1_D]))
    return torch.stack(rows)[None]
