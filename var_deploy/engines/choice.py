"""The one place where an engine is chosen; what is taken and why is logged."""

from __future__ import annotations

import logging

from ..bundle import Bundle
from ..errors import EngineError
from .engine import Engine, Graphs

log = logging.getLogger("var_deploy")

ENGINES = ("onnx",)
DEVICES = ("cpu",)


def engine_for(bundle: Bundle, engine: str, device: str, *, graphs: str, threads: int | None) -> Engine:
    """The engine asked for, or with "auto" the best that runs here; the choice is logged with its reason.

    Raises EngineError when it is unknown or its library is missing.
    """
    if engine not in ("auto", *ENGINES):
        raise EngineError(f"unknown engine {engine!r}; known: auto, {', '.join(ENGINES)}")
    if device not in ("auto", *DEVICES):
        raise EngineError(f"unknown device {device!r}; known: auto, {', '.join(DEVICES)}")
    if graphs not in set(Graphs):
        raise EngineError(f"unknown graphs {graphs!r}; known: {', '.join(Graphs)}")
    if threads is not None and threads < 1:
        raise EngineError(f"threads: got {threads}, expected at least 1, or none for one per core")
    try:
        from .onnx import OnnxEngine
    except ImportError as error:
        raise EngineError(f"engine 'onnx' needs onnxruntime ({error}); pip install 'var-deploy[cpu]'") from error
    reason = "asked for" if engine == "onnx" else "the only engine of this version"
    log.info("engine onnx on cpu (%s), %s graphs", reason, graphs)
    return OnnxEngine(bundle, graphs=Graphs(graphs), threads=threads)
