"""upsample_sum against its reference: odd sides and widths, every sum, wrong input."""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.upsample_sum import upsample_sum


def arguments_of(B, h, w, C, names, dtype, device):
    """x and the summands of these names."""
    every = {
        "x_BhwC": torch.randn(B, h, w, C),
        "branch_BhwC": torch.randn(B, h, w, C),
        "conv_bias_C": torch.randn(C),
    }
    return {name: tensor.to(device, dtype) for name, tensor in every.items() if name in ("x_BhwC", *names)}


def assert_equals_the_reference(B, h, w, C, names, dtype, device):
    """Bit for bit: the same float32 sums, rounded once."""
    arguments = arguments_of(B, h, w, C, names, dtype, device)
    out_BHWC = torch.full((B, 2 * h, 2 * w, C), torch.nan, dtype=dtype, device=device)
    expected_BHWC = reference.upsample_sum(**arguments, out_BHWC=torch.empty_like(out_BHWC))
    assert upsample_sum(**arguments, out_BHWC=out_BHWC) is out_BHWC
    torch.testing.assert_close(out_BHWC, expected_BHWC, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("B", "h", "w", "C"), [(1, 1, 1, 32), (3, 5, 5, 96), (2, 3, 7, 160), (2, 4, 4, 2048), (1, 5, 2, 7)]
)
@pytest.mark.parametrize("names", [(), ("branch_BhwC",), ("conv_bias_C",), ("branch_BhwC", "conv_bias_C")])
def test_against_the_reference(B, h, w, C, names, dtype, device):
    assert_equals_the_reference(B, h, w, C, names, dtype, device)


def test_nothing_outside_the_buffers_is_touched(device):
    arguments = arguments_of(2, 3, 5, 96, ("branch_BhwC", "conv_bias_C"), torch.float32, device)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    guard = torch.full((4, 6, 10, 96), 7.0, device=device)
    upsample_sum(**arguments, out_BHWC=guard[1:3])
    assert (guard[0] == 7).all()
    assert (guard[3] == 7).all()
    assert all(torch.equal(arguments[name], before[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "h", "C"), [(2, 16, 640), (2, 32, 320), (2, 64, 320), (2, 128, 160), (1, 256, 160)])
def test_the_maps_of_the_published_decoder(B, h, C, dtype, device):
    assert_equals_the_reference(B, h, h, C, ("branch_BhwC", "conv_bias_C"), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "C"), [(5, 96), (64, 320)])
def test_bf16_against_float64(h, C, device, rounded_once):
    arguments = arguments_of(2, h, h, C, ("branch_BhwC", "conv_bias_C"), torch.bfloat16, device)
    exact_BhwC = sum(tensor.double() for tensor in arguments.values())
    out_BHWC = torch.full((2, 2 * h, 2 * h, C), torch.nan, dtype=torch.bfloat16, device=device)
    upsample_sum(**arguments, out_BHWC=out_BHWC)
    rounded_once(out_BHWC, exact_BhwC.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    x_BhwC = torch.arange(1, 55, device=device).half().view(54, 1, 1, 1).expand(54, 256, 256, 160).contiguous()
    out_BHWC = upsample_sum(x_BhwC, out_BHWC=torch.zeros(54, 512, 512, 160, dtype=torch.float16, device=device))
    assert (out_BHWC[-1] == 54).all()
    assert (out_BHWC[-2] == 53).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_BhwC": torch.zeros(2, 64, 3, 5).permute(0, 2, 3, 1)},
            r"x_BhwC: strides \(960, 5, 1, 15\) of shape \(2, 3, 5, 64\), expected contiguous",
        ),
        ({"branch_BhwC": torch.zeros(2, 5, 3, 64)}, r"branch_BhwC: shape \(2, 5, 3, 64\), expected \(2, 3, 5, 64\)"),
        ({"conv_bias_C": torch.zeros(32)}, r"conv_bias_C: shape \(32,\), expected \(64,\)"),
        ({"out_BHWC": torch.zeros(2, 3, 5, 64)}, r"out_BHWC: shape \(2, 3, 5, 64\), expected \(2, 6, 10, 64\)"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"x_BhwC": torch.zeros(2, 3, 5, 64), "out_BHWC": torch.zeros(2, 6, 10, 64), **change}
    with pytest.raises(ValueError, match=message):
        upsample_sum(**arguments)
