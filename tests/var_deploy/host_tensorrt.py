"""TensorRT on the host: the recorder of its API, whose plans are run by ONNX Runtime at the addresses that were given.

A "plan" names its graph and its profiles; an engine made of one runs nothing before it was refitted, a context nothing
before it has scratch memory, a profile, shapes within it, and an address for every tensor.
"""

from __future__ import annotations

import ctypes
import json
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.export.recorded_tensorrt import Recorder
from tests.var_deploy.host_cuda import HostCuda, at

SCRATCH = 4096


class HostTensorRT:
    """Behaviours of builder, runtime, engines and contexts on a `Recorder`."""

    def __init__(self, bindings: Any, cuda: HostCuda) -> None:
        self.recorder, self.cuda = Recorder(bindings), cuda
        self.executions: list[str] = []  #: graphs that ran
        self.scratch = SCRATCH
        trt = bindings
        for key, behaviour in {
            ("Builder", "create_network"): lambda made, **_: self._made("INetworkDefinition"),
            ("OnnxParser", "__init__"): lambda made, network, logger: made.state.update(network=network),
            ("OnnxParser", "parse_from_file"): lambda made, model: (
                made.state["network"].state.update(graph=model) is None
            ),
            ("INetworkDefinition", "num_layers"): lambda made: 0,
            ("IOptimizationProfile", "set_shape"): self._profile_shape,
            ("IBuilderConfig", "add_optimization_profile"): self._add_profile,
            ("Builder", "build_serialized_network"): self._build,
            ("ITimingCache", "serialize"): lambda made: b"timings",
            ("Runtime", "deserialize_cuda_engine"): self._deserialize,
            ("ICudaEngine", "num_io_tensors"): lambda made: len(made.state["names"]),
            ("ICudaEngine", "get_tensor_name"): lambda made, index: made.state["names"][index],
            ("ICudaEngine", "device_memory_size_v2"): lambda made: self.scratch,
            ("ICudaEngine", "get_tensor_location"): lambda made, name: (
                trt.TensorLocation.HOST if name == "scale" else trt.TensorLocation.DEVICE
            ),
            ("ICudaEngine", "get_aliased_input_tensor"): lambda made, name: (
                name.removesuffix(".out") if name.startswith("cache_") and name.endswith(".out") else ""
            ),
            ("Refitter", "__init__"): lambda made, engine, logger: made.state.update(engine=engine, read=None),
            ("OnnxParserRefitter", "__init__"): lambda made, refitter, logger: made.state.update(refitter=refitter),
            ("OnnxParserRefitter", "refit_from_file"): lambda made, model: (
                made.state["refitter"].state.update(read=model) is None
            ),
            ("OnnxParserRefitter", "num_errors"): lambda made: 0,
            ("Refitter", "get_missing_weights"): lambda made: [],
            ("Refitter", "refit_cuda_engine"): lambda made: (
                made.state["engine"].state.update(refitted=made.state["read"]) is None
            ),
            ("ICudaEngine", "create_execution_context"): self._context,
            ("IExecutionContext", "set_device_memory"): self._set_memory,
            ("IExecutionContext", "set_optimization_profile_async"): lambda made, profile_index, stream_handle: (
                made.state.update(profile=profile_index) is None
                and profile_index < len(made.state["engine"].state["profiles"])
            ),
            ("IExecutionContext", "set_input_shape"): self._set_shape,
            ("IExecutionContext", "set_tensor_address"): lambda made, name, memory: (
                made.state["addresses"].update({name: memory}) is None and memory % 256 == 0
            ),
            ("IExecutionContext", "infer_shapes"): lambda made: [
                name for name in made.state["engine"].state["inputs"] if name not in made.state["shapes"]
            ],
            ("IExecutionContext", "execute_async_v3"): self._execute,
        }.items():
            self.recorder.behaviours[key] = behaviour

    def _made(self, cls: str, **state: Any) -> Any:
        made = self.recorder.make(cls)
        made.state.update(state)
        return made

    # ---- building ----------------------------------------------------------------------------------------------------

    def _profile_shape(self, made: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        made.state[input] = [list(min), list(opt), list(max)]

    def _add_profile(self, made: Any, profile: Any) -> int:
        profiles = made.state.setdefault("profiles", [])
        profiles.append(dict(profile.state))
        return len(profiles) - 1

    def _build(self, made: Any, network: Any, config: Any) -> bytes:
        return json.dumps({"graph": network.state["graph"], "profiles": config.state["profiles"]}).encode()

    # ---- running -----------------------------------------------------------------------------------------------------

    def _deserialize(self, made: Any, serialized_engine: bytes) -> Any:
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            return None
        graph = onnx.load(plan["graph"], load_external_data=False).graph
        inputs, outputs = [value.name for value in graph.input], [value.name for value in graph.output]
        return self._made(
            "ICudaEngine", graph=plan["graph"], profiles=plan["profiles"], inputs=inputs, names=inputs + outputs
        )

    def _context(self, made: Any, strategy: Any) -> Any:
        assert strategy == self.recorder.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._made("IExecutionContext", engine=made, shapes={}, addresses={}, profile=None, memory=None)

    def _set_memory(self, made: Any, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert self.cuda.is_device(memory, size)
        made.state["memory"] = size

    def _set_shape(self, made: Any, name: str, shape: tuple[int, ...]) -> bool:
        made.state["shapes"][name] = shape
        limits = made.state["engine"].state["profiles"][made.state["profile"]].get(name)
        if limits is None:  # given by value
            return True
        least, _, most = limits
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def _execute(self, made: Any, stream_handle: int) -> bool:
        engine, state = made.state["engine"].state, made.state
        assert engine.get("refitted") == engine["graph"], "an engine without weights"
        assert state["memory"] is not None
        assert state["memory"] >= self.scratch
        assert state["addresses"].keys() == set(engine["names"])
        session = _session(engine["graph"])
        feeds = {}
        for tensor in session.get_inputs():
            shape, dtype = state["shapes"][tensor.name], _numpy(tensor.type)
            address = state["addresses"][tensor.name]
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            assert self.cuda.is_device(address, nbytes) != (tensor.name == "scale"), tensor.name
            feeds[tensor.name] = at(address, dtype, *shape)
            if tensor.name.startswith("cache_"):
                assert state["addresses"][f"{tensor.name}.out"] == address, "a cache that is copied"
        outputs = [tensor.name for tensor in session.get_outputs()]

        def work() -> None:
            self.executions.append(engine["graph"].rsplit("/", 1)[-1])
            for name, value in zip(outputs, session.run(outputs, feeds), strict=True):
                address = state["addresses"][name]
                assert self.cuda.is_device(address, value.nbytes), name
                ctypes.memmove(address, np.ascontiguousarray(value).ctypes.data, value.nbytes)

        self.cuda.submit(work)
        return True


@cache
def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the caches are copied here, which it warns of
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _numpy(type_name: str) -> str:
    return {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}[type_name]
