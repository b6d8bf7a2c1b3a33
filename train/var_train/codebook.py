"""Health of a codebook in training: how many entries are used, how evenly, and new life for those that are not.

Counts are of the global batch, whatever the number of processes, and what an unused entry becomes is a function of the
iteration and the global batch alone. Axes: B images of this process, S scales, V entries, C code width, N vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import sum_over_processes
from .quantizer import MultiScaleQuantizer

USAGE_DECAY = 0.9  #: of the running usage; short, so that a revived entry is judged by what came after
UNUSED = 0.1  #: hits per iteration below which an entry counts as unused


@torch.no_grad()
def record_usage(quantizer: MultiScaleQuantizer, tokens: list[Tensor]) -> Tensor:
    """Updates `ema_vocab_hit_SV`, the running hits per iteration; returns this iteration's, float32 [S, V]."""
    V = quantizer.config.vocab_size
    hits_SV = torch.stack([tokens_Bn.flatten().bincount(minlength=V) for tokens_Bn in tokens]).float()
    sum_over_processes(hits_SV)
    quantizer.ema_vocab_hit_SV.lerp_(hits_SV, 1 - USAGE_DECAY)
    return hits_SV


def usage(hits_SV: Tensor) -> list[float]:
    """Share of entries that were hit, for each scale."""
    return (hits_SV > 0).float().mean(dim=1).tolist()


def perplexity(hits_SV: Tensor) -> list[float]:
    """exp(entropy) of the hits, for each scale: how many entries, used evenly, would be as hard to guess."""
    share_SV = hits_SV / hits_SV.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.special.entr(share_SV).sum(dim=1).exp().tolist()


@torch.no_grad()
def revive_unused(quantizer: MultiScaleQuantizer, f_BChh: Tensor, *, seed: int, first_row: int, rows: int) -> Tensor:
    """Puts entries that almost nothing falls on onto residual vectors of the global batch; returns which, bool [V].

    `f_BChh`: features of this process's images, which are rows `first_row` … of a global batch of `rows`. All processes
    must call it together, with the same seed. An entry whose vector is not finite stays as it is.
    """
    unused_V = quantizer.ema_vocab_hit_SV.sum(dim=0) < UNUSED
    count = int(unused_V.sum())
    if count == 0:
        return unused_V
    vectors_BNC = residual_vectors(quantizer, f_BChh)
    B, N, C = vectors_BNC.shape
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(rows * N, (count,), generator=random).to(f_BChh.device) - first_row * N
    ours = (chosen >= 0) & (chosen < B * N)
    codes = torch.zeros(count, C, device=f_BChh.device)
    codes[ours] = vectors_BNC.flatten(0, 1)[chosen[ours]].float()
    sum_over_processes(codes)  # every vector comes from one process, the others add 0
    sound = codes.isfinite().all(dim=1)
    unused_V[unused_V.nonzero().squeeze(1)[~sound]] = False
    quantizer.embedding.weight[unused_V] = codes[sound].to(quantizer.embedding.weight.dtype)
    return unused_V


def residual_vectors(quantizer: MultiScaleQuantizer, f_BChh: Tensor) -> Tensor:
    """Every vector that the quantiser looks up an entry for, all scales of an image together: [B, N, C]."""
    f_hat_BChh = torch.zeros_like(f_BChh)
    residuals = []
    for k in range(quantizer.config.num_scales):
        residual_BChw = quantizer.shrink(k, f_BChh - f_hat_BChh)
        residuals.append(residual_BChw.flatten(2).transpose(1, 2))
        codes_BnC = quantizer.embedding(quantizer.nearest(residual_BChw))
        f_hat_BChh = f_hat_BChh + quantizer.contribution(k, codes_BnC)
    return torch.cat(residuals, dim=1)
