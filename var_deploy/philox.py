"""Philox4x32-10: counter-based random numbers, so that any token's noise is a pure function of (seed, position).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the same generator that Triton and cuRAND offer,
so a GPU kernel can make the same numbers. Key = 64-bit seed; counter = (index, position, stream, 0).
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_LOW32 = np.uint64(0xFFFFFFFF)
_STREAM_DRAW, _STREAM_GUMBEL, _STREAM_INTEGER = 0, 1, 2


def philox4x32(counter_N4: np.ndarray, seed: int) -> np.ndarray:
    """Ten rounds on uint32 counters: uint32 [N, 4]."""
    c0, c1, c2, c3 = (counter_N4[:, i].astype(np.uint64) for i in range(4))
    for step in range(10):
        key0 = np.uint64((seed + step * _KEY_STEP[0]) & 0xFFFFFFFF)
        key1 = np.uint64(((seed >> 32) + step * _KEY_STEP[1]) & 0xFFFFFFFF)
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _LOW32, high0 ^ c3 ^ key1, product0 & _LOW32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, begin: int, end: int) -> np.ndarray:
    """One uniform in [0, 1) per position of [begin, end): float64 [end − begin], 53 bits each."""
    return _unit(seed, np.arange(begin, end), _STREAM_DRAW)


def integers(seed: int, positions_N: np.ndarray, bound: int) -> np.ndarray:
    """One uniform integer in [0, bound) per position, independent of the other numbers here: int64 [N]."""
    return (_unit(seed, positions_N, _STREAM_INTEGER) * bound).astype(np.int64)


def _unit(seed: int, positions_N: np.ndarray, stream: int) -> np.ndarray:
    """Uniforms in [0, 1): float64 [N], 53 bits each."""
    counter = np.zeros((len(positions_N), 4), dtype=np.uint32)
    counter[:, 1] = positions_N
    counter[:, 2] = stream
    words = philox4x32(counter, seed).astype(np.uint64)
    return ((words[:, 0] >> np.uint64(5)) * 2.0**26 + (words[:, 1] >> np.uint64(6))) * 2.0**-53


def gumbels(seed: int, begin: int, end: int, vocab_size: int) -> np.ndarray:
    """Standard Gumbel noise for every position of [begin, end) and codebook entry: float32 [end − begin, V]."""
    groups = -(-vocab_size // 4)
    counter = np.zeros((end - begin, groups, 4), dtype=np.uint32)
    counter[:, :, 0] = np.arange(groups)
    counter[:, :, 1] = np.arange(begin, end)[:, None]
    counter[:, :, 2] = _STREAM_GUMBEL
    words = philox4x32(counter.reshape(-1, 4), seed).reshape(end - begin, 4 * groups)[:, :vocab_size]
    open_unit = (words.astype(np.float64) + 0.5) * 2.0**-32  # never 0 or 1, so both logarithms are finite
    return (-np.log(-np.log(open_unit))).astype(np.float32)
