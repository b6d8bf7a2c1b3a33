"""Sampling options → settings of every scale. An option is one value, or one per scale; presets are published ones.

A single guidance g stands for the published ramp g·k/(K−1) over scales k = 0 … K−1; every other option is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from .bundle import Manifest
from .errors import RequestError
from .request import is_integer, is_number, listed
from .sampling import Settings

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3  # keep divided logits finite
MAX_GUIDANCE = 1000.0  # far beyond use, far from overflowing float32 logits

#: Settings by name. paper-fid: those of the paper's tables (section 4.1). paper-visual: those of the authors' sample
#: pictures. paper-edit: those that the authors give for in-painting and editing by class.
PRESETS: dict[str, dict[str, Any]] = {
    "paper-fid": {"guidance": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False},
    "paper-visual": {"guidance": 4.0, "top_k": 900, "top_p": 0.95, "smooth": False},
    "paper-edit": {"guidance": 3.0, "top_k": 900, "top_p": 0.95, "smooth": True},
}


class Sampling(TypedDict, total=False):
    """How tokens are drawn: each one value, or one per scale. None, or left out: the preset's, then the bundle's."""

    guidance: float | Sequence[float] | None
    temperature: float | Sequence[float] | None
    top_k: int | Sequence[int] | None
    top_p: float | Sequence[float] | None
    smooth: bool | Sequence[bool] | None
    preset: str | None


@dataclass(frozen=True, slots=True)
class _Option:
    """What one value of an option may be."""

    holds: Callable[[Any], bool]
    expected: str
    convert: Callable[[Any], Any]


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low <= value <= high


_OPTIONS = {
    "guidance": _Option(_between(0, MAX_GUIDANCE), f"numbers from 0 to {MAX_GUIDANCE:g}", float),
    "temperature": _Option(
        _between(MIN_TEMPERATURE, MAX_TEMPERATURE),
        f"a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}; top_k=1 is greedy",
        float,
    ),
    "top_k": _Option(lambda value: is_integer(value) and value >= 0, "an integer of at least 0 (0 is off)", int),
    "top_p": _Option(_between(0, 1), "a number from 0 to 1 (0 is off)", float),
    "smooth": _Option(lambda value: isinstance(value, bool | np.bool_), "True or False", bool),
}


def settings(
    manifest: Manifest,
    *,
    guidance: float | Sequence[float] | None = None,
    temperature: float | Sequence[float] | None = None,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    smooth: bool | Sequence[bool] | None = None,
    preset: str | None = None,
) -> Settings:
    """Checked settings of a request; None takes the preset's value, then the bundle's default. Raises RequestError."""
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise RequestError(f"preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    defaults, K = manifest.sampling, manifest.var.num_scales
    silent = {"guidance": defaults.guidance, "top_k": defaults.top_k, "top_p": defaults.top_p}
    silent |= {"temperature": 1.0, "smooth": False} | (PRESETS[preset] if preset else {})
    asked = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    values = {name: _by_scale(name, silent[name] if value is None else value, K) for name, value in asked.items()}
    if not listed(silent["guidance"] if guidance is None else guidance)[1]:
        values["guidance"] = tuple(g * manifest.var.ratio(k) for k, g in enumerate(values["guidance"]))
    return Settings(
        strengths=values["guidance"],
        temperatures=values["temperature"],
        top_ks=values["top_k"],
        top_ps=values["top_p"],
        smooths=values["smooth"],
    )


def _by_scale(name: str, given: Any, K: int) -> tuple[Any, ...]:
    """One checked value per scale."""
    option = _OPTIONS[name]
    values, several = listed(given)
    if not all(option.holds(value) for value in values):
        raise RequestError(f"{name}: got {given!r}, expected {option.expected}")
    if several and len(values) != K:
        raise RequestError(f"{name}: {len(values)} values, expected one, or one per scale ({K})")
    return tuple(option.convert(value) for value in (values if several else values * K))


def options_of(settings: Settings) -> Sampling:
    """The options that give exactly these settings, one value per scale."""
    return {
        "guidance": settings.strengths,
        "temperature": settings.temperatures,
        "top_k": settings.top_ks,
        "top_p": settings.top_ps,
        "smooth": settings.smooths,
    }
