"""A bundle → its scale graphs with TensorRT's plugins, in memory: the plain graphs stay what a bundle is.

They hold no weights: each initializer points into the bundle's weights.safetensors at the plain graph's place. TensorRT
looks for it beside the path that a graph is said to come from, and follows no location that leaves that directory; so
that path is the plain graph's:

    parser.parse(plugin_graphs(bundle)[name], str(bundle.file(f"{name}.onnx")))

A refitter takes weights by their names, so a plan of such a graph is refitted from the plain graph as any other.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from var_deploy.bundle import WEIGHTS, Bundle
from var_deploy.errors import BundleError
from var_deploy.precision import Precision
from var_deploy.signature import scale_graph_name

from .importer_rules import importer_problems
from .transformer_graphs import scale_graph
from .weights_file import read_layout


def plugin_graphs(bundle: Bundle) -> dict[str, bytes]:
    """The serialised graph of every scale, by name; inputs and outputs are those of the plain graph.

    Raises BundleError for a bundle that TensorRT cannot run.
    """
    manifest = bundle.manifest
    if manifest.precision is Precision.INT8:
        raise BundleError(f"{bundle.path}: an int8 bundle has no plugins; export fp16, bf16 or fp32 for TensorRT")
    layout = read_layout(bundle.file(WEIGHTS))
    graphs = {}
    for k in range(manifest.var.num_scales):
        name = scale_graph_name(k)
        plain, model = (
            ir.to_proto(
                scale_graph(
                    manifest.var, manifest.vqvae, k, layout, manifest.graphs[name], manifest.precision, plugins=plugins
                )
            )
            for plugins in (False, True)
        )
        assert _initializers(model) <= _initializers(plain), name  # else the plain graph would not refit its plan
        if problems := importer_problems(model, plugins=True):
            raise BundleError(
                f"{name} with plugins breaks a rule of TensorRT's importer: {problems[0]}; report the bundle's shapes"
            )
        graphs[name] = model.SerializeToString(deterministic=True)
    return graphs


def _initializers(model: onnx.ModelProto) -> set[bytes]:
    """Names with their values, or with their places in the weights file."""
    return {tensor.SerializeToString(deterministic=True) for tensor in model.graph.initializer}
