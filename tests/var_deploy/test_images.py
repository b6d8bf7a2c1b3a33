"""Pixels to pictures and back, grids and animations."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import RequestError
from var_deploy.images import image_grid, images_from_pixels, pixels_from_images, save_animation


def _plain(*colour: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_pixels_round_to_the_nearest_of_256_levels():
    values = np.array([0, 0.4, 0.6, 1, 127.49, 127.51, 254.4, 255, -9, 300]) / 255
    pixels = np.broadcast_to(values, (1, 3, 1, 10)).astype(np.float32)
    (image,) = images_from_pixels(pixels)
    assert (image.mode, image.size) == ("RGB", (10, 1))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 1, 127, 128, 254, 255, 0, 255]


def test_channels_rows_and_columns_stay_in_their_places():
    pixels = np.zeros((2, 3, 5, 7), np.float32)
    pixels[1, 2, 3, 6] = 1
    first, second = images_from_pixels(pixels)
    assert first.getextrema() == ((0, 0),) * 3
    assert second.getpixel((6, 3)) == (0, 0, 255)


def test_eight_bit_pictures_survive_the_way_there_and_back():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    (back,) = images_from_pixels(pixels_from_images([picture], 9))
    np.testing.assert_array_equal(np.asarray(back), np.asarray(picture))


def test_a_wide_picture_is_cropped_at_its_centre():
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    pixels = pixels_from_images([wide], 50)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 50, 50), np.float32)
    # The centre third is all that is left; the filter may ring at its border.
    np.testing.assert_allclose(pixels[0, :, :, 5:-5].mean(axis=(1, 2)), [0, 1, 0], atol=0.01)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_are_taken(mode):
    pixels = pixels_from_images([Image.new(mode, (10, 20))], 8)
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_an_array_is_taken_as_it_is():
    array = np.random.default_rng(2).random((2, 3, 5, 5))
    np.testing.assert_array_equal(pixels_from_images(array, 5), array.astype(np.float32))


def test_one_bad_value_in_an_array_is_found():
    array = np.zeros((2, 3, 5, 5))
    array[1, 2, 4, 4] = 1.0001
    with pytest.raises(RequestError, match=r"^images: array values outside \[0, 1\]; scale 8-bit values by 1/255$"):
        pixels_from_images(array, 5)


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        (1, None, (6, 4)),
        (2, None, (14, 4)),
        (5, None, (22, 10)),  # three columns, two rows, two pixels between
        (5, 5, (38, 4)),
        (5, 1, (6, 28)),
    ],
)
def test_a_grid_is_as_square_as_it_gets(count, columns, size):
    assert image_grid([_plain(9)] * count, columns).size == size


def test_a_grid_runs_row_by_row():
    grid = image_grid([_plain(i, 0, 0) for i in range(5)], columns=3)
    corners = [(8 * column, 6 * row) for row in range(2) for column in range(3)]
    assert [grid.getpixel(corner) for corner in corners] == [(i, 0, 0) for i in range(5)] + [(255, 255, 255)]
    assert grid.getpixel((6, 0)) == (255, 255, 255)  # the gap


def test_an_animation_loops_and_rests_on_its_last_frame(tmp_path):
    path = tmp_path / "steps.gif"
    save_animation([_plain(60 * i, 0, 0) for i in range(4)], path, milliseconds=100)
    with Image.open(path) as gif:
        assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 4, 0)
        durations, reds = [], []
        for frame in range(4):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            reds.append(gif.convert("RGB").getpixel((0, 0))[0])
    assert durations == [100, 100, 100, 300]
    assert reds == [0, 60, 120, 180]
