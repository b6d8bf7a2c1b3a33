"""8-bit images to numbers in [−1, 1], and images in [0, 1] to a grid, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_train.pictures import normalised, picture_grid


def test_all_bytes_are_numbers_from_minus_one_to_one():
    bytes_11HW = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    values = normalised(bytes_11HW, torch.device("cpu"))
    assert values.dtype == torch.float32
    assert (values[0, 0, 0, 0].item(), values[0, 0, -1, -1].item()) == (-1.0, 1.0)
    torch.testing.assert_close(values.flatten(), torch.linspace(-1, 1, 256), rtol=0, atol=2e-7)  # two roundings
    assert bytes_11HW.flatten().tolist() == list(range(256))  # the given images stay as they are


@pytest.mark.parametrize(
    ("images", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4)]
)
def test_images_lie_row_by_row_in_a_nearly_square_grid(images, rows, columns):
    R = 5
    image_B3RR = torch.rand(images, 3, R, R)
    grid_HW3 = picture_grid(image_B3RR)
    assert grid_HW3.shape == (rows * R, columns * R, 3)
    assert grid_HW3.dtype == np.uint8
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        tile_RR3 = grid_HW3[row * R : (row + 1) * R, column * R : (column + 1) * R]
        expected = np.zeros_like(tile_RR3)
        if number < images:
            expected = np.rint(image_B3RR[number].permute(1, 2, 0).numpy() * 255)
        assert np.array_equal(tile_RR3, expected)


def test_what_lies_outside_is_cut_off_and_a_picture_comes_back_as_it_was():
    values = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, 128 / 255]).view(6, 1, 1, 1).expand(6, 3, 1, 1)
    assert picture_grid(values)[..., 0].flatten().tolist() == [0, 0, 128, 255, 255, 128]
    bytes_B3RR = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    grid_HW3 = picture_grid((normalised(bytes_B3RR, torch.device("cpu")) + 1) / 2)
    assert np.array_equal(grid_HW3[8:, :8], bytes_B3RR[2].permute(1, 2, 0).numpy())
