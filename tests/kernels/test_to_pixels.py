"""to_pixels against its reference: odd sides, every rounding boundary, values out of range, wrong input."""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.to_pixels import to_pixels


def buffers(B, R, device):
    """Planes and bytes filled with what no pixel is."""
    planes_B3RR = torch.full((B, 3, R, R), torch.nan, device=device)
    return {
        "pixels_out_B3RR": planes_B3RR,
        "bytes_out_BRR3": torch.full((B, R, R, 3), 77, dtype=torch.uint8, device=device),
    }


def assert_equals_the_reference(x_Bl3, bias_3, R):
    """Bit for bit: both sides do the same five float32 operations."""
    got, expected = (buffers(x_Bl3.shape[0], R, x_Bl3.device) for _ in range(2))
    to_pixels(x_Bl3, bias_3, **got)
    reference.to_pixels(x_Bl3, bias_3, **expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(("B", "R"), [(1, 1), (3, 5), (2, 16), (1, 37)])
def test_against_the_reference(B, R, dtype, device):
    x_Bl3, bias_3 = torch.randn(B, R * R, 3) * 0.8, torch.tensor([0.3, -0.2, 1e-3])
    assert_equals_the_reference(x_Bl3.to(device, dtype), bias_3.to(device, dtype), R)


def test_every_byte_and_the_halves_between(device):
    """x where unit·255 is next to, or exactly on, k and k + 1/2."""
    x = (torch.arange(0, 511, dtype=torch.float64) / 255 - 1).float()
    lower, upper = x.nextafter(torch.tensor(-2.0)), x.nextafter(torch.tensor(2.0))
    values = torch.cat([x, lower, upper, torch.tensor([-torch.inf, -3.0, -0.0, 0.0, 1e-40, 3.0, torch.inf])])
    R = 23
    x_Bl3 = torch.zeros(R * R * 3).index_put((torch.arange(len(values)),), values).view(1, R * R, 3).to(device)
    levels = (x_Bl3 * 0.5 + 0.5).clamp(0, 1) * 255
    assert (levels % 1 == 0.5).sum() > 50, "no halves among the levels"
    assert_equals_the_reference(x_Bl3, torch.zeros(3, device=device), R)


def test_nan_gives_a_pixel_in_range(device):
    out = buffers(1, 2, device)
    to_pixels(torch.full((1, 4, 3), torch.nan, device=device), torch.zeros(3, device=device), **out)
    assert ((out["pixels_out_B3RR"] >= 0) & (out["pixels_out_B3RR"] <= 1)).all()


def test_nothing_outside_the_buffers_is_touched(device):
    out = buffers(4, 5, device)
    slices = {name: tensor[1:3] for name, tensor in out.items()}
    to_pixels(torch.zeros(2, 25, 3, device=device), torch.zeros(3, device=device), **slices)
    for image in (0, 3):
        assert out["pixels_out_B3RR"][image].isnan().all()
        assert (out["bytes_out_BRR3"][image] == 77).all()


@pytest.mark.gpu
@pytest.mark.parametrize("R", [37, 256])
def test_bf16_against_float64(R, device):
    x_Bl3, bias_3 = torch.randn(2, R * R, 3) * 0.8, torch.tensor([0.3, -0.2, 1e-3])
    x_Bl3, bias_3 = x_Bl3.to(device, torch.bfloat16), bias_3.to(device, torch.bfloat16)
    out = buffers(2, R, device)
    to_pixels(x_Bl3, bias_3, **out)
    exact_Bl3 = ((x_Bl3.double() + bias_3.double()) * 0.5 + 0.5).clamp(0, 1)
    # Two float32 roundings: of x + bias, at most 1 where nothing is clamped, then halved; and of what is at most 1.
    exact_B3RR = exact_Bl3.mT.reshape(2, 3, R, R)
    torch.testing.assert_close(out["pixels_out_B3RR"].double(), exact_B3RR, rtol=0, atol=2**-24)
    # A byte is off by a half at most, and by what the pixel is off where it lies beside a half.
    level_BRR3 = 255 * exact_Bl3.reshape(2, R, R, 3)
    torch.testing.assert_close(out["bytes_out_BRR3"].double(), level_BRR3, rtol=0, atol=0.5 + 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "R"), [(8, 256), (2, 512)])
def test_published_sizes(B, R, dtype, device):
    x_Bl3, bias_3 = torch.randn(B, R * R, 3) * 0.8, torch.tensor([0.3, -0.2, 1e-3])
    assert_equals_the_reference(x_Bl3.to(device, dtype), bias_3.to(device, dtype), R)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_Bl3": torch.zeros(2, 3, 16).mT},
            r"x_Bl3: strides \(48, 1, 16\) of shape \(2, 16, 3\), expected contiguous",
        ),
        ({"x_Bl3": torch.zeros(2, 15, 3)}, r"x_Bl3: shape \(2, 15, 3\), expected \(2, 16, 3\)"),
        ({"bias_3": torch.zeros(4)}, r"bias_3: shape \(4,\), expected \(3,\)"),
        (
            {"pixels_out_B3RR": torch.zeros(1, 3, 4, 4)},
            r"pixels_out_B3RR: shape \(1, 3, 4, 4\), expected \(2, 3, 4, 4\)",
        ),
        ({"bytes_out_BRR3": torch.zeros(2, 3, 4, 4)}, r"bytes_out_BRR3: shape \(2, 3, 4, 4\), expected \(2, 4, 4, 3\)"),
        ({"bytes_out_BRR3": torch.zeros(2, 4, 4, 3)}, "bytes_out_BRR3: torch.float32, expected torch.uint8"),
        ({"pixels_out_B3RR": torch.zeros(2, 3, 4, 4).half()}, "pixels_out_B3RR: torch.float16, expected torch.float32"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"x_Bl3": torch.zeros(2, 16, 3), "bias_3": torch.zeros(3), **buffers(2, 4, "cpu"), **change}
    with pytest.raises(ValueError, match=message):
        to_pixels(**arguments)
