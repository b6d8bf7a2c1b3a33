"""Writes one ONNX graph with onnx-ir: inputs, weights in a file beside it, small constants inline, operators.

Opset 24, IR version 10, and ONNX Runtime's own operators where a graph uses one. A weight is an initializer that points
into weights.safetensors and bears the same name in every graph, so runtimes can share it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec, TensorSpec

from .weights_file import WeightsLayout

OPSET = 24
IR_VERSION = 10

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int64": ir.DataType.INT64,
}


class GraphBuilder:
    """One graph under construction; operators are added in execution order."""

    def __init__(self, spec: GraphSpec, layout: WeightsLayout, precision: Precision = Precision.FP32) -> None:
        self.spec = spec
        self.precision = precision
        self.activation = precision.graph_dtype
        self._layout = layout
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._inputs = {tensor.name: _value(tensor) for tensor in spec.inputs}

    def input(self, name: str) -> ir.Value:
        """A graph input of the signature."""
        return self._inputs[name]

    def weight(self, name: str, rows: tuple[int, int] | None = None) -> ir.Value:
        """A tensor of the weights file; `rows` takes a half-open range of its first axis, without copying."""
        slot = self._layout.slots[name]
        shape, offset, length = slot.shape, slot.offset, slot.length
        if rows is not None and rows != (0, shape[0]):
            row_bytes = length // shape[0]
            offset, length = offset + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
            shape = (rows[1] - rows[0], *shape[1:])
            name = f"{name}[{rows[0]}:{rows[1]}]"
        if name not in self._initializers:
            dtype = _DTYPES[slot.dtype]
            tensor = ir.ExternalTensor(slot.file, offset, length, dtype, shape=ir.Shape(shape), name=name)
            self._add_initializer(name, tensor)
        return self._initializers[name]

    def stored(self, name: str) -> str | None:
        """Type that a weight has in the file; None where there is no such weight."""
        slot = self._layout.slots.get(name)
        return None if slot is None else slot.dtype

    def constant(self, value: Any, dtype: str) -> ir.Value:
        """A small inline constant; equal constants share one initializer."""
        array = np.asarray(value, dtype=_DTYPES[dtype].numpy())
        text = "x".join(map(str, array.shape)) or "scalar"
        values = "_".join(map(str, array.ravel()[:4]))
        name = f"const.{dtype}.{text}.{values}"
        while name in self._initializers:
            held = self._initializers[name].const_value
            if held is not None and np.array_equal(held.numpy(), array):
                return self._initializers[name]
            name += "'"
        self._add_initializer(name, ir.tensor(array, name=name))
        return self._initializers[name]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(list(values), "int64")

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds an operator; returns its output, or a list of them where `outputs` > 1."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"{op_type}_{len(self._nodes)}" + (f".{index}" if index else "")
        node.name = f"{op_type}_{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def declare(self, x: ir.Value, dtype: str, shape: tuple[int | str, ...]) -> None:
        """States type and shape of a result where its operator is none that shape inference knows."""
        x.type, x.shape = ir.TensorType(_DTYPES[dtype]), ir.Shape(shape)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape; 0 keeps an axis, −1 infers it."""
        return self.op("Reshape", x, self.ints(*shape))

    def cast(self, x: ir.Value, dtype: str) -> ir.Value:
        """The same values in another type."""
        return self.op("Cast", x, to=_DTYPES[dtype])

    def conv(self, x: ir.Value, name: str, *, kernel: int = 3, stride: int = 1, pads: tuple[int, ...] = ()) -> ir.Value:
        """2-D convolution with the named weight and bias; pads default to "same"."""
        return self.op(
            "Conv",
            x,
            self.weight(f"{name}.weight"),
            self.weight(f"{name}.bias"),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads) if pads else [kernel // 2] * 4,
        )

    def model(self, outputs: dict[str, ir.Value]) -> ir.Model:
        """The finished model, with the outputs in the order, type and shape of the signature."""
        results = []
        for tensor in self.spec.outputs:
            value = outputs[tensor.name]
            value.name, value.type, value.shape = tensor.name, ir.TensorType(_DTYPES[tensor.dtype]), _shape(tensor)
            results.append(value)
        graph = ir.Graph(
            list(self._inputs.values()),
            results,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, **{node.domain: 1 for node in self._nodes if node.domain}},
            name=Path(self.spec.file).stem,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="var_deploy")

    def _add_initializer(self, name: str, tensor: Any) -> None:
        self._initializers[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )


def _shape(tensor: TensorSpec) -> ir.Shape:
    return ir.Shape(tensor.shape)


def _value(tensor: TensorSpec) -> ir.Value:
    return ir.Value(name=tensor.name, type=ir.TensorType(_DTYPES[tensor.dtype]), shape=_shape(tensor))
