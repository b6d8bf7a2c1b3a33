"""Models of odd configurations with random weights, exported once per run, for the tests of graphs and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from var_deploy.bundle import Bundle
from var_deploy.config import VARConfig, VQVAEConfig
from var_export.bundle import write_bundle
from var_export.checkpoint import CheckpointPair
from var_train import VAR, VQVAE
from var_train.presets import SCALES_512, randomise

# These tensors are tiny: a second thread costs more than it gives, several times over where cores are shared.
torch.set_num_threads(1)

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


@dataclass(frozen=True)
class OddModel:
    """Reference models, their state dicts as a checked pair, and the opened bundle."""

    name: str
    var: VAR
    vqvae: VQVAE
    pair: CheckpointPair
    bundle: Bundle


@pytest.fixture(scope="session", params=list(ODD_CONFIGURATIONS))
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OddModel:
    """One exported model after the other; read only."""
    var, vqvae = random_models(*odd_configs(request.param))
    pair = CheckpointPair(var.config, vqvae.config, var.state_dict(), vqvae.state_dict())
    path = write_bundle(pair, tmp_path_factory.mktemp("odd") / request.param)
    return OddModel(request.param, var, vqvae, pair, Bundle.open(path))


@pytest.fixture(scope="session")
def odd_states() -> Callable[[str], tuple[VARConfig, VQVAEConfig, dict[str, Tensor], dict[str, Tensor]]]:
    """`odd_states(name)`: configurations and state dicts of a row of the table, free to alter."""

    def make(name: str) -> tuple[VARConfig, VQVAEConfig, dict[str, Tensor], dict[str, Tensor]]:
        var, vqvae = random_models(*odd_configs(name))
        return var.config, vqvae.config, dict(var.state_dict()), dict(vqvae.state_dict())

    return make


@pytest.fixture(scope="session")
def odd_names() -> list[str]:
    return list(ODD_CONFIGURATIONS)


@pytest.fixture(scope="session")
def tiny_checkpoints(tiny_pair) -> CheckpointPair:
    """The golden tiny pair as the exporter reads it."""
    from var_export.checkpoint import load_pair

    return load_pair(tiny_pair[1], tiny_pair[2])


@pytest.fixture
def write_pth(tmp_path: Path) -> Callable[..., Path]:
    """`write_pth(content, name="x.pth", **torch_save_options)` → path of the file."""

    def write(content: Any, name: str = "file.pth", **options: Any) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write
