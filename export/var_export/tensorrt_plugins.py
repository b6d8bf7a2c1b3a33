"""Registers the plugins of `plugin_nodes` with TensorRT, so that its importer finds them and compiles them into plans.

Ahead of time: while it builds, TensorRT asks the plugin of each node for a kernel in PTX and for its launch, which
Triton makes for the GPU that builds, and keeps both in the plan. A plan runs without Python, Triton and this file.
TensorRT passes a kernel its inputs, its int32 numbers and its outputs, in this order and nothing else. Needs Triton to
be imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from var_deploy.config import HEAD_DIM
from var_deploy.errors import EngineError
from var_kernels import plugins
from var_kernels.ahead_of_time import Compiled, compiled, without_spare_pointers
from var_kernels.launch import Launch, recording

from .plugin_nodes import ACTIVATION, FLOAT32, NAMESPACE, PLUGINS, PluginSpec

#: Oldest GPU that plugins are compiled for.
LEAST_CAPABILITY = 80

#: What the plugins are compiled for, once they are registered: TensorRT's registry is of the process, and so is this.
_capability: list[int] = []


def register_plugins(capability: tuple[int, int]) -> None:
    """Makes the plugins known to this process's TensorRT; to be called before a graph with plugins is parsed.

    capability: of the GPU that builds, like (9, 0); a later call changes it. Raises EngineError where TensorRT is
    missing, Triton is told to interpret, or the GPU is too old.
    """
    number = 10 * capability[0] + capability[1]
    if number < LEAST_CAPABILITY:
        raise EngineError(
            f"tensorrt: plugins need a GPU of compute capability 8.0 or later, got {capability[0]}.{capability[1]}; "
            "build without them"
        )
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise EngineError("tensorrt: TRITON_INTERPRET is set, so no plugin can be compiled; unset it")
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise EngineError(
            f"tensorrt: its plugins cannot be used ({error}): pip install 'var-deploy[tensorrt]'"
        ) from error
    if not _capability:
        if trt.get_plugin_registry() is None:
            raise EngineError("tensorrt: it has no registry for plugins; build without them")
        for spec in PLUGINS.values():
            _register(trt, trtp, spec)
    _capability[:] = [number]


def _register(trt: Any, trtp: Any, spec: PluginSpec) -> None:
    """One plugin's two functions: what its results are, and its kernel.

    tensorrt.plugin reads from annotations what a function takes. They are made from the data here.
    """

    def described(*inputs: Any, **_: int | float) -> tuple[Any, ...]:
        activation = inputs[list(spec.inputs.values()).index(ACTIVATION)].dtype
        types = [trt.DataType.FLOAT if kind == FLOAT32 else activation for kind in spec.outputs.values()]
        shapes = _shapes_of_outputs(spec, [tensor.shape_expr for tensor in inputs])
        return tuple(trtp.from_shape_expr(shape, dtype) for shape, dtype in zip(shapes, types, strict=True))

    def kernel(*given: Any) -> tuple[str, bytes, Any, Any]:
        inputs, values, results = given[: len(spec.inputs)], given[len(spec.inputs) : -2], given[-2]
        attributes = dict(zip(spec.attributes, values, strict=True))
        tensors = [_tensor(trt, desc) for desc in (*inputs, *results)]
        made, launch = plugin_kernel(spec, tensors, attributes, _capability[0])
        # The grid's first axis is a number of blocks per row, times the rows.
        per_row = launch.grid[0] // tensors[0].shape[0]
        params = trtp.KernelLaunchParams()
        params.grid_x = inputs[0].shape_expr[0] * per_row
        params.grid_y = launch.grid[1] if len(launch.grid) > 1 else 1
        params.block_x, params.shared_mem = made.threads, made.shared_bytes
        numbers = [launch.arguments[name] for name, kind in made.arguments if kind == "i32"]
        scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(number) for number in numbers])
        # Kernels of one function for several plugins of a plan: nothing says that TensorRT tells equal names apart.
        name = f"{NAMESPACE}_{spec.name}"
        return name, without_spare_pointers(made).replace(made.entry, name).encode(), params, scalars

    generic: Any = tuple
    outputs = generic[(trtp.TensorDesc,) * len(spec.outputs)]
    compiled_kernel = generic[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    parameters = {**dict.fromkeys(spec.inputs, trtp.TensorDesc), **spec.attributes}
    _annotate(described, parameters, outputs)
    _annotate(kernel, {**parameters, "outputs": outputs, "tactic": int}, compiled_kernel)
    trtp.register(f"{NAMESPACE}::{spec.name}")(described)
    trtp.aot_impl(f"{NAMESPACE}::{spec.name}")(kernel)


def _annotate(function: Callable[..., Any], parameters: Mapping[str, Any], returns: Any) -> None:
    kind = Parameter.POSITIONAL_OR_KEYWORD
    declared = [Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = Signature(declared, return_annotation=returns)  # type: ignore[attr-defined]


def _shapes_of_outputs(spec: PluginSpec, inputs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """From the shapes of the inputs, whose lengths may be TensorRT's expressions."""
    if not spec.name.endswith("attention"):
        return [tuple(inputs[0])] * len(spec.outputs)
    qkv, cache_k = inputs[0], inputs[-2]
    update = (qkv[0], cache_k[1], qkv[1], HEAD_DIM)
    return [(qkv[0], qkv[1], cache_k[1] * HEAD_DIM), update, update]


def _tensor(trt: Any, desc: Any) -> Tensor:
    """A tensor without memory of a description's type and shape; one row where their number is open."""
    dtypes = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
    }
    first, *others = desc.shape
    if -1 in others:
        raise ValueError(f"plugin: got shape {(first, *others)}, expected only the rows to be open")
    return torch.empty(1 if first == -1 else first, *others, dtype=dtypes[desc.dtype], device="meta")


def plugin_kernel(
    spec: PluginSpec, tensors: Sequence[Tensor], attributes: Mapping[str, int | float], capability: int
) -> tuple[Compiled, Launch]:
    """A plugin's kernel and its launch, for any number of rows.

    tensors: inputs and outputs as TensorRT has them, on any device; their memory is not touched. capability: 90 is 9.0.
    Raises ValueError for a kernel that TensorRT could not call.
    """
    with recording() as launches:
        launch_plugin(spec, tensors, attributes)
    (launch,) = launches
    pointers = [name for name, value in launch.arguments.items() if isinstance(value, Tensor)]
    # TensorRT's own memory begins at multiples of 256 bytes and callers' has to; weights may lie anywhere.
    aligned = [name for name in pointers if name != "q_scale_ptr"]
    # Of the PTX that Triton can write, old ones: 9.0 is what the oldest driver for TensorRT 11 reads.
    made = compiled(launch, capability, aligned, ptx_version=80 if capability < 100 else 90)
    numbers = len(made.arguments) - len(tensors)
    expected = ["pointer"] * len(spec.inputs) + ["i32"] * numbers + ["pointer"] * len(spec.outputs)
    if (kinds := [kind for _, kind in made.arguments]) != expected:
        raise ValueError(f"{made.entry}: takes {', '.join(kinds)}, expected {', '.join(expected)}")
    if made.shared_bytes > plugins.SHARED_LIMIT:
        limit = plugins.SHARED_LIMIT
        raise ValueError(f"{made.entry}: needs {made.shared_bytes} bytes of shared memory, limit {limit}")
    return made, launch


def launch_plugin(spec: PluginSpec, tensors: Sequence[Tensor], attributes: Mapping[str, int | float]) -> None:
    """Starts the kernel of a plugin on its inputs and outputs."""
    given = dict(zip([*spec.inputs, *spec.outputs], tensors, strict=True))
    numbers: dict[str, Any] = dict(attributes)
    if spec.name.endswith("attention"):
        plugins.cached_attention(
            given["qkv"],
            given["q_scale"].flatten() if "q_scale" in given else None,
            given["cache_k"],
            given["cache_v"],
            begin=numbers["begin"],
            softmax_scale=numbers.get("softmax_scale", 1.0),
            out_RnD=given["attended"],
            k_new_RHnd=given["k_new"],
            v_new_RHnd=given["v_new"],
        )
    else:
        plugins.adaln(
            given["x"],
            given.get("y"),
            given["gates"].flatten(1, -2) if "gates" in given else None,
            given["norms"].flatten(1, -2),
            gamma_at=numbers.get("gamma_at"),
            scale_at=numbers["scale_at"],
            shift_at=numbers["shift_at"],
            x_out_RnD=given.get("x_out"),
            out_RnD=given["out"],
        )
