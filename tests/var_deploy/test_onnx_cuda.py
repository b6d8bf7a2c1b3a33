"""ONNX Runtime's sessions on a device whose memory is the host's: bindings, shared weights, draws, refusals. No GPU."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.var_deploy.host_cuda import HostCuda, host_compiled
from var_deploy import Pipeline, load
from var_deploy.bundle import WEIGHTS, Bundle
from var_deploy.engines import onnx_cuda
from var_deploy.engines.cuda.dlpack import SharedTensor
from var_deploy.engines.engine import Provider
from var_deploy.errors import EngineError
from var_deploy.gpu import OutOfMemoryError
from var_deploy.mapped_weights import weight_bytes
from var_export.bundle import write_bundle
from var_export.verify import verify_bundle
from var_kernels import ahead_of_time
from var_train.checkpoint import load_pair

#: As they are without the fixture below.
NAMES, PROVIDERS = onnx_cuda._NAMES, onnx_cuda._providers


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> Iterator[HostCuda]:
    """A device for all tests of the file, on which ONNX Runtime's CPU provider works in the place of CUDA's."""
    with pytest.MonkeyPatch.context() as patch:
        cuda = HostCuda()
        cuda.install(patch)
        patch.setattr(ahead_of_time, "compiled", host_compiled)
        patch.setattr(onnx_cuda, "DEVICE_TYPE", "cpu")
        patch.setattr(onnx_cuda, "_NAMES", {Provider.CUDA: "CPUExecutionProvider"})
        patch.setattr(onnx_cuda, "_providers", lambda *_, **__: [("CPUExecutionProvider", {})])
        patch.setattr(ort, "preload_dlls", lambda: None)
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cuda


@pytest.fixture(scope="module")
def pipe(cuda, tiny_bundle) -> Pipeline:
    return load(tiny_bundle, engine="onnx", device="cuda")


@pytest.fixture(scope="module")
def onnx(tiny_bundle) -> Pipeline:
    return load(tiny_bundle, engine="onnx", device="cpu")


REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {"labels": [1, 2, 3], "seeds": 7},
    "alone": {"labels": [4], "seeds": 2**64 - 1, "guidance": 0},
    "ends-in-zeros": {"labels": [5, 6], "seeds": 1, "guidance": [1.0, 0.5, 0, 0]},
    "smooth": {"labels": [9, 2, 4], "seeds": 51, "smooth": True},
}


def assert_same(got, expected, atol: float = 1e-5) -> None:
    for got_Bn, expected_Bn in zip(got.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=atol, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_images_are_those_of_the_cpu_engine(cuda, pipe, onnx, name):
    cuda.launches.clear()
    atol = 1e-3 if name == "smooth" else 1e-5  # sums in another order, which τ of the mixtures magnifies
    assert_same(pipe.generate(**REQUESTS[name]), onnx.generate(**REQUESTS[name]), atol)
    kernels = ["_draw_kernel", "_mix_codes_kernel"] if name == "smooth" else ["_draw_kernel"]
    assert cuda.launches == ["_uniforms_kernel", *kernels * len(pipe.bundle.manifest.var.tokens_per_scale)]
    assert cuda.graph_launches == 0  # the provider captures graphs itself


def test_given_tokens_and_drafts(pipe, onnx):
    images = np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)
    edit: dict[str, Any] = {"box": (0, 0, 0.5, 1), "labels": [1, 2], "seeds": 3, "smooth": [False, True, False, False]}
    assert_same(pipe.edit(images, **edit), onnx.edit(images, **edit), 1e-3)  # τ magnifies a sum in another order
    assert_same(pipe.generate([1, 2], refine=onnx, draft_scales=2), onnx.generate([1, 2]))
    assert_same(onnx.generate([1, 2], refine=pipe, draft_scales=2), onnx.generate([1, 2]))


def test_draws_on_the_host_and_previews(pipe, tiny_bundle, onnx):
    heard: list[Any] = []
    asked = REQUESTS["ends-in-zeros"]
    assert_same(load(tiny_bundle, engine="onnx", device="cuda", draw="host").generate(**asked), onnx.generate(**asked))
    assert_same(pipe.generate(**asked, on_scale=heard.append), onnx.generate(**asked))
    assert [preview.scale for preview in heard] == [0, 1, 2, 3]
    pixels = onnx.generate([1, 2], seeds=2).pixels
    for got_Bn, expected_Bn in zip(pipe.encode(pixels), onnx.encode(pixels), strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)


@pytest.mark.parametrize("precision", ["fp16"])
def test_half_precision(cuda, tiny_pair, tmp_path, precision):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "bundle", precision=precision)
    pipe, onnx = load(path, engine="onnx", device="cuda"), load(path, engine="onnx", device="cpu")
    assert_same(pipe.generate([1, 2], seeds=3, top_k=1), onnx.generate([1, 2], seeds=3, top_k=1))


def test_verify_holds_it_to_the_reference(cuda, tiny_bundle, tiny_pair):
    parity = verify_bundle(tiny_bundle, *tiny_pair[1:], engine="onnx", device="cuda")
    assert parity.passed
    assert parity.exact


def test_weights_lie_on_the_device_once(cuda, tiny_bundle, monkeypatch):
    """The sessions read them there: what is changed in that memory changes what every session computes."""
    gc.collect()
    before = cuda.allocated
    pipe = load(tiny_bundle, engine="onnx", device="cuda")
    runner = pipe.engine._runner
    sizes = sum(values.nbytes for _, _, values in weight_bytes(tiny_bundle / WEIGHTS).values())
    assert sizes <= cuda.allocated - before < 1.6 * sizes + 10**6  # each padded to 256 bytes, the codebook again
    expected = pipe.generate([1], seeds=1, top_k=1)
    head = runner._weights["head.weight"]._tensor
    whole = pipe.engine.device.download(head)
    pipe.engine.device.upload(head, np.zeros_like(whole))
    changed = pipe.generate([1], seeds=1, top_k=1)
    assert [(a != b).any() for a, b in zip(changed.tokens, expected.tokens, strict=True)] == [True] * 4
    pipe.engine.device.upload(head, whole)
    assert_same(pipe.generate([1], seeds=1, top_k=1), expected)
    del pipe, runner, head
    gc.collect()
    assert cuda.allocated == before


def test_every_launch_has_a_graph_number_of_its_own(cuda, tiny_bundle, monkeypatch):
    numbers: list[str] = []
    released: list[int] = []

    class Options(ort.RunOptions):
        def add_run_config_entry(self, key: str, value: str) -> None:
            if key == "gpu_graph_id":
                numbers.append(value)
            super().add_run_config_entry(key, value)

    monkeypatch.setattr(ort, "RunOptions", Options)
    monkeypatch.setattr(ort.InferenceSession, "release_captured_graph", lambda _, number: released.append(number))
    pipe = load(tiny_bundle, engine="onnx", device="cuda")
    pipe.generate([1, 2])
    first = list(numbers)
    assert len(first) == len(set(first)) == 7  # condition, four scales, finish, decoder
    pipe.generate([2, 1])
    assert numbers == first
    pipe.generate([1])
    assert len(set(numbers)) == 14
    pipe.engine.release()
    gc.collect()
    pipe.engine._runner._worker.submit(int).result()  # after what it was given before
    assert sorted(released) == sorted(map(int, numbers))


def test_kernels_are_kept_between_runs(cuda, pipe, tiny_bundle, monkeypatch, caplog):
    monkeypatch.setattr(onnx_cuda, "write_draw_kernels", None)  # not called again
    load(tiny_bundle, engine="onnx", device="cuda")
    monkeypatch.undo()
    load(tiny_bundle, engine="onnx", device="cuda", cache=False).generate([1])
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EngineError, match=r"kernels of the draw need triton \(.*\): pip install 'var-deploy\[gpu\]'"):
        load(tiny_bundle, engine="onnx", device="cuda", cache=False)


# What is refused ------------------------------------------------------------------------------------------------------


def assigned(provider: str, *nodes: tuple[str, str]) -> Any:
    found = [SimpleNamespace(name=name, op_type=op_type) for name, op_type in nodes]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: found)


def test_nodes_on_the_cpu_are_refused_unless_allowed(cuda, tiny_bundle, monkeypatch, caplog):
    nodes = [(f"Attention_{i}", "Attention") for i in range(5)]
    parts = [assigned("CPUExecutionProvider", ("Shape_0", "Shape")), assigned("OtherExecutionProvider", *nodes)]
    monkeypatch.setattr(ort.InferenceSession, "get_provider_graph_assignment_info", lambda _: parts)
    line = (
        r"condition: 5 nodes do not run on CPUExecutionProvider: Attention_0 \(Attention, OtherExecutionProvider\), .* "
        "and 2 more; update onnxruntime-gpu, or allow it with allow_cpu"
    )
    with pytest.raises(EngineError, match=line):
        load(tiny_bundle, engine="onnx", device="cuda")
    load(tiny_bundle, engine="onnx", device="cuda", allow_cpu=True)
    assert "condition: 5 nodes do not run on CPUExecutionProvider" in caplog.text


def test_the_real_assignment_names_every_node(cuda, pipe):
    """The control of the test above: nothing is refused because nothing is listed."""
    session = pipe.engine._runner._session("scale_01")
    parts = session.get_provider_graph_assignment_info()
    names = {node.name for part in parts for node in part.get_nodes()}
    assert {part.ep_name for part in parts} == {"CPUExecutionProvider"}
    assert sum(name.startswith("TensorScatter") for name in names) == 2 * pipe.bundle.manifest.var.depth


def test_a_capture_that_is_refused_is_explained_by_name(cuda, tiny_bundle, monkeypatch):
    """ONNX Runtime opens no session that captures beside nodes on the CPU; one without says which they are."""
    start = onnx_cuda.SessionRunner._started

    def started(self: Any, name: str, *, captures: bool) -> ort.InferenceSession:
        if captures:
            raise EngineError("This session cannot use the graph capture feature")
        return start(self, name, captures=captures)

    monkeypatch.setattr(onnx_cuda.SessionRunner, "_started", started)
    with pytest.raises(EngineError, match="cannot use the graph capture feature"):
        load(tiny_bundle, engine="onnx", device="cuda")
    parts = [assigned("OtherExecutionProvider", ("Cast_3", "Cast"))]
    monkeypatch.setattr(ort.InferenceSession, "get_provider_graph_assignment_info", lambda _: parts)
    with pytest.raises(
        EngineError, match=r"condition: 1 nodes do not run on CPUExecutionProvider: Cast_3 \(Cast, Other"
    ):
        load(tiny_bundle, engine="onnx", device="cuda")
    assert load(tiny_bundle, engine="onnx", device="cuda", allow_cpu=True).engine._runner._captures is False


def test_all_runs_are_of_one_thread(cuda, pipe, monkeypatch):
    """ONNX Runtime keeps captured graphs by thread."""
    seen: set[int] = set()
    run = ort.InferenceSession.run_with_iobinding

    def noted(self: Any, *arguments: Any) -> None:
        seen.add(threading.get_ident())
        run(self, *arguments)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", noted)
    for _ in range(3):
        thread = threading.Thread(target=pipe.generate, args=([1],))
        thread.start()
        thread.join()
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_memory_that_does_not_suffice(cuda, pipe, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 7")

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(OutOfMemoryError, match=r"condition: ONNX Runtime .* failed: Failed to allocate memory"):
        pipe.generate([1])


def test_a_provider_that_does_not_start(cuda, tiny_bundle, monkeypatch):
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: ["OtherExecutionProvider"])
    with pytest.raises(EngineError, match="could not start CPUExecutionProvider and fell back to Other"):
        load(tiny_bundle, engine="onnx", device="cuda")


def test_what_onnx_runtime_raises_is_one_line(cuda, pipe, tiny_bundle, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 700\nat line 3")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", fail)
        with pytest.raises(EngineError, match=rf"condition: ONNX Runtime {ort.__version__} failed: CUDA failure 700$"):
            pipe.generate([1])
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(EngineError, match=r"loading .*condition.onnx: CUDA failure 700$"):
        load(tiny_bundle, engine="onnx", device="cuda")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"threads": 2}, "engine 'onnx' on a GPU has no option threads; leave it out"),
        ({"graphs": "static", "decoder": "graph"}, "engine 'onnx' on a GPU has no option graphs, decoder; leave"),
        ({"plans": "x"}, "engine 'onnx' on a GPU has no option plans; leave it out"),
        ({"device": "cpu", "draw": "host"}, "engine 'onnx' has no option draw; leave it out"),
        ({"device": "cpu", "provider": "tensorrt"}, "engine 'onnx' has no option provider; leave it out"),
        ({"device": "cpu", "allow_cpu": True}, "engine 'onnx' has no option allow_cpu; leave it out"),
        ({"provider": "rocm"}, "unknown provider 'rocm'; known: cuda, tensorrt"),
        ({"device": "cuda:1"}, "device 'cuda:1': this machine has 1 GPUs, counted from 0"),
    ],
)
def test_options(cuda, tiny_bundle, options, line):
    with pytest.raises(EngineError, match=line):
        load(tiny_bundle, **{"engine": "onnx", "device": "cuda", **options})


def test_int8_is_for_cpus(cuda, tiny_pair, tmp_path):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "bundle", precision="int8")
    with pytest.raises(EngineError, match="engine 'onnx' on a GPU: the bundle is int8, for CPUs alone; export fp16"):
        load(path, engine="onnx", device="cuda")


@pytest.mark.parametrize("provider", Provider)
def test_the_build_for_cpus_is_told(tiny_bundle, provider, monkeypatch):
    monkeypatch.setattr(onnx_cuda, "_NAMES", NAMES)
    name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    if name in ort.get_available_providers():
        pytest.skip("this is the build for GPUs")
    with pytest.raises(EngineError, match=f"needs {name}, this ONNX Runtime has .*CPUExecution"):
        load(tiny_bundle, engine="onnx", device="cuda", provider=provider)


def test_an_old_version(tiny_bundle, monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.24.4")
    with pytest.raises(EngineError, match=r"needs onnxruntime-gpu 1\.30 or later, got 1\.24\.4"):
        load(tiny_bundle, engine="onnx", device="cuda")


def test_options_of_the_providers(tiny_bundle, monkeypatch, tmp_path):
    """Names and values as the documentation of ONNX Runtime has them; every value is a string."""
    monkeypatch.setattr(onnx_cuda, "_NAMES", NAMES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = SimpleNamespace(index=1, stream=77)
    bundle = Bundle.open(tiny_bundle)
    ((name, options),) = PROVIDERS(Provider.CUDA, bundle, device, "scale_01", captures=True)
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "1",
        "user_compute_stream": "77",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }
    tensorrt, cuda = PROVIDERS(Provider.TENSORRT, bundle, device, "scale_01", captures=False)
    assert (tensorrt[0], cuda[0]) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert "enable_cuda_graph" not in cuda[1]
    assert tensorrt[1]["trt_engine_cache_enable"] == tensorrt[1]["trt_timing_cache_enable"] == "1"
    assert PROVIDERS(Provider.CUDA, bundle, device, "scale_01", captures=False) == [cuda]
    assert Path(tensorrt[1]["trt_engine_cache_path"]).is_dir()
    assert Path(tensorrt[1]["trt_engine_cache_path"]).parent == Path(tensorrt[1]["trt_timing_cache_path"])
    least, most = (
        dict(f.rsplit(":", 1) for f in tensorrt[1][f"trt_profile_{w}_shapes"].split(",")) for w in ("min", "max")
    )
    names = [tensor.name for tensor in bundle.manifest.graphs["scale_01"].inputs]
    assert list(least) == list(most) == names  # every input with an open axis needs all three
    assert least["cache_k.0"].startswith("1x")
    assert most["cache_k.0"].startswith("16x")


def test_memory_is_shared_by_the_protocol():
    """Scalars, odd shapes and halves; a change shows on the other side."""
    for dtype, shape in (("float32", (3, 5)), ("float16", (7,)), ("int64", ()), ("int8", (2, 3, 4))):
        array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
        held = SimpleNamespace(address=array.ctypes.data, shape=shape)
        shared = SharedTensor(held, dtype, "cpu", 0)
        value = ort.OrtValue.from_dlpack(shared)
        np.testing.assert_array_equal(value.numpy(), array)
        assert value.data_ptr() == array.ctypes.data
        array += 1
        np.testing.assert_array_equal(value.numpy(), array)
