"""draw against its reference, the runtime's thresholds, the published probabilities and the runtime's noise.

Kernel and reference add up in different orders, so they may part where a sum lies within MARGIN of its bound; nowhere
else. A program takes the interpreter a tenth of a second with both filters on, so that most cases have few positions.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from var_deploy import philox
from var_deploy.sampling import invert_cdf, kept_threshold
from var_kernels import reference
from var_kernels.draw import draw
from var_train import sampling as published

MARGIN = 1e-5
JUST_BELOW_ONE = np.nextafter(1.0, 0.0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.usefixtures("device")  # whatever runs here runs on DEVICE, the same


def call(function, logits_RnV, uniforms_Bn, top_k, top_p, *, strength=0.0, temperature=1.0, guided=False, **smooth):
    """Runs a draw; settings are numbers or one per image. Returns tokens, codes, invalid and the smooth weights."""
    (B, n), V = uniforms_Bn.shape, logits_RnV.shape[-1]
    values = ((strength, torch.float32), (temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32))
    settings_B = [torch.as_tensor(v, dtype=dtype, device=DEVICE).expand(B).contiguous() for v, dtype in values]
    out = {
        "tokens_out_Bn": torch.full((B, n), -1, device=DEVICE),
        "codes_out_BnC": torch.full((B, n, 5), torch.nan, device=DEVICE),
        "invalid_out_B": torch.zeros(B, dtype=torch.int32, device=DEVICE),
    }
    if smooth:
        out["smooth_weights_out_BnV"] = torch.full((B, n, V), torch.nan, device=DEVICE)
    codebook_VC = torch.arange(V * 5, dtype=torch.float32, device=DEVICE).view(V, 5)
    arguments = (logits_RnV.to(DEVICE), uniforms_Bn.to(DEVICE), *settings_B, codebook_VC)
    function(*arguments, guided=guided, **out, **smooth)
    if not out["invalid_out_B"].any():
        assert torch.equal(out["codes_out_BnC"], codebook_VC[out["tokens_out_Bn"]])
    return {name: tensor.cpu() for name, tensor in out.items()}


def tokens_within_margin(logits_V, uniform, top_k, top_p):
    """Tokens that are right for some uniform and some top-p within MARGIN of those given."""
    low, high = max(uniform - MARGIN, 0.0), uniform + MARGIN
    right = set()
    for p in {top_p, max(top_p - MARGIN, 1e-9), top_p + MARGIN} if 0 < top_p < 1 else {top_p}:
        kept_1V = logits_V[None] >= kept_threshold(logits_V[None], top_k, p)
        first, last = (
            int(invert_cdf(logits_V[None], kept_1V, np.array([u]))[0]) if u < 1 else kept_1V[0].nonzero()[0][-1]
            for u in (low, high)
        )
        right |= {token for token in range(first, last + 1) if kept_1V[0, token]}
    return right


def assert_right(tokens_Bn, logits_BnV, uniforms_Bn, top_k, top_p):
    """Every token is right within MARGIN."""
    for b, i in np.ndindex(*tokens_Bn.shape):
        right = tokens_within_margin(logits_BnV[b, i].numpy(), float(uniforms_Bn[b, i]), int(top_k[b]), float(top_p[b]))
        assert int(tokens_Bn[b, i]) in right, f"image {b}, position {i}"


def filters_of(V):
    """Four images: no filter, top-k, top-p, both."""
    return torch.tensor([0, max(V // 3, 1), 0, max(V // 2, 1)]), torch.tensor([0.0, 1.0, 0.9, 0.8])


@pytest.mark.parametrize("V", [1, 2, 97, 4096, 5000])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
def test_against_the_reference(V, guided):
    logits_RnV, uniforms_Bn = 3 * torch.randn(8 if guided else 4, 2, V), torch.rand(4, 2, dtype=torch.float64)
    top_k_B, top_p_B = filters_of(V)
    strength_B, temperature_B = torch.tensor([0.0, 1.5, 3.0, 0.7]), torch.tensor([1.0, 0.7, 1.3, 2.0])
    options = {"strength": strength_B, "temperature": temperature_B, "guided": guided}
    got = call(draw, logits_RnV, uniforms_Bn, top_k_B, top_p_B, **options)
    expected = call(reference.draw, logits_RnV, uniforms_Bn, top_k_B, top_p_B, **options)
    assert not got["invalid_out_B"].any()
    mixed_BnV = published.mix_guidance(logits_RnV, strength_B.view(-1, 1, 1)) if guided else logits_RnV
    mixed_BnV = mixed_BnV / temperature_B.view(-1, 1, 1)
    assert_right(got["tokens_out_Bn"], mixed_BnV, uniforms_Bn, top_k_B, top_p_B)
    assert_right(expected["tokens_out_Bn"], mixed_BnV, uniforms_Bn, top_k_B, top_p_B)
    # A twelfth of all uniforms lies within MARGIN of a boundary at V = 4096; sums that are right part far more rarely.
    assert (got["tokens_out_Bn"] != expected["tokens_out_Bn"]).sum() <= 1


@pytest.mark.slow
def test_many_positions():
    """Without filters, whose bisections the interpreter takes minutes for; positions share nothing anyway."""
    n, V = 520, 33
    logits_RnV, uniforms_1n = 3 * torch.randn(2, n, V), torch.rand(1, n, dtype=torch.float64)
    got = call(draw, logits_RnV, uniforms_1n, 0, 0.0, strength=1.5, guided=True)
    expected = call(reference.draw, logits_RnV, uniforms_1n, 0, 0.0, strength=1.5, guided=True)
    mixed_1nV = published.mix_guidance(logits_RnV, 1.5)
    assert_right(got["tokens_out_Bn"], mixed_1nV, uniforms_1n, torch.zeros(1), torch.zeros(1))
    # One uniform in 1,500 lies within MARGIN of one of 33 boundaries; sums that are right part far more rarely.
    assert (got["tokens_out_Bn"] != expected["tokens_out_Bn"]).sum() <= 1


def test_settings_of_one_batch_do_not_mix():
    logits_RnV, uniforms_Bn = 3 * torch.randn(8, 1, 53), torch.rand(4, 1, dtype=torch.float64)
    top_k_B, top_p_B = filters_of(53)
    strength_B, temperature_B = torch.tensor([0.0, 1.5, 3.0, 0.7]), torch.tensor([1.0, 0.7, 1.3, 2.0])
    options = {"guided": True, "seeds_B": torch.tensor([1, 2, 3, 4], device=DEVICE)}
    settings_B = {"strength": strength_B, "temperature": temperature_B}
    together = call(draw, logits_RnV, uniforms_Bn, top_k_B, top_p_B, **settings_B, **options)
    for b in range(4):
        options = {"guided": True, "seeds_B": torch.tensor([b + 1], device=DEVICE)}
        settings_1 = {"strength": strength_B[b], "temperature": temperature_B[b]}
        alone = call(
            draw, logits_RnV[b::4].contiguous(), uniforms_Bn[b : b + 1], top_k_B[b], top_p_B[b], **settings_1, **options
        )
        for name in together:
            assert torch.equal(alone[name][0], together[name][b]), name


#: Rows with many equal values, zeros of both signs and wide gaps.
ROWS = st.lists(
    st.sampled_from([-0.0, 0.0, 1.0, 1.5, -2.0, 80.0, -90.0, 1e-30]) | st.floats(-9, 9, width=32), min_size=1
)


@settings(max_examples=30)
@example(row=[80.0, 0.0], top_k=0, top_p=0.0, uniform=JUST_BELOW_ONE)  # the last has e⁻⁸⁰, less than rounding
@given(
    row=ROWS,
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 1e-8, 0.5, 0.999, 1.0]) | st.floats(0, 1, width=32),
    uniform=st.sampled_from([0.0, 0.5, JUST_BELOW_ONE]) | st.floats(0, 1, exclude_max=True),
)
def test_no_token_outside_the_kept_ones_is_drawn(row, top_k, top_p, uniform):
    row_V = torch.tensor(row)
    uniforms_11 = torch.tensor([[uniform]], dtype=torch.float64)
    token = call(draw, row_V.view(1, 1, -1), uniforms_11, top_k, top_p)["tokens_out_Bn"].item()
    # Where rounding decides what top-p drops, the larger set counts.
    wider_p = top_p + 1e-6 if 0 < top_p < 1 else top_p
    assert row_V[token] >= kept_threshold(row_V[None].numpy(), top_k, wider_p).item()
    assert token in tokens_within_margin(row_V.numpy(), uniform, top_k, top_p)


@pytest.mark.parametrize("V", [3, 97, 4096])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_kept_token(V):
    logits_BnV = torch.randn(1, 1, V).expand(1, 2, V).contiguous()
    uniforms_Bn = torch.tensor([[0.0, JUST_BELOW_ONE]], dtype=torch.float64)
    tokens = call(draw, logits_BnV, uniforms_Bn, V // 2, 0.0)["tokens_out_Bn"]
    kept = (logits_BnV[0, 0] >= logits_BnV[0, 0].topk(V // 2).values[-1]).nonzero()
    assert tokens.tolist() == [[kept[0].item(), kept[-1].item()]]


@pytest.mark.parametrize("row", [[0.0, -1e4, -1e4], [-200.0, -200.0, 5.0, -200.0], [1e38, -1e38]])
def test_one_hot(row):
    logits_BnV = torch.tensor(row).expand(1, 3, -1).contiguous()
    uniforms_Bn = torch.tensor([[0.0, 0.3, JUST_BELOW_ONE]], dtype=torch.float64)
    tokens = call(draw, logits_BnV, uniforms_Bn, 0, 0.0)["tokens_out_Bn"]
    assert tokens.tolist() == [[int(np.argmax(row))] * 3]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.0), (0, 1e-8), (0, 0.3), (2, 0.1)])
def test_equal_logits_stay_together(top_k, top_p):
    """Three tokens share the largest logit, whose zeros differ in sign: each is drawn for a third of the uniforms."""
    logits_BnV = torch.tensor([-1.0, 0.0, -2.0, -0.0, 0.0, -3.0]).expand(1, 4, -1).contiguous()
    uniforms_Bn = torch.tensor([[0.0, 0.3, 0.5, JUST_BELOW_ONE]], dtype=torch.float64)
    tokens = call(draw, logits_BnV, uniforms_Bn, top_k, top_p)["tokens_out_Bn"]
    assert tokens.tolist() == [[1, 1, 3, 4]]


# --- The distribution: 18 logits a fifth apart or more, in fixed disorder ---

ROW_V = torch.tensor([7, 1, 14, 3, 9, 17, 0, 12, 5, 16, 2, 10, 8, 15, 4, 11, 6, 13]) / 5
FILTERS = {"none": (0, 0.0), "top_k": (9, 0.0), "top_p": (0, 0.9), "both": (12, 0.8)}


def published_probabilities(top_k, top_p):
    return published.mask_top_k_top_p(ROW_V.double()[None, None], top_k, top_p).softmax(-1)[0, 0]


@pytest.mark.parametrize(("top_k", "top_p"), [FILTERS["none"], FILTERS["both"]], ids=["none", "both"])
def test_evenly_spread_uniforms_draw_every_token_as_often_as_published(top_k, top_p):
    """No chance is involved: of N even uniforms, a token of probability P gets N·P, rounded up or down."""
    N = 60
    uniforms_1N = ((torch.arange(N, dtype=torch.float64) + 0.5) / N)[None]
    tokens = call(draw, ROW_V.expand(1, N, -1).contiguous(), uniforms_1N, top_k, top_p)["tokens_out_Bn"]
    excess_V = tokens.flatten().bincount(minlength=len(ROW_V)) - N * published_probabilities(top_k, top_p)
    assert excess_V.abs().max() < 1 + N * MARGIN


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("function", [reference.draw, pytest.param(draw, marks=pytest.mark.gpu)], ids=["ref", "kernel"])
def test_draws_pass_a_chi_square_test(function, top_k, top_p):
    """20,000 draws; the seed is fixed, and a right sampler falls below the bound for one seed in a thousand."""
    uniforms_Bn = torch.from_numpy(np.stack([philox.uniforms(seed, 0, 200) for seed in range(100)]))
    tokens = call(function, ROW_V.expand(100, 200, -1).contiguous(), uniforms_Bn, top_k, top_p)["tokens_out_Bn"]
    counts_V = tokens.flatten().bincount(minlength=len(ROW_V)).double()
    expected_V = 20_000 * published_probabilities(top_k, top_p)
    assert counts_V[expected_V == 0].sum() == 0
    kept = expected_V > 0
    assert expected_V[kept].min() > 5, "too rare for the chi-square approximation"
    statistic = ((counts_V - expected_V)[kept] ** 2 / expected_V[kept]).sum()
    assert torch.special.gammaincc((kept.sum() - 1).double() / 2, statistic / 2) > 1e-3


@pytest.mark.slow
def test_draws_of_the_kernel_pass_a_chi_square_test():
    """512 draws over 8 logits: 128 for each filter, whose statistics add up as their degrees of freedom do.

    What is expected is the published mask's softmax. The seeds are fixed, and a right sampler falls below the bound for
    one choice of seeds in a thousand; one whose probabilities are a third off fails.
    """
    row_V = torch.tensor([4, 1, 6, 0, 3, 7, 2, 5]) / 4
    filters = [(0, 0.0), (5, 0.0), (0, 0.8), (6, 0.7)]
    top_k_B, top_p_B = (torch.tensor(values) for values in zip(*filters, strict=True))
    uniforms_Bn = torch.from_numpy(np.stack([philox.uniforms(seed, 0, 128) for seed in range(4)]))
    tokens_Bn = call(draw, row_V.expand(4, 128, -1).contiguous(), uniforms_Bn, top_k_B, top_p_B)["tokens_out_Bn"]
    statistic, freedom = 0.0, 0
    for tokens_n, (top_k, top_p) in zip(tokens_Bn, filters, strict=True):
        counts_V = tokens_n.bincount(minlength=len(row_V)).double()
        masked_V = published.mask_top_k_top_p(row_V.double()[None, None], top_k, top_p)[0, 0]
        expected_V, kept_V = 128 * masked_V.softmax(-1), masked_V.isfinite()
        assert counts_V[~kept_V].sum() == 0, "a token outside the kept ones"
        assert expected_V[kept_V].min() > 5, "too rare for the chi-square approximation"
        statistic += ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum().item()
        freedom += int(kept_V.sum()) - 1
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)).item()
    assert p_value > 1e-3, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


# --- Bad logits ---


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(1, 2, 3), (4, 1, 0), (1, slice(None), slice(None))], ids=["one", "null", "image"])
def test_a_bad_logit_marks_its_image_only(bad, place):
    logits_RnV, uniforms_Bn = torch.randn(6, 3, 21), torch.rand(3, 3, dtype=torch.float64)
    options = {"strength": 1.0, "guided": True}
    good = call(draw, logits_RnV, uniforms_Bn, 0, 0.0, **options)
    logits_RnV[place] = bad
    got = call(draw, logits_RnV, uniforms_Bn, 0, 0.0, **options)
    assert got["invalid_out_B"].tolist() == [0, 1, 0]
    assert torch.equal(got["tokens_out_Bn"][::2], good["tokens_out_Bn"][::2])
    assert got["tokens_out_Bn"].min() >= 0
    assert got["tokens_out_Bn"].max() < 21


def test_bad_logits_under_both_filters_and_smoothing_give_tokens_in_range():
    logits_BnV = torch.randn(2, 1, 21)
    logits_BnV[0] = torch.nan
    options = {"seeds_B": torch.tensor([1, 2], device=DEVICE)}
    got = call(draw, logits_BnV, torch.rand(2, 1, dtype=torch.float64), 5, 0.9, **options)
    assert got["invalid_out_B"].tolist() == [1, 0]
    assert 0 <= got["tokens_out_Bn"][0, 0] < 21
    assert got["smooth_weights_out_BnV"].isfinite().all()


# --- The smooth mixture ---

SEEDS = [5, 2**63 + 11, 2**64 - 1]


@pytest.mark.parametrize(("V", "ratio"), [(2, 0.0), (97, 1 / 3), (98, 1.0), (4096, 0.5)])
def test_smooth_weights(V, ratio, near):
    logits_BnV, uniforms_Bn = 2 * torch.randn(3, 2, V), torch.rand(3, 2, dtype=torch.float64)
    top_k_B, top_p_B = torch.tensor([0, V // 2, 0]), torch.tensor([0.0, 0.0, 0.9])
    seeds_B = torch.from_numpy(np.array(SEEDS, dtype=np.uint64).view(np.int64)).to(DEVICE)
    options = {"seeds_B": seeds_B, "begin": 14, "ratio": ratio}
    weights_BnV = call(draw, logits_BnV, uniforms_Bn, top_k_B, top_p_B, **options)["smooth_weights_out_BnV"]
    expected = call(reference.draw, logits_BnV, uniforms_Bn, top_k_B, top_p_B, **options)["smooth_weights_out_BnV"]
    # Scores reach 50/τ ≈ 4000, of which float32 keeps 2e-4: as large is the relative error of a weight.
    near(weights_BnV, expected, torch.float32, factor=250)
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    for b, seed in enumerate(SEEDS):
        gumbel_nV = philox.gumbels(seed, 14, 16, V)
        threshold_n1 = kept_threshold(logits_BnV[b].numpy(), int(top_k_B[b]), float(top_p_B[b]))
        kept_nV = logits_BnV[b] >= torch.from_numpy(threshold_n1)
        scores_nV = (logits_BnV[b].double() * (1 + ratio) + torch.from_numpy(gumbel_nV)) / tau
        near(weights_BnV[b], scores_nV.masked_fill(~kept_nV, -torch.inf).softmax(-1), torch.float32, factor=250)
        assert (weights_BnV[b][~kept_nV] == 0).all()


# --- Memory ---


def test_nothing_outside_slices_of_larger_buffers_is_read_or_written():
    """Uniforms and tokens are positions 3 … 4 of a request's."""
    logits_BnV, uniforms_BL = torch.full((4, 2, 97), torch.nan), torch.full((2, 9), torch.nan, dtype=torch.float64)
    logits_BnV[1:3], uniforms_BL[:, 3:5] = torch.randn(2, 2, 97), torch.rand(2, 2, dtype=torch.float64)
    codebook_VC = torch.full((99, 5), torch.nan)
    codebook_VC[1:98] = torch.randn(97, 5)
    tokens_BL, codes_BnC, weights_BnV = torch.full((2, 9), -7), torch.full((4, 2, 5), 7.0), torch.full((4, 2, 97), 7.0)
    inputs = [t.to(DEVICE) for t in (logits_BnV, uniforms_BL, codebook_VC)]
    tokens_BL, codes_BnC, weights_BnV = outputs = [t.to(DEVICE) for t in (tokens_BL, codes_BnC, weights_BnV)]
    settings_B = [torch.full((2,), v, device=DEVICE) for v in (0.0, 1.0, 0, 0.0)]
    settings_B[2] = settings_B[2].int()
    invalid_B = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    draw(
        inputs[0][1:3],
        inputs[1][:, 3:5],
        *settings_B,
        inputs[2][1:98],
        guided=False,
        tokens_out_Bn=tokens_BL[:, 3:5],
        codes_out_BnC=codes_BnC[1:3],
        invalid_out_B=invalid_B,
        smooth_weights_out_BnV=weights_BnV[1:3],
        seeds_B=torch.tensor([1, 2], device=DEVICE),
    )
    plain = call(draw, logits_BnV[1:3], uniforms_BL[:, 3:5].contiguous(), 0, 0.0)
    tokens_BL, codes_BnC, weights_BnV = (t.cpu() for t in outputs)
    assert invalid_B.tolist() == [1, 0], "an image stays invalid"
    assert torch.equal(tokens_BL[:, 3:5], plain["tokens_out_Bn"])
    assert torch.equal(codes_BnC[1:3], codebook_VC[1:98][plain["tokens_out_Bn"]])
    assert (tokens_BL[:, [0, 1, 2, 5, 6, 7, 8]] == -7).all()
    assert (codes_BnC[[0, 3]] == 7).all()
    assert (weights_BnV[[0, 3]] == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_RnV": torch.zeros(2, 3, 8)}, r"logits_RnV: shape \(2, 3, 8\), expected \(4, 3, 8\)"),
        ({"logits_RnV": torch.zeros(4, 8, 3).mT}, "logits_RnV: strides .* expected contiguous"),
        ({"uniforms_Bn": torch.zeros(2, 3)}, "uniforms_Bn: torch.float32, expected torch.float64"),
        ({"top_k_B": torch.zeros(2)}, "top_k_B: torch.float32, expected torch.int32"),
        ({"top_p_B": torch.zeros(1)}, r"top_p_B: shape \(1,\), expected \(2,\)"),
        ({"tokens_out_Bn": torch.zeros(3, 2, dtype=torch.int64).T}, "expected unit stride along n"),
        ({"smooth_weights_out_BnV": torch.zeros(2, 3, 8)}, "seeds_B: None, expected the images' seeds"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "logits_RnV": torch.zeros(4, 3, 8),
        "uniforms_Bn": torch.zeros(2, 3, dtype=torch.float64),
        **{name: torch.ones(2) for name in ("strength_B", "temperature_B", "top_p_B")},
        "top_k_B": torch.zeros(2, dtype=torch.int32),
        "codebook_VC": torch.zeros(8, 5),
        "guided": True,
        "tokens_out_Bn": torch.zeros(2, 3, dtype=torch.int64),
        "codes_out_BnC": torch.zeros(2, 3, 5),
        "invalid_out_B": torch.zeros(2, dtype=torch.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
