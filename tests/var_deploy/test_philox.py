"""Philox4x32-10 against the published known answers, and what is built on it: uniforms and Gumbel noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.philox import gumbels, integers, philox4x32, uniforms

ONES = 0xFFFFFFFF

#: Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    result = philox4x32(np.array([counter], dtype=np.uint32), key[0] | key[1] << 32)
    assert result.dtype == np.uint32
    assert [hex(word) for word in result[0]] == [hex(word) for word in expected]


def test_known_answers_hold_in_any_row_of_a_batch():
    key = KNOWN[2][1]
    counters = np.array([KNOWN[0][0], KNOWN[2][0], KNOWN[1][0]], dtype=np.uint32)
    assert tuple(philox4x32(counters, key[0] | key[1] << 32)[1]) == KNOWN[2][2]


def test_first_uniform_of_seed_zero_is_the_first_53_bits_of_the_known_answer():
    high, low = KNOWN[0][2][:2]
    expected = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
    assert uniforms(0, 0, 1)[0] == expected


@given(seed=seeds, begin=st.integers(0, 5000), length=st.integers(1, 40), cut=st.integers(0, 39))
def test_a_uniform_depends_on_seed_and_position_alone(seed, begin, length, cut):
    whole = uniforms(seed, begin, begin + length)
    cut = min(cut, length - 1)
    np.testing.assert_array_equal(uniforms(seed, begin + cut, begin + length), whole[cut:])
    assert whole.dtype == np.float64
    assert ((whole >= 0) & (whole < 1)).all()


@given(seed=seeds, begin=st.integers(0, 5000), vocab=st.integers(1, 33), fewer=st.integers(1, 33))
def test_gumbel_noise_depends_on_seed_position_and_entry_alone(seed, begin, vocab, fewer):
    whole = gumbels(seed, begin, begin + 3, vocab)
    assert whole.shape == (3, vocab)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(gumbels(seed, begin + 1, begin + 3, vocab), whole[1:])
    np.testing.assert_array_equal(gumbels(seed, begin, begin + 3, min(fewer, vocab)), whole[:, :fewer])


@given(seed=seeds)
def test_both_halves_of_the_seed_matter(seed):
    numbers = [uniforms(s, 0, 4).tolist() for s in (seed, seed ^ 1, seed ^ 1 << 32, seed ^ 1 << 63)]
    assert len({tuple(four) for four in numbers}) == 4


def test_uniforms_are_flat():
    # 200,000 numbers in 100 equal bins: chi-square with 99 degrees of freedom, mean 99, deviation 14. Seeds are
    # fixed, so this is decided once; ± 4 deviations.
    numbers = np.concatenate([uniforms(seed, 0, 2000) for seed in range(100)])
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_square = np.square(counts - 2000).sum() / 2000
    assert 99 - 4 * 14 < chi_square < 99 + 4 * 14


def test_gumbel_moments():
    # Mean γ, variance π²/6, skewness 1.1395; 400,000 numbers, so standard errors 0.002, 0.006 and 0.02 (the sixth
    # moment is large). Five of them.
    x = np.concatenate([gumbels(seed, 0, 40, 1000).ravel() for seed in range(10)]).astype(np.float64)
    assert abs(x.mean() - np.euler_gamma) < 0.01
    assert abs(x.var() - np.pi**2 / 6) < 0.03
    assert abs(((x - x.mean()) ** 3).mean() / x.std() ** 3 - 1.1395) < 0.1


def test_draw_and_gumbel_streams_differ():
    # Were the streams one, a token's uniform and its first Gumbel number would share their leading bits.
    uniform = uniforms(7, 0, 2000)
    open_unit = np.exp(-np.exp(-gumbels(7, 0, 2000, 1)[:, 0].astype(np.float64)))
    assert abs(np.corrcoef(uniform, open_unit)[0, 1]) < 5 / np.sqrt(2000)  # five standard errors


@given(seeds, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(1, 10**6))
def test_an_integer_depends_on_seed_and_position_alone_and_stays_below_the_bound(seed, positions, bound):
    numbers = integers(seed, np.array(positions), bound)
    assert numbers.dtype == np.int64
    assert ((numbers >= 0) & (numbers < bound)).all()
    assert numbers.tolist() == [int(integers(seed, np.array([position]), bound)[0]) for position in positions]


def test_integers_are_uniform_and_not_those_of_the_tokens():
    positions, bound = np.arange(30_000), 7
    counts = np.bincount(integers(3, positions, bound), minlength=bound)
    assert (np.abs(counts - 30_000 / 7) < 5 * np.sqrt(30_000 / 7 * 6 / 7)).all()
    same = integers(3, positions, bound) == (uniforms(3, 0, 30_000) * bound).astype(int)
    assert abs(same.mean() - 1 / 7) < 5 * np.sqrt(1 / 7 * 6 / 7 / 30_000)  # as often as chance has it
