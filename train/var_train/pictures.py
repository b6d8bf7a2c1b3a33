"""Images between the three forms they have in training: 8-bit, float in [−1, 1], and a grid to look at.

Axes: B images, R image side, H and W sides of a grid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def normalised(images_B3RR: Tensor, device: torch.device) -> Tensor:
    """8-bit images → float32 in [−1, 1] on a device."""
    return images_B3RR.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def picture_grid(images_B3RR: Tensor) -> np.ndarray:
    """Images in [0, 1] as a nearly square grid, uint8 [H, W, 3]."""
    B, _, R, _ = images_B3RR.shape
    columns = int(np.ceil(np.sqrt(B)))
    rows = -(-B // columns)
    tiles = np.zeros((rows * columns, R, R, 3), np.uint8)
    tiles[:B] = images_B3RR.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return tiles.reshape(rows, columns, R, R, 3).swapaxes(1, 2).reshape(rows * R, columns * R, 3)
