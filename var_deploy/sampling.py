"""Logits → tokens: guidance mix, top-k, top-p, and a draw by inverting the cumulative distribution.

An image's tokens depend on its seed and its logits alone: position l of the sequence has one uniform number, and the
token is the first in vocabulary order at which the cumulative probability exceeds it. Equal logits are kept or dropped
together, so both filters are one threshold. Axes: R rows, B images, n tokens of a scale, V codebook entries, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import philox
from .errors import EngineError
from .products import single_threaded


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How one request draws, one value per scale; checked where a request enters."""

    #: Guidance strength t: logits = (1 + t)·conditioned − t·null. All zero: no null rows are run.
    strengths: tuple[float, ...]
    temperatures: tuple[float, ...]  #: divide the mixed logits
    top_ks: tuple[int, ...]  #: keep the k largest; 0 is off
    top_ps: tuple[float, ...]  #: then keep the largest whose probabilities reach p; 0 or 1 is off
    smooths: tuple[bool, ...]  #: mix codes by Gumbel-softmax instead of taking the drawn one

    @classmethod
    def constant(
        cls, strengths: tuple[float, ...], *, top_k: int, top_p: float, temperature: float = 1.0, smooth: bool = False
    ) -> Settings:
        """The same at every scale, but for the strengths."""
        K = len(strengths)
        return cls(
            strengths=strengths,
            temperatures=(temperature,) * K,
            top_ks=(top_k,) * K,
            top_ps=(top_p,) * K,
            smooths=(smooth,) * K,
        )

    @property
    def guided_scales(self) -> int:
        """Scales that need null-class rows: all up to the last whose strength is not 0.

        A strength of 0 before that does not end them: their keys and values are read by the scales after.
        """
        return max((k + 1 for k, t in enumerate(self.strengths) if t != 0), default=0)

    @property
    def smooth(self) -> bool:
        """Whether codes are mixed at any scale."""
        return any(self.smooths)


def draw_scale(
    logits_RnV: np.ndarray,
    k: int,
    begin: int,
    seeds: list[int],
    settings: Settings,
    codebook_VC: np.ndarray,
    *,
    first_image: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [B, n] and codes float32 [B, n, C] of scale k, whose first position is `begin`.

    `logits_RnV` has the conditioned rows first, then, at a guided scale, the null-class rows. Raises EngineError for
    logits from which nothing can be drawn; it counts images from `first_image`.
    """
    B, n, V = len(seeds), logits_RnV.shape[1], logits_RnV.shape[2]
    tokens_Bn = np.empty((B, n), dtype=np.int64)
    codes_BnC = np.empty((B, n, codebook_VC.shape[1]), dtype=np.float32)
    t, temperature = np.float32(settings.strengths[k]), np.float32(settings.temperatures[k])
    for image, seed in enumerate(seeds):  # image by image: the same arithmetic in any batch
        logits_nV = logits_RnV[image]
        if len(logits_RnV) > B:
            logits_nV = (1 + t) * logits_nV - t * logits_RnV[B + image]
        logits_nV = logits_nV / temperature
        if not np.isfinite(logits_nV).all():
            raise invalid_logits(k, first_image + image)
        kept_nV = logits_nV >= kept_threshold(logits_nV, settings.top_ks[k], settings.top_ps[k])
        tokens_Bn[image] = invert_cdf(logits_nV, kept_nV, philox.uniforms(seed, begin, begin + n))
        if settings.smooths[k]:
            ratio = k / (len(settings.strengths) - 1)
            gumbel_nV = philox.gumbels(seed, begin, begin + n, V)
            codes_BnC[image] = smooth_codes(logits_nV, kept_nV, gumbel_nV, ratio, codebook_VC)
        else:
            codes_BnC[image] = codebook_VC[tokens_Bn[image]]
    return tokens_Bn, codes_BnC


def invalid_logits(k: int, image: int) -> EngineError:
    """The error of logits that hold NaN or infinity."""
    return EngineError(f"scale {k}: logits of image {image} hold NaN or infinity; check the bundle with verify")


def kept_threshold(logits_nV: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Smallest logit that top-k and then top-p keep: [n, 1].

    Top-p as published: in ascending order, drop while the cumulated probability is ≤ 1 − p; the largest always stays.
    """
    V = logits_nV.shape[-1]
    filter_k, filter_p = 0 < top_k < V, 0 < top_p < 1
    if not filter_k and not filter_p:
        return np.full((len(logits_nV), 1), -np.inf, dtype=logits_nV.dtype)
    ascending_nV = np.sort(logits_nV, axis=-1)
    threshold_n1 = ascending_nV[:, V - top_k, None] if filter_k else ascending_nV[:, :1]
    if filter_p:
        weights_nV = np.exp((ascending_nV - ascending_nV[:, -1:]).astype(np.float64))
        weights_nV[ascending_nV < threshold_n1] = 0.0
        cumulated_nV = weights_nV.cumsum(axis=-1)
        dropped_n1 = (cumulated_nV <= (1 - top_p) * cumulated_nV[:, -1:]).sum(axis=-1, keepdims=True)
        least_n1 = np.take_along_axis(ascending_nV, np.minimum(dropped_n1, V - 1), axis=-1)
        threshold_n1 = np.maximum(threshold_n1, least_n1)
    return threshold_n1


def invert_cdf(logits_nV: np.ndarray, kept_nV: np.ndarray, uniforms_n: np.ndarray) -> np.ndarray:
    """First token in vocabulary order whose cumulative probability exceeds the uniform: int64 [n]."""
    weights_nV = np.exp((logits_nV - logits_nV.max(axis=-1, keepdims=True)).astype(np.float64))
    weights_nV *= kept_nV
    cumulated_nV = weights_nV.cumsum(axis=-1)
    # u ≤ 1 − 2⁻⁵³, so u·total stays below the total even after rounding, and the sum ends at a token that is kept.
    return (cumulated_nV <= uniforms_n[:, None] * cumulated_nV[:, -1:]).sum(axis=-1)


def smooth_temperature(ratio: float) -> float:
    """τ of the smooth mixture at ratio k/(K − 1), as published."""
    return max(0.27 * (1 - 0.95 * ratio), 0.005)


def smooth_codes(
    logits_nV: np.ndarray, kept_nV: np.ndarray, gumbel_nV: np.ndarray, ratio: float, codebook_VC: np.ndarray
) -> np.ndarray:
    """softmax((logits·(1 + ratio) + gumbel)/τ) over the kept tokens, times the codebook: float32 [n, C]."""
    tau = smooth_temperature(ratio)
    scores_nV = np.where(kept_nV, (logits_nV * np.float32(1 + ratio) + gumbel_nV) / np.float32(tau), -np.inf)
    weights_nV = np.exp(scores_nV - scores_nV.max(axis=-1, keepdims=True))
    weights_nV /= weights_nV.sum(axis=-1, keepdims=True)
    with single_threaded():
        return (weights_nV @ codebook_VC).astype(np.float32)
