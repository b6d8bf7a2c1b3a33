"""The decode loop: class ids → tokens, scale by scale → image. The file to read first.

    begin(labels) → for each scale: logits = step(codes); tokens = draw(logits); codes = codebook[tokens]
                  → finish(codes) → decode(f_hat)

Axes: B images, R rows (B, or 2B under guidance: conditioned first, then the null class), n tokens of a scale, C code
width, V codebook entries, h side of the feature map.

The torch engine, and the engines on a GPU, run this same loop on their own side, as one CUDA graph where there is a
GPU: `engines/torch/engine.py`, `engines/cuda/engine.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .config import VARConfig
from .engines import Engine, LoopResult, ScaleListener, State
from .given import Given
from .quantizer import Quantizer
from .sampling import Settings, draw_scale


def generate(
    engine: Engine,
    config: VARConfig,
    quantizer: Quantizer,
    labels_B: np.ndarray,
    seeds: list[int],
    settings: Settings,
    listener: ScaleListener | None,
    given: Given | None,
    *,
    first: int,
) -> LoopResult:
    """Images that are made at the same time; first: position in the request of the first of them, for errors."""
    K, timings = config.num_scales, dict[str, float]()
    state, tokens, codes = _scales(
        engine, config, quantizer, K, labels_B, seeds, settings, listener, given, first, timings
    )
    with _timed(timings, "finish"):
        f_hat_BChh = engine.finish(state, codes[-1])
    del state  # the caches, before the decoder takes as much again
    if listener is not None:
        listener(K - 1, tokens[-1], f_hat_BChh.copy())
    with _timed(timings, "decode"):
        pixels_B3RR = engine.decode(f_hat_BChh)
    return LoopResult(tokens=tokens, bytes_BRR3=None, pixels=lambda: pixels_B3RR, timings=timings)


def draft(
    engine: Engine,
    config: VARConfig,
    quantizer: Quantizer,
    labels_B: np.ndarray,
    seeds: list[int],
    settings: Settings,
    scales: int,
    *,
    first: int,
) -> Given:
    """The first scales alone: what they drew, for another engine to go on."""
    _, tokens, codes = _scales(engine, config, quantizer, scales, labels_B, seeds, settings, None, None, first, {})
    return Given.of_scales(np.concatenate(tokens, axis=1), np.concatenate(codes, axis=1), config.num_tokens)


def _scales(
    engine: Engine,
    config: VARConfig,
    quantizer: Quantizer,
    scales: int,
    labels_B: np.ndarray,
    seeds: list[int],
    settings: Settings,
    listener: ScaleListener | None,
    given: Given | None,
    first: int,
    timings: dict[str, float],
) -> tuple[State, list[np.ndarray], list[np.ndarray]]:
    """The first scales: the engine's state, and tokens int64 [B, n_k] and codes [B, n_k, C] of each."""
    B, codebook_VC = len(labels_B), quantizer.codebook_VC
    rows_R = np.append(labels_B, np.full(B, config.null_class)) if settings.guided_scales else labels_B
    tokens: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    with _timed(timings, "condition"):
        state = engine.begin(rows_R)
    for k in range(scales):
        with _timed(timings, f"scale_{k:02d}"):
            codes_RnC = codes[-1] if codes else None
            if codes_RnC is not None and k < settings.guided_scales:
                codes_RnC = np.concatenate([codes_RnC, codes_RnC])
            logits_RnV = engine.step(state, k, codes_RnC)
        if listener is not None and tokens:  # f_hat now holds the scale before this one
            listener(k - 1, tokens[-1], state.f_hat_RChh[:B].copy())
        with _timed(timings, "draw"):
            span = config.span(k)
            if given is not None and given.everywhere(span):
                drawn = given.at(span)
            else:
                drawn = draw_scale(logits_RnV, k, span[0], seeds, settings, codebook_VC, first_image=first)
                if given is not None:
                    given.put(span, *drawn)
        del logits_RnV  # before the next scale's are allocated
        tokens.append(drawn[0])
        codes.append(drawn[1])
    return state, tokens, codes


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin
