"""Engines: what runs a bundle's graphs. An engine is three calls on a state it hands out, plus decode and encode.

`engine_for` is the one place where an engine is chosen.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np

from ..bundle import Bundle
from ..errors import EngineError

log = logging.getLogger("var_deploy")

ENGINES = ("onnx",)
DEVICES = ("cpu",)


class State(Protocol):
    """One generation in flight: the engine's caches and f_hat. States are independent of each other."""

    @property
    def f_hat_RChh(self) -> np.ndarray:
        """f_hat of the scales before the one stepped last; valid until the next step, copy to keep it."""
        ...


class Engine(Protocol):
    """The decode loop's view of a backend. A `state` comes from `begin` of the same engine; arrays are float32."""

    name: str

    def begin(self, labels_R: np.ndarray) -> State:
        """Computes everything that depends on the classes alone (labels int64 [R])."""
        ...

    def step(self, state: Any, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        """Scale k given the codes of scale k − 1 (None for k = 0): raw logits [R, n_k, V].

        The array belongs to the state and is valid until the next step; copy to keep it.
        """
        ...

    def finish(self, state: Any, codes_BnC: np.ndarray) -> np.ndarray:
        """Adds the last scale's codes: complete f_hat [B, C, h, h] of the first B rows."""
        ...

    def decode(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        """Pixels [B, 3, R, R] in [0, 1]."""
        ...

    def encode(self, pixels_B3RR: np.ndarray) -> np.ndarray:
        """Feature map [B, C, h, h], not yet quantised."""
        ...


def engine_for(bundle: Bundle, engine: str, device: str, *, graphs: str, threads: int | None) -> Engine:
    """The engine asked for, or with "auto" the best that runs here; the choice is logged with its reason.

    Raises EngineError when it is unknown or its library is missing.
    """
    if engine not in ("auto", *ENGINES):
        raise EngineError(f"unknown engine {engine!r}; known: auto, {', '.join(ENGINES)}")
    if device not in ("auto", *DEVICES):
        raise EngineError(f"unknown device {device!r}; known: auto, {', '.join(DEVICES)}")
    try:
        from .onnx import GRAPHS, OnnxEngine
    except ImportError as error:
        raise EngineError(f"engine 'onnx' needs onnxruntime ({error}); pip install 'var-deploy[cpu]'") from error
    if graphs not in GRAPHS:
        raise EngineError(f"unknown graphs {graphs!r}; known: {', '.join(GRAPHS)}")
    if threads is not None and threads < 1:
        raise EngineError(f"threads: got {threads}, expected at least 1, or none for one per core")
    reason = "asked for" if engine == "onnx" else "the only engine of this version"
    log.info("engine onnx on cpu (%s), %s graphs", reason, graphs)
    return OnnxEngine(bundle, graphs=graphs, threads=threads)
