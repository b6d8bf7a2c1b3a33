"""TensorRT's plugins as far as a machine without a GPU goes: the graphs compute what the plain ones do, the rules take
them where they are meant, and the real `tensorrt.plugin` takes what is registered and gets kernels that assemble.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests import plugin_stand_ins
from tests.export.recorded_tensorrt import real_bindings
from var_deploy.bundle import Bundle
from var_deploy.errors import BundleError, EngineError
from var_deploy.signature import GraphSpec, scale_graph_name
from var_export.bundle import write_bundle
from var_export.importer_rules import importer_problems
from var_export.plugin_graphs import plugin_graphs
from var_export.plugin_nodes import ACTIVATION, NAMESPACE, PLUGINS, PluginSpec
from var_train.checkpoint import CheckpointPair, load_pair

pytest.importorskip("triton")

from var_export import tensorrt_plugins
from var_export.tensorrt_plugins import launch_plugin, plugin_kernel, register_plugins

ROOT = Path(__file__).parents[2]


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tiny_pair, odd_states, tmp_path_factory) -> dict[str, Bundle]:
    """Own AdaLN with queries and keys of unit length; in halves; and shared AdaLN with plain attention."""
    folder = tmp_path_factory.mktemp("plugins")
    var, vqvae, *states = odd_states("both")
    half = write_bundle(load_pair(*tiny_pair[1:]), folder / "half", precision="fp16")
    plain = write_bundle(CheckpointPair(var, vqvae, *states), folder / "plain")
    return {"unit": Bundle.open(tiny_bundle), "half": Bundle.open(half), "plain": Bundle.open(plain)}


@pytest.fixture(scope="module")
def graphs(bundles) -> dict[str, dict[str, onnx.ModelProto]]:
    return {
        key: {name: onnx.load_model_from_string(graph) for name, graph in plugin_graphs(bundle).items()}
        for key, bundle in bundles.items()
    }


def with_weights(bundle: Bundle, graph: onnx.ModelProto) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(graph.SerializeToString())
    load_external_data_for_model(model, str(bundle.path))
    return model


def feeds(bundle: Bundle, spec: GraphSpec, first: int) -> dict[str, np.ndarray]:
    """Random inputs for three rows; caches are NaN from this scale's first position on."""
    random = np.random.default_rng(3)
    found = {}
    for tensor in spec.inputs:
        shape = [3 if axis == "R" else axis for axis in tensor.shape]
        found[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
        if tensor.name.startswith("cache_"):
            found[tensor.name][:, :, first:] = np.nan
    return found


def stand_in(spec: PluginSpec) -> type[OpRun]:
    """The plugin as an operator of ONNX's evaluator, by the reference of its kernel."""

    def _run(self: Any, *inputs: np.ndarray, **_: object) -> tuple[np.ndarray, ...]:
        tensors = [torch.tensor(array) for array in inputs]
        activation = tensors[list(spec.inputs.values()).index(ACTIVATION)].dtype
        shapes = tensorrt_plugins._shapes_of_outputs(spec, [tensor.shape for tensor in tensors])
        for shape, kind in zip(shapes, spec.outputs.values(), strict=True):
            dtype = activation if kind == ACTIVATION else torch.float32
            tensors.append(torch.full(shape, torch.nan, dtype=dtype))
        launch_plugin(spec, tensors, {name: getattr(self, name) for name in spec.attributes})
        return tuple(tensor.numpy() for tensor in tensors[len(inputs) :])

    return type(spec.name, (OpRun,), {"op_domain": NAMESPACE, "_run": _run})


@pytest.mark.parametrize("key", ["unit", "plain", "half"])
def test_a_graph_with_plugins_computes_what_the_plain_one_does(key, bundles, graphs, monkeypatch):
    for name in ("adaln", "cached_attention"):
        monkeypatch.setattr(tensorrt_plugins.plugins, name, getattr(plugin_stand_ins, name))
    bundle, manifest = bundles[key], bundles[key].manifest
    # float32 in another order; halves are rounded to 2⁻¹¹ in the products of two blocks, before logits of size 5.
    tolerance = {"atol": 1e-2, "rtol": 2e-3} if key == "half" else {"atol": 2e-5, "rtol": 1e-5}
    for k in [2] if key == "half" else range(manifest.var.num_scales):
        name = scale_graph_name(k)
        given = feeds(bundle, manifest.graphs[name], manifest.var.span(k)[0])
        session = ort.InferenceSession(bundle.file(f"{name}.onnx"), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        evaluator = ReferenceEvaluator(
            with_weights(bundle, graphs[key][name]), new_ops=[stand_in(spec) for spec in PLUGINS.values()]
        )
        assert evaluator.output_names == names
        for output, plain, other in zip(names, session.run(names, given), evaluator.run(None, given), strict=True):
            assert other.dtype == plain.dtype
            np.testing.assert_allclose(other, plain, err_msg=f"{name}: {output}", **tolerance)
            first, end = manifest.var.span(k)
            if output.startswith("cache_"):
                assert np.isfinite(other[:, :, :end]).all()
                assert np.isnan(other[:, :, end:]).all()
                np.testing.assert_array_equal(other[:, :, :first], given[output.removesuffix(".out")][:, :, :first])


def test_plugins_stand_for_everything_between_the_products(bundles, graphs):
    for key, models in graphs.items():
        depth = bundles[key].manifest.var.depth
        attention = "plain_attention" if key == "plain" else "cached_attention"
        for name, model in models.items():
            operators = [node.op_type for node in model.graph.node]
            counts = {plugin: operators.count(plugin) for plugin in PLUGINS if plugin in operators}
            expected = {"adaln": 2 * depth - 1, "adaln_start": 1, "adaln_head": 1, attention: depth}
            assert counts == expected, name
            left = {"Attention", "LayerNormalization", "ReduceL2", "Split", "Slice", "Softmax"}
            assert not left & set(operators), name
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24), (NAMESPACE, 1)]
            onnx.checker.check_model(with_weights(bundles[key], model), full_check=True)


def test_a_plan_of_it_is_refitted_from_the_plain_graph(odd):
    """Every initializer is one of the plain graph, of the same name and value or place in the weights file."""
    for name, graph in plugin_graphs(odd.bundle).items():
        plain = onnx.load(odd.bundle.file(f"{name}.onnx"), load_external_data=False).graph
        known = {tensor.name: tensor for tensor in plain.initializer}
        assert len(known) > 10
        for tensor in onnx.load_model_from_string(graph).graph.initializer:
            assert tensor == known[tensor.name]


def test_int8_bundles_have_none(tiny_pair, tmp_path):
    bundle = Bundle.open(write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "int8", precision="int8"))
    with pytest.raises(BundleError, match="an int8 bundle has no plugins; export fp16, bf16 or fp32 for TensorRT"):
        plugin_graphs(bundle)


# Rules ----------------------------------------------------------------------------------------------------------------


def test_the_importers_rules_take_plugins_only_where_they_are_registered(graphs):
    for models in graphs.values():
        for model in models.values():
            assert importer_problems(model, plugins=True) == []
            refused = [line for line in importer_problems(model) if f"known to read (domain {NAMESPACE})" in line]
            assert len(refused) == sum(node.domain == NAMESPACE for node in model.graph.node)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(entry for entry in node.attribute if entry.name == name)


def renamed(node: onnx.NodeProto) -> None:
    node.op_type = "adaln_end"


def elsewhere(node: onnx.NodeProto) -> None:
    attribute(node, "plugin_namespace").s = b"other"


def in_python(node: onnx.NodeProto) -> None:
    attribute(node, "aot").i = 0


def without_begin(node: onnx.NodeProto) -> None:
    node.attribute.remove(attribute(node, "begin"))


def begin_as_text(node: onnx.NodeProto) -> None:
    attribute(node, "begin").CopyFrom(onnx.helper.make_attribute("begin", "5"))


def one_input_less(node: onnx.NodeProto) -> None:
    del node.input[-1]


def wide_cache(node: onnx.NodeProto) -> None:
    node.input[2] = "f_hat"


def stays_float32(node: onnx.NodeProto) -> None:
    node.input[0] = "modulation"


def other_update(node: onnx.NodeProto) -> None:
    node.input[2] = "cache_k.1"


@pytest.mark.parametrize(
    ("operator", "change", "problem"),
    [
        ("adaln_head", renamed, "(adaln_end): not an operator that the importer is known to read (domain"),
        ("adaln", elsewhere, "(adaln): attribute plugin_namespace is b'other', expected b'var_deploy'"),
        ("adaln", in_python, "(adaln): attribute aot is 0, expected 1"),
        ("cached_attention", without_begin, "(cached_attention): attributes none, expected begin: int"),
        ("cached_attention", begin_as_text, "(cached_attention): attributes begin: bytes, expected begin: int"),
        ("cached_attention", one_input_less, "expected qkv, q_scale, cache_k, cache_v"),
        ("cached_attention", wide_cache, "(cached_attention): activations of types FLOAT, FLOAT16"),
        ("adaln_start", stays_float32, "(adaln_start): modulation of type FLOAT16"),
        ("cached_attention", other_update, "(TensorScatter): cache_k.1 is read elsewhere too, where it may be updated"),
    ],
)
def test_nodes_made_wrong_on_purpose(operator, change, problem, graphs):
    model = onnx.ModelProto.FromString(graphs["half"]["scale_02"].SerializeToString())
    change(next(node for node in model.graph.node if node.op_type == operator))
    found = importer_problems(model, plugins=True)
    assert any(problem in line for line in found), found


# TensorRT -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """What the real `tensorrt.plugin` made of every plugin; see `plugin_program`."""
    folder = tmp_path_factory.mktemp("program")
    real_bindings(tmp_path_factory.mktemp("bindings"))  # skips where they cannot be
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    paths = [str(ROOT / part) for part in (".", "export", "kernels", "train")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.export.plugin_program", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_take_inputs_numbers_and_outputs_and_assemble(program):
    assert {line.split()[1] for line in program} == {"80", "90", "100"}
    assert {line.split()[0] for line in program} == set(PLUGINS)
    for line, made in program.items():
        spec = PLUGINS[line.split()[0]]
        pointers, numbers = ".u64", ".u32"
        count = len(made["numbers"])
        expected = [pointers] * len(spec.inputs) + [numbers] * count + [pointers] * len(spec.outputs)
        assert made["parameters"] == expected, line
        assert made["machine code"], line
        assert made["entry"] == f"var_deploy_{spec.name}"
        assert made["launch"]["shared_mem"] <= 48 * 1024, line


def test_results_and_launches_are_described(program):
    adaln, attention = program["adaln 90"], program["cached_attention 90"]
    assert adaln["output types"] == ["FLOAT", "HALF"]
    assert program["adaln_head 90"]["output types"] == ["FLOAT"]
    assert adaln["output shapes"] == [[-1, 36, 128]] * 2
    assert attention["output shapes"] == [[-1, 36, 128], [-1, 2, 36, 64], [-1, 2, 36, 64]]
    assert program["cached_attention 100"]["output types"] == ["BF16"] * 3
    assert adaln["numbers"] == [1, 8, 10]  # gamma, scale, shift
    assert program["adaln_start 90"]["numbers"] == [8, 10]
    assert adaln["launch"]["grid_x"] == 3 * 36  # a block per token, three rows
    launch = attention["launch"]
    assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (3 * 2, 2, 1)  # rows · heads, 32 queries each
    assert all(made["formats"] == ["LINEAR"] and made["types kept"] for made in program.values())


@pytest.mark.parametrize(
    ("capability", "variable", "modules", "line"),
    [
        ((7, 5), None, {}, r"plugins need a GPU of compute capability 8.0 or later, got 7.5; build without them"),
        ((9, 0), "1", {}, "TRITON_INTERPRET is set, so no plugin can be compiled; unset it"),
        ((9, 0), None, {"tensorrt": None}, r"its plugins cannot be used \(.*\): pip install 'var-deploy\[tensorrt\]'"),
    ],
)
def test_where_plugins_cannot_be_registered(capability, variable, modules, line, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRITON_INTERPRET", variable)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(EngineError, match=f"^tensorrt: {line}"):
        register_plugins(capability)


def test_a_tensorrt_without_registry(tmp_path, monkeypatch):
    """The real bindings over empty libraries have none."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tensorrt_plugins, "_capability", [])
    monkeypatch.setitem(sys.modules, "tensorrt", real_bindings(tmp_path))
    with pytest.raises(EngineError, match="tensorrt: it has no registry for plugins; build without them"):
        register_plugins((9, 0))


def test_a_kernel_that_tensorrt_could_not_call_is_refused(monkeypatch):
    tensors = [torch.empty(2, 4, 64, device="meta"), torch.empty(2, 2, 64, device="meta")]
    tensors.append(torch.empty(2, 4, 64, device="meta"))
    kinds = [("x_ptr", "pointer"), ("norms_ptr", "pointer"), ("scale_at", "i32"), ("out_ptr", "pointer")]

    def compile_as(arguments: list[tuple[str, str]], shared: int) -> None:
        made = type("Made", (), {"entry": "kernel", "arguments": arguments, "shared_bytes": shared})
        monkeypatch.setattr(tensorrt_plugins, "compiled", lambda *_, **__: made)
        plugin_kernel(PLUGINS["adaln_start"], tensors, {"scale_at": 0, "shift_at": 1}, 90)

    compile_as(kinds, 48 * 1024)
    with pytest.raises(ValueError, match="kernel: needs 49153 bytes of shared memory, limit 49152"):
        compile_as(kinds, 48 * 1024 + 1)
    with pytest.raises(
        ValueError, match="kernel: takes pointer, i32, pointer, pointer, expected pointer, pointer, i32"
    ):
        compile_as([kinds[0], kinds[2], kinds[1], kinds[3]], 0)
