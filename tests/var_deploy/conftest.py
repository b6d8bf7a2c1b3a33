"""Fixtures of the runtime's tests: the schema that NVIDIA's Triton Inference Server reads configurations with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format


@pytest.fixture(scope="session")
def server_schema() -> ModuleType:
    """`model_config_pb2` of NVIDIA's client, by its file: importing its package needs the client's other parts too."""
    package = find_spec("tritonclient")
    assert package is not None, "tritonclient is not installed: pip install -e '.[dev]'"
    assert package.submodule_search_locations is not None
    (directory,) = package.submodule_search_locations
    spec = spec_from_file_location("model_config_pb2", Path(directory) / "grpc" / "model_config_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parsed_config(server_schema: ModuleType) -> Callable[[str], Any]:
    """`parsed_config(text)`: the ModelConfig of a config.pbtxt; what the schema does not have is an error."""
    return lambda text: text_format.Parse(text, server_schema.ModelConfig())
