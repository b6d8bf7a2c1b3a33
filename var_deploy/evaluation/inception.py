"""The Inception network of the FID: 8-bit images → pooled features [B, 2048] and spatial features [B, 2023].

It is TensorFlow's classifier of 2015-12-05 (Szegedy et al., arXiv 1512.00567), with the module names of its published
conversion to PyTorch, so that those weights load by key. Three things differ from the network that vision libraries
have under that name: images are enlarged as TensorFlow 1 does it, average pooling leaves the padding out, and the last
block pools by maximum. Axes: B images, H and W of the image, C channels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  #: of the images that the network sees
POOL = 2048
CLASSES = 1008
#: sFID takes the first channels of one branch at every one of 17×17 cells.
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Conv(NamedTuple):
    """One convolution with its norm and ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


#: Convolutions that follow each other; those side by side in one step share its input and are joined.
Branch = list[tuple[Conv, ...]]
Pool = Literal["mean", "max", "shrink"]


class Unit(nn.Module):
    """relu(norm(conv(x))); padded to keep the size, or not at all where it strides or `padded` is off."""

    def __init__(self, width_in: int, spec: Conv, *, padded: bool = True) -> None:
        super().__init__()
        height, width = spec.kernel
        padding = (height // 2, width // 2) if padded and spec.stride == 1 else 0
        self.conv = nn.Conv2d(width_in, spec.width, spec.kernel, stride=spec.stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.width, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


class Mixed(nn.Module):
    """Branches on one input, joined by channel; the last one pools.

    pool: "mean" or "max" of 3×3 cells, followed by the unit `branch_pool` of `pool_width`; "shrink": the maximum at
    every second cell and nothing after it, in blocks whose branches end in a stride of 2.
    """

    def __init__(self, width_in: int, branches: list[Branch], pool: Pool, pool_width: int = 0) -> None:
        super().__init__()
        self._branches: list[list[list[str]]] = []
        self._pool = pool
        for branch in branches:
            width = width_in
            for step in branch:
                for spec in step:
                    self.add_module(spec.name, Unit(width, spec))
                width = sum(spec.width for spec in step)
            self._branches.append([[spec.name for spec in step] for step in branch])
        if pool != "shrink":
            self.branch_pool = Unit(width_in, Conv("branch_pool", pool_width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            y_BCHW = x_BCHW
            for step in branch:
                y_BCHW = torch.cat([self.get_submodule(name)(y_BCHW) for name in step], dim=1)
            outputs.append(y_BCHW)
        return torch.cat([*outputs, self._pooled(x_BCHW)], dim=1)

    def _pooled(self, x_BCHW: Tensor) -> Tensor:
        if self._pool == "shrink":
            return F.max_pool2d(x_BCHW, 3, stride=2)
        if self._pool == "max":
            y_BCHW = F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
        else:
            y_BCHW = F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
        pooled: Tensor = self.branch_pool(y_BCHW)
        return pooled


def _block_35(width_in: int, pool_width: int) -> Mixed:
    """At 35×35 cells."""
    return Mixed(
        width_in,
        [
            [(Conv("branch1x1", 64),)],
            [(Conv("branch5x5_1", 48),), (Conv("branch5x5_2", 64, (5, 5)),)],
            [
                (Conv("branch3x3dbl_1", 64),),
                (Conv("branch3x3dbl_2", 96, (3, 3)),),
                (Conv("branch3x3dbl_3", 96, (3, 3)),),
            ],
        ],
        "mean",
        pool_width,
    )


def _block_17(width: int) -> Mixed:
    """At 17×17 cells; `width` of the 7×7 convolutions, which are split into 1×7 and 7×1."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        768,
        [
            [(Conv("branch1x1", 192),)],
            [
                (Conv("branch7x7_1", width),),
                (Conv("branch7x7_2", width, row),),
                (Conv("branch7x7_3", 192, column),),
            ],
            [
                (Conv("branch7x7dbl_1", width),),
                (Conv("branch7x7dbl_2", width, column),),
                (Conv("branch7x7dbl_3", width, row),),
                (Conv("branch7x7dbl_4", width, column),),
                (Conv("branch7x7dbl_5", 192, row),),
            ],
        ],
        "mean",
        192,
    )


def _block_8(width_in: int, pool: Pool) -> Mixed:
    """At 8×8 cells; 3×3 convolutions end in 1×3 beside 3×1."""
    row, column = (1, 3), (3, 1)
    return Mixed(
        width_in,
        [
            [(Conv("branch1x1", 320),)],
            [
                (Conv("branch3x3_1", 384),),
                (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column)),
            ],
            [
                (Conv("branch3x3dbl_1", 448),),
                (Conv("branch3x3dbl_2", 384, (3, 3)),),
                (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
            ],
        ],
        pool,
        192,
    )


class Inception(nn.Module):
    """Images → features; the classifier `fc` is there for the Inception score, which takes its weight without the bias.

    The spatial features of sFID (Nash et al., arXiv 2103.03841) are guided-diffusion's: output `mixed_6/conv` of the
    TensorFlow graph, first 7 of 192 channels, channels last. That graph counts its blocks from `mixed`: mixed … mixed_2
    are 5b–5d here, mixed_3 is 6a, mixed_4 … mixed_7 are 6b–6e; in a block, `conv` is the ReLU of the 1×1 branch.
    """

    def __init__(self) -> None:
        super().__init__()
        square = (3, 3)
        self.Conv2d_1a_3x3 = Unit(3, Conv("1a", 32, square, stride=2))
        self.Conv2d_2a_3x3 = Unit(32, Conv("2a", 32, square), padded=False)
        self.Conv2d_2b_3x3 = Unit(32, Conv("2b", 64, square))
        self.Conv2d_3b_1x1 = Unit(64, Conv("3b", 80))
        self.Conv2d_4a_3x3 = Unit(80, Conv("4a", 192, square), padded=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        shrunk = [(Conv("branch3x3dbl_1", 64),), (Conv("branch3x3dbl_2", 96, square),)]
        self.Mixed_6a = Mixed(
            288,
            [[(Conv("branch3x3", 384, square, 2),)], [*shrunk, (Conv("branch3x3dbl_3", 96, square, 2),)]],
            "shrink",
        )
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        wide = [(Conv("branch7x7x3_1", 192),), (Conv("branch7x7x3_2", 192, (1, 7)),)]
        self.Mixed_7a = Mixed(
            768,
            [
                [(Conv("branch3x3_1", 192),), (Conv("branch3x3_2", 320, square, 2),)],
                [*wide, (Conv("branch7x7x3_3", 192, (7, 1)),), (Conv("branch7x7x3_4", 192, square, 2),)],
            ],
            "shrink",
        )
        self.Mixed_7b = _block_8(1280, "mean")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(POOL, CLASSES)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images of any size → float32 (pooled [B, 2048], spatial [B, 2023])."""
        x = (enlarge(images_B3HW.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        branch = self.Mixed_6d.get_submodule("branch1x1")(x)
        spatial_BS = branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        return self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3)), spatial_BS


def enlarge(images_B3HW: Tensor, side: int) -> Tensor:
    """Bilinear to side×side as TensorFlow 1 places cells: output i lies at input i·(size / side), not at half cells."""
    for axis in (3, 2):
        size = images_B3HW.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=images_B3HW.device) * (size / side)
        low = place.long()
        high = (low + 1).clamp_max(size - 1)
        share = (place - low).view(-1, *[1] * (3 - axis))
        below, above = images_B3HW.index_select(axis, low), images_B3HW.index_select(axis, high)
        images_B3HW = below + (above - below) * share
    return images_B3HW
