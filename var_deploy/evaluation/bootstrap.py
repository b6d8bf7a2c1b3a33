"""How much a measure of sampled images would move if the images were drawn again, from these images alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Two-sided 95 % of a normal distribution, in standard deviations.
NORMAL_95 = 1.96


def bootstrap_interval(
    measure: Callable[[np.ndarray], float], count: int, value: float, *, repeats: int, seed: int = 0
) -> tuple[float, float]:
    """95 % interval about `value` = measure(all rows): value ± 1.96 standard deviations of resampled values.

    measure takes the numbers of `count` rows, drawn with replacement. The interval is that of the value at this number
    of images under new draws of them, the reference fixed; 20 repeats tell it within about 16 %. It says nothing of the
    bias that a Fréchet distance of few images has: resampling raises the distance much as too few images do, so the
    resampled values lie above `value`, and their percentiles would miss it. Where bias is most of the distance, samples
    nearly as good as the reference, the spread is too wide as well: measured up to three times. Then the interval is an
    upper bound. Two repeats at least (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 6 and 13).
    """
    assert repeats >= 2, "a spread needs two repeats"
    generator = np.random.default_rng(seed)
    values = [measure(generator.integers(0, count, size=count)) for _ in range(repeats)]
    reach = NORMAL_95 * float(np.std(values, ddof=1))
    return value - reach, value + reach
