"""Reference generation: class labels → tokens, f_hat and image, scale by scale, in plain PyTorch.

Axes as in `var.py`; under guidance the model runs 2B rows, conditioned rows first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sampling
from .var import VAR, KVCache
from .vqvae import VQVAE


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything one generation computed."""

    logits: list[Tensor]  #: per scale, raw [R, n_k, V]
    tokens: list[Tensor]  #: per scale, int64 [B, n_k]
    f_hat_BChh: Tensor
    image_B3RR: Tensor  #: in [0, 1]


@torch.no_grad()
def generate(
    var: VAR,
    vqvae: VQVAE,
    labels_B: Tensor,
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    generator: torch.Generator | None = None,
    forced_tokens: Sequence[Tensor] | None = None,
) -> Generation:
    """Generates images; `guidance` 0 runs B rows instead of 2B.

    `forced_tokens` [B, n_k] per scale replace the draw, which keeps a comparison aligned after a token differs.
    """
    config, quantize = var.config, vqvae.quantize
    B = len(labels_B)
    rows_R = labels_B
    if guidance != 0:
        rows_R = torch.cat([labels_B, torch.full_like(labels_B, config.null_class)])
    cond_RD = var.condition(rows_R)
    x_RnD = var.embed_start(cond_RD)
    f_hat_BChh = x_RnD.new_zeros(B, config.z_channels, config.latent_size, config.latent_size)
    cache: KVCache = []
    all_logits, all_tokens = [], []
    for k in range(config.num_scales):
        logits_RnV, cache = var.forward_scale(x_RnD, cond_RD, cache)
        mixed_BnV = logits_RnV
        if guidance != 0:
            mixed_BnV = sampling.mix_guidance(logits_RnV, guidance * config.ratio(k))
        masked_BnV = sampling.mask_top_k_top_p(mixed_BnV, top_k, top_p)
        tokens_Bn = forced_tokens[k] if forced_tokens is not None else sampling.draw(masked_BnV, generator)
        if smooth:
            codes_BnC = sampling.smooth_codes(masked_BnV, quantize.embedding.weight, config.ratio(k), generator)
        else:
            codes_BnC = quantize.embedding(tokens_Bn)
        f_hat_BChh = f_hat_BChh + quantize.contribution(k, codes_BnC)
        if k + 1 < config.num_scales:
            features_BnC = quantize.next_features(k + 1, f_hat_BChh)
            x_RnD = var.embed_scale(k + 1, features_BnC.repeat(len(rows_R) // B, 1, 1))
        all_logits.append(logits_RnV)
        all_tokens.append(tokens_Bn)
    image_B3RR = vqvae.decode(f_hat_BChh).add(1).mul(0.5)
    return Generation(all_logits, all_tokens, f_hat_BChh, image_B3RR)
