"""The discriminator: shapes, independence of images, losses by hand, the weight that evens gradients out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from var_train import adversarial
from var_train.adversarial import (
    MAX_ADAPTIVE_WEIGHT,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


@pytest.mark.parametrize(("side", "patches"), [(64, 6), (32, 2), (72, 7)])
def test_a_patch_of_70_pixels_gives_one_number(side, patches):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1, patches, patches)


def test_a_number_depends_on_its_patch_of_70_pixels_alone():
    discriminator = PatchDiscriminator(width=8).eval()
    for module in discriminator.modules():  # whose statistics are of the whole image
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    discriminator(image)[0, 0, 9, 9].backward()
    touched = image.grad[0].abs().sum(0).nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [70, 70]


def test_images_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8).train()
    images = torch.randn(3, 3, 64, 64)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.625))  # (0 + ½)/2 and (0 + 1¼)/2
    assert generator_loss(fake).item() == pytest.approx(1.375)


def test_the_weight_makes_both_gradients_as_long():
    layer = nn.Linear(4, 4, bias=False)
    y = layer(torch.randn(8, 4))
    reconstruction, adversarial = 3 * y.abs().mean(), 0.01 * y.square().mean()
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    assert not weight.requires_grad
    (ours,) = torch.autograd.grad(reconstruction, layer.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(weight * adversarial, layer.weight)
    assert theirs.norm().item() == pytest.approx(ours.norm().item(), rel=0.05)  # all but the 1e-4 that guards from 0


def test_the_weight_is_of_the_gradients_of_all_processes(monkeypatch):
    layer = nn.Linear(4, 4, bias=False)
    y = layer(torch.randn(8, 4))
    losses = y.abs().mean(), y.square().mean()
    ours = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
    theirs = [torch.randn(4, 4), torch.randn(4, 4)]  # of another process

    def average(tensors):
        for tensor, other in zip(tensors, theirs, strict=True):
            tensor.add_(other).div_(2)

    monkeypatch.setattr(adversarial, "average_over_processes", average)
    means = [(a + b).div(2).norm().item() for a, b in zip(ours, theirs, strict=True)]
    assert adaptive_weight(*losses, layer.weight).item() == pytest.approx(means[0] / (means[1] + 1e-4), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_weight_does_not_depend_on_the_scale_unless_it_is_too_large(scale):
    layer = nn.Linear(4, 4, bias=False)
    y = layer(torch.randn(8, 4))
    losses = y.abs().mean(), 1e-3 * y.square().mean()
    ours, theirs = (adaptive_weight(*losses, layer.weight, scale=s).item() for s in (1.0, scale))
    assert theirs == pytest.approx(ours, rel=1e-6)
    assert adaptive_weight(*losses, layer.weight, scale=3e38).item() == 0


def test_the_weight_is_bounded_where_the_discriminator_says_nothing():
    layer = nn.Linear(2, 2, bias=False)
    y = layer(torch.ones(1, 2))
    assert adaptive_weight(1e6 * y.sum(), 0.0 * y.sum(), layer.weight).item() == MAX_ADAPTIVE_WEIGHT


def test_discriminator_and_images_learn_against_each_other():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    real, fake = torch.randn(4, 3, 32, 32).clamp(-1, 1), torch.zeros(4, 3, 32, 32)
    first = discriminator_loss(discriminator(real), discriminator(fake)).item()
    for _ in range(20):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    fake.requires_grad_(True)
    before = generator_loss(discriminator(fake))
    before.backward()
    after = generator_loss(discriminator(fake.detach() - 10 * fake.grad))
    assert after.item() < before.item()
