"""Features of images → Fréchet distance, Inception score, precision and recall, as pure functions of arrays.

The definitions are those of guided-diffusion's evaluator (Dhariwal and Nichol, arXiv 2105.05233, section 2.2), computed
in float64, distances between features in float32. Axes: N rows (images), D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..products import single_threaded

#: Rows that are taken to float64 at a time.
ROWS = 4096
#: Images whose probabilities one Inception score is computed of; the score is the mean over such parts.
SCORE_SPLIT = 5_000
#: A ball reaches to the third nearest neighbour (Kynkäänniemi et al., arXiv 1904.06991, section 3).
NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """Mean and covariance of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray

    @classmethod
    def of_rows(cls, features_ND: np.ndarray, rows_N: np.ndarray | None = None) -> Gaussian:
        """Of all rows, or of the given ones, each as often as it is named."""
        moments = Moments(features_ND.shape[1])
        for start in range(0, len(features_ND) if rows_N is None else len(rows_N), ROWS):
            chosen = slice(start, start + ROWS) if rows_N is None else rows_N[start : start + ROWS]
            moments.add(features_ND[chosen])
        return moments.gaussian()


class Moments:
    """Mean and covariance of rows that come block by block.

    Blocks are merged by their means (Chan et al. 1979), not by sums of squares, which lose digits to large means.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean_D = np.zeros(width)
        self._scatter_DD = np.zeros((width, width))

    def add(self, features_BD: np.ndarray) -> None:
        """Takes a block of rows."""
        block_BD = features_BD.astype(np.float64)
        block_mean_D = block_BD.mean(axis=0)
        block_BD -= block_mean_D
        shift_D, total = block_mean_D - self._mean_D, self.count + len(block_BD)
        self._scatter_DD += block_BD.T @ block_BD
        self._scatter_DD += np.outer(shift_D, shift_D) * (self.count * len(block_BD) / total)
        self._mean_D += shift_D * (len(block_BD) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """With the covariance of a sample, divided by N − 1; two rows at least."""
        assert self.count > 1, "a covariance needs two rows"
        return Gaussian(mean_D=self._mean_D.copy(), covariance_DD=self._scatter_DD / (self.count - 1))


class FrechetDistance:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½) from a fixed a (Heusel et al., arXiv 1706.08500, section 2).

    With Σ_a = A·Aᵀ the trace of the root is Σ_i √λ_i of the symmetric matrix Aᵀ·Σ_b·A, which has the eigenvalues of
    Σ_a·Σ_b: real, and rounded below zero by a rounding error only, also where a covariance has no full rank.
    """

    def __init__(self, a: Gaussian) -> None:
        self._a = a
        with single_threaded():  # eigenvalues are many small steps: threads on busy cores take 14 s instead of 0.8
            values_D, vectors_DD = np.linalg.eigh(a.covariance_DD)
        self._root_DD = vectors_DD * np.sqrt(np.maximum(values_D, 0))

    def __call__(self, b: Gaussian) -> float:
        a = self._a
        product_DD = self._root_DD.T @ b.covariance_DD @ self._root_DD
        with single_threaded():
            values_D = np.linalg.eigvalsh(product_DD)
        trace_of_root = np.sqrt(np.maximum(values_D, 0)).sum()
        traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
        distance = np.square(a.mean_D - b.mean_D).sum() + traces - 2 * trace_of_root
        return max(float(distance), 0.0)  # of equals, rounding leaves something on either side of 0


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Between two Gaussians; symmetric up to rounding."""
    return FrechetDistance(a)(b)


def inception_score(logits_NK: np.ndarray, split: int = SCORE_SPLIT) -> float:
    """Mean over parts of `split` images of exp(mean_N KL(p(k|image) ‖ mean p(k))) (Salimans et al., arXiv 1606.03498).

    Parts are taken in the order of the images, and a last, smaller one counts as much as the others.
    """
    scores = []
    for start in range(0, len(logits_NK), split):
        shifted_NK = logits_NK[start : start + split].astype(np.float64)
        shifted_NK -= shifted_NK.max(axis=1, keepdims=True)
        log_p_NK = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
        p_NK = np.exp(log_p_NK)
        mean_p_K = p_NK.mean(axis=0)
        # A class that no image has any probability of contributes nothing.
        log_mean_K = np.log(mean_p_K, out=np.zeros_like(mean_p_K), where=mean_p_K > 0)
        scores.append(np.exp((p_NK * (log_p_NK - log_mean_K)).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference_ND: np.ndarray, samples_MD: np.ndarray, neighbours: int = NEIGHBOURS, block: int = ROWS
) -> tuple[float, float]:
    """(share of samples in a ball around a reference image, share of reference images in a ball around a sample).

    A ball reaches to the `neighbours`-th nearest other image of its own set (arXiv 1904.06991, section 3). Memory: some
    tables of block² float32. guided-diffusion computes the distances in float16, which moves the third digit.
    """
    for name, rows in (("reference", reference_ND), ("samples", samples_MD)):
        assert len(rows) > neighbours, f"{name}: {len(rows)} rows, more than {neighbours} are needed"
    centre_D = reference_ND.mean(axis=0, dtype=np.float64)  # distances stay, their rounding errors get smaller
    reference = _Points(reference_ND, centre_D, block)
    samples = _Points(samples_MD, centre_D, block)
    reference_radius_N, samples_radius_M = reference.radii(neighbours), samples.radii(neighbours)
    reference_inside_N = np.zeros(len(reference_ND), dtype=bool)
    samples_inside_M = np.zeros(len(samples_MD), dtype=bool)
    for n in reference.blocks():
        for m in samples.blocks():
            distance_nm = reference.distances(n, samples, m)
            samples_inside_M[m] |= (distance_nm <= reference_radius_N[n, None]).any(axis=0)
            reference_inside_N[n] |= (distance_nm <= samples_radius_M[None, m]).any(axis=1)
    return float(samples_inside_M.mean()), float(reference_inside_N.mean())


class _Points:
    """Rows in float32 with their squared lengths, block by block."""

    def __init__(self, rows_ND: np.ndarray, centre_D: np.ndarray, block: int) -> None:
        self._rows_ND = (rows_ND - centre_D.astype(np.float32)).astype(np.float32)
        self._squares_N = np.einsum("nd,nd->n", self._rows_ND, self._rows_ND)
        self._block = block

    def blocks(self) -> Iterator[slice]:
        """Of consecutive rows."""
        return (slice(start, start + self._block) for start in range(0, len(self._rows_ND), self._block))

    def distances(self, own: slice, others: _Points, theirs: slice) -> np.ndarray:
        """Squared distances of a block of these rows to one of others'."""
        squares_nm = self._squares_N[own, None] + others._squares_N[None, theirs]
        distance_nm = squares_nm - 2 * (self._rows_ND[own] @ others._rows_ND[theirs].T)
        # What is below the rounding error of the sum, negative too, is a copy: it has to lie in a ball of radius 0.
        distance_nm[distance_nm < 1e-6 * squares_nm] = 0
        return distance_nm

    def radii(self, neighbours: int) -> np.ndarray:
        """Squared distance of every row to its `neighbours`-th nearest other row, float32 [N]."""
        radius_N = np.empty(len(self._rows_ND), dtype=np.float32)
        for own in self.blocks():
            nearest = np.empty((len(self._rows_ND[own]), 0), dtype=np.float32)
            for theirs in self.blocks():  # the row itself, at distance 0, is among them
                found = np.concatenate([nearest, self.distances(own, self, theirs)], axis=1)
                kept = min(neighbours, found.shape[1] - 1)
                nearest = np.partition(found, kept, axis=1)[:, : kept + 1]
            radius_N[own] = nearest.max(axis=1)
        return radius_N
