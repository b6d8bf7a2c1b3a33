"""Multi-scale residual vector quantiser: feature map ↔ token pyramid (paper section 3.2, algorithms 1 and 2).

Each scale codes what the coarser scales left over. Axes: B images, C code width, h side of the feature map,
K scales, n = n_k tokens of scale k, L all tokens, V codebook entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.config import PhiLayout, VQVAEConfig


class Phi(nn.Conv2d):
    """φ(x) = 0.5·x + 0.5·conv3×3(x): smooths an enlarged code map. Shape [B, C, h, h] is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x_BChh: Tensor) -> Tensor:
        return 0.5 * x_BChh + 0.5 * super().forward(x_BChh)


def _phi_modules(config: VQVAEConfig) -> nn.Module:
    """The φ convolutions under the state-dict keys that the checkpoint's layout uses."""
    convs = [Phi(config.z_channels) for _ in range(config.num_phi)]
    if config.phi_layout is PhiLayout.PER_SCALE:
        return nn.ModuleList(convs)
    holder = nn.Module()
    if config.phi_layout is PhiLayout.SINGLE:
        holder.qresi = convs[0]
    else:
        holder.qresi_ls = nn.ModuleList(convs)
    return holder


class MultiScaleQuantizer(nn.Module):
    """Codebook, φ convolutions and the residual loop over scales."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = _phi_modules(config)
        # Usage statistics of the published trainer; they take no part in the computation.
        self.ema_vocab_hit_SV: Tensor
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(config.num_scales, config.vocab_size))

    def phi(self, k: int) -> Phi:
        """The φ that scale k uses."""
        convs = [m for m in self.quant_resi.modules() if isinstance(m, Phi)]
        return convs[self.config.phi_index(k)]

    def nearest(self, z_BChw: Tensor) -> Tensor:
        """Index of the nearest codebook entry for every cell, row-major: int64 [B, h·w]."""
        z_NC = z_BChw.permute(0, 2, 3, 1).reshape(-1, self.config.z_channels)
        e_VC = self.embedding.weight
        if self.config.using_znorm:
            index_N = (F.normalize(z_NC, dim=-1) @ F.normalize(e_VC, dim=-1).T).argmax(dim=1)
        else:
            distance_NV = z_NC.square().sum(dim=1, keepdim=True) + e_VC.square().sum(dim=1) - 2.0 * (z_NC @ e_VC.T)
            index_N = distance_NV.argmin(dim=1)
        return index_N.view(z_BChw.shape[0], -1)

    def contribution(self, k: int, codes_BnC: Tensor) -> Tensor:
        """What scale k's codes add to the feature map: enlarged (bicubic), then φ. Shape [B, C, h, h]."""
        pn, h = self.config.patch_nums[k], self.config.latent_size
        map_BChw = codes_BnC.transpose(1, 2).reshape(-1, self.config.z_channels, pn, pn)
        if pn != h:
            map_BChw = F.interpolate(map_BChw, size=(h, h), mode="bicubic")
        return self.phi(k)(map_BChw)

    def shrink(self, k: int, map_BChh: Tensor) -> Tensor:
        """Feature map at scale k's resolution by area interpolation: [B, C, pn_k, pn_k]."""
        pn = self.config.patch_nums[k]
        return map_BChh if pn == map_BChh.shape[-1] else F.interpolate(map_BChh, size=(pn, pn), mode="area")

    def next_features(self, k: int, f_hat_BChh: Tensor) -> Tensor:
        """Transformer input of scale k from the f_hat of the scales before it: [B, n_k, C]."""
        return self.shrink(k, f_hat_BChh).flatten(2).transpose(1, 2)

    def tokens_from_features(self, f_BChh: Tensor) -> list[Tensor]:
        """Token pyramid of a feature map: K tensors int64 [B, n_k]."""
        f_hat_BChh = torch.zeros_like(f_BChh)
        tokens = []
        for k in range(self.config.num_scales):
            tokens_Bn = self.nearest(self.shrink(k, f_BChh - f_hat_BChh))
            f_hat_BChh = f_hat_BChh + self.contribution(k, self.embedding(tokens_Bn))
            tokens.append(tokens_Bn)
        return tokens

    def features_from_tokens(self, tokens: list[Tensor]) -> Tensor:
        """f_hat after the given scales (all, or the first few): [B, C, h, h]."""
        contributions = [self.contribution(k, self.embedding(t_Bn)) for k, t_Bn in enumerate(tokens)]
        return torch.stack(contributions).sum(dim=0)

    def teacher_forcing_input(self, tokens: list[Tensor]) -> Tensor:
        """Transformer inputs of scales 1…K−1 for the true tokens: [B, L − n_0, C]."""
        f_hat_BChh = torch.zeros(())
        inputs = []
        for k in range(self.config.num_scales - 1):
            f_hat_BChh = f_hat_BChh + self.contribution(k, self.embedding(tokens[k]))
            inputs.append(self.next_features(k + 1, f_hat_BChh))
        return torch.cat(inputs, dim=1)

    def forward(self, f_BChh: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training pass: straight-through f_hat, loss, tokens.

        Loss = mean over scales of 0.25·mse(f_hat.detach(), f) + mse(f_hat, f.detach()).
        """
        target = f_BChh.detach()
        f_hat_BChh = torch.zeros_like(target)
        loss = torch.zeros((), device=f_BChh.device)
        tokens = []
        for k in range(self.config.num_scales):
            with torch.no_grad():
                tokens_Bn = self.nearest(self.shrink(k, target - f_hat_BChh))
            f_hat_BChh = f_hat_BChh + self.contribution(k, self.embedding(tokens_Bn))
            loss = loss + 0.25 * F.mse_loss(f_hat_BChh.detach(), f_BChh) + F.mse_loss(f_hat_BChh, target)
            tokens.append(tokens_Bn)
        straight_through_BChh = f_BChh + (f_hat_BChh - f_BChh).detach()
        return straight_through_BChh, loss / self.config.num_scales, tokens
