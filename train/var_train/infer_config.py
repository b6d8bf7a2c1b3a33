"""State dicts → the configurations that their keys and shapes imply."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from var_deploy.config import HEAD_DIM, ConfigError, PhiLayout, VARConfig, VQVAEConfig
from var_deploy.errors import CheckpointError

StateDict = dict[str, Tensor]


def infer_var_config(state: StateDict, path: Path) -> VARConfig:
    """Configuration from keys and shapes alone. Raises CheckpointError."""

    def need(key: str, dims: int) -> Tensor:
        if key not in state:
            raise CheckpointError(f"{path}: missing key {key!r}, needed to infer the configuration of a VAR")
        if state[key].dim() != dims:
            raise CheckpointError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {dims} axes")
        return state[key]

    lvl_1L = need("lvl_1L", 2).long()
    if not lvl_1L.numel() or lvl_1L.min() < 0 or lvl_1L.max() >= lvl_1L.shape[1]:
        raise CheckpointError(f"{path}: lvl_1L does not hold the scale index of each token; the file is damaged")
    counts = torch.bincount(lvl_1L[0]).tolist()
    patch_nums = tuple(math.isqrt(n) for n in counts)
    if [pn * pn for pn in patch_nums] != counts:
        raise CheckpointError(f"{path}: lvl_1L counts {counts} tokens per scale, expected square numbers")
    embed_dim, z_channels = need("word_embed.weight", 2).shape
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    if scale_mul is not None and scale_mul.dim() == 4 and scale_mul.shape[1] * HEAD_DIM != embed_dim:
        raise CheckpointError(
            f"{path}: {scale_mul.shape[1]} heads at width {embed_dim}, expected head width {HEAD_DIM} "
            f"({embed_dim // HEAD_DIM} heads)"
        )
    try:
        return VARConfig(
            patch_nums=patch_nums,
            vocab_size=need("head.weight", 2).shape[0],
            z_channels=z_channels,
            num_classes=need("class_emb.weight", 2).shape[0] - 1,
            depth=_count(state, path, r"blocks\.(\d+)\."),
            embed_dim=embed_dim,
            ffn_dim=need("blocks.0.ffn.fc1.weight", 2).shape[0],
            shared_aln=any(key.endswith(".ada_gss") for key in state),
            attn_l2_norm=scale_mul is not None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def infer_vqvae_config(
    state: StateDict, patch_nums: tuple[int, ...] | None, path: Path, *, using_znorm: bool = False
) -> VQVAEConfig:
    """Configuration from keys and shapes alone, but for the scales. Raises CheckpointError."""

    def need(key: str, dims: int) -> Tensor:
        if key not in state:
            raise CheckpointError(f"{path}: missing key {key!r}, needed to infer the configuration of a VQVAE")
        if state[key].dim() != dims:
            raise CheckpointError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {dims} axes")
        return state[key]

    ch = need("encoder.conv_in.weight", 4).shape[0]
    widths = [
        need(f"encoder.down.{level}.block.0.conv1.weight", 4).shape[0]
        for level in range(_count(state, path, r"encoder\.down\.(\d+)\."))
    ]
    partial = _count(state, path, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    per_scale = _count(state, path, r"quantize\.quant_resi\.(\d+)\.")
    if partial:
        layout, num_phi = PhiLayout.PARTIAL, partial
    elif per_scale:
        layout, num_phi = PhiLayout.PER_SCALE, per_scale
    else:
        layout, num_phi = PhiLayout.SINGLE, 1
    vocab_size, z_channels = need("quantize.embedding.weight", 2).shape
    if patch_nums is None:
        usage = state.get("quantize.ema_vocab_hit_SV")
        scales = len(usage) if usage is not None and usage.dim() == 2 and len(usage) > 1 else 10
        patch_nums = tuple(range(1, 1 + scales))
    try:
        return VQVAEConfig(
            patch_nums=patch_nums,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=_count(state, path, r"encoder\.down\.0\.block\.(\d+)\."),
            num_phi=num_phi,
            phi_layout=layout,
            using_znorm=using_znorm,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _count(state: StateDict, path: Path, pattern: str) -> int:
    """One more than the largest number that a key has where the pattern has its group. Raises CheckpointError."""
    numbers = [int(match.group(1)) for key in state if (match := re.match(pattern, key))]
    count = 1 + max(numbers, default=-1)
    if count > len(state):  # said before a model of that many parts is built
        raise CheckpointError(f"{path}: a key numbers part {count - 1} of a state dict with {len(state)} keys")
    return count
