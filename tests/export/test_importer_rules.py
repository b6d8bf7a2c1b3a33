"""The importer's rules: all float graphs keep them, and graphs made wrong on purpose do not."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

from var_deploy.bundle import Bundle
from var_export.bundle import write_bundle
from var_export.importer_rules import importer_problems
from var_train.checkpoint import load_pair

FLOAT, HALF, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pair", ["tiny_pair", "shared_aln_pair"])
def test_graphs_of_bundles_keep_the_rules(pair, precision, request, tmp_path):
    path = write_bundle(load_pair(*request.getfixturevalue(pair)[1:]), tmp_path / "bundle", precision=precision)
    specs = Bundle.open(path).manifest.graphs
    assert len(specs) > 6
    for name, spec in specs.items():
        axes = {"R", "B", "n", "n_prev"} if name == "scales" else {"R", "B"}
        model = onnx.load(path / spec.file, load_external_data=False)
        assert importer_problems(model, free_axes=frozenset(axes)) == [], name


def test_int8_graphs_are_of_onnx_runtime_alone(tiny_pair, tmp_path):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "bundle", precision="int8")
    problems = importer_problems(onnx.load(path / "scale_01.onnx", load_external_data=False))
    assert any("(domain com.microsoft)" in problem for problem in problems)


def test_odd_models_keep_the_rules(odd):
    for name, spec in odd.bundle.manifest.graphs.items():
        axes = {"R", "B", "n", "n_prev"} if name == "scales" else {"R", "B"}
        model = onnx.load(odd.bundle.file(spec.file), load_external_data=False)
        assert importer_problems(model, free_axes=frozenset(axes)) == [], name


def value(name: str, *shape: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def attention_step(**changes: object) -> onnx.ModelProto:
    """A scale in small: a key cache is updated and read. `changes` make it wrong."""
    given = {
        "cache": value("cache", "R", 2, 9, 64),
        "update": value("update", "R", 2, 4, 64),
        "query": value("query", "R", 2, 4, 64),
        "indices": value("indices", "R", dtype=INT64),
    } | {name: changes.pop(name) for name in ("cache", "update", "query", "indices") if name in changes}
    scattered = changes.pop("scattered", "cache")
    scatter: dict[str, object] = {"axis": 2, "mode": "linear", **changes.pop("scatter", {})}
    attention: dict[str, object] = {"scale": 1.0, **changes.pop("attention", {})}
    inputs = changes.pop("attention_inputs", ["query", "cache.out", "cache.out"])
    nodes = [
        helper.make_node("TensorScatter", [scattered, "update", "indices"], ["cache.out"], "scatter", **scatter),
        helper.make_node("Attention", inputs, ["y", *changes.pop("more", [])], "attend", **attention),
        *changes.pop("nodes", []),
    ]
    outputs = [
        value(name, "R", 2, 9 if name == "cache.out" else 4, 64) for name in changes.pop("out", ["y", "cache.out"])
    ]
    opset = changes.pop("opset", 24)
    initializers = changes.pop("initializers", [])
    assert not changes
    graph = helper.make_graph(nodes, "step", list(given.values()), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_a_step_as_it_should_be():
    assert importer_problems(attention_step()) == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"opset": 8}, "opset 8: expected 9 to 25"),
        ({"cache": value("cache", "R", 2, "L", 64)}, "cache: axis 'L' is open, expected a number or"),
        ({"cache": value("cache", "R", 2, "L", 64)}, "scatter (TensorScatter): cache has an open axis [2, 'L', 64]"),
        ({"scatter": {"mode": "circular"}}, "scatter (TensorScatter): mode b'circular', expected linear"),
        ({"scatter": {"axis": 1}}, "scatter (TensorScatter): axis 1, expected 2 or -2"),
        ({"out": ["y"]}, "scatter (TensorScatter): cache.out is not an output of the graph"),
        (
            {"scattered": "moved", "nodes": [helper.make_node("Identity", ["cache"], ["moved"], "move")]},
            "scatter (TensorScatter): moved is not an input of the graph, so it has no memory of the caller's",
        ),
        (
            {"attention_inputs": ["query", "cache", "cache.out"]},
            "scatter (TensorScatter): cache is read elsewhere too, where it may be updated already",
        ),
        ({"indices": value("indices", "R")}, "scatter (TensorScatter): write indices of type FLOAT"),
        ({"update": value("update", "R", 2, 4, 64, dtype=HALF)}, "scatter (TensorScatter): operands of types FLOAT, F"),
        ({"cache": value("cache", "R", 2, 9, 64, dtype=DOUBLE)}, "scatter (TensorScatter): input of type DOUBLE"),
        ({"query": value("query", "R", 4, 128)}, "attend (Attention): query has 3 axes, expected 4"),
        ({"more": ["k", "v"]}, "attend (Attention): more than one output"),
        (
            {"attention_inputs": ["query", "update", "update", "", "cache.out", "cache.out"]},
            "attend (Attention): input past_key is not read",
        ),
        (
            {"attention_inputs": ["query", "cache.out", "cache.out", "", "", "", "indices"]},
            "attend (Attention): input nonpad_kv_seqlen is not read",
        ),
        ({"attention": {"softcap": 5.0}}, "attend (Attention): attribute softcap is not read"),
        (
            {"nodes": [helper.make_node("Gelu", ["y"], ["z"], "own", domain="com.microsoft")]},
            "own (Gelu): not an operator that the importer is known to read (domain com.microsoft)",
        ),
        (
            {"nodes": [helper.make_node("NonZero", ["y"], ["z"], "odd")]},
            "odd (NonZero): not an operator that the importer is known to read",
        ),
        (
            {"nodes": [helper.make_node("ReduceL2", ["y", "indices"], ["z"], "length")]},
            "length (ReduceL2): input 1 is computed, expected an initializer",
        ),
        (
            {"nodes": [helper.make_node("LayerNormalization", ["y", "y"], ["z", "mean"], "norm")]},
            "norm (LayerNormalization): more than one output",
        ),
        (
            {"nodes": [helper.make_node("Resize", ["y", "", "s"], ["z"], "up", mode="cubic")],
             "initializers": [helper.make_tensor("s", FLOAT, [4], [1, 1, 2, 2])]},
            "up (Resize): mode cubic, expected linear, nearest",
        ),
    ],
)  # fmt: skip
def test_graphs_made_wrong_on_purpose(wrong, problem):
    found = importer_problems(attention_step(**wrong))
    assert any(line.startswith(problem) for line in found), found


def test_export_stops_at_a_graph_that_breaks_them(tiny_pair, tmp_path, monkeypatch: pytest.MonkeyPatch):
    from var_deploy.errors import BundleError
    from var_export import bundle as exporter

    broken: Callable[..., list[str]] = lambda model, **_: ["node (Op): no"]  # noqa: E731
    monkeypatch.setattr(exporter, "importer_problems", broken)
    with pytest.raises(BundleError, match=r"condition.onnx: breaks a rule of TensorRT's importer: node \(Op\): no; "):
        write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "int8", precision="int8")  # not for TensorRT
