"""TensorRT's Python module, checked, and its messages in this package's log. For the engine and the builder."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from ..errors import EngineError

log = logging.getLogger("var_deploy")


def tensorrt_module() -> ModuleType:
    """`tensorrt`. Raises EngineError where it is missing or of a version that this code was not written for."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"tensorrt: cannot be used ({error}): pip install 'var-deploy[tensorrt]' where there is an NVIDIA GPU"
        ) from error
    version: str = tensorrt.__version__
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if not [11, 4] <= numbers < [12]:
        raise EngineError(f"tensorrt: got version {version}, expected 11.4 or later, before 12; install that")
    module: ModuleType = tensorrt
    return module


def tensorrt_logger(trt: ModuleType, raised: list[BaseException]) -> Any:
    """An ILogger that passes messages on; `last_error` is the newest one of an error.

    What is raised in a callback, Ctrl-C among it, does not get past the bindings: it is kept in `raised`.
    """
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.INFO,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[name-defined]
        last_error: str | None = None

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels[severity]
            if level == logging.ERROR:
                self.last_error = msg
            try:
                log.log(level, "TensorRT: %s", msg)
            except BaseException as error:
                raised.append(error)

    return Log()


def parser_errors(parser: Any) -> str:
    """All errors of an ONNX parser or of the refitter that reads ONNX, with the names of their nodes."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors)
