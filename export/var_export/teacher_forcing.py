"""An engine fed with given tokens, scale by scale, so that one differing token does not hide what comes after it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from var_deploy.config import VARConfig
from var_deploy.engines import Engine


@dataclass(frozen=True, eq=False, slots=True)
class ForcedScale:
    """One scale: the engine's raw logits [R, n, V], valid until the next scale, and what its step took."""

    k: int
    state: Any
    logits_RnV: np.ndarray
    seconds: float  #: with `begin` before the first


def teacher_forced(
    engine: Engine,
    config: VARConfig,
    codebook_VC: np.ndarray,
    tokens: Sequence[np.ndarray],
    labels: list[int],
    copies: int,
) -> Iterator[ForcedScale]:
    """All scales for tokens [B, n_k]. copies: 2 with the null class's rows after the conditioned ones, else 1."""
    began = time.perf_counter()
    state = engine.begin(np.array(labels + [config.null_class] * len(labels) * (copies - 1)))
    codes_RnC: np.ndarray | None = None
    for k in range(config.num_scales):
        logits_RnV = engine.step(state, k, codes_RnC)
        yield ForcedScale(k, state, logits_RnV, time.perf_counter() - began)
        began = time.perf_counter()
        codes_RnC = np.concatenate([codebook_VC[tokens[k]]] * copies)


def guided(logits_RnV: np.ndarray, t: float, copies: int) -> np.ndarray:
    """(1 + t)·conditioned − t·null: [B, n, V]."""
    if copies == 1:
        return logits_RnV
    conditioned_BnV, null_BnV = np.split(logits_RnV, 2)
    return (1 + t) * conditioned_BnV - t * null_BnV


def mean_kl(expected_BnV: np.ndarray, got_BnV: np.ndarray) -> float:
    """KL(softmax(expected) ‖ softmax(got)), mean over tokens, in nats."""
    expected, got = (torch.from_numpy(x).double().log_softmax(-1) for x in (expected_BnV, got_BnV))
    return float((expected.exp() * (expected - got)).sum(-1).mean())
