"""The published sampler against naive loops, and generation: reproducible, forced tokens respected."""

from __future__ import annotations

import math

import pytest
import torch

from var_deploy.config import VARConfig, VQVAEConfig
from var_train import VAR, VQVAE, generate
from var_train.presets import randomise
from var_train.sampling import draw, mask_top_k_top_p, mix_guidance, smooth_codes

PATCH_NUMS = (1, 2, 4)


@pytest.fixture(scope="module")
def models() -> tuple[VAR, VQVAE]:
    var = VAR(
        VARConfig(patch_nums=PATCH_NUMS, vocab_size=29, z_channels=8, num_classes=5, depth=2, embed_dim=64, ffn_dim=100)
    )
    vqvae = VQVAE(VQVAEConfig(patch_nums=PATCH_NUMS, vocab_size=29, z_channels=8, ch=32, ch_mult=(1, 1), num_phi=2))
    for model in (var, vqvae):
        randomise(model)
        model.eval()
    return var, vqvae


# Filters --------------------------------------------------------------------------------------------------------------


def naive_filter(logits: list[float], top_k: int, top_p: float) -> list[float]:
    """The published rule, one entry at a time, in float64."""
    kept = list(logits)
    if top_k:
        kth = sorted(kept, reverse=True)[min(top_k, len(kept)) - 1]
        kept = [x if x >= kth else -math.inf for x in kept]
    if 0 < top_p < 1:
        ascending = sorted(range(len(kept)), key=lambda i: (kept[i], i))
        total = sum(math.exp(x) for x in kept)
        cumulated = 0.0
        for i in ascending[:-1]:  # the largest is always kept
            cumulated += math.exp(kept[i]) / total
            if cumulated <= 1 - top_p:
                kept[i] = -math.inf
    return kept


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.96, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 40, 41, 1000])
def test_filters_equal_the_naive_rule(top_k, top_p):
    logits = 3 * torch.randn(3, 5, 41, generator=torch.Generator().manual_seed(top_k))
    got = mask_top_k_top_p(logits, top_k, top_p)
    for row, expected in zip(got.flatten(0, 1).tolist(), logits.flatten(0, 1).tolist(), strict=True):
        assert row == naive_filter(expected, top_k, top_p)


def test_equal_logits_at_the_kth_place_are_all_kept():
    kept = mask_top_k_top_p(torch.tensor([[[1.0, 3.0, 2.0, 2.0, 0.0]]]), top_k=2)
    assert kept.isfinite().tolist() == [[[False, True, True, True, False]]]


def test_the_largest_survives_any_top_p():
    kept = mask_top_k_top_p(torch.tensor([[[0.0, 0.1, 0.05]]]), top_p=1e-9)
    assert kept.isfinite().tolist() == [[[False, True, False]]]


def test_filters_off_change_nothing_and_filters_do_not_write_to_their_input():
    logits = torch.randn(2, 3, 11)
    copy = logits.clone()
    assert torch.equal(mask_top_k_top_p(logits), logits)
    mask_top_k_top_p(logits, 2, 0.5)
    assert torch.equal(logits, copy)


def test_guidance_extrapolates_from_the_null_rows():
    conditioned, null = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mixed = mix_guidance(torch.cat([conditioned, null]), 1.5)
    torch.testing.assert_close(mixed, null + 2.5 * (conditioned - null))
    assert torch.equal(mix_guidance(torch.cat([conditioned, null]), 0.0), conditioned)


def test_draws_follow_the_softmax_of_what_is_left():
    """Chi-square over 20,000 draws of a fixed row: 95 in 100,000 fair samplers would exceed the bound."""
    logits = torch.tensor([0.3, -1.0, 1.2, 2.0, 0.0, -3.0])
    masked = mask_top_k_top_p(logits[None, None], top_k=5, top_p=0.95)
    probabilities = masked[0, 0].softmax(-1)
    count = 20_000
    tokens = draw(masked.expand(1, count, -1), torch.Generator().manual_seed(0))
    observed = tokens.flatten().bincount(minlength=6)
    possible = probabilities > 0
    assert not observed[~possible].any()
    expected = count * probabilities[possible]
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum().item()
    assert possible.sum() == 4
    assert chi_square < 16.4  # 3 degrees of freedom


def test_smooth_codes_sharpen_with_the_scale():
    """A convex mixture of kept codes: soft at the first scale, a single code at the last (tau 0.0135)."""
    codebook = torch.eye(9)  # so that a code shows its mixture
    masked = mask_top_k_top_p(torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0)), top_k=4)
    mixtures = [smooth_codes(masked, codebook, ratio, torch.Generator().manual_seed(1)) for ratio in (0.0, 1.0)]
    for mixture in mixtures:
        torch.testing.assert_close(mixture.sum(-1), torch.ones(2, 50))
        assert not mixture[masked.isneginf()].any()
    assert mixtures[0].amax(-1).mean() < 0.97 < 0.99 < mixtures[1].amax(-1).mean()


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [False, True])
def test_generation_repeats_with_the_same_generator(models, smooth):
    labels = torch.tensor([0, 4, 2])
    first, second, other = (
        generate(*models, labels, smooth=smooth, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, second.tokens, strict=True))
    assert torch.equal(first.image_B3RR, second.image_B3RR)
    assert not torch.equal(first.image_B3RR, other.image_B3RR)


def test_shapes_ranges_and_rows(models):
    out = generate(*models, torch.tensor([1, 3]), generator=torch.Generator().manual_seed(0))
    assert [t.shape for t in out.tokens] == [(2, 1), (2, 4), (2, 16)]
    assert [x.shape for x in out.logits] == [(4, 1, 29), (4, 4, 29), (4, 16, 29)]
    assert out.image_B3RR.shape == (2, 3, 8, 8)
    assert out.image_B3RR.min() >= 0
    assert out.image_B3RR.max() <= 1
    torch.testing.assert_close(out.f_hat_BChh, models[1].quantize.features_from_tokens(out.tokens))


def test_forced_tokens_take_the_place_of_the_draw(models):
    random = torch.Generator().manual_seed(2)
    forced = [torch.randint(29, (2, n), generator=random) for n in (1, 4, 16)]
    out = generate(*models, torch.tensor([1, 3]), forced_tokens=forced)
    assert all(torch.equal(a, b) for a, b in zip(out.tokens, forced, strict=True))
    torch.testing.assert_close(out.f_hat_BChh, models[1].quantize.features_from_tokens(forced))
    with torch.no_grad():  # the logits are those of teacher forcing on the same tokens
        features = models[1].quantize.teacher_forcing_input(forced)
        expected = models[0](torch.tensor([1, 3]), features)
    got = torch.cat([logits[:2] for logits in out.logits], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # attention sums over other lengths


def test_greedy_takes_the_best_guided_logit_at_the_published_strength(models):
    out = generate(*models, torch.arange(5), guidance=20.0, top_k=1, top_p=0.0)
    for k, (tokens, logits) in enumerate(zip(out.tokens, out.logits, strict=True)):
        assert torch.equal(tokens, mix_guidance(logits, 20.0 * k / 2).argmax(-1)), f"scale {k}"
    assert not torch.equal(out.tokens[0], mix_guidance(out.logits[0], 20.0).argmax(-1))  # strength begins at 0


def test_no_guidance_runs_half_the_rows_with_the_same_result_as_zero_strength(models):
    labels = torch.tensor([0, 1, 2])
    out = generate(*models, labels, guidance=0, top_k=1, top_p=0)
    assert [logits.shape[0] for logits in out.logits] == [3, 3, 3]
    guided = generate(*models, labels, guidance=1e-12, top_k=1, top_p=0)
    assert all(torch.equal(a, b) for a, b in zip(out.tokens, guided.tokens, strict=True))


def test_weights_get_no_gradient_from_generation(models):
    out = generate(*models, torch.tensor([0]), generator=torch.Generator().manual_seed(0))
    assert not out.image_B3RR.requires_grad
