"""The perceptual term of VQVAE training: distance of VGG-16 features, as LPIPS weighs them.

Source: LPIPS (arXiv 1801.03924, section 3, equation 1). The weights are the user's: a file with VGG-16's convolutions
under torchvision's names (`features.0.weight` …), with or without LPIPS's own (`lin0.model.1.weight` …). Images are
[B, 3, R, R] in [−1, 1].
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_deploy.errors import CheckpointError

#: Channels of VGG-16's convolutions; a pooling that halves the sides lies between the groups.
GROUPS: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

#: ImageNet's mean and deviation for images in [−1, 1] instead of [0, 1].
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualDistance(nn.Module):
    """LPIPS with given weights, which are not trained: mean over images of Σ_layers mean_cells Σ_c w_c·(â − b̂)²_c.

    â, b̂: features after the last ReLU of each group, of unit length in every cell. Without LPIPS's weights w_c = 1.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        number, before = 0, 3  # number of the layer in torchvision's list: ReLUs and poolings count too
        for widths in GROUPS:
            group = nn.ModuleList()
            for c_in, c_out in pairwise((before, *widths)):
                conv = nn.Conv2d(c_in, c_out, 3, padding=1)
                conv.weight.data = state[f"features.{number}.weight"].float()
                conv.bias.data = state[f"features.{number}.bias"].float()  # type: ignore[union-attr]
                group.append(conv)
                number += 2
            self.groups.append(group)
            before, number = widths[-1], number + 1
        for i, widths in enumerate(GROUPS):
            key = f"lin{i}.model.1.weight"
            weight_C = state[key].float().flatten() if key in state else torch.ones(widths[-1])
            self.register_buffer(f"channel_weight_{i}", weight_C.view(-1, 1, 1))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, ours_B3RR: Tensor, theirs_B3RR: Tensor) -> Tensor:
        """One number; differentiable in both."""
        mean, deviation = self.get_buffer("mean"), self.get_buffer("deviation")
        x = (torch.cat([ours_B3RR, theirs_B3RR]) - mean) / deviation
        total = torch.zeros((), device=x.device)
        for i, group in enumerate(self.groups):
            assert isinstance(group, nn.ModuleList)
            if i:
                x = F.max_pool2d(x, 2)
            for conv in group:
                x = F.relu(conv(x))
            ours, theirs = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            total = total + ((ours - theirs).square() * self.get_buffer(f"channel_weight_{i}")).sum(1).mean()
        return total


def load_perceptual(path: Path) -> PerceptualDistance:
    """From a safetensors file or a state dict saved by torch.save. Raises CheckpointError; executes nothing."""
    advice = "give a file with VGG-16's convolutions under torchvision's names"
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the file system, safetensors, or one of torch's many
        kind = "" if isinstance(error, OSError | SafetensorError) else f"{type(error).__name__}: "
        why = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path}: cannot be read ({kind}{why}); {advice}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: got a {type(state).__name__}, expected a state dict; {advice}")
    for name, shape in _shapes().items():
        found = state.get(name)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else "nothing"
            raise CheckpointError(f"{path}: {name}: got {got}, expected {shape}; {advice}")
    return PerceptualDistance(state)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    number, before = 0, 3
    for widths in GROUPS:
        for c_in, c_out in pairwise((before, *widths)):
            shapes |= {f"features.{number}.weight": (c_out, c_in, 3, 3), f"features.{number}.bias": (c_out,)}
            number += 2
        before, number = widths[-1], number + 1
    return shapes
