"""Run as a program: takes every plugin through TensorRT's calls while it builds, and assembles the kernels it gives.

The bindings and `tensorrt.plugin` are the real ones, over empty libraries; what only the libraries could make, which is
the registry and expressions of lengths, is stood in for. Prints one line of JSON: capability and plugin → what came of
it. In a process of its own, as the interpreter of kernels may be chosen in the one that tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton import knobs

from tests.export.recorded_tensorrt import real_bindings
from var_export.plugin_nodes import ACTIVATION, NAMESPACE, PLUGINS, PluginSpec
from var_export.tensorrt_plugins import register_plugins
from var_kernels.ahead_of_time import parameters

#: Lengths of every input, the rows open, and attributes as the importer reads them from a node.
R, N, H, L, D = -1, 36, 2, 91, 128
SHAPES = {
    **{"x": (R, N, D), "y": (R, N, D), "gates": (R, 3, 6, D), "norms": (R, 3, 6, D)},
    **{"qkv": (R, N, 3 * D), "q_scale": (H, 1, 1), "cache_k": (R, H, L, 64), "cache_v": (R, H, L, 64)},
}
ATTRIBUTES = {"gamma_at": 1, "scale_at": 8, "shift_at": 10, "begin": 55, "softmax_scale": 0.03125}


class Registry:
    """What plugins are registered with."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


class Expressions:
    """Builds expressions of lengths as texts of Python, R for the rows."""

    def __init__(self, trt: Any) -> None:
        class Length(trt.IDimensionExpr):  # type: ignore[name-defined]
            text: str

        self._cls = Length

    def of(self, text: str) -> Any:
        made = self._cls.__new__(self._cls)  # it has no constructor
        made.text = text
        return made

    def constant(self, value: int) -> Any:
        return self.of(str(value))

    def operation(self, operation: Any, a: Any, b: Any) -> Any:
        sign = {"SUM": "+", "SUB": "-", "PROD": "*", "FLOOR_DIV": "//"}[operation.name]
        return self.of(f"({a.text} {sign} {b.text})")


class Numbers(dict[int, str]):
    """Takes the numbers that are passed beside tensors."""

    nbSymExprs = -1


def built(trt: Any, registry: Registry, spec: PluginSpec, activation: Any, capability: int) -> dict[str, Any]:
    """TensorRT's calls of one plugin, in order."""
    expressions = Expressions(trt)
    creator = registry.get_creator(spec.name, "1", NAMESPACE)
    fields = []
    for field in creator.field_names:
        value, kinds = ATTRIBUTES[field.name], trt.PluginFieldType
        kind = kinds.INT32 if isinstance(value, int) else kinds.FLOAT32
        fields.append(trt.PluginField(field.name, np.array([value], "i4" if isinstance(value, int) else "f4"), kind))
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin(spec.name, NAMESPACE, collection, trt.TensorRTPhase.BUILD, request)

    inputs = [SHAPES[name] for name in spec.inputs]
    types = [activation if kind == ACTIVATION else trt.DataType.FLOAT for kind in spec.inputs.values()]
    types += plugin.get_output_data_types(types, [len(shape) for shape in inputs])
    lengths = [[expressions.of("R" if length == R else str(length)) for length in shape] for shape in inputs]
    outputs = [[length.text for length in shape] for shape in plugin.get_output_shapes(lengths, [], expressions)]
    results = [tuple(R if text == "R" else eval(text) for text in shape) for shape in outputs]
    described = []
    for shape, dtype in zip([*inputs, *results], types, strict=True):
        described.append(trt.DynamicPluginTensorDesc())
        desc = described[-1].desc
        desc.dims, desc.type, desc.format = shape, dtype, trt.TensorFormat.LINEAR
    combinations = plugin.get_supported_format_combinations(described, len(inputs))
    plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, numbers = SimpleNamespace(), Numbers()
    plugin.get_launch_params(lengths, described, len(inputs), launch, numbers, expressions)
    descs = [each.desc for each in described]
    name, ptx = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
    assert isinstance(ptx, bytes)
    return {
        "output types": [dtype.name for dtype in types[len(inputs) :]],
        "output shapes": results,
        "formats": sorted({combination.format.name for combination in combinations}),
        "types kept": [combination.type for combination in combinations] == types,
        "launch": {key: eval(text, {"R": 3}) for key, text in vars(launch).items()},  # for three rows
        "numbers": [int(numbers[index]) for index in range(numbers.nbSymExprs)],
        "parameters": [declared.split()[1] for declared in parameters(ptx.decode())],
        "entry": name,
        "machine code": assembled(ptx, name, capability),
    }


def assembled(ptx: bytes, entry: str, capability: int) -> bool:
    """Whether Triton's assembler makes a kernel of that name of it."""
    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile(suffix=".ptx") as source, tempfile.NamedTemporaryFile() as made:
        Path(source.name).write_bytes(ptx)
        target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        subprocess.run([tool.path, target, source.name, "-o", made.name], check=True)
        code = Path(made.name).read_bytes()
    return code.startswith(b"\x7fELF") and f".text.{entry}".encode() in code


def main(folder: str) -> None:
    trt: Any = real_bindings(Path(folder))
    sys.modules["tensorrt"] = trt
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.DimsExprs = lambda count: [None] * count
    found = {}
    for capability, activation in ((80, trt.DataType.FLOAT), (90, trt.DataType.HALF), (100, trt.DataType.BF16)):
        register_plugins(divmod(capability, 10))
        from tensorrt.plugin import _tensor

        _tensor.SymExprImpl = lambda expression: expression._expr.text
        for name in PLUGINS if capability == 90 else ("adaln", "cached_attention"):
            found[f"{name} {capability}"] = built(trt, registry, PLUGINS[name], activation, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
