"""What a caller asks for → checked values: class ids, seeds, sampling settings, token pyramids.

Everything raises RequestError with one line: what is wrong, what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Manifest
from .config import VQVAEConfig
from .errors import RequestError
from .sampling import Settings

MAX_SEED = 2**64 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3  # keep divided logits finite
MAX_GUIDANCE = 1000.0  # far beyond use, far from overflowing float32 logits


def label_ids(labels: int | str | Sequence[int | str], manifest: Manifest) -> np.ndarray:
    """Class ids int64 [B] of one or several ids or class names."""
    names, count = manifest.class_names, manifest.var.num_classes
    entries, _ = _listed(labels)
    if not entries:
        raise RequestError("labels: got none, expected at least one class")
    ids = []
    for entry in entries:
        if isinstance(entry, str):
            if names is None or entry not in names:
                known = ", ".join(names[:10]) + (", …" if count > 10 else "") if names else "ids only"
                raise RequestError(f"class {entry!r} is unknown; this bundle knows {known} (ids 0 to {count - 1})")
            same = [i for i, name in enumerate(names) if name == entry]
            if len(same) > 1:
                raise RequestError(f"class {entry!r} is the name of several classes; give one of the ids {same}")
            entry = same[0]
        if not _is_integer(entry) or not 0 <= entry < count:
            raise RequestError(f"class {entry!r} is out of range; expected an id from 0 to {count - 1}")
        ids.append(int(entry))
    return np.array(ids, dtype=np.int64)


def seed_list(seeds: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: s, s + 1, … from one integer, or as given."""
    listed, several = _listed(seeds)
    if not several and _is_integer(listed[0]):
        listed = [int(listed[0]) + i for i in range(count)]
    elif not several:
        raise RequestError(f"seeds: got {seeds!r}, expected one integer or one per image")
    if len(listed) != count:
        raise RequestError(f"seeds: {len(listed)} for {count} images; give one integer, or one per image")
    for seed in listed:
        if not _is_integer(seed) or not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seeds: got {seed!r}, expected integers from 0 to 2⁶⁴ − 1")
    return [int(seed) for seed in listed]


def settings(
    manifest: Manifest,
    guidance: float | Sequence[float] | None,
    top_k: int | None,
    top_p: float | None,
    smooth: bool,
    temperature: float = 1.0,
) -> Settings:
    """Sampling settings; None takes the bundle's default.

    A single guidance g stands for the published schedule g·k/(K−1), a sequence for the strength of every scale.
    """
    defaults, config = manifest.sampling, manifest.var
    guidance = defaults.guidance if guidance is None else guidance
    top_k = defaults.top_k if top_k is None else top_k
    top_p = defaults.top_p if top_p is None else top_p
    values, per_scale = _listed(guidance)
    if not all(_is_number(t) and 0 <= t <= MAX_GUIDANCE for t in values):
        raise RequestError(f"guidance: got {guidance!r}, expected numbers from 0 to {MAX_GUIDANCE:g}")
    if not per_scale:
        values = [values[0] * config.ratio(k) for k in range(config.num_scales)]
    if len(values) != config.num_scales:
        raise RequestError(f"guidance: {len(values)} values, expected one per scale ({config.num_scales})")
    if not _is_integer(top_k) or top_k < 0:
        raise RequestError(f"top_k: got {top_k!r}, expected an integer of at least 0 (0 is off)")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise RequestError(f"top_p: got {top_p!r}, expected a number from 0 to 1 (0 is off)")
    if not _is_number(temperature) or not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        expected = f"a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}; top_k=1 is greedy"
        raise RequestError(f"temperature: got {temperature!r}, expected {expected}")
    strengths = tuple(float(t) for t in values)
    return Settings(
        strengths=strengths, temperature=float(temperature), top_k=int(top_k), top_p=float(top_p), smooth=smooth
    )


def token_pyramid(tokens: Sequence[np.ndarray], config: VQVAEConfig) -> list[np.ndarray]:
    """All scales' tokens, or the first few scales': integers [B, n_k] inside the codebook."""
    scales, _ = _listed(tokens)
    if not 1 <= len(scales) <= config.num_scales:
        raise RequestError(f"tokens: {len(scales)} scales, expected 1 to {config.num_scales}")
    arrays = [np.asarray(tokens_Bn) for tokens_Bn in scales]
    for k, tokens_Bn in enumerate(arrays):
        expected = (max(len(np.atleast_1d(arrays[0])), 1), config.tokens_per_scale[k])
        if tokens_Bn.shape != expected:
            raise RequestError(f"tokens: scale {k} has shape {tokens_Bn.shape}, expected {expected}")
        if not np.issubdtype(tokens_Bn.dtype, np.integer):
            raise RequestError(f"tokens: scale {k} is {tokens_Bn.dtype}, expected integers")
        if tokens_Bn.min() < 0 or tokens_Bn.max() >= config.vocab_size:
            raise RequestError(f"tokens: scale {k} leaves the codebook's 0 to {config.vocab_size - 1}")
    return arrays


def _listed(value: Any) -> tuple[list[Any], bool]:
    """The entries of a sequence or array, or the one value; and whether it was several."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    return (list(value) if several else [value]), several


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
