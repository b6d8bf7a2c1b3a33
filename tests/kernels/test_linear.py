"""linear against its reference: small and large tiles, ragged sides, int8 weights, the GELU, wrong input."""

from __future__ import annotations

import pytest
import torch

import var_kernels.linear
from var_kernels import reference
from var_kernels.linear import linear

#: (M, K, N): one token to many, and sides that no tile divides.
SHAPES = [(1, 64, 64), (2, 300, 512), (5, 40, 50), (18, 320, 72), (50, 200, 96), (130, 70, 90)]


def tensors(M, K, N, dtype, device, *, int8=False):
    """x, weights whose products keep a spread of 1, bias, and with int8 the columns' scales."""
    x_MK, bias_N = torch.randn(M, K).to(device, dtype), torch.randn(N).to(device)
    if not int8:
        return x_MK, (torch.randn(K, N) / K**0.5).to(device, dtype), bias_N, None
    weight_KN = torch.randint(-127, 128, (K, N), dtype=torch.int8).to(device)
    return x_MK, weight_KN, bias_N, ((torch.rand(N) + 0.5) / (73 * K**0.5)).to(device)


def both(arguments, out_dtype, gelu=False):
    """(kernel's, reference's) result."""
    x_MK, weight_KN, bias_N, column_scale_N = arguments
    results = []
    for function in (linear, reference.linear):
        out_MN = torch.full((len(x_MK), len(bias_N)), torch.nan, dtype=out_dtype, device=x_MK.device)
        options = {"column_scale_N": column_scale_N, "gelu": gelu, "out_MN": out_MN}
        assert function(x_MK, weight_KN, bias_N, **options) is out_MN
        results.append(out_MN)
    return results


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_against_the_reference(M, K, N, int8, dtype, device, near):
    near(*both(tensors(M, K, N, dtype, device, int8=int8), dtype), dtype)


@pytest.mark.parametrize(("M", "K", "N"), [(50, 200, 130), (300, 70, 200), (1200, 64, 136)])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_large_tiles(M, K, N, int8, dtype, device, near, monkeypatch):
    """Tiles of 64 and 128 rows, and more of them than a group holds, which need large products otherwise."""
    monkeypatch.setattr(var_kernels.linear, "PROGRAMS", 1)
    near(*both(tensors(M, K, N, dtype, device, int8=int8), dtype), dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, whose inverse is the 0 it shall be
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_gelu_is_the_tanh_approximated_one(int8, dtype, device, near):
    arguments = tensors(18, 96, 80, dtype, device, int8=int8)
    arguments[0].mul_(4)  # far enough for both flat ends
    got_MN, expected_MN = both(arguments, dtype, gelu=True)
    near(got_MN, expected_MN, dtype)
    exact_MN = torch.nn.functional.gelu(both(arguments, torch.float32)[1])
    if dtype == torch.float32:  # the two GELUs differ by 5e-4
        assert (got_MN - exact_MN).abs().max() > 1e-4


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_and_bias_have_types_of_their_own(out_dtype, bias_dtype, device, near):
    x_MK, weight_KN, bias_N, _ = tensors(4, 64, 48, torch.float16, device)
    got_MN, expected_MN = both((x_MK, weight_KN, bias_N.to(bias_dtype), None), out_dtype)
    # Sums are float32 whatever x is: a float32 result shows it.
    near(got_MN, expected_MN, out_dtype)


def test_long_sums_lose_nothing(device, near):
    x_MK, weight_KN, bias_N, _ = tensors(2, 4096, 32, torch.float16, device)
    out_MN = linear(x_MK, weight_KN, bias_N, out_MN=torch.empty(2, 32, device=device))
    near(out_MN, x_MK.double() @ weight_KN.double() + bias_N.double(), torch.float32, factor=3)


def test_int8_reaches_both_ends(device):
    x_MK = torch.eye(16).to(device, torch.float16)
    weight_KN = torch.arange(-128, 128, dtype=torch.int8).view(16, 16).to(device)
    one_N, zero_N = torch.ones(16).to(device), torch.zeros(16).to(device)
    out_MN = linear(x_MK, weight_KN, zero_N, column_scale_N=one_N, out_MN=torch.empty(16, 16, device=device))
    assert torch.equal(out_MN, weight_KN.float())


def test_runs_agree_bit_for_bit(dtype, device):
    arguments = tensors(18, 200, 96, dtype, device)
    assert torch.equal(both(arguments, dtype)[0], both(arguments, dtype)[0])


@pytest.mark.parametrize(("M", "N"), [(3, 40), (70, 90)])
def test_nothing_outside_the_buffers_is_touched(M, N, device):
    x_MK, weight_KN, bias_N, _ = tensors(M, 72, N, torch.float32, device)
    guard = torch.full((M + 2, N), 7.0, device=device)
    # Beyond the operands lie NaNs, which a product would spread.
    padded_x = torch.full((M + 2, 72), torch.nan, device=device)
    padded_weight = torch.full((72 + 2, N), torch.nan, device=device)
    padded_x[1:-1], padded_weight[1:-1] = x_MK, weight_KN
    linear(padded_x[1:-1], padded_weight[1:-1], bias_N, out_MN=guard[1:-1])
    assert (guard[[0, -1]] == 7).all()
    assert guard.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1024, 1024), (512, 1024, 4096), (512, 4096, 1024), (2048, 1920, 5760)])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_published_sizes_against_float64(M, K, N, int8, dtype, device, near):
    x_MK, weight_KN, bias_N, column_scale_N = tensors(M, K, N, dtype, device, int8=int8)
    expected_MN = x_MK.double() @ weight_KN.double() * (1 if column_scale_N is None else column_scale_N) + bias_N
    got_MN = both((x_MK, weight_KN, bias_N, column_scale_N), dtype)[0]
    near(got_MN, expected_MN, dtype, factor=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MK": torch.zeros(32, 6).T}, r"x_MK: strides \(1, 6\) of shape \(6, 32\), expected contiguous"),
        ({"x_MK": torch.zeros(6, 32).double()}, r"x_MK: torch.float64, expected torch.float32 or torch.float16"),
        ({"weight_KN": torch.zeros(31, 48)}, r"weight_KN: shape \(31, 48\), expected \(32, 48\)"),
        ({"weight_KN": torch.zeros(32, 48).half()}, r"weight_KN: torch.float16, expected torch.float32 or torch.int8"),
        ({"bias_N": torch.zeros(32)}, r"bias_N: shape \(32,\), expected \(48,\)"),
        ({"bias_N": torch.zeros(48).int()}, r"bias_N: torch.int32, expected torch.float32"),
        ({"out_MN": torch.zeros(6, 32)}, r"out_MN: shape \(6, 32\), expected \(6, 48\)"),
        ({"out_MN": torch.zeros(48, 6).T}, r"out_MN: strides \(1, 6\) of shape \(6, 48\), expected contiguous"),
        ({"weight_KN": torch.zeros(32, 48).char()}, "column_scale_N: expected with int8 weights, and with no others"),
        ({"column_scale_N": torch.ones(48)}, "column_scale_N: expected with int8 weights, and with no others"),
        (
            {"weight_KN": torch.zeros(32, 48).char(), "column_scale_N": torch.ones(32)},
            r"column_scale_N: shape \(32,\), expected \(48,\)",
        ),
        (
            {"weight_KN": torch.zeros(32, 48).char(), "column_scale_N": torch.ones(48).half()},
            r"column_scale_N: torch.float16, expected torch.float32",
        ),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"x_MK": torch.zeros(6, 32), "weight_KN": torch.zeros(32, 48), "bias_N": torch.zeros(48)}
    with pytest.raises(ValueError, match=message):
        linear(**{**arguments, "out_MN": torch.zeros(6, 48), **change})
