"""Multi-scale VQVAE: images [B, 3, R, R] in [−1, 1] ↔ token pyramid, with the published state-dict keys.

A VQGAN-style convolutional encoder and decoder around `MultiScaleQuantizer`. The number of levels follows from
`ch_mult`; attention sits at the deepest level and in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.config import GROUPS, VQVAEConfig

from .quantizer import MultiScaleQuantizer

NORM_EPS = 1e-6  # of every GroupNorm


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


def _conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), with a 1×1 shortcut where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(c_in)
        self.conv1 = _conv3x3(c_in, c_out)
        self.norm2 = _group_norm(c_out)
        self.conv2 = _conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, kernel_size=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        y_BChw = self.conv1(F.silu(self.norm1(x_BChw)))
        y_BChw = self.conv2(F.silu(self.norm2(y_BChw)))
        return self.nin_shortcut(x_BChw) + y_BChw


class AttnBlock(nn.Module):
    """Single-head attention over all cells of a map, softmax scale C^−0.5, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        q_BCl, k_BCl, v_BCl = self.qkv(self.norm(x_BChw)).flatten(2).chunk(3, dim=1)
        scores_Bll = q_BCl.transpose(1, 2) @ k_BCl * x_BChw.shape[1] ** -0.5
        y_BCl = v_BCl @ scores_Bll.softmax(dim=-1).transpose(1, 2)
        return x_BChw + self.proj_out(y_BCl.view_as(x_BChw))


class Downsample(nn.Module):
    """Halves the sides: one row and column of zeros right and below, then 3×3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then 3×3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BChw, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BChw)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked, then the resampling if there is one.

    The encoder names the resampling `downsample`, the decoder `upsample`.
    """

    def __init__(self, c_in: int, c_out: int, num_blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if j == 0 else c_out, c_out) for j in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(num_blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x_BChw = block(x_BChw)
            if len(self.attn):
                x_BChw = self.attn[j](x_BChw)
        return self.upsample(self.downsample(x_BChw))


class Encoder(nn.Module):
    """Image [B, 3, R, R] → features [B, C, h, h] before `quant_conv`."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        deepest = len(widths) - 1
        self.conv_in = _conv3x3(3, config.ch)
        self.down = nn.ModuleList()
        for level, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            stage = Level(c_in, c_out, config.num_res_blocks, attention=level == deepest)
            if level != deepest:
                stage.downsample = Downsample(c_out)
            self.down.append(stage)
        self.mid = Middle(widths[-1])
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], config.z_channels)

    def forward(self, x_B3RR: Tensor) -> Tensor:
        x_BChw = self.conv_in(x_B3RR)
        for stage in self.down:
            x_BChw = stage(x_BChw)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BChw))))


class Decoder(nn.Module):
    """Features [B, C, h, h] after `post_quant_conv` → image [B, 3, R, R], not yet clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        deepest = len(widths) - 1
        self.conv_in = _conv3x3(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, c_out in enumerate(widths):  # stored shallow first, run deepest first
            c_in = widths[min(level + 1, deepest)]
            stage = Level(c_in, c_out, config.num_res_blocks + 1, attention=level == deepest)
            if level != 0:
                stage.upsample = Upsample(c_out)
            self.up.append(stage)
        self.norm_out = _group_norm(widths[0])
        self.conv_out = _conv3x3(widths[0], 3)

    def forward(self, f_BChh: Tensor) -> Tensor:
        x_BChw = self.mid(self.conv_in(f_BChh))
        for stage in reversed(self.up):
            x_BChw = stage(x_BChw)
        return self.conv_out(F.silu(self.norm_out(x_BChw)))


class VQVAE(nn.Module):
    """Encoder, multi-scale quantiser, decoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = _conv3x3(config.z_channels, config.z_channels)
        self.post_quant_conv = _conv3x3(config.z_channels, config.z_channels)

    def encode(self, image_B3RR: Tensor) -> Tensor:
        """Feature map [B, C, h, h] of images in [−1, 1], not yet quantised."""
        return self.quant_conv(self.encoder(image_B3RR))

    def tokens(self, image_B3RR: Tensor) -> list[Tensor]:
        """Token pyramid of images in [−1, 1]: K tensors int64 [B, n_k]."""
        return self.quantize.tokens_from_features(self.encode(image_B3RR))

    def decode(self, f_hat_BChh: Tensor) -> Tensor:
        """Image [B, 3, R, R] clamped to [−1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat_BChh)).clamp(-1, 1)

    def reconstruct(self, image_B3RR: Tensor) -> Tensor:
        """Images in [−1, 1] through all scales of the quantiser and back."""
        return self.decode(self.quantize.features_from_tokens(self.tokens(image_B3RR)))

    def forward(self, image_B3RR: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training pass: reconstruction [B, 3, R, R] (not clamped), quantiser loss, tokens."""
        features_BChh = self.encode(image_B3RR)
        with torch.autocast(image_B3RR.device.type, enabled=False):  # codes are chosen in float32
            f_BChh, loss, tokens = self.quantize(features_BChh.float())
        return self.decoder(self.post_quant_conv(f_BChh)), loss, tokens

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As usual, except that usage statistics of another number of scales are ignored.

        The published VQVAE file keeps statistics of ten scales whatever the VAR it is used with.
        """
        key = "quantize.ema_vocab_hit_SV"
        own_SV = self.quantize.ema_vocab_hit_SV
        if key in state_dict and state_dict[key].shape != own_SV.shape:
            state_dict = {**state_dict, key: torch.zeros_like(own_SV)}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
