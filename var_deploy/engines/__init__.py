"""Engines: what runs a bundle's graphs."""

from .choice import engine_for
from .engine import Engine, State

__all__ = ["Engine", "State", "engine_for"]
