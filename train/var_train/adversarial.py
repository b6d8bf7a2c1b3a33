"""The adversarial term of VQVAE training: a patch discriminator, its hinge loss, and a weight by gradients.

Sources: PatchGAN (arXiv 1611.07004, section 3.2.2); hinge loss and adaptive weight (VQGAN, arXiv 2012.09841, section
3.1). Images are [B, 3, R, R] in [−1, 1]; a discriminator's answer is one number per patch, [B, 1, r, r].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .processes import average_over_processes

#: The discriminator never counts for more than this times the reconstruction.
MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Tells real patches from reconstructed ones: 4×4 convolutions, of which `layers` halve the sides.

    GroupNorm in the place of BatchNorm: its result does not depend on the other images, so it is the same in however
    many processes a batch is trained.
    """

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            wider = width * min(2**i, 8)
            modules += [
                nn.Conv2d(channels, wider, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.GroupNorm(min(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        modules.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image_B3RR: Tensor) -> Tensor:
        patches_B1rr: Tensor = self.layers(image_B3RR)
        return patches_B1rr


def discriminator_loss(real_B1rr: Tensor, fake_B1rr: Tensor) -> Tensor:
    """Hinge: ½·mean(max(0, 1 − D(real))) + ½·mean(max(0, 1 + D(fake)))."""
    return 0.5 * (F.relu(1 - real_B1rr).mean() + F.relu(1 + fake_B1rr).mean())


def generator_loss(fake_B1rr: Tensor) -> Tensor:
    """−mean(D(fake))."""
    return -fake_B1rr.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter, *, scale: float = 1.0
) -> Tensor:
    """How strongly the adversarial term has to count for its gradient at the last layer to be as long as the other's.

    Both are losses that depend on `last_layer`; their graphs are kept. A number without a gradient, the same in all
    processes: their gradients are averaged, as those of a global batch are. `scale` is that of the losses in fp16,
    which would round small gradients to 0; where it is too large, and the update is left out for it, the weight is 0.
    """
    (of_reconstruction,) = torch.autograd.grad(scale * reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(scale * adversarial, last_layer, retain_graph=True)
    average_over_processes([of_reconstruction, of_adversarial])
    ratio = of_reconstruction.norm() / (of_adversarial.norm() + scale * 1e-4)
    return ratio.nan_to_num(nan=0.0, posinf=0.0).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
