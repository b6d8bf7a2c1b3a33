"""The transformer of the torch engine: condition once per request, then one call per scale, all on static buffers.

Axes: R rows (B images, or 2B under guidance: conditioned first), n tokens of a scale, M = R·n, D width, H heads, L all
positions, C code width, l = h² cells of the feature map, p and q sides of two consecutive token maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels import Ops
from var_kernels.reference import resampling_taps

from ...config import PLAIN_SCALE, VARConfig, VQVAEConfig
from ...interpolation import area_matrix, bicubic_matrix
from .buffers import Buffers
from .weights import Product, WeightReader


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one block."""

    q_scale_H: Tensor | None
    qkv: Product
    proj: Product
    fc1: Product
    fc2: Product


@dataclass(frozen=True, slots=True)
class Resampling:
    """What `next_scale` needs to go from scale k − 1 to scale k (or, after the last, to the complete feature map)."""

    phi_weight_9CC: Tensor
    phi_bias_C: Tensor
    cell_taps_3hp: Tensor
    token_taps_3qp: Tensor | None
    area_qh: Tensor | None
    position_mD: Tensor | None


class Transformer:
    """Weights on the device and the launches that use them."""

    def __init__(self, var: VARConfig, vqvae: VQVAEConfig, read: WeightReader) -> None:
        self.config = var
        self._ops: Ops = read.ops
        self._class_embedding = read.half("class_emb.weight")
        self._start_position_nD = read.float32("start_position")
        self._ada_gss_1i6D: Tensor | None = None
        if var.shared_aln:
            self._ada_gss_1i6D = read.float32("ada_gss").flatten(2)
            projections = ["shared_ada_lin", "head_nm.ada_lin"]
        else:
            projections = [*(f"blocks.{i}.ada_lin" for i in range(var.depth)), "head_nm.ada_lin"]
        # All projections in one product: at a small batch it reads at the memory's full rate.
        self._ada_weight_DN = torch.cat([read.half(f"{name}.weight") for name in projections], dim=1)
        self._ada_bias_N = torch.cat([read.float32(f"{name}.bias") for name in projections])
        self._word_weight_CD = read.float32("word_embed.weight")
        self._blocks = [self._block(read, i) for i in range(var.depth)]
        self._head_weight_DV, self._head_bias_V = read.half("head.weight"), read.float32("head.bias")
        self._resampling = [_resampling(var, vqvae, read, k) for k in range(1, var.num_scales + 1)]
        self.codebook_VC = read.float32("quantize.embedding.weight")

    def _block(self, read: WeightReader, i: int) -> Block:
        attn, ffn = f"blocks.{i}.attn", f"blocks.{i}.ffn"
        return Block(
            q_scale_H=read.float32(f"{attn}.q_scale").flatten() if self.config.attn_l2_norm else None,
            qkv=read.product(f"{attn}.qkv"),
            proj=read.product(f"{attn}.proj"),
            fc1=read.product(f"{ffn}.fc1"),
            fc2=read.product(f"{ffn}.fc2"),
        )

    def condition(self, b: Buffers) -> None:
        """labels → modulations of all blocks and the head, and the first scale's input."""
        D, depth = self.config.embed_dim, self.config.depth
        cond_RD = self._class_embedding[b.labels_R]
        silu_RD = F.silu(cond_RD)
        if self._ada_gss_1i6D is None:
            self._ops.linear(silu_RD, self._ada_weight_DN, self._ada_bias_N, out_MN=b.modulation_RN)
        else:
            shared_RN = torch.empty(len(cond_RD), 8 * D, device=cond_RD.device)
            self._ops.linear(silu_RD, self._ada_weight_DN, self._ada_bias_N, out_MN=shared_RN)
            blocks_RN, head_RN = b.modulation_RN.split([6 * depth * D, 2 * D], dim=1)
            torch.add(shared_RN[:, None, : 6 * D], self._ada_gss_1i6D, out=blocks_RN.unflatten(1, (depth, 6 * D)))
            head_RN.copy_(shared_RN[:, 6 * D :])
        start_RnD = b.tokens_in(0, len(cond_RD)).view(len(cond_RD), -1, D)
        torch.add(cond_RD[:, None], self._start_position_nD, out=start_RnD)

    def embed(self, b: Buffers, k: int, rows: int) -> None:
        """Adds the codes of scale k − 1 to f_hat and writes the input tokens of scale k; k = K only adds."""
        step = self._resampling[k - 1]
        last = step.area_qh is None
        self._ops.next_scale(
            b.codes(k - 1),
            b.f_hat_BlC(k - 1),
            step.phi_weight_9CC,
            step.phi_bias_C,
            step.cell_taps_3hp,
            f_hat_out_BlC=b.f_hat_BlC(k),
            token_taps_3qp=step.token_taps_3qp,
            area_qh=step.area_qh,
            word_weight_CD=None if last else self._word_weight_CD,
            position_mD=step.position_mD,
            x_out_RmD=None if last else b.tokens_in(k, rows).view(rows, -1, self.config.embed_dim),
        )

    def scale(self, b: Buffers, k: int, rows: int) -> None:
        """Input tokens of scale k → raw logits float32 [rows·n_k, V]; keys and values go into the caches."""
        config, ops = self.config, self._ops
        D, M, begin = config.embed_dim, rows * config.tokens_per_scale[k], config.span(k)[0]
        x_MD, normed_MD, qkv_MN = b.x_MD[:M], b.normed_MD[:M], b.qkv_MN[:M]
        attended_MD, hidden_MF, branch_MD = b.attended_MD[:M], b.hidden_MF[:M], b.branch_MD[:M]
        modulation_RN = b.modulation_RN[:rows]
        y_MD: Tensor | None = None  # the branch before, added to x by the norm after it
        gamma_RD: Tensor | None = None
        for i, block in enumerate(self._blocks):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_RN[:, 6 * i * D : 6 * (i + 1) * D].split(D, 1)
            ops.adaln(x_MD, y_MD, gamma_RD, scale1, shift1, out_MD=normed_MD)
            block.qkv(normed_MD, qkv_MN, b)
            cache_k_RHLd, cache_v_RHLd = b.caches_i2RHLd[i, :, :rows]
            ops.cached_attention(
                qkv_MN,
                block.q_scale_H,
                cache_k_RHLd,
                cache_v_RHLd,
                begin=begin,
                softmax_scale=1.0 if block.q_scale_H is not None else PLAIN_SCALE,
                out_MD=attended_MD,
            )
            y_MD = block.proj(attended_MD, branch_MD, b)
            ops.adaln(x_MD, y_MD, gamma1, scale2, shift2, out_MD=normed_MD)
            block.fc1(normed_MD, hidden_MF, b, gelu=True)
            y_MD, gamma_RD = block.fc2(hidden_MF, branch_MD, b), gamma2
        head_scale, head_shift = modulation_RN[:, 6 * config.depth * D :].split(D, 1)
        ops.adaln(x_MD, y_MD, gamma_RD, head_scale, head_shift, out_MD=normed_MD)
        ops.linear(normed_MD, self._head_weight_DV, self._head_bias_V, out_MN=b.logits_MV[:M])


def _resampling(var: VARConfig, vqvae: VQVAEConfig, read: WeightReader, k: int) -> Resampling:
    """From scale k − 1 to scale k; k = K for what follows the last."""
    C, h, p = vqvae.z_channels, vqvae.latent_size, vqvae.patch_nums[k - 1]
    phi = vqvae.phi_index(k - 1)
    weight_CC33 = read.float32("quantize.phi.weight")[phi * C : (phi + 1) * C]
    enlarge_hp = torch.from_numpy(bicubic_matrix(p, h))
    token_taps_3qp = area_qh = position_mD = None
    if k < var.num_scales:
        area_qh = torch.from_numpy(area_matrix(h, vqvae.patch_nums[k]))
        token_taps_3qp = resampling_taps(enlarge_hp, area_qh).contiguous().to(read.device)
        begin, end = (position - var.tokens_per_scale[0] for position in var.span(k))
        position_mD = read.float32("position")[begin:end].contiguous()
    return Resampling(
        phi_weight_9CC=weight_CC33.permute(2, 3, 1, 0).reshape(9, C, C).contiguous(),
        phi_bias_C=read.float32("quantize.phi.bias")[phi * C : (phi + 1) * C].contiguous(),
        cell_taps_3hp=resampling_taps(enlarge_hp).contiguous().to(read.device),
        token_taps_3qp=token_taps_3qp,
        area_qh=None if area_qh is None else area_qh.to(read.device),
        position_mD=position_mD,
    )
