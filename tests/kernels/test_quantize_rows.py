"""quantize_rows against its reference: ragged rows, zeros, wrong input.

Triton's interpreter mends neither ties nor carries when it rounds to float8 (0.12109375 becomes 0.0625 there, not
0.125) and knows no NaN of it. So without a GPU the values are such that nothing is left to round.
"""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.quantize_rows import quantize_rows

#: All finite e4m3 numbers, from −448 to 448.
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()].sort().values


def both(x_MK):
    """(bytes, scales) of the kernel and of the reference."""
    results = []
    for function in (quantize_rows, reference.quantize_rows):
        out_MK = torch.zeros(x_MK.shape, dtype=torch.float8_e4m3fn, device=x_MK.device)
        scale_M1 = torch.full((len(x_MK), 1), torch.nan, device=x_MK.device)
        function(x_MK, out_MK=out_MK, scale_out_M1=scale_M1)
        results.append((out_MK.view(torch.uint8), scale_M1))
    return results


def assert_same(x_MK):
    """Bit for bit the reference's."""
    (got_MK, scale_M1), (expected_MK, expected_scale_M1) = both(x_MK)
    assert torch.equal(scale_M1, expected_scale_M1)
    assert torch.equal(got_MK, expected_MK)


@pytest.mark.parametrize(("M", "K"), [(5, 1), (5, 3), (5, 64), (5, 100), (5, 1024), (5, 1920), (1024, 9)])
def test_against_the_reference_where_nothing_is_rounded(M, K, dtype, device):
    """Rows of e4m3 numbers times powers of two, which every storage type holds and division gives back."""
    x_MK = E4M3[torch.randint(len(E4M3), (M, K))]
    x_MK[:, torch.randint(K, (1,))] = 448.0 * (-1.0) ** torch.arange(M)[:, None]
    x_MK *= 2.0 ** torch.tensor([0.0, -6.0, 3.0, -8.0, 6.0])[torch.arange(M) % 5, None]
    assert_same(x_MK.to(device, dtype))


def test_a_row_of_zeros_has_scale_1(dtype, device):
    x_MK = torch.zeros(3, 48).to(device, dtype)
    x_MK[1, 5] = -2.0
    (got_MK, scale_M1), _ = both(x_MK)
    assert scale_M1[:, 0].tolist() == [1.0, scale_M1[1].item(), 1.0]
    assert (got_MK[[0, 2]] == 0).all()
    assert got_MK[1, 5].item() == 0xFE, "the largest of a row is 448"
    assert_same(x_MK)


@pytest.mark.parametrize("K", [768, 7680, 16384])
def test_scales_are_the_references(K, dtype, device):
    x_MK = (torch.randn(4, K) * torch.logspace(-4, 3, 4)[:, None]).to(device, dtype)
    (_, scale_M1), (_, expected_scale_M1) = both(x_MK)
    assert torch.equal(scale_M1, expected_scale_M1)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [100, 1024, 7680, 16384])
def test_rounding_is_the_references(K, dtype, device):
    assert_same((torch.randn(64, K) * torch.logspace(-4, 3, 64)[:, None]).to(device, dtype))


@pytest.mark.gpu
def test_ties_go_to_even(device):
    ties = (E4M3[1:] + E4M3[:-1]) / 2
    assert_same(torch.cat([E4M3, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)])[None].to(device))


@pytest.mark.gpu
def test_nan_stays_nan(dtype, device):
    x_MK = torch.randn(2, 64).to(device, dtype)
    x_MK[1, 7] = torch.nan
    (got_MK, _), _ = both(x_MK)
    is_nan_MK = got_MK.view(torch.float8_e4m3fn).float().isnan()
    assert is_nan_MK.nonzero().tolist() == [[1, 7]]


def test_nothing_outside_the_buffers_is_touched(device):
    guard_MK = torch.full((3 + 2, 40), 7, dtype=torch.uint8, device=device)
    guard_M1 = torch.full((3 + 2, 1), 7.0, device=device)
    out_MK = guard_MK.view(torch.float8_e4m3fn)[1:-1]
    quantize_rows(torch.ones(3, 40).to(device), out_MK=out_MK, scale_out_M1=guard_M1[1:-1])
    assert (guard_MK[[0, -1]] == 7).all()
    assert (guard_MK[1:-1] == 0x7E).all()
    assert guard_M1[[0, -1]].tolist() == [[7.0], [7.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MK": torch.zeros(64, 6).T}, r"x_MK: strides \(1, 6\) of shape \(6, 64\), expected contiguous"),
        ({"x_MK": torch.zeros(6, 64).double()}, r"x_MK: torch.float64, expected torch.float32 or torch.float16"),
        ({"out_MK": torch.zeros(6, 32).to(torch.float8_e4m3fn)}, r"out_MK: shape \(6, 32\), expected \(6, 64\)"),
        ({"out_MK": torch.zeros(6, 64).char()}, r"out_MK: torch.int8, expected torch.float8_e4m3fn"),
        ({"scale_out_M1": torch.zeros(6)}, r"scale_out_M1: shape \(6,\), expected \(6, 1\)"),
        ({"scale_out_M1": torch.zeros(6, 1).half()}, r"scale_out_M1: torch.float16, expected torch.float32"),
        (
            {"x_MK": torch.zeros(1, 16385), "out_MK": torch.zeros(1, 16385).to(torch.float8_e4m3fn)}
            | {"scale_out_M1": torch.zeros(1, 1)},
            "x_MK: rows of 16385, expected at most 16384",
        ),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"x_MK": torch.zeros(6, 64), "out_MK": torch.zeros(6, 64).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=message):
        quantize_rows(**{**arguments, "scale_out_M1": torch.zeros(6, 1), **change})
