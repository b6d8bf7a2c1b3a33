"""The references themselves against other truths: the runtime's sampler and noise, PyTorch's modules, dequantisation.

`test_next_scale.py` holds the reference of next_scale to the trainer's quantiser, `test_uniforms.py` that of uniforms
to the runtime's generator, each together with its kernel.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from var_deploy import philox
from var_deploy.interpolation import area_matrix, bicubic_matrix
from var_deploy.sampling import Settings, draw_scale
from var_kernels import reference

# --- draw ---

SEEDS = [0, 7, 2**63 + 5, 2**64 - 1]


def seeds_tensor(seeds):
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


@settings(max_examples=40)
@given(
    V=st.integers(1, 60),
    k=st.integers(0, 2),
    top_k=st.integers(0, 62),
    top_p=st.sampled_from([0.0, 0.125, 0.5, 0.96875, 1.0]),  # exact in float32, which the reference takes
    strength=st.sampled_from([0.0, 1.5]),
    temperature=st.sampled_from([1.0, 0.7]),
    ties=st.booleans(),
    smooth=st.booleans(),
)
def test_draw_equals_the_runtimes_token_for_token(V, k, top_k, top_p, strength, temperature, ties, smooth):
    B, n, C, begin = len(SEEDS), 6, 3, 5
    generator = torch.Generator().manual_seed(V)
    guided = strength != 0
    logits_RnV = 2 * torch.randn(2 * B if guided else B, n, V, generator=generator)
    if ties:
        logits_RnV = logits_RnV.round()
    codebook_VC = torch.randn(V, C, generator=generator)
    strengths = (strength, strength, strength)
    runtime = Settings.constant(strengths, temperature=temperature, top_k=top_k, top_p=top_p, smooth=smooth)
    expected_Bn, expected_BnC = draw_scale(logits_RnV.numpy(), k, begin, SEEDS, runtime, codebook_VC.numpy())
    tokens_Bn, codes_BnC, weights_BnV = torch.zeros(B, n).long(), torch.zeros(B, n, C), torch.zeros(B, n, V)
    invalid_B = torch.zeros(B, dtype=torch.int32)
    reference.draw(
        logits_RnV,
        torch.from_numpy(np.stack([philox.uniforms(seed, begin, begin + n) for seed in SEEDS])),
        *(torch.full((B,), value) for value in (strength, temperature)),
        torch.full((B,), top_k, dtype=torch.int32),
        torch.full((B,), top_p),
        codebook_VC,
        guided=guided,
        tokens_out_Bn=tokens_Bn,
        codes_out_BnC=codes_BnC,
        invalid_out_B=invalid_B,
        smooth_weights_out_BnV=weights_BnV if smooth else None,
        seeds_B=seeds_tensor(SEEDS),
        begin=begin,
        ratio=k / 2,
    )
    assert not invalid_B.any()
    np.testing.assert_array_equal(tokens_Bn.numpy(), expected_Bn)
    if smooth:  # scores reach 3000 where τ is least, of which float32 keeps 2e-4
        np.testing.assert_allclose((weights_BnV @ codebook_VC).numpy(), expected_BnC, rtol=0, atol=2e-3)
    else:
        np.testing.assert_array_equal(codes_BnC.numpy(), expected_BnC)


@pytest.mark.parametrize("V", [1, 4, 97])
def test_gumbel_noise_is_that_of_the_runtime(V):
    gumbel_BnV = reference.gumbels(seeds_tensor(SEEDS), 14, 3, V)
    expected_BnV = np.stack([philox.gumbels(seed, 14, 17, V) for seed in SEEDS])
    np.testing.assert_allclose(gumbel_BnV.numpy(), expected_BnV, rtol=2e-7)  # the logarithms of two libraries


# --- attention ---


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "plain"])
def test_cached_attention_scale_by_scale_is_masked_attention_over_the_sequence(unit, near):
    R, H, scales = 2, 3, (1, 4, 9, 16)
    L, ends = sum(scales), np.cumsum(scales)
    qkv_RL3Hd = torch.randn(R, L, 3, H, 64)
    q, k, v = qkv_RL3Hd.double().permute(2, 0, 3, 1, 4)
    q_scale_H = torch.tensor([4.0, 20.0, 100.0]) if unit else None
    if q_scale_H is not None:
        q, k = F.normalize(q, dim=-1) * q_scale_H.double().view(H, 1, 1), F.normalize(k, dim=-1)
    scale_L = torch.from_numpy(np.repeat(np.arange(len(scales)), scales))
    softmax_scale = 1.0 if unit else 0.125
    visible_LL = scale_L[:, None] >= scale_L
    expected_RHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_LL, scale=softmax_scale)

    caches = torch.full((2, R, H, L, 64), torch.nan)
    for begin, end in zip(ends - scales, ends, strict=True):
        qkv_MN = qkv_RL3Hd[:, begin:end].reshape(-1, 3 * H * 64)
        out_MD = torch.full((len(qkv_MN), H * 64), torch.nan)
        options = {"begin": int(begin), "softmax_scale": softmax_scale, "out_MD": out_MD}
        assert reference.cached_attention(qkv_MN, q_scale_H, *caches, **options) is out_MD
        expected_RnHd = expected_RHLd[:, :, begin:end].transpose(1, 2)
        near(out_MD, expected_RnHd.reshape(out_MD.shape), torch.float32, factor=10)  # scores to 100
    near(caches[0], k, torch.float32)
    near(caches[1], v, torch.float32)


# --- matrix products and their operands ---


@pytest.mark.parametrize("gelu", [True, False])
def test_linear_is_the_module(gelu, near):
    layer = nn.Linear(40, 24).double()
    x_MK, out_MN = torch.randn(7, 40), torch.empty(7, 24)
    module = nn.Sequential(layer, nn.GELU(approximate="tanh")) if gelu else layer
    assert reference.linear(x_MK, layer.weight.T.float(), layer.bias.float(), gelu=gelu, out_MN=out_MN) is out_MN
    near(out_MN.detach(), module(x_MK.double()).detach(), torch.float32)


def test_linear_with_int8_weights_is_linear_with_dequantised_ones(near):
    weight_KN, scale_N = torch.randint(-127, 128, (40, 24)).to(torch.int8), torch.rand(24) / 100
    x_MK, bias_N, out_MN = torch.randn(7, 40), torch.randn(24), torch.empty(7, 24)
    reference.linear(x_MK, weight_KN, bias_N, column_scale_N=scale_N, out_MN=out_MN)
    near(out_MN, x_MK.double() @ (weight_KN.double() * scale_N.double()) + bias_N.double(), torch.float32)


def test_quantized_rows_are_the_rows_within_half_a_step():
    x_MK = torch.randn(6, 50) * torch.tensor([1e-20, 1e-3, 1.0, 40.0, 1e10, 0.0])[:, None]
    out_MK, scale_M1 = torch.empty(6, 50, dtype=torch.float8_e4m3fn), torch.empty(6, 1)
    reference.quantize_rows(x_MK, out_MK=out_MK, scale_out_M1=scale_M1)
    assert (out_MK.float().abs().amax(-1) == torch.tensor([448.0] * 5 + [0.0])).all()
    assert scale_M1[5] == 1
    error_MK = (out_MK.double() * scale_M1.double() - x_MK.double()).abs()
    # Three mantissa bits: half a step is a 16th of a number, and below 2⁻⁶ a fixed 2⁻¹⁰ of the scale.
    limit_MK = torch.maximum(x_MK.double().abs() / 16, scale_M1.double() * 2.0**-10)
    assert (error_MK <= limit_MK * (1 + 1e-6)).all()


# --- the VQVAE ---


@pytest.mark.parametrize("silu", [True, False])
def test_groupnorm_silu_is_the_modules(silu, near):
    norm = nn.GroupNorm(32, 96, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(norm, nn.SiLU()) if silu else norm
    x_BlC = torch.randn(2, 25, 96) * 3 + 1
    out_BlC = reference.groupnorm_silu(
        x_BlC, norm.weight.float(), norm.bias.float(), silu=silu, out_BlC=torch.empty_like(x_BlC)
    )
    expected_BChw = module(x_BlC.double().transpose(1, 2).unflatten(2, (5, 5)))
    near(out_BlC.detach(), expected_BChw.detach().flatten(2).transpose(1, 2), torch.float32)


def test_groupnorm_silu_of_a_sum_is_that_of_the_rounded_sum():
    x_BlC, branch_BlC, conv_bias_C = torch.randn(2, 9, 64).half(), torch.randn(2, 9, 64).half(), torch.randn(64)
    weight_C, bias_C = torch.randn(64), torch.randn(64)
    sum_BlC, out_BlC = torch.empty(2, 9, 64).half(), torch.empty(2, 9, 64)
    reference.groupnorm_silu(
        x_BlC,
        weight_C,
        bias_C,
        silu=True,
        branch_BlC=branch_BlC,
        conv_bias_C=conv_bias_C,
        sum_out_BlC=sum_BlC,
        out_BlC=out_BlC,
    )
    assert torch.equal(sum_BlC, (x_BlC.float() + branch_BlC.float() + conv_bias_C).half())
    expected_BlC = reference.groupnorm_silu(sum_BlC, weight_C, bias_C, silu=True, out_BlC=torch.empty(2, 9, 64))
    torch.testing.assert_close(out_BlC, expected_BlC, rtol=0, atol=0)


def test_upsample_sum_is_interpolate_of_the_sum():
    x_BhwC, branch_BhwC, conv_bias_C = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(8)
    out_BHWC = torch.empty(2, 6, 10, 8)
    reference.upsample_sum(x_BhwC, branch_BhwC=branch_BhwC, conv_bias_C=conv_bias_C, out_BHWC=out_BHWC)
    sum_BChw = (x_BhwC + branch_BhwC + conv_bias_C).permute(0, 3, 1, 2)
    assert torch.equal(out_BHWC.permute(0, 3, 1, 2), F.interpolate(sum_BChw, scale_factor=2, mode="nearest"))


def test_to_pixels_clamps_and_rounds():
    x_Bl3 = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 0.003, 0.005, 0.007, -0.001, 0.999]).view(1, 4, 3)
    bias_3 = torch.tensor([0.0, -0.25, 0.5])
    pixels_B3RR, bytes_BRR3 = torch.empty(1, 3, 2, 2), torch.empty(1, 2, 2, 3, dtype=torch.uint8)
    reference.to_pixels(x_Bl3, bias_3, pixels_out_B3RR=pixels_B3RR, bytes_out_BRR3=bytes_BRR3)
    expected = ((x_Bl3.double() + bias_3 + 1) / 2).clamp(0, 1).view(2, 2, 3)
    torch.testing.assert_close(pixels_B3RR[0].permute(1, 2, 0).double(), expected, rtol=0, atol=1e-7)
    assert bytes_BRR3.flatten().tolist() == [round(value * 255) for value in expected.flatten().tolist()]


@pytest.mark.parametrize(("p", "h", "q"), [(1, 4, 2), (3, 7, 5), (5, 5, 5), (4, 16, 6)])
def test_resampling_taps_of_both_axes_are_enlarge_convolve_and_shrink(p, h, q, near):
    enlarge_hp, shrink_qh = (torch.from_numpy(m) for m in (bicubic_matrix(p, h), area_matrix(h, q)))
    taps_3hp = reference.resampling_taps(enlarge_hp)
    taps_3qp = reference.resampling_taps(enlarge_hp, shrink_qh)
    assert torch.equal(taps_3hp[1], enlarge_hp)
    map_pp, weight_33 = torch.randn(p, p), torch.randn(3, 3)
    enlarged_hh = F.interpolate(map_pp.double()[None, None], size=(h, h), mode="bicubic")
    convolved_hh = F.conv2d(enlarged_hh, weight_33.double()[None, None], padding=1)
    shrunk_qq = F.interpolate(convolved_hh, size=(q, q), mode="area")[0, 0]
    for taps, expected in ((taps_3hp, convolved_hh[0, 0]), (taps_3qp, shrunk_qq)):
        near(torch.einsum("dyp,pr,exr,de->yx", taps, map_pp, taps, weight_33), expected, torch.float32)
