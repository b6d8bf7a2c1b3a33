"""The published model sizes, and checkpoints of those sizes with random weights for tests and benchmarks.

    python -m var_train.presets d16 --out DIR

Random weights time and parity-test a model as well as trained ones do; the pictures are noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from var_deploy.config import HEAD_DIM, VARConfig, VQVAEConfig

from .var import VAR
from .vqvae import VQVAE

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

#: Name → (depth, scales, shared AdaLN), as in the paper.
PRESETS = {
    "d12": (12, SCALES_256, False),
    "d16": (16, SCALES_256, False),
    "d20": (20, SCALES_256, False),
    "d24": (24, SCALES_256, False),
    "d30": (30, SCALES_256, False),
    "d36-s": (36, SCALES_512, True),
}


def preset_configs(name: str) -> tuple[VARConfig, VQVAEConfig]:
    """Configurations of a published model."""
    depth, patch_nums, shared_aln = PRESETS[name]
    D = depth * HEAD_DIM
    var = VARConfig(
        patch_nums=patch_nums,
        vocab_size=4096,
        num_classes=1000,
        depth=depth,
        embed_dim=D,
        ffn_dim=4 * D,
        shared_aln=shared_aln,
    )
    return var, VQVAEConfig(patch_nums=patch_nums, vocab_size=4096)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Fills a model so that activations keep their size through it.

    Each tensor is a function of its key, its shape and the kind of device that it lies on.
    """
    for key, tensor in model.state_dict().items():
        leaf = key.rsplit(".", 1)[-1]
        if key in ("lvl_1L", "attn_bias_for_masking") or "ema_vocab_hit" in key or leaf == "zero_k_bias":
            continue
        tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(zlib.crc32(key.encode())))
        if leaf == "scale_mul_1H11":
            tensor.mul_(0.1).add_(math.log(4.0))
        elif "norm" in key and leaf == "weight":
            tensor.mul_(0.1).add_(1.0)
        elif leaf in ("bias", "q_bias", "v_bias"):
            tensor.mul_(0.1)
        elif "emb" in key or "pos_" in key or leaf == "ada_gss":
            tensor.mul_(0.3)
        else:
            tensor.mul_(1 / math.sqrt(math.prod(tensor.shape[1:])))


def write_random_checkpoints(name: str, out: Path) -> tuple[Path, Path]:
    """Writes `var_NAME.pth` and `vae_NAME.pth` into `out` and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"var_{name}.pth", out / f"vae_{name}.pth"
    var_config, vqvae_config = preset_configs(name)
    _write_random(partial(VAR, var_config), paths[0])
    _write_random(partial(VQVAE, vqvae_config), paths[1])
    return paths


def _write_random(make: Callable[[], nn.Module], path: Path) -> None:
    model = make()
    randomise(model)
    torch.save(model.state_dict(), path)


def main(
    preset: Annotated[str, typer.Argument(help=f"One of {', '.join(PRESETS)}.")],
    out: Annotated[Path, typer.Option(help="Directory for the two files.")],
) -> None:
    """Write a published-size checkpoint pair with random weights."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    for path in write_random_checkpoints(preset, out):
        print(path)


if __name__ == "__main__":
    typer.run(main)
