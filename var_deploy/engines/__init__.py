"""Engines: what runs a bundle's graphs."""

from .choice import engine_for
from .engine import Engine, Graphs, State

__all__ = ["Engine", "Graphs", "State", "engine_for"]
