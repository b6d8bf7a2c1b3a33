"""The runtime's sampler against the published one: kept tokens, distribution of the draw, smooth mixture, bad logits.

The published sampler draws by torch.multinomial, the runtime by inverting the cumulative distribution: same
distribution, other numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from var_deploy import philox
from var_deploy.errors import EngineError
from var_deploy.sampling import Settings, draw_scale, invert_cdf, kept_threshold, smooth_codes
from var_train import sampling as published

V = 53
JUST_BELOW_ONE = np.nextafter(1.0, 0.0)

#: Filters as (top_k, top_p).
FILTERS = {"none": (0, 0.0), "top_k": (11, 0.0), "top_p": (0, 0.9), "both": (17, 0.8)}


def _settings(
    *strengths: float, top_k: int = 0, top_p: float = 0.0, smooth: bool = False, temperature: float = 1.0
) -> Settings:
    return Settings.constant(strengths or (0.0, 0.0), temperature=temperature, top_k=top_k, top_p=top_p, smooth=smooth)


# ---- which tokens are kept -------------------------------------------------------------------------------------------

#: Rows without equal values, a thousandth apart at least.
rows = st.lists(st.integers(-6000, 6000), unique=True, min_size=1, max_size=40).map(lambda x: np.array(x) / 1000)


def _clear_cut(row_V: np.ndarray, top_k: int, top_p: float) -> bool:
    """Whether no cumulated probability lies so near to 1 − p that rounding decides."""
    kept = np.sort(row_V)[-top_k:] if 0 < top_k < len(row_V) else np.sort(row_V)
    weights = np.exp(kept - kept[-1])
    return np.abs(weights.cumsum() / weights.sum() - (1 - top_p)).min() > 1e-9


@given(row_V=rows, top_k=st.integers(0, 43), top_p=st.floats(0, 1))
def test_kept_tokens_are_those_of_the_published_sampler(row_V, top_k, top_p):
    assume(_clear_cut(row_V, top_k, top_p))
    masked = published.mask_top_k_top_p(torch.from_numpy(row_V)[None, None], top_k, top_p)[0, 0]
    kept_V = row_V >= kept_threshold(row_V[None], top_k, top_p)[0]
    np.testing.assert_array_equal(kept_V, torch.isfinite(masked).numpy())


@given(row_V=rows, top_k=st.integers(0, 43), top_p=st.floats(0, 1), u=st.floats(0, 1, exclude_max=True))
def test_no_token_outside_the_kept_ones_is_drawn(row_V, top_k, top_p, u):
    kept_1V = row_V[None] >= kept_threshold(row_V[None], top_k, top_p)
    for uniform in (u, 0.0, JUST_BELOW_ONE):
        token = invert_cdf(row_V[None], kept_1V, np.array([uniform]))[0]
        assert kept_1V[0, token]


@given(row_V=rows, u=st.floats(0, 1, exclude_max=True))
def test_greedy_takes_the_largest(row_V, u):
    for top_k, top_p in ((1, 0.0), (0, 1e-12)):
        kept_1V = row_V[None] >= kept_threshold(row_V[None], top_k, top_p)
        assert invert_cdf(row_V[None], kept_1V, np.array([u]))[0] == row_V.argmax()


@pytest.mark.parametrize("row", [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.0), (0, 0.3)])
def test_equal_logits_are_kept_together(row, top_k, top_p):
    row_1V = np.array([row])
    np.testing.assert_array_equal(row_1V >= kept_threshold(row_1V, top_k, top_p), row_1V == 1.0)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (0, 1.0), (V, 0.0), (V + 9, 1.0)])
def test_filters_that_are_off_keep_all(top_k, top_p):
    row_1V = np.linspace(-80, 80, V)[None]
    assert (row_1V >= kept_threshold(row_1V, top_k, top_p)).all()


# ---- the draw --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "kept", "u", "token"),
    [
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.0, 0),
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.25, 1),  # the first whose cumulative probability exceeds u
        ([0, 0, 0, 0], [1, 1, 1, 1], np.nextafter(0.25, 0), 0),
        ([0, 0, 0, 0], [1, 1, 1, 1], JUST_BELOW_ONE, 3),
        ([5, 0, 0, 0], [0, 0, 1, 1], 0.0, 2),  # nothing at the head
        ([0, 0, 0, 9], [1, 1, 0, 0], JUST_BELOW_ONE, 1),  # nothing at the tail
        ([-np.inf, 0, 0, -np.inf], [1, 1, 1, 1], 0.0, 1),
        ([-np.inf, 0, 0, -np.inf], [1, 1, 1, 1], JUST_BELOW_ONE, 2),
        ([0, -1e4, 0, -1e4], [1, 1, 1, 1], JUST_BELOW_ONE, 2),  # probability underflows to zero
        ([-1e4, 0, -1e4, -1e4], [1, 1, 1, 1], 0.0, 1),
        ([7], [1], JUST_BELOW_ONE, 0),
    ],
)
def test_inversion_at_the_edges(logits, kept, u, token):
    result = invert_cdf(np.array([logits], dtype=np.float32), np.array([kept], dtype=bool), np.array([u]))
    assert result.tolist() == [token]


def _fixed_row() -> np.ndarray:
    return (1.5 * np.random.default_rng(3).standard_normal(V)).astype(np.float32)


def _runtime_counts(row_V: np.ndarray, top_k: int, top_p: float, temperature: float = 1.0) -> np.ndarray:
    """How often `draw_scale` draws each token: 100 images with their own seeds, 200 positions each."""
    logits_BnV = np.broadcast_to(row_V, (100, 200, V))
    settings = _settings(top_k=top_k, top_p=top_p, temperature=temperature)
    tokens_Bn, _ = draw_scale(logits_BnV, 1, 30, list(range(100)), settings, np.zeros((V, 2), np.float32))
    return np.bincount(tokens_Bn.ravel(), minlength=V)


def _published_probabilities(row_V: np.ndarray, top_k: int, top_p: float) -> torch.Tensor:
    row = torch.from_numpy(row_V).double()[None, None]
    return published.mask_top_k_top_p(row, top_k, top_p).softmax(dim=-1)[0, 0]


def _chi_square_p(counts_V: np.ndarray, probability_V: torch.Tensor) -> float:
    """p-value of the counts under the probabilities; rare tokens share a bin, impossible ones are checked apart."""
    expected_V = probability_V.numpy() * counts_V.sum()
    assert counts_V[expected_V == 0].sum() == 0, "an impossible token was drawn"
    common = expected_V >= 5
    observed, expected = list(counts_V[common]), list(expected_V[common])
    if expected_V[~common].sum() > 0:
        observed.append(counts_V[~common].sum())
        expected.append(expected_V[~common].sum())
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


# Seeds are fixed, so each case is decided once. A right sampler falls below this bound once in a thousand cases, a
# sampler that is off by a few per cent of a probability lies many orders of magnitude below it (see the control).
SMALLEST_P = 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
def test_draws_are_distributed_as_published(top_k, top_p):
    row_V = _fixed_row()
    p_value = _chi_square_p(_runtime_counts(row_V, top_k, top_p), _published_probabilities(row_V, top_k, top_p))
    assert p_value > SMALLEST_P


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
def test_draws_of_the_published_sampler_pass_the_same_test(top_k, top_p):
    row = torch.from_numpy(_fixed_row())
    masked = published.mask_top_k_top_p(row.expand(1, 20_000, V), top_k, top_p)
    tokens = published.draw(masked, torch.Generator().manual_seed(5)).flatten().numpy()
    counts_V = np.bincount(tokens, minlength=V)
    assert _chi_square_p(counts_V, _published_probabilities(row.numpy(), top_k, top_p)) > SMALLEST_P


def test_the_chi_square_test_tells_a_slightly_different_distribution():
    row_V = _fixed_row()
    warmer = _published_probabilities(row_V * np.float32(0.95), 0, 0.0)
    assert _chi_square_p(_runtime_counts(row_V, 0, 0.0), warmer) < 1e-6


# ---- temperature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.5, 4.0])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_softmax_of_the_divided_logits(temperature, top_k, top_p):
    row_V = 0.4 * _fixed_row()  # at 0.5, top-p still keeps several
    counts_V = _runtime_counts(row_V, top_k, top_p, temperature)
    divided_V = row_V / np.float32(temperature)  # before the filters: top-p keeps more of a warmer distribution
    assert _chi_square_p(counts_V, _published_probabilities(divided_V, top_k, top_p)) > SMALLEST_P


def test_the_chi_square_test_tells_a_slightly_different_temperature():
    row_V = _fixed_row()
    probability_V = torch.from_numpy(row_V).double().div(1.4).softmax(0)
    assert _chi_square_p(_runtime_counts(row_V, 0, 0.0, 1.4), probability_V) > SMALLEST_P
    assert _chi_square_p(_runtime_counts(row_V, 0, 0.0, 1.5), probability_V) < 1e-6


@pytest.mark.parametrize("smooth", [False, True])
def test_temperature_divides_the_mixed_logits(smooth):
    rng, t, B, n = np.random.default_rng(7), 1.3, 2, 6
    logits_RnV = rng.standard_normal((2 * B, n, V)).astype(np.float32)
    codebook_VC = rng.standard_normal((V, 3)).astype(np.float32)
    options = {"top_k": 20, "top_p": 0.9, "smooth": smooth}
    warm = _settings(0.0, t, temperature=1.7, **options)
    tokens_Bn, codes_BnC = draw_scale(logits_RnV, 1, 3, [1, 2], warm, codebook_VC)
    mixed_BnV = (1 + np.float32(t)) * logits_RnV[:B] - np.float32(t) * logits_RnV[B:]
    plain = _settings(0.0, 0.0, **options)
    expected = draw_scale(mixed_BnV / np.float32(1.7), 1, 3, [1, 2], plain, codebook_VC)
    np.testing.assert_array_equal(tokens_Bn, expected[0])
    np.testing.assert_array_equal(codes_BnC, expected[1])


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
def test_the_smallest_temperature_is_greedy(top_k, top_p):
    """At 10⁻³, the least that a request may ask for, every other token has a probability below e⁻¹⁰."""
    rows_BnV = np.random.default_rng(8).permuted(np.tile(0.01 * np.arange(V, dtype=np.float32), (3, 40, 1)), axis=-1)
    settings = _settings(top_k=top_k, top_p=top_p, temperature=1e-3)
    tokens_Bn, _ = draw_scale(rows_BnV, 1, 0, [4, 5, 6], settings, np.zeros((V, 2), np.float32))
    differs = tokens_Bn != rows_BnV.argmax(-1)
    assert differs.sum() == 0  # of 120 draws, one in 180 such tests would have one


def test_the_largest_temperature_is_nearly_uniform():
    counts_V = _runtime_counts(_fixed_row(), 0, 0.0, 1e3)
    assert _chi_square_p(counts_V, torch.full((V,), 1 / V, dtype=torch.float64)) > SMALLEST_P


def test_temperature_leaves_a_greedy_draw_alone():
    logits_BnV = np.random.default_rng(11).standard_normal((2, 9, V)).astype(np.float32)
    for temperature in (1e-3, 0.3, 7.0, 1e3):
        settings = _settings(top_k=1, temperature=temperature)
        tokens_Bn, _ = draw_scale(logits_BnV, 1, 0, [1, 2], settings, np.zeros((V, 2), np.float32))
        np.testing.assert_array_equal(tokens_Bn, logits_BnV.argmax(-1))


# ---- scales that need null rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strengths", "guided"),
    [
        ((0.0, 0.0, 0.0), 0),
        ((0.0, 0.75, 1.5), 3),
        ((2.0, 0.0, 0.0), 1),
        ((0.0, 2.0, 0.0), 2),
        ((2.0, 0.0, 1e-30), 3),  # a strength of 0 before the last does not end them
        ((0.0, -0.0), 0),
    ],
)
def test_null_rows_are_needed_up_to_the_last_strength(strengths, guided):
    assert _settings(*strengths).guided_scales == guided


def test_without_null_rows_the_strength_does_not_matter():
    logits_BnV = np.random.default_rng(12).standard_normal((2, 5, V)).astype(np.float32)
    drawn = [
        draw_scale(logits_BnV, 1, 4, [1, 2], _settings(3.0, t, top_k=30), np.zeros((V, 2), np.float32))[0]
        for t in (0.0, 2.0)
    ]
    np.testing.assert_array_equal(*drawn)


# ---- a scale of a batch ----------------------------------------------------------------------------------------------


def test_guidance_mixes_as_published():
    rng, t, B, n = np.random.default_rng(1), 0.7, 3, 5
    logits_RnV = rng.standard_normal((2 * B, n, V)).astype(np.float32)
    tokens_Bn, _ = draw_scale(logits_RnV, 1, 0, [1, 2, 3], _settings(0, t, top_k=1), np.zeros((V, 2), np.float32))
    expected = published.mix_guidance(torch.from_numpy(logits_RnV), t).argmax(dim=-1)
    np.testing.assert_array_equal(tokens_Bn, expected.numpy())


@pytest.mark.parametrize("smooth", [False, True])
def test_an_image_is_drawn_alike_at_any_place_of_a_batch(smooth):
    rng, n = np.random.default_rng(2), 7
    logits_RnV = rng.standard_normal((8, n, V)).astype(np.float32)
    codebook_VC = rng.standard_normal((V, 3)).astype(np.float32)
    settings = _settings(0.5, 1.0, top_k=20, top_p=0.9, smooth=smooth)
    tokens_Bn, codes_BnC = draw_scale(logits_RnV, 1, 9, [5, 6, 7, 8], settings, codebook_VC)
    for image, seed in enumerate([5, 6, 7, 8]):
        alone = draw_scale(logits_RnV[[image, 4 + image]], 1, 9, [seed], settings, codebook_VC)
        np.testing.assert_array_equal(alone[0][0], tokens_Bn[image])
        np.testing.assert_array_equal(alone[1][0], codes_BnC[image])
    if not smooth:
        np.testing.assert_array_equal(codes_BnC, codebook_VC[tokens_Bn])


def test_a_position_is_drawn_alike_whatever_scale_it_belongs_to():
    logits_1nV = np.random.default_rng(4).standard_normal((1, 9, V)).astype(np.float32)
    codebook_VC = np.zeros((V, 1), np.float32)
    whole, _ = draw_scale(logits_1nV, 0, 10, [3], _settings(), codebook_VC)
    part, _ = draw_scale(logits_1nV[:, 4:], 1, 14, [3], _settings(), codebook_VC)
    np.testing.assert_array_equal(part, whole[:, 4:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_one_bad_logit_is_an_error_that_names_scale_and_image(value, row):
    logits_RnV = np.zeros((4, 3, V), np.float32)
    logits_RnV[row, 2, 5] = value
    with pytest.raises(
        EngineError, match=f"^scale 1: logits of image {row % 2} hold NaN or infinity; check the bundle"
    ):
        draw_scale(logits_RnV, 1, 0, [1, 2], _settings(0.0, 1.0), np.zeros((V, 1), np.float32))


def test_a_row_of_minus_infinity_is_an_error():
    logits_RnV = np.zeros((2, 3, V), np.float32)
    logits_RnV[1, 1] = -np.inf
    with pytest.raises(EngineError, match="logits of image 1 hold NaN or infinity"):
        draw_scale(logits_RnV, 0, 0, [1, 2], _settings(), np.zeros((V, 1), np.float32))


# ---- smooth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
def test_smooth_codes_equal_the_published_mixture_for_the_same_noise(ratio, top_k, top_p):
    rng, n, C = np.random.default_rng(6), 7, 5
    logits_nV = rng.standard_normal((n, V)).astype(np.float32)
    codebook_VC = rng.standard_normal((V, C)).astype(np.float32)
    masked_1nV = published.mask_top_k_top_p(torch.from_numpy(logits_nV)[None], top_k, top_p)
    expected = published.smooth_codes(
        masked_1nV, torch.from_numpy(codebook_VC), ratio, torch.Generator().manual_seed(8)
    )
    exponential = torch.empty_like(masked_1nV).exponential_(generator=torch.Generator().manual_seed(8))
    gumbel_nV = -exponential.log()[0].numpy()
    kept_nV = logits_nV >= kept_threshold(logits_nV, top_k, top_p)
    result = smooth_codes(logits_nV, kept_nV, gumbel_nV, ratio, codebook_VC)
    assert result.dtype == np.float32
    # Scores are divided by τ ≥ 0.0135, which magnifies float32 rounding of values up to 20 to 1e-4 of a weight.
    np.testing.assert_allclose(result, expected[0].numpy(), atol=5e-4, rtol=0)


def test_smooth_drawing_uses_the_noise_of_its_seed_and_position():
    rng, n, begin = np.random.default_rng(9), 4, 12
    logits_1nV = rng.standard_normal((1, n, V)).astype(np.float32)
    codebook_VC = rng.standard_normal((V, 3)).astype(np.float32)
    settings = _settings(0.0, 0.0, 0.0, 0.0, smooth=True)
    _, codes_BnC = draw_scale(logits_1nV, 2, begin, [77], settings, codebook_VC)
    gumbel_nV = philox.gumbels(77, begin, begin + n, V)
    expected = smooth_codes(logits_1nV[0], np.ones((n, V), bool), gumbel_nV, 2 / 3, codebook_VC)
    np.testing.assert_array_equal(codes_BnC[0], expected)


def test_smooth_codes_of_one_kept_token_are_its_code():
    codebook_VC = np.random.default_rng(1).standard_normal((V, 3)).astype(np.float32)
    kept_1V = np.arange(V)[None] == 31
    result = smooth_codes(np.zeros((1, V), np.float32), kept_1V, philox.gumbels(1, 0, 1, V), 1.0, codebook_VC)
    np.testing.assert_array_equal(result[0], codebook_VC[31])
