"""Engines: what runs a bundle."""

from .choice import EngineOptions, engine_for
from .engine import DeviceLoop, Engine, Graphs, LoopResult, Planned, State

__all__ = ["DeviceLoop", "Engine", "EngineOptions", "Graphs", "LoopResult", "Planned", "State", "engine_for"]
