"""What TensorRT's ONNX importer reads, as rules for every float graph of a bundle, long before a GPU is at hand.

Sources: the operator matrix of onnx-tensorrt for TensorRT 10.15 (docs/operators.md there: operators, types, ranks,
outputs, "must be an initializer"), the documentation of IKVCacheUpdateLayer (a cache is a network input, its update a
network output at the same address, of static length), and TensorRT 11's migration guide (every network is strongly
typed: operands of one type, nothing is cast for them). A graph that passes is not proven to build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, helper

from .plugin_nodes import ACTIVATION, LOOK_UP, NAMESPACE, PLUGINS

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
NUMBERS = FLOATS | {TensorProto.INT32, TensorProto.INT64}
ANY = NUMBERS | {TensorProto.BOOL}

#: Operator → types of its first input. Only what was looked up: another one is a problem until somebody has.
_FLOATS_ONLY = """
    Attention Clip Conv Gelu InstanceNormalization LayerNormalization MatMul Resize Sigmoid Softmax Sqrt TensorScatter
"""
_NUMBERS_TOO = "Abs Add Div Max Min Mul Neg Pow ReduceL2 ReduceMax ReduceMean ReduceSum Sub"
_BOOL_TOO = """
    Cast Concat Constant ConstantOfShape Expand Gather Identity Reshape Shape Slice Split Squeeze Tile Transpose
    Unsqueeze Where
"""
OPERATORS: dict[str, frozenset[int]] = {
    **dict.fromkeys(_FLOATS_ONLY.split(), FLOATS),
    **dict.fromkeys(_NUMBERS_TOO.split(), NUMBERS),
    **dict.fromkeys(_BOOL_TOO.split(), ANY),
}

#: Operators whose operands have one type in a strongly typed network → which of their inputs.
ONE_TYPE = {
    **dict.fromkeys(["Add", "Concat", "Div", "Max", "Min", "Mul", "Pow", "Sub"], slice(None)),
    **dict.fromkeys(("Conv", "InstanceNormalization", "LayerNormalization", "MatMul"), slice(None)),
    "Attention": slice(0, 4),
    "TensorScatter": slice(0, 2),
    "Where": slice(1, None),
}

#: Operators whose input of that number has to be an initializer.
INITIALIZERS = {"ReduceL2": 1, "ReduceMax": 1, "ReduceMean": 1, "ReduceSum": 1}

MIN_OPSET, MAX_OPSET = 9, 25

#: Attributes that are not read, with the value that means the same as leaving them out. `softmax_precision` is not read
#: either; it asks for no more than fused attention does anyway, so it is let pass.
NOT_READ = {"Attention": {"softcap": 0.0, "qk_matmul_output_mode": 0}}

RESIZE = {
    "mode": {"nearest", "linear"},
    "coordinate_transformation_mode": {
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    },
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
}


def importer_problems(
    model: onnx.ModelProto, *, free_axes: frozenset[str] = frozenset({"R", "B"}), plugins: bool = False
) -> list[str]:
    """What TensorRT's importer would refuse, or read as something else, one line each; none for a graph that may pass.

    free_axes: names of axes of inputs and outputs that may be left open until run time; all others have to be numbers.
    plugins: whether those of `plugin_nodes` will be registered.
    """
    return list(_Graph(model, free_axes, plugins).problems())


class _Graph:
    """One graph with the types and shapes of all its values."""

    def __init__(self, model: onnx.ModelProto, free_axes: frozenset[str], plugins: bool) -> None:
        self._model, self._graph, self._free_axes, self._plugins = model, model.graph, free_axes, plugins
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except onnx.shape_inference.InferenceError:  # of an operator from nowhere, which is a problem of its own
            inferred = model.graph
        self._inputs = {value.name for value in self._graph.input}
        self._outputs = {value.name for value in self._graph.output}
        self._initializers = {tensor.name for tensor in self._graph.initializer}
        self._types: dict[str, int] = {tensor.name: tensor.data_type for tensor in self._graph.initializer}
        self._shapes: dict[str, list[int | str | None]] = {
            tensor.name: list(tensor.dims) for tensor in self._graph.initializer
        }
        for value in [*inferred.input, *inferred.value_info, *inferred.output]:
            self._types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = [_length(dim) for dim in value.type.tensor_type.shape.dim]
        self._readers = Counter(name for node in self._graph.node for name in node.input if name)
        self._makers = {name: node for node in self._graph.node for name in node.output}

    def problems(self) -> Iterator[str]:
        """All of them, in the order of the nodes."""
        for opset in self._model.opset_import:
            if opset.domain == "" and not MIN_OPSET <= opset.version <= MAX_OPSET:
                yield f"opset {opset.version}: expected {MIN_OPSET} to {MAX_OPSET}"
        for value in [*self._graph.input, *self._graph.output]:
            for length in self._shapes[value.name]:
                if not isinstance(length, int) and length not in self._free_axes:
                    yield f"{value.name}: axis {length!r} is open, expected a number or {', '.join(self._free_axes)}"
        for node in self._graph.node:
            for problem in self._node_problems(node):
                yield f"{node.name} ({node.op_type}): {problem}"

    def _node_problems(self, node: onnx.NodeProto) -> Iterator[str]:
        if self._is_plugin(node):
            yield from self._plugin(node)
            return
        if node.domain or node.op_type not in OPERATORS:
            domain = f" (domain {node.domain})" if node.domain else ""
            yield f"not an operator that the importer is known to read{domain}"
            return
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.input and self._types.get(node.input[0]) not in OPERATORS[node.op_type]:
            yield f"input of type {self._type(node.input[0])}"
        one_type = {self._types.get(name) for name in node.input[ONE_TYPE.get(node.op_type, slice(0))] if name}
        if len(one_type) > 1:
            yield f"operands of types {', '.join(map(self._type, node.input))}; a strongly typed network casts none"
        place = INITIALIZERS.get(node.op_type)
        if place is not None and len(node.input) > place and node.input[place] not in self._initializers:
            yield f"input {place} is computed, expected an initializer"
        for name, default in NOT_READ.get(node.op_type, {}).items():
            if attributes.get(name, default) != default:
                yield f"attribute {name} is not read"
        specific = {"Attention": self._attention, "TensorScatter": self._scatter, "Resize": self._resize}
        if node.op_type in specific:
            yield from specific[node.op_type](node, attributes)
        elif node.op_type in ("LayerNormalization", "InstanceNormalization") and len(node.output) > 1:
            yield "more than one output"

    def _is_plugin(self, node: onnx.NodeProto) -> bool:
        return self._plugins and node.domain == NAMESPACE and node.op_type in PLUGINS

    def _plugin(self, node: onnx.NodeProto) -> Iterator[str]:
        """It has exactly the signature that will be registered, and TensorRT is told what it cannot infer."""
        spec = PLUGINS[node.op_type]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for name, value in LOOK_UP.items():
            expected = value.encode() if isinstance(value, str) else value
            if (got := attributes.pop(name, None)) != expected:
                yield f"attribute {name} is {got!r}, expected {expected!r}"
        kinds = {name: type(value) for name, value in attributes.items()}
        if kinds != dict(spec.attributes):
            yield f"attributes {_kinds(kinds)}, expected {_kinds(spec.attributes)}"
        activations = set()
        for what, names, kinds_of in (("inputs", node.input, spec.inputs), ("outputs", node.output, spec.outputs)):
            if len(names) != len(kinds_of) or not all(names):
                yield f"{what} {list(names)}, expected {', '.join(kinds_of)}"
                continue
            for name, kind in zip(names, kinds_of.values(), strict=True):
                if self._types.get(name) not in (FLOATS if kind == ACTIVATION else {TensorProto.FLOAT}):
                    yield f"{name} of type {self._type(name)}"
                elif kind == ACTIVATION:
                    activations.add(self._type(name))
        if len(activations) > 1:
            yield f"activations of types {', '.join(sorted(activations))}"

    def _attention(self, node: onnx.NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        if len([name for name in node.output if name]) > 1:
            yield "more than one output"
        for name, given in zip(("past_key", "past_value", "nonpad_kv_seqlen"), node.input[4:], strict=False):
            if given:
                yield f"input {name} is not read"
        for name in node.input[:4]:
            if name and len(self._shapes.get(name, [])) != 4:
                yield f"{name} has {len(self._shapes.get(name, []))} axes, expected 4"
        if len(node.input) > 3 and node.input[3] and attributes.get("is_causal"):
            yield "a mask and is_causal exclude each other"

    def _scatter(self, node: onnx.NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        cache, update = node.input[:2]
        if cache not in self._inputs:
            yield f"{cache} is not an input of the graph, so it has no memory of the caller's"
        elif self._readers[cache] > 1 and not self._read_before(cache, update):
            yield f"{cache} is read elsewhere too, where it may be updated already"
        if node.output[0] not in self._outputs:
            yield f"{node.output[0]} is not an output of the graph"
        if attributes.get("mode", b"linear") != b"linear":
            yield f"mode {attributes['mode']!r}, expected linear"
        for name in (cache, update):
            if len(self._shapes.get(name, [])) != 4:
                yield f"{name} has {len(self._shapes.get(name, []))} axes, expected 4"
        if attributes.get("axis", -2) not in (2, -2):
            yield f"axis {attributes['axis']}, expected 2 or -2"
        lengths = self._shapes.get(cache, [])
        if len(lengths) == 4 and not all(isinstance(length, int) for length in lengths[1:]):
            yield f"{cache} has an open axis {lengths[1:]}, expected heads, length and width as numbers"
        if len(node.input) > 2 and self._types.get(node.input[2]) not in (TensorProto.INT32, TensorProto.INT64):
            yield f"write indices of type {self._type(node.input[2])}"

    def _read_before(self, cache: str, update: str) -> bool:
        """Whether the one other reader of a cache is the plugin that makes its update, so that it reads first."""
        maker = self._makers.get(update)
        return maker is not None and self._is_plugin(maker) and cache in maker.input and self._readers[cache] == 2

    def _resize(self, node: onnx.NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        for name, known in RESIZE.items():
            value = attributes.get(name)
            if isinstance(value, bytes) and value.decode() not in known:
                yield f"{name} {value.decode()}, expected {', '.join(sorted(known))}"
        if attributes.get("antialias"):
            yield "antialias is not read"

    def _type(self, name: str) -> str:
        return TensorProto.DataType.Name(self._types.get(name, TensorProto.UNDEFINED))


def _kinds(kinds: Mapping[str, type]) -> str:
    return ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items()) or "none"


def _length(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param or None
