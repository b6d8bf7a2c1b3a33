"""What a caller asks for → checked values: class ids, seeds, token pyramids; sampling settings are in `schedules`.

Everything raises RequestError with one line: what is wrong, what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Manifest
from .config import VQVAEConfig
from .errors import RequestError
from .given import DRAWN

MAX_SEED = 2**64 - 1


def label_ids(labels: int | str | Sequence[int | str], manifest: Manifest) -> np.ndarray:
    """Class ids int64 [B] of one or several ids or class names."""
    names, count = manifest.class_names, manifest.var.num_classes
    entries, _ = listed(labels)
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
        if not is_integer(entry) or not 0 <= entry < count:
            raise RequestError(f"class {entry!r} is out of range; expected an id from 0 to {count - 1}")
        ids.append(int(entry))
    return np.array(ids, dtype=np.int64)


def seed_list(seeds: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: s, s + 1, … from one integer, or as given."""
    entries, several = listed(seeds)
    if not several and is_integer(entries[0]):
        entries = [int(entries[0]) + i for i in range(count)]
    elif not several:
        raise RequestError(f"seeds: got {seeds!r}, expected one integer or one per image")
    if len(entries) != count:
        raise RequestError(f"seeds: {len(entries)} for {count} images; give one integer, or one per image")
    for seed in entries:
        if not is_integer(seed) or not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seeds: got {seed!r}, expected integers from 0 to 2⁶⁴ − 1")
    return [int(seed) for seed in entries]


def token_pyramid(tokens: Sequence[np.ndarray], config: VQVAEConfig) -> list[np.ndarray]:
    """All scales' tokens, or the first few scales': integers [B, n_k] inside the codebook."""
    scales, _ = listed(tokens)
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


def prefix(tokens: Sequence[np.ndarray], count: int, config: VQVAEConfig) -> np.ndarray:
    """Tokens of the first few scales, for one image or all → int64 [B, L], DRAWN at the other positions."""
    try:
        rows = [np.atleast_2d(np.asarray(scale)) for scale in listed(tokens)[0]]
    except ValueError as error:  # rows of several lengths
        raise RequestError(f"prefix_tokens: expected integers [images, tokens] by scale ({error})") from error
    checked = token_pyramid(rows, config)
    if len(checked) == config.num_scales:
        raise RequestError("prefix_tokens: all scales are given, so there is nothing to draw; use decode")
    prefix_BL = np.full((len(checked[0]), config.num_tokens), DRAWN, dtype=np.int64)
    prefix_BL[:, : sum(scale.shape[1] for scale in checked)] = np.concatenate(checked, axis=1)
    if len(prefix_BL) not in (1, count):
        raise RequestError(f"prefix_tokens: of {len(prefix_BL)} images, expected {count}, or 1 for all")
    return repeated(prefix_BL, count)


def count_of(value: Any) -> int:
    """Entries of a sequence, or 1."""
    entries, several = listed(value)
    return len(entries) if several else 1


def common_count(**counts: int) -> int:
    """How many images a request is for, of which one thing may serve for all: pictures, labels, seeds."""
    most = max(counts.values())
    if wrong := [f"{count} {name}" for name, count in counts.items() if count not in (1, most)]:
        said = " and ".join([*wrong, *(f"{count} {name}" for name, count in counts.items() if count == most)])
        raise RequestError(f"got {said}; give one, or as many as there are images")
    return most


def repeated(array: np.ndarray, count: int) -> np.ndarray:
    """A copy with as many entries: the one that there is, again and again, or those that there are."""
    return np.repeat(array, count if len(array) == 1 else 1, axis=0)


def listed(value: Any) -> tuple[list[Any], bool]:
    """The entries of a sequence or array, or the one value; and whether it was several."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    return (list(value) if several else [value]), several


def is_integer(value: object) -> bool:
    """A truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A truth value is none."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
