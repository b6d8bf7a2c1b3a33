"""cached_attention against its reference and, a whole pyramid long, against full masked attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from var_kernels import reference
from var_kernels.cached_attention import cached_attention

#: Scores reach 100 with the largest query scale: an error in a float32's last place there is 1e-5 of a weight.
FACTOR = {torch.float32: 10, torch.float16: 1, torch.bfloat16: 1}


def tensors(R, H, n, begin, L, dtype, device):
    """qkv, and caches that are NaN from `begin` on: what lies there is never read."""
    qkv_MN = torch.randn(R * n, 3 * H * 64).to(device, dtype)
    k_RHLd = torch.nn.functional.normalize(torch.randn(R, H, L, 64), dim=-1).to(device, dtype)
    v_RHLd = torch.randn(R, H, L, 64).to(device, dtype)
    k_RHLd[:, :, begin:] = v_RHLd[:, :, begin:] = torch.nan
    return qkv_MN, k_RHLd, v_RHLd


def run(function, qkv_MN, q_scale_H, caches, begin):
    """(output, keys, values) of the kernel or its reference on copies of the caches."""
    caches = [cache.clone() for cache in caches]
    out_MD = torch.full((len(qkv_MN), qkv_MN.shape[1] // 3), torch.nan, dtype=qkv_MN.dtype, device=qkv_MN.device)
    scale = 1.0 if q_scale_H is not None else 0.125
    assert function(qkv_MN, q_scale_H, *caches, begin=begin, softmax_scale=scale, out_MD=out_MD) is out_MD
    return out_MD, *caches


@pytest.mark.parametrize(
    ("R", "H", "n", "begin"),
    [
        (4, 3, 1, 0),
        (1, 2, 4, 1),
        (2, 3, 9, 5),
        (4, 1, 16, 14),
        (3, 2, 36, 55),
        (2, 2, 64, 91),
        (1, 2, 100, 155),
    ],
)
@pytest.mark.parametrize("unit", [True, False], ids=["unit", "plain"])
def test_against_the_reference(R, H, n, begin, unit, dtype, device, near):
    q_scale_H = torch.linspace(4, 100, H).to(device) if unit else None
    qkv_MN, *caches = tensors(R, H, n, begin, begin + n + 7, dtype, device)
    out_MD, k_RHLd, v_RHLd = run(cached_attention, qkv_MN, q_scale_H, caches, begin)
    expected_MD, expected_k_RHLd, expected_v_RHLd = run(reference.cached_attention, qkv_MN, q_scale_H, caches, begin)
    near(out_MD, expected_MD, dtype, factor=FACTOR[dtype])
    end = begin + n
    near(k_RHLd[:, :, :end], expected_k_RHLd[:, :, :end], dtype)
    assert torch.equal(v_RHLd[:, :, :end], expected_v_RHLd[:, :, :end])
    assert torch.equal(k_RHLd[:, :, :begin], caches[0][:, :, :begin]), "the prefix is read only"
    assert k_RHLd[:, :, end:].isnan().all()
    assert v_RHLd[:, :, end:].isnan().all()


@pytest.mark.parametrize(
    ("R", "H", "n", "begin"),
    [(1, 1, 256, 70), (1, 1, 1024, 1), pytest.param(2, 16, 1024, 1216, marks=pytest.mark.gpu)],
)
def test_many_tokens(R, H, n, begin, device, near):
    qkv_MN, *caches = tensors(R, H, n, begin, begin + n, torch.float16, device)
    q_scale_H = torch.full((H,), 10.0).to(device)
    out_MD, *_ = run(cached_attention, qkv_MN, q_scale_H, caches, begin)
    near(out_MD, run(reference.cached_attention, qkv_MN, q_scale_H, caches, begin)[0], torch.float16)


@pytest.mark.slow
def test_many_tokens_in_fp32(device, near):
    """Plain attention, which the interpreter ends soonest: fp32 has the smallest tiles."""
    qkv_MN, *caches = tensors(1, 1, 520, 1, 521, torch.float32, device)
    out_MD, k_RHLd, v_RHLd = run(cached_attention, qkv_MN, None, caches, 1)
    expected = run(reference.cached_attention, qkv_MN, None, caches, 1)
    near(out_MD, expected[0], torch.float32)
    assert torch.equal(k_RHLd, expected[1])
    assert torch.equal(v_RHLd, expected[2])


def full_attention(qkv_RlN: Tensor, q_scale_H: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(attended [R, l, H·64], keys [R, H, l, 64]) in float64: block-causal mask over all scales at once."""
    R, tokens, H = *qkv_RlN.shape[:2], len(q_scale_H)
    q, k, v = (part.reshape(R, tokens, H, 64).transpose(1, 2) for part in qkv_RlN.double().chunk(3, dim=-1))
    q = q / q.norm(dim=-1, keepdim=True) * q_scale_H.double().view(-1, 1, 1)
    k = k / k.norm(dim=-1, keepdim=True)
    q, k = q.to(qkv_RlN.dtype).double(), k.to(qkv_RlN.dtype).double()  # as the storage type holds them
    scale_l = torch.cat([torch.full((side**2,), float(i)) for i, side in enumerate(sides)]).to(qkv_RlN.device)
    scores_RHll = (q @ k.transpose(-1, -2)).masked_fill(scale_l[None, :] > scale_l[:, None], -torch.inf)
    return (scores_RHll.softmax(-1) @ v).transpose(1, 2).flatten(2), k


@pytest.mark.parametrize("q_scale", [1.0, 4.0, 100.0])
def test_a_pyramid_is_one_masked_attention(q_scale, dtype, device, near):
    R, H, sides = 1, 2, (1, 2, 3, 4, 6, 9)
    L = sum(side**2 for side in sides)
    q_scale_H = torch.tensor([q_scale, q_scale / 2]).to(device)
    qkv_RlN = torch.randn(R, L, 3 * H * 64).to(device, dtype)
    if q_scale == 100:  # a query along its own key has a score of 100, and the others' weights vanish
        qkv_RlN[..., : H * 64] = qkv_RlN[..., H * 64 : 2 * H * 64]
    k_RHLd, v_RHLd = (torch.full((R, H, L, 64), torch.nan, dtype=dtype, device=device) for _ in range(2))
    expected_RlD, expected_k_RHLd = full_attention(qkv_RlN, q_scale_H, sides)
    begin = 0
    for side in sides:
        end = begin + side**2
        qkv_MN = qkv_RlN[:, begin:end].reshape(-1, 3 * H * 64).contiguous()
        out_MD = torch.empty(len(qkv_MN), H * 64, dtype=dtype, device=device)
        cached_attention(qkv_MN, q_scale_H, k_RHLd, v_RHLd, begin=begin, softmax_scale=1.0, out_MD=out_MD)
        near(out_MD.view(R, -1, H * 64), expected_RlD[:, begin:end], dtype, factor=FACTOR[dtype])
        begin = end
    near(k_RHLd, expected_k_RHLd, dtype)
    assert torch.equal(v_RHLd.transpose(1, 2).flatten(2), qkv_RlN[..., 2 * H * 64 :])


def test_zeros_stay_zeros(device):
    qkv_MN, *caches = tensors(1, 1, 4, 0, 4, torch.float32, device)
    qkv_MN[:, :128] = 0
    out_MD, k_RHLd, _ = run(cached_attention, qkv_MN, torch.ones(1).to(device), caches, 0)
    assert (k_RHLd == 0).all()
    torch.testing.assert_close(out_MD, qkv_MN[:, 128:].mean(0).expand(4, -1))


def test_a_row_does_not_depend_on_its_batch(dtype, device):
    qkv_MN, *caches = tensors(3, 2, 9, 5, 16, dtype, device)
    q_scale_H = torch.full((2,), 5.0).to(device)
    whole = run(cached_attention, qkv_MN, q_scale_H, caches, 5)
    alone = run(cached_attention, qkv_MN[9:18], q_scale_H, [cache[1:2] for cache in caches], 5)
    assert torch.equal(whole[0][9:18], alone[0])
    assert torch.equal(whole[1][1, :, :14], alone[1][0, :, :14])


@pytest.mark.parametrize("n", [9, 36])
def test_nothing_outside_the_buffers_is_touched(n, device):
    R, H, begin, L = 2, 1, 5, 5 + n
    qkv_MN, *poisoned = tensors(R, H, n, begin, L, torch.float32, device)
    guard_MD = torch.full((R * n + 2, H * 64), 7.0, device=device)
    caches = [torch.full((R + 2, H, L, 64), 7.0, device=device) for _ in poisoned]
    for cache, content in zip(caches, poisoned, strict=True):
        cache[1:-1] = content
    inner = [cache[1:-1] for cache in caches]
    cached_attention(qkv_MN, None, *inner, begin=begin, softmax_scale=0.125, out_MD=guard_MD[1:-1])
    for buffer in (guard_MD, *caches):
        assert (buffer[[0, -1]] == 7).all()
        assert buffer[1:-1].isfinite().all()


@pytest.mark.gpu
def test_caches_beyond_32_bit_offsets(device, near):
    R, H, n, L = 1400, 16, 16, 1520  # 2.2e9 elements
    caches = [torch.zeros(R, H, L, 64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    qkv_MN = torch.randn(R * n, 3 * H * 64, device=device).bfloat16()
    out_MD = torch.empty(R * n, H * 64, dtype=torch.bfloat16, device=device)
    cached_attention(qkv_MN, None, *caches, begin=0, softmax_scale=0.125, out_MD=out_MD)
    last = [cache[-1:].clone() for cache in caches]
    expected_MD = torch.empty_like(out_MD[-n:])
    reference.cached_attention(qkv_MN[-n:], None, *last, begin=0, softmax_scale=0.125, out_MD=expected_MD)
    near(out_MD[-n:], expected_MD, torch.bfloat16)
    assert all(torch.equal(cache[-1:], expected) for cache, expected in zip(caches, last, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_MN": torch.zeros(384, 8).T}, r"qkv_MN: strides \(1, 8\) of shape \(8, 384\), expected contiguous"),
        ({"qkv_MN": torch.zeros(8, 192)}, r"qkv_MN: shape \(8, 192\), expected \(8, 384\)"),
        ({"qkv_MN": torch.zeros(7, 384), "out_MD": torch.zeros(7, 128)}, "7 tokens do not divide into 2 rows"),
        ({"qkv_MN": torch.zeros(8, 384).double()}, r"qkv_MN: torch.float64, expected torch.float32 or torch.float16"),
        ({"q_scale_H": torch.ones(3)}, r"q_scale_H: shape \(3,\), expected \(2,\)"),
        ({"q_scale_H": torch.ones(2).half()}, r"q_scale_H: torch.float16, expected torch.float32"),
        ({"cache_k_RHLd": torch.zeros(2, 2, 9, 32)}, r"cache_k_RHLd: shape .*, expected \(2, 2, 9, 64\)"),
        ({"cache_k_RHLd": torch.zeros(2, 2, 9, 64).half()}, r"cache_k_RHLd: torch.float16, expected torch.float32"),
        ({"cache_v_RHLd": torch.zeros(2, 2, 8, 64)}, r"cache_v_RHLd: shape .*, expected \(2, 2, 9, 64\)"),
        ({"cache_v_RHLd": torch.zeros(2, 2, 18, 64)[:, :, ::2]}, "cache_v_RHLd: strides .*, expected contiguous"),
        ({"begin": 6}, "begin: 6 with 4 tokens, expected 0 to 5 in a cache of 9"),
        ({"begin": -1}, "begin: -1 with 4 tokens"),
        ({"out_MD": torch.zeros(8, 64)}, r"out_MD: shape \(8, 64\), expected \(8, 128\)"),
        ({"out_MD": torch.zeros(8, 128).half()}, r"out_MD: torch.float16, expected torch.float32"),
    ],
)
def test_wrong_input_is_named(change, message):
    tensors = {"qkv_MN": torch.zeros(8, 384), "q_scale_H": torch.ones(2), "out_MD": torch.zeros(8, 128)}
    caches = {"cache_k_RHLd": torch.zeros(2, 2, 9, 64), "cache_v_RHLd": torch.zeros(2, 2, 9, 64)}
    with pytest.raises(ValueError, match=message):
        cached_attention(**{**tensors, **caches, "begin": 5, "softmax_scale": 1.0, **change})
