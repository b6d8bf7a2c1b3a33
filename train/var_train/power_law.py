"""Points → the power law through them, y = (β·x)^α, by least squares on logarithms, and how sure it is.

Intervals are at 95 %, from Student's t with n − 2 degrees of freedom for n points, if log y scatters independently and
normally. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from var_deploy.errors import DataError

CONFIDENCE = 0.95
FEWEST = 3  # a line through two points leaves nothing to judge it by

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """y = (β·x)^α fitted to points, and how sure that is."""

    alpha: float
    alpha_interval: Interval
    log_beta: float  #: β itself may be beyond a float's range where α is near 0
    #: Where the band around the line meets y = 1 (Fieller's interval); None: without end, as α may be 0.
    log_beta_interval: Interval | None
    correlation: float  #: Pearson's, of log x and log y
    points: int
    mean_log_x: float
    mean_log_y: float
    spread: float  #: Σ (log x − mean)²
    reach: float  #: t·s: residuals' standard deviation times Student's quantile

    def at(self, x: np.ndarray) -> np.ndarray:
        """The fitted y."""
        return np.exp(self.mean_log_y + self.alpha * (np.log(x) - self.mean_log_x))

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The interval of the law at x; a further run may well lie outside, as runs scatter around the law."""
        half = self.reach * np.sqrt(1 / self.points + (np.log(x) - self.mean_log_x) ** 2 / self.spread)
        return self.at(x) * np.exp(-half), self.at(x) * np.exp(half)

    def to_dict(self) -> dict[str, Any]:
        """`beta` is None where no float holds it."""
        return {
            "alpha": self.alpha,
            "alpha_interval": list(self.alpha_interval),
            "beta": math.exp(self.log_beta) if has_exponential(self.log_beta) else None,
            "log_beta": self.log_beta,
            "log_beta_interval": self.log_beta_interval and list(self.log_beta_interval),
            "correlation": self.correlation,
        }


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares on the logarithms of positive numbers. Raises DataError where they leave no law."""
    log_x, log_y = (np.array([math.log(value) for value in values]) for values in (x, y))
    distinct = len(set(log_x.tolist()))
    if distinct < FEWEST:
        raise DataError(f"got {distinct} distinct sizes, expected at least {FEWEST}; add runs of other sizes")
    n, from_x, from_y = len(log_x), log_x - log_x.mean(), log_y - log_y.mean()
    spread, mean_x, mean_y = float(from_x @ from_x), float(log_x.mean()), float(log_y.mean())
    alpha = float(from_x @ from_y) / spread
    if alpha == 0 or len(set(log_y.tolist())) == 1:
        raise DataError(
            f"got values around {math.exp(mean_y):.4g} that neither rise nor fall, expected a trend; add other runs"
        )
    residuals = from_y - alpha * from_x
    student = float(stdtrit(n - 2, (1 + CONFIDENCE) / 2))
    reach = student * math.sqrt(float(residuals @ residuals) / (n - 2))
    half = reach / math.sqrt(spread)
    log_beta_interval = None
    if abs(alpha) > half:
        # |mean_y + α·d| ≤ reach·√(1/n + d²/spread), a quadratic in d = log x − mean_x, and log β = −log x there.
        leading = alpha**2 - half**2
        middle = mean_y * alpha / leading - mean_x
        reached = reach * math.sqrt(mean_y**2 / spread + leading / n) / leading
        log_beta_interval = middle - reached, middle + reached
    correlation = float(from_x @ from_y) / math.sqrt(spread * float(from_y @ from_y))
    return PowerLaw(
        alpha=alpha,
        alpha_interval=(alpha - half, alpha + half),
        log_beta=mean_y / alpha - mean_x,
        log_beta_interval=log_beta_interval,
        correlation=min(max(correlation, -1.0), 1.0),
        points=n,
        mean_log_x=mean_x,
        mean_log_y=mean_y,
        spread=spread,
        reach=reach,
    )


def has_exponential(logarithm: float) -> bool:
    """Whether a float holds e to this power."""
    return abs(logarithm) < 700
