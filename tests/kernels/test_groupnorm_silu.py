"""groupnorm_silu against its reference: widths of the decoder, sums, ragged chunks, a large mean, wrong input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from var_kernels import reference
from var_kernels.groupnorm_silu import groupnorm_silu

# The interpreter warns where exp(−y) overflows, which is right: y/(1 + inf) is the 0 that SiLU tends to.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def tensors(B, cells, C, dtype, device, mean=0.5):
    """x, weight and bias."""
    x_BlC = torch.randn(B, cells, C) * (1 + torch.arange(C) / C) + mean
    return x_BlC.to(device, dtype), torch.randn(C).to(device), torch.randn(C).to(device)


def assert_like_the_reference(B, cells, C, silu, dtype, device, near):
    x_BlC, weight_C, bias_C = tensors(B, cells, C, dtype, device)
    out_BlC = torch.full((B, cells, C), torch.nan, dtype=dtype, device=device)
    expected_BlC = reference.groupnorm_silu(x_BlC, weight_C, bias_C, silu=silu, out_BlC=torch.empty_like(out_BlC))
    assert groupnorm_silu(x_BlC, weight_C, bias_C, silu=silu, out_BlC=out_BlC) is out_BlC
    near(out_BlC, expected_BlC, dtype)


@pytest.mark.parametrize(
    ("B", "cells", "C"), [(2, 1, 64), (3, 9, 32), (1, 300, 160), (2, 17, 320), (1, 49, 640), (2, 6, 96), (1, 1, 1280)]
)
@pytest.mark.parametrize("silu", [True, False])
def test_against_the_reference(B, cells, C, silu, dtype, device, near):
    assert_like_the_reference(B, cells, C, silu, dtype, device, near)


SUMS = {  # what is added, and whether the sum is kept
    "bias": ("conv_bias_C",),
    "bias kept": ("conv_bias_C", "sum_out_BlC"),
    "branch": ("branch_BlC", "sum_out_BlC"),
    "branch and bias": ("branch_BlC", "conv_bias_C", "sum_out_BlC"),
    "nothing, kept": ("sum_out_BlC",),
}


def summands(names, x_BlC):
    """The arguments of these names; every channel's bias is another, and as large as the spread."""
    B, cells, C = x_BlC.shape
    options = {"device": x_BlC.device, "dtype": x_BlC.dtype}
    every = {
        "branch_BlC": torch.randn(B, cells, C).to(**options),
        "conv_bias_C": (2 * torch.randn(C)).to(**options),
        "sum_out_BlC": torch.full((B, cells, C), torch.nan, **options),
    }
    return {name: every[name] for name in names}


def assert_sum_like_the_reference(B, cells, C, names, dtype, device, near):
    x_BlC, weight_C, bias_C = tensors(B, cells, C, dtype, device)
    added = summands(names, x_BlC)
    expected_added = {name: tensor.clone() for name, tensor in added.items()}
    arguments, out_BlC = (x_BlC, weight_C, bias_C), torch.full_like(x_BlC, torch.nan)
    expected_BlC = reference.groupnorm_silu(*arguments, silu=True, **expected_added, out_BlC=torch.empty_like(x_BlC))
    assert groupnorm_silu(*arguments, silu=True, **added, out_BlC=out_BlC) is out_BlC
    for name, expected in expected_added.items():  # the sum bit for bit, the rest as it was
        torch.testing.assert_close(added[name], expected, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    near(out_BlC, expected_BlC, dtype)


@pytest.mark.parametrize(("B", "cells", "C"), [(2, 1, 64), (1, 300, 160), (2, 17, 320), (2, 6, 96), (1, 1024, 32)])
@pytest.mark.parametrize("names", SUMS.values(), ids=SUMS)
def test_a_sum_against_the_reference(B, cells, C, names, dtype, device, near):
    assert_sum_like_the_reference(B, cells, C, names, dtype, device, near)


def test_what_is_normalised_is_the_rounded_sum(device, near):
    """In float16 a sum of size 1000 is rounded to halves, as much as its spread."""
    x_BlC, branch_BlC = (torch.randn(1, 40, 64, device=device).half() + offset for offset in (0, 1000))
    one_C, zero_C, out_BlC = torch.ones(64, device=device), torch.zeros(64, device=device), torch.empty_like(x_BlC)
    groupnorm_silu(x_BlC, one_C, zero_C, silu=False, branch_BlC=branch_BlC, sum_out_BlC=x_BlC, out_BlC=out_BlC)
    exact_BCl = F.group_norm(x_BlC.double().mT, 32, eps=1e-6)
    near(out_BlC, exact_BCl.mT, torch.float16)


@pytest.mark.parametrize("kept_in", ["x_BlC", "branch_BlC", "out_BlC"])
def test_a_sum_kept_in_the_memory_of_another_map(kept_in, dtype, device):
    x_BlC, weight_C, bias_C = tensors(2, 50, 160, dtype, device)
    added = summands(SUMS["branch and bias"], x_BlC)
    expected_BlC = groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, **added, out_BlC=torch.empty_like(x_BlC))
    maps = {"x_BlC": x_BlC, "branch_BlC": added["branch_BlC"], "out_BlC": torch.empty_like(x_BlC)}
    vectors = {"weight_C": weight_C, "bias_C": bias_C, "conv_bias_C": added["conv_bias_C"]}
    out_BlC = groupnorm_silu(**maps, **vectors, silu=True, sum_out_BlC=maps[kept_in])
    torch.testing.assert_close(out_BlC, expected_BlC, rtol=0, atol=0)
    if kept_in != "out_BlC":
        torch.testing.assert_close(maps[kept_in], added["sum_out_BlC"], rtol=0, atol=0)


def test_longer_chunks_where_there_may_be_no_more_of_them(device, near, monkeypatch):
    monkeypatch.setattr("var_kernels.groupnorm_silu.MAX_CHUNKS", 5)
    # 26 tiles: four chunks of 6, one of 2.
    assert_like_the_reference(2, 101, 640, True, torch.float32, device, near)
    assert_sum_like_the_reference(2, 101, 640, SUMS["branch and bias"], torch.float32, device, near)


def test_a_large_mean_does_not_swallow_the_variance(device, near):
    x_BlC, weight_C, bias_C = tensors(2, 37, 64, torch.float32, device, mean=1000)
    out_BlC = groupnorm_silu(x_BlC, weight_C, bias_C, silu=False, out_BlC=torch.empty_like(x_BlC))
    exact_BCl = F.group_norm(x_BlC.double().mT, 32, weight_C.double(), bias_C.double(), eps=1e-6)
    # float32 keeps x itself to 6e-5 of its spread of 1.
    near(out_BlC, exact_BCl.mT, torch.float32, factor=100)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3])
def test_a_constant_gives_the_bias_exactly(value, device):
    x_BlC = torch.full((1, 50, 160), value, device=device)
    weight_C, bias_C = torch.randn(160).to(device), torch.randn(160).to(device)
    out_BlC = groupnorm_silu(x_BlC, weight_C, bias_C, silu=False, out_BlC=torch.empty_like(x_BlC))
    torch.testing.assert_close(out_BlC, bias_C.expand_as(out_BlC), rtol=0, atol=0)


def test_an_image_does_not_depend_on_its_batch(device):
    x_BlC, weight_C, bias_C = tensors(3, 100, 96, torch.float32, device)
    together_BlC = groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, out_BlC=torch.empty_like(x_BlC))
    alone_1lC = groupnorm_silu(x_BlC[1:2], weight_C, bias_C, silu=True, out_BlC=torch.empty_like(x_BlC[:1]))
    torch.testing.assert_close(alone_1lC, together_BlC[1:2], rtol=0, atol=0)


def test_nothing_outside_the_buffers_is_touched(device):
    x_BlC, weight_C, bias_C = tensors(2, 33, 160, torch.float32, device)
    guard = torch.full((4, 33, 160), 7.0, device=device)
    x_before_BlC = x_BlC.clone()
    sum_guard = guard.clone()
    groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, sum_out_BlC=sum_guard[1:3], out_BlC=guard[1:3])
    for tensor in (guard, sum_guard):
        assert (tensor[0] == 7).all()
        assert (tensor[3] == 7).all()
    assert torch.equal(x_BlC, x_before_BlC)


def test_in_place(device):
    x_BlC, weight_C, bias_C = tensors(2, 50, 160, torch.float32, device)
    expected_BlC = groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, out_BlC=torch.empty_like(x_BlC))
    torch.testing.assert_close(
        groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, out_BlC=x_BlC), expected_BlC, rtol=0, atol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("cells", "C"), [(300, 160), (4096, 320)])
def test_bf16_against_float64(cells, C, device, rounded_once):
    """The sum, and the norm of the sum as it was rounded."""
    x_BlC, weight_C, bias_C = tensors(2, cells, C, torch.bfloat16, device)
    added, out_BlC = summands(SUMS["branch and bias"], x_BlC), torch.full_like(x_BlC, torch.nan)
    groupnorm_silu(x_BlC, weight_C, bias_C, silu=True, **added, out_BlC=out_BlC)
    sum_BlC = added["sum_out_BlC"]
    rounded_once(sum_BlC, x_BlC.double() + added["branch_BlC"].double() + added["conv_bias_C"].double())
    normed_BCl = F.group_norm(sum_BlC.double().mT, 32, weight_C.double(), bias_C.double(), eps=1e-6)
    rounded_once(out_BlC, F.silu(normed_BCl).mT)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "cells", "C"), [(2, 256, 640), (2, 4096, 320), (2, 65536, 160), (1, 65536, 320), (1, 262144, 160)]
)
def test_the_maps_of_the_published_decoder(B, cells, C, dtype, device, near):
    # The sums of up to a million elements differ in their order.
    assert_like_the_reference(B, cells, C, True, dtype, device, near)
    assert_sum_like_the_reference(B, cells, C, SUMS["branch and bias"], dtype, device, near)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    x_BlC = torch.zeros(53, 262144, 160, dtype=torch.float16, device=device)
    x_BlC[-1, :, ::2] = 1
    one_C = torch.ones(160, device=device)
    groupnorm_silu(x_BlC, one_C, one_C, silu=False, out_BlC=x_BlC)
    last_lC = x_BlC[-1].view(-1, 32, 5)
    # Groups with three ones in five and with two ones in five, in turn.
    for group, share in ((0, 0.6), (1, 0.4)):
        spread = (share * (1 - share)) ** 0.5
        expected_5 = torch.tensor([((c + group + 1) % 2 - share) / spread + 1 for c in range(5)], device=device)
        torch.testing.assert_close(last_lC[-1, group].float(), expected_5, rtol=1e-3, atol=1e-3)
    assert (x_BlC[-2] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_BlC": torch.zeros(2, 64, 6).mT},
            r"x_BlC: strides \(384, 1, 6\) of shape \(2, 6, 64\), expected contiguous",
        ),
        ({"out_BlC": torch.zeros(2, 6, 32)}, r"out_BlC: shape \(2, 6, 32\), expected \(2, 6, 64\)"),
        ({"branch_BlC": torch.zeros(2, 6, 64)}, "sum_out_BlC: None, expected a place for the sum with branch_BlC"),
        (
            {"branch_BlC": torch.zeros(1, 6, 64), "sum_out_BlC": torch.zeros(2, 6, 64)},
            r"branch_BlC: shape \(1, 6, 64\), expected \(2, 6, 64\)",
        ),
        ({"sum_out_BlC": torch.zeros(2, 7, 64)}, r"sum_out_BlC: shape \(2, 7, 64\), expected \(2, 6, 64\)"),
        ({"conv_bias_C": torch.zeros(128)[::2]}, r"conv_bias_C: strides \(2,\) of shape \(64,\), expected contiguous"),
        ({"conv_bias_C": torch.zeros(32)}, r"conv_bias_C: shape \(32,\), expected \(64,\)"),
        ({"weight_C": torch.zeros(32)}, r"weight_C: shape \(32,\), expected \(64,\)"),
        ({"bias_C": torch.zeros(64).half()}, "bias_C: torch.float16, expected torch.float32"),
        (
            {
                "x_BlC": torch.zeros(2, 6, 48),
                "weight_C": torch.zeros(48),
                "bias_C": torch.zeros(48),
                "out_BlC": torch.zeros(2, 6, 48),
            },
            "x_BlC: 48 channels, expected a multiple of 32",
        ),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "x_BlC": torch.zeros(2, 6, 64),
        "weight_C": torch.zeros(64),
        "bias_C": torch.zeros(64),
        "out_BlC": torch.zeros(2, 6, 64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        groupnorm_silu(**arguments, silu=True)
