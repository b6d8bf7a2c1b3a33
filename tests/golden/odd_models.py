"""Models of odd configurations with random weights: each departs from the published shape in its own way."""

from __future__ import annotations

from typing import Any

from var_deploy.config import VARConfig, VQVAEConfig
from var_train import VAR, VQVAE
from var_train.presets import SCALES_512, randomise

#: Each row departs from the published shape in its own way; what is not named is small and plain.
ODD_CONFIGURATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "shared_aln": ((1, 2, 3), {"depth": 3, "shared_aln": True}, {}),
    "plain_attention": ((1, 2, 4), {"attn_l2_norm": False, "embed_dim": 128}, {"ch_mult": (1, 2)}),
    "both": ((1, 3, 5), {"shared_aln": True, "attn_l2_norm": False}, {"num_phi": 2}),
    "one_phi": ((1, 2, 3, 4), {}, {"num_phi": 1, "phi_layout": "single"}),
    "phi_per_scale": ((1, 2, 3, 4, 5), {}, {"num_phi": 5, "phi_layout": "per_scale"}),
    "first_scale_of_four": ((2, 3, 5), {"num_classes": 3}, {"num_phi": 3}),
    "many_scales": (tuple(range(1, 13)), {"depth": 1}, {"ch_mult": (2, 1), "num_res_blocks": 1}),
    "scales_512": (SCALES_512, {"depth": 1}, {"ch_mult": (1, 1), "num_res_blocks": 1}),
    "one_class": ((1, 2), {"num_classes": 1, "vocab_size": 97, "z_channels": 8, "depth": 1}, {"num_phi": 1}),
    "three_heads": ((1, 3, 4), {"embed_dim": 192, "z_channels": 16, "ffn_dim": 250}, {"ch_mult": (1, 2, 1, 2)}),
    "no_downsampling": ((3, 4, 7), {"ffn_dim": 65}, {"ch_mult": (1,), "ch": 64}),
}


def odd_configs(name: str) -> tuple[VARConfig, VQVAEConfig]:
    patch_nums, var, vqvae = ODD_CONFIGURATIONS[name]
    both = {"patch_nums": patch_nums, "vocab_size": 61, "z_channels": 32}
    var = {"num_classes": 7, "depth": 2, "embed_dim": 64, **var}
    shared = {**both, **{key: value for key, value in var.items() if key in both}}
    var = {**both, "ffn_dim": 4 * var["embed_dim"], **var}
    return VARConfig(**var), VQVAEConfig(**{**shared, "ch": 32, "ch_mult": (1, 1, 2), **vqvae})


def random_models(var: VARConfig, vqvae: VQVAEConfig) -> tuple[VAR, VQVAE]:
    """Reference models whose activations keep their size; the same configuration gives the same weights."""
    models = VAR(var), VQVAE(vqvae)
    for model in models:
        randomise(model)
        model.eval().requires_grad_(False)
    return models
