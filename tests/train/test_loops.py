"""The training loops on random images with a tiny model: losses fall, seeds repeat, published optimiser groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from var_deploy.config import VARConfig, VQVAEConfig
from var_train import VAR, VQVAE
from var_train.loops import (
    LoopSettings,
    train_var,
    train_vqvae,
)

PATCH_NUMS = (1, 2, 3)
VQVAE_CONFIG = VQVAEConfig(patch_nums=PATCH_NUMS, vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1)
VAR_CONFIG = VARConfig(
    patch_nums=PATCH_NUMS,
    vocab_size=24,
    z_channels=8,
    num_classes=2,
    depth=2,
    embed_dim=64,
    ffn_dim=128,
)
SETTINGS = LoopSettings(steps=30, learning_rate=2e-3, weight_decay=0.05)


def two_stripes() -> Iterator[tuple[Tensor, Tensor]]:
    """Class 0 is bright above, class 1 bright on the left; the noise never repeats."""
    generator = torch.Generator().manual_seed(5)
    while True:
        labels_B = torch.randint(2, (8,), generator=generator)
        image_B3RR = torch.full((8, 3, 6, 6), -0.8)
        image_B3RR[labels_B == 0, :, :3] = 0.8
        image_B3RR[labels_B == 1, :, :, :3] = 0.8
        yield image_B3RR + 0.05 * torch.randn(image_B3RR.shape, generator=generator), labels_B


def trained(seed: int) -> tuple[list[float], list[float], VQVAE]:
    torch.manual_seed(seed)
    vqvae, var = VQVAE(VQVAE_CONFIG), VAR(VAR_CONFIG)
    var.init_weights()
    vqvae_losses = train_vqvae(vqvae, two_stripes(), SETTINGS, revive_every=10)
    return vqvae_losses, train_var(var, vqvae, two_stripes(), SETTINGS), vqvae


def test_losses_fall_and_the_seed_repeats_them():
    vqvae_losses, var_losses, vqvae = trained(0)
    for losses in (vqvae_losses, var_losses):
        assert len(losses) == SETTINGS.steps
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not vqvae.training
    again_vqvae, again_var, _ = trained(0)
    assert (again_vqvae, again_var) == (vqvae_losses, var_losses)
    assert trained(1)[0] != vqvae_losses


def test_rate_warms_up_and_ends_at_final():
    settings = LoopSettings(steps=100, learning_rate=1.0, weight_decay=0.0, warmup=0.1, final=0.05)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("steps", [1, 2])
def test_rate_of_the_shortest_runs(steps):
    settings = LoopSettings(steps=steps, learning_rate=1.0, weight_decay=0.0)
    assert all(0 < settings.rate(step) <= 1 for step in range(steps))
