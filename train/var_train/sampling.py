"""The published sampler: guidance mix, top-k, top-p, multinomial draw, and the smooth (Gumbel) mixture.

The runtime draws by inverting the cumulative distribution instead; a chi-square test holds the two together.
Axes: B images, n tokens of a scale, V codebook entries, C code width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix_guidance(logits_2BnV: Tensor, t: float) -> Tensor:
    """(1 + t)·conditioned − t·unconditioned; the conditioned rows come first. Result [B, n, V]."""
    conditioned_BnV, null_BnV = logits_2BnV.chunk(2)
    return (1 + t) * conditioned_BnV - t * null_BnV


def mask_top_k_top_p(logits_BnV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with everything outside top-k, then outside top-p of the rest, set to −inf; 0 turns a filter off."""
    if 0 < top_k < logits_BnV.shape[-1]:
        kth_Bn1 = logits_BnV.topk(top_k, dim=-1).values[..., -1:]
        logits_BnV = logits_BnV.masked_fill(logits_BnV < kth_Bn1, -torch.inf)
    if 0 < top_p < 1:
        ascending_BnV, order_BnV = logits_BnV.sort(dim=-1, stable=True)
        drop_BnV = ascending_BnV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop_BnV[..., -1] = False
        logits_BnV = logits_BnV.masked_fill(drop_BnV.scatter(-1, order_BnV, drop_BnV), -torch.inf)
    return logits_BnV


def draw(masked_BnV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per position from masked logits: int64 [B, n]."""
    B, n, V = masked_BnV.shape
    return torch.multinomial(masked_BnV.softmax(dim=-1).view(-1, V), 1, generator=generator).view(B, n)


def smooth_codes(
    masked_BnV: Tensor, codebook_VC: Tensor, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """`more_smooth`: a Gumbel-softmax mixture of codes [B, n, C]; `ratio` is k/(K−1)."""
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel_BnV = -torch.empty_like(masked_BnV).exponential_(generator=generator).log()
    return ((masked_BnV * (1 + ratio) + gumbel_BnV) / tau).softmax(dim=-1) @ codebook_VC
