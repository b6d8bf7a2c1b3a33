"""What commands print, and how they reach what is not part of the runtime."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import EngineError


def stderr() -> Any:
    """A console on standard error, where nothing that is read by programs goes."""
    from rich.console import Console

    return Console(stderr=True)


def output(data: dict[str, Any], as_json: bool, layout: Any) -> None:
    """Prints data as JSON, or laid out for people."""
    if as_json:
        print(json_text(data))
    else:
        layout(data)


def json_text(data: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_without_nan(data), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_nan(value: Any) -> Any:
    """The same data with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def needs(module: str, extra: str) -> Any:
    """Imports what a command needs, or says which extra to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(f"this command needs {error.name}; pip install 'var-deploy[{extra}]'") from error
