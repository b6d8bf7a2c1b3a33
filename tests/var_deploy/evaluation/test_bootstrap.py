"""The interval has the width that new draws have, and sits on the value."""

from __future__ import annotations

import numpy as np

from var_deploy.evaluation.bootstrap import NORMAL_95, bootstrap_interval
from var_deploy.evaluation.metrics import FrechetDistance, Gaussian


def test_of_a_mean_it_is_the_textbook_interval():
    values_N = np.random.default_rng(0).standard_normal(400)
    value = values_N.mean()
    low, high = bootstrap_interval(lambda rows: values_N[rows].mean(), 400, value, repeats=400)
    reach = NORMAL_95 * values_N.std() / 20
    assert np.isclose(low + high, 2 * value)
    assert (
        abs((high - low) / 2 / reach - 1) < 0.15
    )  # 400 repeats tell a deviation within 1/√800, four of which are this


def test_of_a_frechet_distance_it_is_as_wide_as_that_of_new_draws():
    rng = np.random.default_rng(1)
    distance_to = FrechetDistance(Gaussian(mean_D=np.zeros(6), covariance_DD=np.eye(6)))

    def draw() -> np.ndarray:
        return rng.standard_normal((300, 6)) * 1.5 + 0.5

    redrawn = np.std([distance_to(Gaussian.of_rows(draw())) for _ in range(200)])
    rows_ND = draw()
    value = distance_to(Gaussian.of_rows(rows_ND))
    low, high = bootstrap_interval(
        lambda rows: distance_to(Gaussian.of_rows(rows_ND, rows)), len(rows_ND), value, repeats=100
    )
    assert 0.7 < (high - low) / 2 / (NORMAL_95 * redrawn) < 1.4
    assert low < value < high


def test_the_same_seed_gives_the_same_interval():
    values_N = np.arange(30.0)

    def interval(seed: int) -> tuple[float, float]:
        return bootstrap_interval(lambda rows: values_N[rows].mean(), 30, 14.5, repeats=5, seed=seed)

    assert interval(3) == interval(3) != interval(4)
