"""Engines: what runs a bundle."""

from .choice import EngineOptions, engine_for
from .engine import DeviceLoop, Engine, Graphs, LoopResult, Planned, ScaleListener, State

__all__ = [
    "DeviceLoop",
    "Engine",
    "EngineOptions",
    "Graphs",
    "LoopResult",
    "Planned",
    "ScaleListener",
    "State",
    "engine_for",
]
