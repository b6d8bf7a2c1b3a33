"""The builder names, shares and places weights and constants so that every graph of a bundle agrees on them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from var_deploy.signature import GraphSpec, TensorSpec
from var_export.graph_builder import GraphBuilder
from var_export.precision import product
from var_export.weights_file import WeightsLayout, WeightSlot

X, Y = TensorSpec("x", "float32", ("R", 3)), TensorSpec("y", "float32", ("R", 5))
LAYOUT = WeightsLayout(
    b"",
    {"m.weight": WeightSlot(4096, 60, (3, 5)), "m.bias": WeightSlot(4156, 20, (5,)), "t": WeightSlot(8192, 96, (6, 4))},
)


@pytest.fixture
def builder() -> GraphBuilder:
    return GraphBuilder(GraphSpec("some_graph.onnx", (X,), (Y,)), LAYOUT)


def initializers(model: ir.Model) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in ir.to_proto(model).graph.initializer}


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_weights_point_into_the_file_and_the_signature_is_kept(builder):
    model = builder.model({"y": product(builder, builder.input("x"), "m")})
    stored = initializers(model)
    assert external(stored["m.weight"]) == {"location": "weights.safetensors", "offset": "4096", "length": "60"}
    assert external(stored["m.bias"]) == {"location": "weights.safetensors", "offset": "4156", "length": "20"}
    proto = ir.to_proto(model)
    assert proto.ir_version == 10
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 24)]
    assert proto.graph.name == "some_graph"
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert shapes == [["R", 3]]
    assert [value.name for value in proto.graph.output] == ["y"]


def test_rows_of_a_weight_are_a_range_of_its_bytes(builder):
    value = builder.weight("t", (1, 3))
    tensor = value.const_value
    assert value.name == "t[1:3]"
    assert tuple(tensor.shape) == (2, 4)
    assert (tensor.offset, tensor.length) == (8192 + 16, 32)


def test_all_rows_of_a_weight_are_the_weight(builder):
    assert builder.weight("t", (0, 6)) is builder.weight("t")


def test_weight_read_twice_is_stored_once(builder):
    assert builder.weight("m.bias") is builder.weight("m.bias")


def test_equal_constants_are_shared_and_different_ones_never_are(builder):
    first = builder.constant([1.0, 2.0, 3.0, 4.0, 5.0], "float32")
    assert builder.constant(np.arange(1, 6), "float32") is first
    same_start = builder.constant([1.0, 2.0, 3.0, 4.0, 6.0], "float32")
    another = builder.constant([1.0, 2.0, 3.0, 4.0, 7.0], "float32")
    other_type = builder.constant([1, 2, 3, 4, 5], "int64")
    other_shape = builder.constant([[1.0, 2.0, 3.0, 4.0, 5.0]], "float32")
    values = [first, same_start, another, other_type, other_shape]
    assert len({value.name for value in values}) == 5
    assert [value.const_value.numpy().ravel()[-1] for value in values] == [5, 6, 7, 5, 5]
    assert builder.constant([1.0, 2.0, 3.0, 4.0, 7.0], "float32") is another


def test_scalar_and_vector_of_one_are_different_constants(builder):
    assert builder.constant(2, "int64").shape == ir.Shape([])
    assert builder.ints(2).shape == ir.Shape([1])


def test_every_value_has_its_own_name(builder):
    x = builder.input("x")
    parts = builder.op("Split", x, outputs=3, axis=1, num_outputs=3)
    names = [value.name for value in [builder.op("Neg", x), builder.op("Neg", x), *parts]]
    assert len(set(names)) == 5


def test_unknown_weight_or_missing_output_is_an_error(builder):
    with pytest.raises(KeyError, match="no_such"):
        builder.weight("no_such.weight")
    with pytest.raises(KeyError, match="y"):
        builder.model({})
