"""Fréchet distance, Inception score, precision and recall: closed forms, properties, and torch-fidelity's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.evaluation.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)

seeds = st.integers(0, 2**32 - 1)


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(mean_D=np.array(mean, float), covariance_DD=np.array(covariance, float))


def random_gaussian(rng: np.random.Generator, width: int, rank: int) -> Gaussian:
    root = rng.standard_normal((width, rank))
    return gaussian(rng.standard_normal(width), root @ root.T)


def rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


# Fréchet distance -----------------------------------------------------------------------------------------------------

TURN = rotation(np.random.default_rng(5), 3)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (([0], [[1]]), ([3], [[1]]), 9),  # means alone
        (([0], [[4]]), ([0], [[9]]), 1),  # (2 − 3)²
        (([1, 2], np.diag([1, 16])), ([0, 0], np.diag([25, 4])), 1 + 4 + 16 + 4),
        (([0, 0], np.zeros((2, 2))), ([3, 4], np.diag([2, 5])), 25 + 7),  # from a point: the whole variance
        (([0, 0], [[1, 1], [1, 1]]), ([0, 0], [[1, -1], [-1, 1]]), 4),  # rank 1, at right angles
        (([0] * 3, TURN @ np.diag([1, 4, 9]) @ TURN.T), ([0] * 3, TURN @ np.diag([4, 4, 1]) @ TURN.T), 1 + 0 + 4),
    ],
    ids=["means", "1d", "diagonal", "point", "rank-1", "commuting"],
)
def test_known_distances(a, b, distance):
    assert frechet_distance(gaussian(*a), gaussian(*b)) == pytest.approx(distance, abs=1e-6)


@given(seeds, st.integers(1, 20), st.data())
def test_a_distance_is_one(seed, width, data):
    """Not negative, symmetric, 0 on itself, the same in turned axes; whatever ranks the covariances have."""
    rng = np.random.default_rng(seed)
    a, b = (random_gaussian(rng, width, data.draw(st.integers(0, width + 2))) for _ in range(2))
    scale = 1 + np.trace(a.covariance_DD) + np.trace(b.covariance_DD)  # √ε of this is lost where a rank is not full
    distance = frechet_distance(a, b)
    assert 0 <= distance < np.inf
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * scale)
    turn = rotation(rng, width)
    turned = [gaussian(turn @ g.mean_D, turn @ g.covariance_DD @ turn.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(distance, abs=1e-6 * scale)


@given(seeds, st.integers(1, 12))
def test_the_definition_with_a_matrix_root(seed, width):
    rng = np.random.default_rng(seed)
    a, b = (random_gaussian(rng, width, width + 3) for _ in range(2))
    root = scipy.linalg.sqrtm(a.covariance_DD @ b.covariance_DD)
    plain = np.sum((a.mean_D - b.mean_D) ** 2) + np.trace(a.covariance_DD + b.covariance_DD - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_fewer_images_than_features_give_a_number():
    """Of low rank; there tr (Σ_a·Σ_b)^½ is the sum of the singular values of X_aᵀ·X_b of the centred rows."""
    rng = np.random.default_rng(2)
    rows = [rng.standard_normal((9, 40)) + 0.3 * i for i in range(2)]
    centred = [(x - x.mean(axis=0)) / np.sqrt(8) for x in rows]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = np.sum((rows[0].mean(axis=0) - rows[1].mean(axis=0)) ** 2)
    expected = means + sum(np.sum(x**2) for x in centred) - 2 * shared
    assert frechet_distance(*map(Gaussian.of_rows, rows)) == pytest.approx(expected, rel=1e-6)


def test_torch_fidelity_has_the_same_distance(torch_fidelity):
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal((n, 24)) @ rng.standard_normal((24, 24)) for n in (100, 57)]
    theirs = [torch_fidelity.fid.fid_features_to_statistics(torch.from_numpy(x)) for x in rows]
    (value,) = torch_fidelity.fid.fid_statistics_to_metric(*theirs, verbose=False).values()
    assert frechet_distance(*map(Gaussian.of_rows, rows)) == pytest.approx(value, rel=1e-9)


@given(seeds, st.lists(st.integers(1, 7), min_size=2, max_size=6))
def test_moments_of_blocks_are_those_of_all_rows(seed, sizes):
    rng = np.random.default_rng(seed)
    # A mean of 1,000 deviations: sums of squares would keep ten of sixteen digits, and none in float32.
    blocks = [(rng.standard_normal((n, 5)) + 1000).astype(np.float32) for n in sizes]
    moments = Moments(5)
    for block in blocks:
        moments.add(block)
    found, rows = moments.gaussian(), np.concatenate(blocks).astype(np.float64)
    np.testing.assert_allclose(found.mean_D, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance_DD, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-11)


def test_rows_count_as_often_as_they_are_named():
    rows_ND = np.random.default_rng(4).standard_normal((6, 3))
    named = np.array([5, 0, 0, 2])
    found = Gaussian.of_rows(rows_ND, named)
    np.testing.assert_allclose(found.covariance_DD, np.cov(rows_ND[named], rowvar=False))


# Inception score ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "split", "score"),
    [
        (np.zeros((7, 4)), 5, 1),  # nothing is told apart
        (1e4 * np.eye(6), 6, 6),  # every image surely of another class; exp of such logits overflows
        (1e4 * np.eye(6), 4, (4 + 2) / 2),  # the smaller last part counts as much as the first
        (np.log([[3.0, 1.0], [1.0, 3.0]]), 9, 2 * (3 / 4) ** (3 / 4) * (1 / 4) ** (1 / 4)),
    ],
    ids=["uniform", "certain", "parts", "by hand"],
)
def test_known_scores(logits, split, score):
    assert inception_score(logits, split) == pytest.approx(score, rel=1e-12)


def test_torch_fidelity_has_the_same_score_in_equal_parts_without_shuffling(torch_fidelity):
    logits_NK = np.random.default_rng(6).standard_normal((60, 11)).astype(np.float32) * 3
    theirs = torch_fidelity.isc.isc_features_to_metric(torch.from_numpy(logits_NK), splits=4, shuffle=False)
    assert inception_score(logits_NK, split=15) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)


# precision and recall -------------------------------------------------------------------------------------------------


def test_sets_far_apart_share_nothing():
    rows = np.random.default_rng(7).standard_normal((20, 6))
    assert precision_recall(rows, rows[::-1] + 50) == (0, 0)


@pytest.mark.parametrize("offset", [0, 300])  # far from the origin, squares are large and their difference small
def test_a_set_covers_itself(offset):
    rows = np.random.default_rng(8).standard_normal((20, 6)) + offset
    assert precision_recall(rows, rows[::-1], block=7) == (1, 1)


def test_samples_of_a_part_are_precise_but_recall_that_part_alone():
    part = np.random.default_rng(9).standard_normal((30, 6))
    assert precision_recall(np.concatenate([part, part + 50]), part) == (1, 0.5)


def test_on_a_line_by_hand():
    reference, samples = np.array([[0.0], [1], [2], [10]]), np.array([[2.5], [20], [21], [30]])
    # Second neighbours: balls of 2, 1, 2, 9 around the reference, of 18.5, 9, 9, 10 around the samples.
    assert precision_recall(reference, samples, neighbours=2) == (1 / 4, 1.0)
    assert precision_recall(samples, reference, neighbours=2) == (1.0, 1 / 4)


def test_copies_of_one_image_cover_that_image():
    """Balls of radius 0, which a rounding error would make miss."""
    rows = np.random.default_rng(10).standard_normal((6, 50)) * 10
    assert precision_recall(rows, np.tile(rows[2], (5, 1))) == (1, 1 / 6)


@given(seeds, st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.integers(2, 13))
def test_in_blocks_as_by_definition(seed, n, m, neighbours, block):
    rng = np.random.default_rng(seed)
    reference, samples = rng.standard_normal((n, 3)), rng.standard_normal((m, 3)) + 0.5

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        own = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(own, axis=1)[:, neighbours]
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(axis=1).mean()

    found = precision_recall(reference, samples, neighbours, block)
    assert found == (covered(samples, reference), covered(reference, samples))


def test_torch_fidelity_has_the_same_precision_and_recall(torch_fidelity):
    rng = np.random.default_rng(11)
    reference, samples = (rng.standard_normal((n, 8)).astype(np.float32) + s for n, s in ((90, 0), (70, 0.4)))
    samples, reference = samples.astype(np.float32), reference.astype(np.float32)
    theirs = torch_fidelity.prc.prc_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(reference), prc_neighborhood=3, verbose=False
    )
    found = precision_recall(reference, samples, block=32)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)  # theirs are means in float32
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1
