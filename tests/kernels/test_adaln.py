"""adaln against its reference: rows, tokens and widths that are no powers of two, strided modulations, wrong input."""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.adaln import adaln


def tensors(R, n, D, dtype, device):
    """x, y and the three row vectors, which are strided views of one modulation [R, 6, D] as in the engine."""
    modulation_R6D = torch.randn(R, 6, D).to(device)
    x_MD, y_MD = torch.randn(R * n, D) * 3 + 1, torch.randn(R * n, D)
    return x_MD.to(device), y_MD.to(device, dtype), *(modulation_R6D[:, i] for i in (0, 2, 4))


@pytest.mark.parametrize(("R", "n", "D"), [(1, 1, 64), (2, 1, 128), (3, 9, 192), (2, 36, 320), (1, 256, 1024)])
@pytest.mark.parametrize("with_y", [True, False])
def test_against_the_reference(R, n, D, with_y, dtype, device, near):
    x_MD, y_MD, gamma_RD, scale_RD, shift_RD = tensors(R, n, D, dtype, device)
    branch = (y_MD, gamma_RD) if with_y else (None, None)
    expected_x_MD, out_MD = x_MD.clone(), torch.full((R * n, D), torch.nan, dtype=dtype, device=device)
    expected_MD = reference.adaln(expected_x_MD, *branch, scale_RD, shift_RD, out_MD=torch.empty_like(out_MD))
    assert adaln(x_MD, *branch, scale_RD, shift_RD, out_MD=out_MD) is out_MD
    near(out_MD, expected_MD, dtype)
    near(x_MD, expected_x_MD, torch.float32)


@pytest.mark.slow
def test_many_tokens(dtype, device, near):
    x_MD, y_MD, gamma_RD, scale_RD, shift_RD = tensors(1, 1024, 96, dtype, device)
    expected_x_MD, out_MD = x_MD.clone(), torch.full_like(y_MD, torch.nan)
    expected_MD = reference.adaln(expected_x_MD, y_MD, gamma_RD, scale_RD, shift_RD, out_MD=torch.empty_like(out_MD))
    adaln(x_MD, y_MD, gamma_RD, scale_RD, shift_RD, out_MD=out_MD)
    near(out_MD, expected_MD, dtype)
    near(x_MD, expected_x_MD, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("R", "n", "D"), [(2, 36, 320), (2, 256, 1024), (4, 16, 1920)])
def test_bf16_against_float64(R, n, D, device, near, rounded_once):
    """The reference itself in float64: bf16 is exact in the float32 that it takes y as."""
    x_MD, y_MD, *modulation = tensors(R, n, D, torch.bfloat16, device)
    exact_x_MD, exact_MD = x_MD.double(), torch.empty(R * n, D, dtype=torch.float64, device=device)
    gamma_RD, scale_RD, shift_RD = (vector_RD.double() for vector_RD in modulation)
    reference.adaln(exact_x_MD, y_MD, gamma_RD, scale_RD, shift_RD, out_MD=exact_MD)
    rounded_once(adaln(x_MD, y_MD, *modulation, out_MD=torch.full_like(y_MD, torch.nan)), exact_MD)
    near(x_MD, exact_x_MD, torch.float32)


def test_a_large_mean_does_not_swallow_the_variance(device, near):
    x_MD = torch.randn(4, 256).to(device) + 1000
    one_RD, out_MD = torch.ones(1, 256).to(device), torch.empty(4, 256, device=device)
    adaln(x_MD, None, None, one_RD, one_RD, out_MD=out_MD)
    # float32 keeps x itself to 6e-5 of its spread of 1.
    near(out_MD, torch.nn.functional.layer_norm(x_MD.double(), (256,), eps=1e-6) + 1, torch.float32, factor=100)


def test_nothing_outside_the_buffers_is_touched(device):
    guard = torch.full((3 + 2, 96), 7.0, device=device)
    one_RD = torch.ones(3, 96).to(device)
    adaln(torch.randn(3, 96).to(device), None, None, one_RD, one_RD, out_MD=guard[1:4])
    assert (guard[0] == 7).all()
    assert (guard[4] == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MD": torch.zeros(64, 6).T}, r"x_MD: strides \(1, 6\) of shape \(6, 64\), expected contiguous"),
        ({"out_MD": torch.zeros(6, 32)}, r"out_MD: shape \(6, 32\), expected \(6, 64\)"),
        ({"x_MD": torch.zeros(7, 64), "out_MD": torch.zeros(7, 64)}, "7 tokens do not divide into 2 rows"),
        ({"gamma_RD": None}, "y_MD and gamma_RD: expected both or neither"),
        ({"shift_RD": torch.zeros(2, 128)[:, ::2]}, "expected one row stride, and unit stride along D"),
    ],
)
def test_wrong_input_is_named(change, message):
    names = ("x_MD", "y_MD", "gamma_RD", "scale_RD", "shift_RD")
    arguments = dict(zip(names, (torch.zeros(6, 64), torch.zeros(6, 64), *torch.zeros(3, 2, 64)), strict=True))
    arguments = {**arguments, "out_MD": torch.zeros(6, 64), **change}
    with pytest.raises(ValueError, match=message):
        adaln(**arguments)
