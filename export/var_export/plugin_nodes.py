"""The plugins of TensorRT's own variant of the scale graphs, as data: what writes a graph and what builds it read this.

The importer takes a node as a plugin by its operator's name and the attribute `plugin_namespace`, and its other
attributes by name (FallbackPluginImporter of onnx-tensorrt). `aot` asks for a kernel that is compiled into the plan.
No attribute is a text: those arrive with a byte 0 at their end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .graph_builder import GraphBuilder

#: Of all plugins, and the operators' domain.
NAMESPACE = "var_deploy"

#: Attributes by which the importer finds a plugin.
LOOK_UP: Mapping[str, Any] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}

#: Type of a tensor: float32 in every bundle, or that of the bundle's activations.
FLOAT32, ACTIVATION = "float32", "activation"


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSpec:
    """Signature of one plugin; see `var_kernels.plugins` for what it computes."""

    name: str
    inputs: Mapping[str, str]  #: name → type, in order
    attributes: Mapping[str, type]  #: name → int or float, in order
    outputs: Mapping[str, str]  #: name → type, in order


_BRANCH = {"x": FLOAT32, "y": ACTIVATION, "gates": ACTIVATION, "norms": ACTIVATION}
_PLACES = {"gamma_at": int, "scale_at": int, "shift_at": int}

ADALN = PluginSpec(name="adaln", inputs=_BRANCH, attributes=_PLACES, outputs={"x_out": FLOAT32, "out": ACTIVATION})
#: Without a branch to add.
ADALN_START = PluginSpec(
    name="adaln_start",
    inputs={"x": FLOAT32, "norms": ACTIVATION},
    attributes={"scale_at": int, "shift_at": int},
    outputs={"out": ACTIVATION},
)
#: The last one, whose sum nobody reads.
ADALN_HEAD = PluginSpec(name="adaln_head", inputs=_BRANCH, attributes=_PLACES, outputs={"out": FLOAT32})
_CACHES = {"cache_k": ACTIVATION, "cache_v": ACTIVATION}
_ATTENDED = {"attended": ACTIVATION, "k_new": ACTIVATION, "v_new": ACTIVATION}
CACHED_ATTENTION = PluginSpec(
    name="cached_attention",
    inputs={"qkv": ACTIVATION, "q_scale": FLOAT32, **_CACHES},
    attributes={"begin": int},
    outputs=_ATTENDED,
)
#: Of models whose queries and keys are not of unit length.
PLAIN_ATTENTION = PluginSpec(
    name="plain_attention",
    inputs={"qkv": ACTIVATION, **_CACHES},
    attributes={"begin": int, "softmax_scale": float},
    outputs=_ATTENDED,
)
PLUGINS = {spec.name: spec for spec in (ADALN, ADALN_START, ADALN_HEAD, CACHED_ATTENTION, PLAIN_ATTENTION)}


def plugin_node(
    b: GraphBuilder, spec: PluginSpec, *inputs: ir.Value, shapes: list[tuple[int | str, ...]], **attributes: int | float
) -> list[ir.Value]:
    """Adds a plugin; returns its outputs, whose shapes no inference could find."""
    assert len(inputs) == len(spec.inputs)
    assert attributes.keys() == spec.attributes.keys()
    made = b.op(spec.name, *inputs, outputs=len(spec.outputs), domain=NAMESPACE, **LOOK_UP, **attributes)
    results: list[ir.Value] = made if isinstance(made, list) else [made]
    for value, kind, shape in zip(results, spec.outputs.values(), shapes, strict=True):
        b.declare(value, FLOAT32 if kind == FLOAT32 else b.activation, shape)
    return results
