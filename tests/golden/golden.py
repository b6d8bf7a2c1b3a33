"""Golden vectors of the published code: what it returns in float32 for weights made by a rule.

`NAME.json` holds the configuration and every state-dict key with its shape, `NAME.safetensors` the results. Each
weight is a pure function of its key and shape, so nothing large is stored.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from var_deploy.config import VARConfig, VQVAEConfig

HERE = Path(__file__).parent
GOLDEN_NAMES = ("tiny", "shared_aln")


@dataclass(frozen=True)
class Golden:
    name: str
    config: dict[str, Any]
    keys: dict[str, dict[str, list[int]]]
    tensors: dict[str, np.ndarray]

    @classmethod
    def load(cls, name: str) -> Golden:
        meta = json.loads((HERE / f"{name}.json").read_text())
        return cls(name, meta["config"], meta["keys"], load_file(HERE / f"{name}.safetensors"))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.tensors[key]

    def test_image(self) -> np.ndarray:
        """The images that were encoded: float32 [B, 3, R, R] in [−1, 1]."""
        B, _, R, _ = self["reconstruction"].shape
        b, c = np.arange(1, B + 1).reshape(-1, 1, 1, 1), np.arange(1, 4).reshape(1, -1, 1, 1)
        y, x = np.arange(R).reshape(-1, 1) / R, np.arange(R).reshape(1, -1) / R
        return np.sin(2 * np.pi * (b * x + c * y)).astype(np.float32)


def rule_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of this key and shape: normal noise seeded by the key, at a magnitude set by its role."""
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if "ema_vocab_hit" in key or leaf == "zero_k_bias":
        x = 0 * x
    elif "scale_mul" in key:
        x = np.log(4.0) + 0.1 * x
    elif "norm" in key and leaf == "weight":
        x = 1 + 0.1 * x
    elif leaf in ("bias", "q_bias", "v_bias"):
        x = 0.1 * x
    elif "embed" in key or "pos_" in key or "class_emb" in key:
        x = 0.5 * x
    elif "ada_gss" in key:
        x = 0.3 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else shape[0])
    return x.astype(np.float32)


def rule_var_state_dict(config: VARConfig, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """State dict of a VAR by the rule; the scale index and the mask keep their computed values."""
    lvl_L = np.repeat(np.arange(config.num_scales), config.tokens_per_scale)
    mask_LL = np.where(lvl_L[None, :] > lvl_L[:, None], -np.inf, 0).astype(np.float32)
    computed = {"lvl_1L": lvl_L[None].astype(np.int64), "attn_bias_for_masking": mask_LL[None, None]}
    return {k: computed[k] if k in computed else rule_tensor(k, tuple(s)) for k, s in shapes.items()}


def rule_state_dicts(golden: Golden) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(VAR, VQVAE) state dicts of a golden case."""
    vqvae = {k: rule_tensor(k, tuple(s)) for k, s in golden.keys["vae"].items()}
    return rule_var_state_dict(golden_config(golden)[0], golden.keys["var"]), vqvae


def golden_config(golden: Golden) -> tuple[VARConfig, VQVAEConfig]:
    c = golden.config
    patch_nums, D = tuple(c["patch_nums"]), golden.keys["var"]["word_embed.weight"][0]
    var = VARConfig(
        patch_nums=patch_nums,
        vocab_size=c["vocab_size"],
        z_channels=c["z_channels"],
        num_classes=c["num_classes"],
        depth=c["depth"],
        embed_dim=D,
        ffn_dim=4 * D,
        shared_aln=c["shared_aln"],
        attn_l2_norm=c["attn_l2_norm"],
    )
    vqvae = VQVAEConfig(
        patch_nums=patch_nums,
        vocab_size=c["vocab_size"],
        z_channels=c["z_channels"],
        ch=c["ch"],
        num_phi=c["share_quant_resi"],
    )
    return var, vqvae
