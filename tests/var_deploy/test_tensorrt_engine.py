"""The tensorrt engine against TensorRT's real signatures, with plans that ONNX Runtime runs on the host's memory.

What is held: every call, its order and its arguments; and that the buffers, shapes and profiles that contexts are bound
to give the images of the onnx engine. No plan is built and no GPU used.
"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.recorded_tensorrt import real_bindings
from tests.var_deploy.host_cuda import Error, HostCuda, host_compiled
from tests.var_deploy.host_tensorrt import HostTensorRT
from var_deploy import Pipeline, load, schedules
from var_deploy.bench.device import cuda_clock
from var_deploy.bench.run import bench
from var_deploy.engines import tensorrt_library
from var_deploy.engines.engine import MAX_FORMS
from var_deploy.errors import EngineError
from var_deploy.plans import Batch, Layout
from var_deploy.sampling import Settings
from var_export.bundle import write_bundle
from var_export.tensorrt import build_plans
from var_export.verify import verify_bundle
from var_kernels import ahead_of_time
from var_train.checkpoint import load_pair

BATCH = Batch(least=1, tuned=1, most=4)
PLACE = Path("plans") / "nvidia-h200-sm90-11.4.0.106"


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[HostTensorRT]:
    """One device and one TensorRT for all tests of the file."""
    bindings = real_bindings(tmp_path_factory.mktemp("bindings"))
    with pytest.MonkeyPatch.context() as patch:
        cuda = HostCuda()
        cuda.install(patch)
        patch.setattr(ahead_of_time, "compiled", host_compiled)
        patch.delenv("TRITON_INTERPRET", raising=False)
        host = HostTensorRT(bindings, cuda)
        patch.setitem(sys.modules, "tensorrt", host.recorder)
        yield host


@pytest.fixture(autouse=True)
def _forgotten(host) -> None:
    """What tests before this one have left."""
    host.recorder.calls.clear()
    host.executions.clear()
    host.cuda.launches.clear()
    host.cuda.graph_launches = 0


@pytest.fixture(scope="module")
def bundle(host, tiny_bundle, tmp_path_factory) -> Path:
    """With plans of both layouts; read only."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / "bundle"))
    for layout in Layout:
        build_plans(path, batch=BATCH, layout=layout)
    return path


@pytest.fixture(scope="module")
def onnx(bundle) -> Pipeline:
    return load(bundle, engine="onnx")


@pytest.fixture(scope="module")
def pipe(bundle) -> Pipeline:
    return load(bundle, engine="tensorrt")


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """With plans, to be altered."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {"labels": [1, 2, 3], "seeds": 7},
    "alone": {"labels": [4], "seeds": 2**64 - 1},
    "unguided": {"labels": [0, 9], "seeds": 3, "guidance": 0},
    "ends-in-zeros": {"labels": [5, 6], "seeds": 1, "guidance": [1.0, 0.5, 0, 0]},
    "begins-with-zeros": {"labels": [5], "seeds": 1, "guidance": [0, 0, 0, 2.0], "temperature": 0.7, "top_k": 0},
    "smooth": {"labels": [9, 2, 4], "seeds": 51, "smooth": True},
    "in-parts": {"labels": [1, 2, 3, 4, 5, 6], "seeds": 11},
}


def assert_same(got, expected, *, smooth: bool = False) -> None:
    for got_Bn, expected_Bn in zip(got.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)
    # The same graphs and library; only sums in another order, which τ of the mixtures magnifies.
    np.testing.assert_allclose(got.pixels, expected.pixels, atol=1e-3 if smooth else 1e-5, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_images_are_those_of_the_onnx_engine(host, pipe, onnx, name):
    asked = REQUESTS[name]
    got = pipe.generate(**asked)
    assert_same(got, onnx.generate(**asked), smooth=name == "smooth")
    assert got.parts == (2 if name == "in-parts" else 1)
    assert len(got.images) == len(asked["labels"])
    assert got.timings.keys() == {"upload", "replay", "download"}


def test_given_tokens_and_schedules(host, pipe, onnx):
    """Edits, by one more kernel per scale, in parts and with previews; drafts; settings that differ by scale."""
    images = np.random.default_rng(0).random((5, 3, 64, 64), dtype=np.float32)
    edit: dict[str, Any] = {"box": (0, 0, 0.5, 1), "labels": [1, 2, 3, 4, 5], "seeds": 3, "guidance": [0, 1, 2, 0]}
    edit["smooth"] = [True, False, True, False]
    expected = onnx.edit(images, **edit)
    host.cuda.launches.clear()
    assert_same(pipe.edit(images, **edit), expected, smooth=True)
    kernels = host.cuda.launches
    assert kernels.count("_keep_given_kernel") == 2 * kernels.count("_mix_codes_kernel") > 0
    heard: list[Any] = []
    assert_same(pipe.edit(images, **edit, on_scale=heard.append), expected, smooth=True)
    assert len(heard) == 2 * 4
    scheduled: dict[str, Any] = {"labels": [1, 2], "seeds": 3, "top_k": [1, 5, 900, 3], "temperature": [1, 2, 0.5, 1]}
    assert_same(pipe.generate(**scheduled), onnx.generate(**scheduled))
    for smooth in (False, [True, True, False, False]):
        both = pipe.generate([1, 2], seeds=3, refine=onnx, draft_scales=2, smooth=smooth)
        assert_same(both, onnx.generate([1, 2], seeds=3, smooth=smooth), smooth=True)
        other_way = onnx.generate([1, 2], seeds=3, refine=pipe, draft_scales=2, smooth=smooth)
        assert_same(other_way, onnx.generate([1, 2], seeds=3, smooth=smooth), smooth=True)


def test_graphs_of_few_forms_are_kept(bundle):
    """Every pattern of scales that mix codes is a graph of its own; the last ones asked for stay."""
    pipe = load(bundle, engine="tensorrt")
    patterns = list(itertools.product([False, True], repeat=4))
    for smooth in patterns:
        pipe.generate([1], seeds=3, smooth=list(smooth))
    (smooth_slot,) = (slot for key, slot in pipe.engine._slots.items() if key[2])
    assert [form.smooths for form in smooth_slot.stages] == patterns[-MAX_FORMS:]


@pytest.mark.parametrize("name", ["defaults", "ends-in-zeros"])
def test_one_plan_with_a_profile_per_scale(host, bundle, onnx, name):
    pipe = load(bundle, engine="tensorrt", plans="profiles-1-1-4")
    assert_same(pipe.generate(**REQUESTS[name]), onnx.generate(**REQUESTS[name]))
    assert len(host.recorder.of("deserialize_cuda_engine")) == 4  # condition, scales, finish, decoder
    profiles = {call["profile_index"] for call in host.recorder.of("set_optimization_profile_async")}
    assert profiles == set(range(pipe.bundle.manifest.var.num_scales))


@pytest.mark.parametrize("name", ["ends-in-zeros", "in-parts", "smooth"])
def test_draws_on_the_host(host, bundle, onnx, name):
    pipe = load(bundle, engine="tensorrt", draw="host")
    got = pipe.generate(**REQUESTS[name])
    assert_same(got, onnx.generate(**REQUESTS[name]), smooth=name == "smooth")
    assert got.parts == (2 if name == "in-parts" else 1)
    assert host.cuda.launches == []
    assert host.cuda.graph_launches == 0


def test_a_generation_is_one_graph(host, bundle):
    pipe = load(bundle, engine="tensorrt")
    first = pipe.generate([3], seeds=1)
    scales = pipe.bundle.manifest.var.num_scales
    graphs = ["condition.onnx", *(f"scale_{k:02d}.onnx" for k in range(scales)), "finish.onnx", "decoder.onnx"]
    assert host.executions == 2 * graphs  # once as they are, then the replay
    host.executions.clear()
    host.cuda.launches.clear()
    host.recorder.calls.clear()
    assert_same(pipe.generate([3], seeds=1), first)
    assert host.cuda.graph_launches == 2
    assert host.executions == graphs
    assert host.cuda.launches == ["_uniforms_kernel", *["_draw_kernel"] * scales]
    assert host.recorder.calls == []  # nothing of TensorRT is called any more


def test_previews_replay_stage_by_stage(host, pipe, onnx):
    asked, heard, expected = REQUESTS["in-parts"], [], []
    got = pipe.generate(**asked, on_scale=heard.append)
    theirs = onnx.generate(**asked, on_scale=expected.append)
    assert_same(got, theirs)
    assert [(p.scale, p.first, len(p.tokens_Bn)) for p in heard] == [
        (k, first, size) for first, size in ((0, 4), (4, 2)) for k in range(len(theirs.tokens))
    ]
    for preview in heard:
        rows = slice(preview.first, preview.first + len(preview.tokens_Bn))
        np.testing.assert_array_equal(preview.tokens_Bn, theirs.tokens[preview.scale][rows])
        np.testing.assert_allclose(preview.f_hat_BChh, expected[preview.scale].f_hat_BChh[rows], atol=1e-5, rtol=0)
    np.testing.assert_allclose(heard[-1]._engine.decode(heard[-1].f_hat_BChh), got.pixels[4:], atol=1e-5, rtol=0)
    with pytest.raises(EngineError, match="generate: called from the on_scale of another generation"):
        pipe.generate([1], on_scale=lambda _: pipe.generate([2]))
    assert_same(pipe.generate([4], seeds=2**64 - 1), onnx.generate([4], seeds=2**64 - 1))


def test_encoding_and_decoding(host, pipe, onnx):
    """More images than the plans take at a time."""
    pixels = onnx.generate([1, 2, 3, 4, 5], seeds=2).pixels
    tokens, expected = pipe.encode(pixels), onnx.encode(pixels)
    for got_Bn, expected_Bn in zip(tokens, expected, strict=True):
        np.testing.assert_array_equal(got_Bn, expected_Bn)
    np.testing.assert_allclose(pipe.decode(tokens), onnx.decode(expected), atol=1e-5, rtol=0)


def test_contexts_share_scratch_memory_and_have_addresses_of_their_own(host, bundle):
    pipe = load(bundle, engine="tensorrt")
    before = host.cuda.allocated
    pipe.generate([1, 2], seeds=1)
    contexts = len(pipe.bundle.manifest.var.tokens_per_scale) + 3
    assert len(host.recorder.of("create_execution_context")) == contexts
    scratch = {(call["memory"], call["size"]) for call in host.recorder.of("set_device_memory")}
    assert len(scratch) == 1
    aliased = {call["name"] for call in host.recorder.of("get_aliased_input_tensor")}
    assert aliased == {f"cache_{kv}.{i}.out" for kv in "kv" for i in range(pipe.bundle.manifest.var.depth)}
    assert host.cuda.allocated > before
    pipe.engine.release()
    gc.collect()
    assert host.cuda.allocated == before


def test_an_engine_that_is_gone_holds_nothing(host, bundle):
    gc.collect()
    before = host.cuda.allocated, len(host.cuda.pinned)
    pipe = load(bundle, engine="tensorrt")
    pipe.generate([1, 2], seeds=1)
    pipe.generate([1, 2], seeds=1, on_scale=lambda _: None)
    pipe.encode(pipe.generate([1]).pixels)
    del pipe
    gc.collect()
    assert (host.cuda.allocated, len(host.cuda.pinned)) == before


def test_half_precision(host, tiny_pair, tmp_path):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "fp16", precision="fp16")
    build_plans(path, batch=BATCH)
    pipe, onnx = load(path, engine="tensorrt"), load(path, engine="onnx")
    got, expected = pipe.generate([1, 2], seeds=3, top_k=1), onnx.generate([1, 2], seeds=3, top_k=1)
    assert_same(got, expected)
    assert pipe.engine.precision == "fp16"


def test_verify_holds_it_to_the_reference(bundle, tiny_pair):
    parity = verify_bundle(bundle, *tiny_pair[1:], engine="tensorrt")
    assert parity.passed
    assert parity.exact


def test_requests_of_several_threads(pipe, onnx):
    names = ["defaults", "alone", "unguided", "ends-in-zeros"]
    got: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, name=name: got.update({i: pipe.generate(**REQUESTS[name])}))
        for i, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, name in enumerate(names):
        assert_same(got[i], onnx.generate(**REQUESTS[name]))


def test_times_and_memory_for_benchmarks(host, bundle):
    pipe = load(bundle, engine="tensorrt")
    row = bench(pipe, batches=[2], repeats=1, reference=False)[0]
    scales = [f"scale_{k:02d}" for k in range(pipe.bundle.manifest.var.num_scales)]
    assert list(row.stages) == ["upload", "condition", "scale_00", "draw", *scales[1:], "finish", "decode", "download"]
    assert row.engine == "tensorrt"
    assert row.device == "cuda:0"
    assert row.device_seconds.median == pytest.approx(0.0005)  # one graph, by the clock of the host's CUDA
    assert row.without_decoder.median == pytest.approx(0.0005)
    sizes = sum(block.nbytes for block in host.cuda.device_memory.values())
    assert 0 < row.device_peak_bytes <= sizes
    seconds = cuda_clock(pipe.engine).device_seconds(np.array([1]), [0], settings(pipe), staged=True, decode=False)
    assert "decode" not in seconds


def settings(pipe: Pipeline) -> Settings:
    return schedules.settings(pipe.bundle.manifest)


# memory ---------------------------------------------------------------------------------------------------------------


def test_other_batch_sizes_make_room(host, bundle, monkeypatch):
    pipe = load(bundle, engine="tensorrt")
    expected = pipe.generate([1, 2, 3], seeds=5)
    monkeypatch.setattr(host.cuda, "limit", host.cuda.allocated + 1000)
    assert_same(pipe.generate([1], seeds=5), pipe.generate([1], seeds=5))
    assert_same(pipe.generate([1, 2, 3], seeds=5), expected)


def test_too_little_memory_is_told(host, bundle, monkeypatch):
    pipe = load(bundle, engine="tensorrt")
    monkeypatch.setattr(host.cuda, "limit", host.cuda.allocated + 1000)
    with pytest.raises(EngineError, match=r"^2 rows: need 0.0 GB for caches and logits and some for scratch, 0.0 GB"):
        pipe.generate([1])
    monkeypatch.undo()
    pipe.generate([1])
    monkeypatch.setattr(host, "scratch", host.cuda.limit)
    with pytest.raises(EngineError, match=r"do not fit into the GPU's memory .*; build --layout profiles, or free"):
        load(bundle, engine="tensorrt")


# what may be wrong ----------------------------------------------------------------------------------------------------


def altered(record: Path, **changes: object) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


BUILD = r"run var-deploy build .*bundle on this machine"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda p: shutil.rmtree(p / "plans"), f"bundle: has no TensorRT plans; {BUILD}"),
        (
            lambda p: (p / PLACE).rename(p / "plans" / "nvidia-a100-sm80-11.4.0.106"),
            f"bundle: has plans for nvidia-a100-sm80-11.4.0.106, this is nvidia-h200-sm90-11.4.0.106; {BUILD}",
        ),
        (
            lambda p: [(directory / "plans.json").unlink() for directory in (p / PLACE).glob("p*")],
            f"holds no finished plans; {BUILD}",
        ),
        (
            lambda p: [(d / "plans.json").write_text("{") for d in (p / PLACE).glob("p*")],
            rf"per-scale-1-1-4/plans.json: damaged \(.*\); {BUILD}",
        ),
        (
            lambda p: [altered(d / "plans.json", bundle="00") for d in (p / PLACE).glob("p*")],
            f"per-scale-1-1-4: built from another export of this bundle; {BUILD}",
        ),
        (
            lambda p: [altered(d / "plans.json", plans={}) for d in (p / PLACE).glob("p*")],
            f"profiles-1-1-4: not finished, condition, scales, finish, decoder, encoder missing; {BUILD}",
        ),
        (
            lambda p: (p / PLACE / "per-scale-1-1-4" / "finish.plan").write_bytes(b"{}"),
            f"finish.plan: damaged, it is not what was built; {BUILD}",
        ),
        (
            lambda p: (p / PLACE / "per-scale-1-1-4" / "finish.plan").unlink(),
            rf"finish.plan: cannot be read \(No such file or directory\); {BUILD}",
        ),
        (
            lambda p: altered(p / PLACE / "per-scale-1-1-4" / "plans.json", kernels=None),
            f"per-scale-1-1-4: built without kernels of the draw; install triton and {BUILD}, or draw on the host",
        ),
        (
            lambda p: altered(p / PLACE / "per-scale-1-1-4" / "kernels" / "kernels.json", capability=[8, 0]),
            f"kernels.json: damaged, it is not what was built; {BUILD}",
        ),
        (
            lambda p: (p / PLACE / "per-scale-1-1-4" / "kernels" / "draw.cubin").write_bytes(b"{}"),
            "draw.cubin: has changed; build the plans again",
        ),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_used(host, copy, spoil, line):
    spoil(copy)
    with pytest.raises(EngineError, match=line):
        load(copy, engine="tensorrt")


def raising(*_: object) -> None:
    raise RuntimeError("a shape that does not fit")


@pytest.mark.parametrize(
    ("cls", "method", "answer", "line"),
    [
        ("Runtime", "deserialize_cuda_engine", lambda *_, **__: None, r"condition.plan: TensorRT 11.4.0.106 does not"),
        ("ICudaEngine", "num_io_tensors", lambda _: 1, "condition.plan: takes and returns labels, expected head_mod"),
        (
            "ICudaEngine",
            "get_aliased_input_tensor",
            lambda _, name: "",
            r"scale_00.plan: cache_k.0.out is not written in place \(aliased with nothing, expected cache_k.0\)",
        ),
        ("OnnxParserRefitter", "refit_from_file", lambda *_, **__: False, "its weights could not be read for the plan"),
        ("Refitter", "get_missing_weights", lambda _: list("abcd"), "has no weights named a, b, c and 1 more, which"),
        ("Refitter", "refit_cuda_engine", lambda _: False, "condition.onnx: its weights could not be put into "),
        ("ICudaEngine", "create_execution_context", lambda *_, **__: None, r"2 rows: need .*no context could be"),
        ("IExecutionContext", "set_optimization_profile_async", lambda *_, **__: False, "profile 0 was refused: it"),
        ("IExecutionContext", "set_input_shape", lambda *_, **__: False, r"labels of shape \(2,\) was refused by"),
        ("IExecutionContext", "set_tensor_address", lambda *_, **__: False, "condition: the address of labels was"),
        ("IExecutionContext", "infer_shapes", raising, "condition: TensorRT failed: a shape that does not fit"),
        ("IExecutionContext", "infer_shapes", lambda _: ["labels"], "does not know the shapes of labels: it gave no"),
        ("IExecutionContext", "execute_async_v3", lambda *_, **__: False, "condition: TensorRT did not run it: it"),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses(host, bundle, monkeypatch, cls, method, answer, line):
    monkeypatch.setitem(host.recorder.behaviours, (cls, method), answer)
    with pytest.raises(EngineError, match=line):
        load(bundle, engine="tensorrt").generate([1])


def test_the_reason_is_what_tensorrt_logged(host, bundle, monkeypatch):
    def refuse(made: Any, **_: object) -> None:
        logger = next(
            c.arguments["logger"]
            for c in reversed(host.recorder.calls)
            if c.cls == "Runtime" and c.arguments.get("logger")
        )
        logger.log(host.recorder.trt.ILogger.Severity.ERROR, "magic tag does not match")

    monkeypatch.setitem(host.recorder.behaviours, ("Runtime", "deserialize_cuda_engine"), refuse)
    with pytest.raises(EngineError, match="does not take it: magic tag does not match"):
        load(bundle, engine="tensorrt")


def test_what_a_callback_raises_is_not_kept_for_later(host, bundle, monkeypatch):
    def interrupted(made: Any, **_: object) -> Any:
        logger = next(call.arguments["logger"] for call in host.recorder.calls if call.cls == "Runtime")
        monkeypatch.setattr(tensorrt_library.log, "log", raising)
        logger.log(host.recorder.trt.ILogger.Severity.INFO, "loading")
        return deserialize(made, **_)

    deserialize = host.recorder.behaviours["Runtime", "deserialize_cuda_engine"]
    monkeypatch.setitem(host.recorder.behaviours, ("Runtime", "deserialize_cuda_engine"), interrupted)
    with pytest.raises(RuntimeError, match="a shape that does not fit"):
        load(bundle, engine="tensorrt")


def test_plans_that_do_not_fit_are_told_before_they_are_loaded(host, bundle, monkeypatch):
    monkeypatch.setattr(host.cuda, "limit", host.cuda.allocated + 1000)
    host.recorder.calls.clear()
    line = (
        r"per-scale-1-1-4: needs 0\.0 GB for weights and caches, 0\.0 GB of the GPU's memory are free; build --layout p"
    )
    with pytest.raises(EngineError, match=line):
        load(bundle, engine="tensorrt")
    assert host.recorder.of("deserialize_cuda_engine") == []


def test_a_capture_that_fails_runs_without_graphs(host, bundle, onnx, monkeypatch, caplog):
    monkeypatch.setattr(host.cuda.runtime, "cudaGraphInstantiate", lambda *_: (Error.cudaErrorInvalidValue, None))
    pipe = load(bundle, engine="tensorrt")
    got = pipe.generate(**REQUESTS["defaults"])
    assert "capturing a CUDA graph: CUDA says cudaErrorInvalidValue" in caplog.text
    assert "running without CUDA graphs" in caplog.text
    assert_same(got, onnx.generate(**REQUESTS["defaults"]))
    assert host.cuda.graph_launches == 0


def test_logits_that_are_no_numbers(host, pipe):
    """Told, and the engine stays usable."""
    expected = pipe.generate([1, 2], seeds=1)
    weights = pipe.engine._codebook_VC
    poisoned = np.full(weights.shape, np.nan, np.float32)
    whole = pipe.engine.device.download(weights)
    pipe.engine.device.upload(weights, poisoned)
    try:
        with pytest.raises(EngineError, match=r"scale 1: logits of image 0 hold NaN or infinity; check the bundle"):
            pipe.generate([1, 2], seeds=1)
    finally:
        pipe.engine.device.upload(weights, whole)
    assert_same(pipe.generate([1, 2], seeds=1), expected)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"device": "cpu"}, "engine 'tensorrt' needs an NVIDIA GPU, got device 'cpu'; use engine 'onnx'"),
        ({"device": "cuda:1"}, "device 'cuda:1': this machine has 1 GPUs, counted from 0"),
        ({"plans": "x"}, "has no plans 'x', only per-scale-1-1-4, profiles-1-1-4; run var-deploy build"),
        ({"draw": "x"}, "unknown draw 'x'; known: device, host"),
        ({"threads": 2}, "engine 'tensorrt' has no option threads; leave it out"),
        ({"precision": "fp16"}, "engine 'tensorrt': the bundle is fp32, got precision 'fp16'; export that"),
    ],
)
def test_options(host, bundle, options, line):
    with pytest.raises(EngineError, match=line):
        load(bundle, engine="tensorrt", **options)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_options_are_of_this_engine_alone(bundle, engine):
    for name, value in {"plans": "per-scale-1-1-4", "draw": "host"}.items():
        with pytest.raises(EngineError, match=f"engine '{engine}' has no option {name}; leave it out"):
            load(bundle, engine=engine, device="cpu", **{name: value})


def test_a_machine_without_tensorrt_or_cuda(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"cuda-python cannot be used \(.*\): pip install cuda-python"):
        load(bundle, engine="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt: cannot be used \(.*\): pip install 'var-deploy\[tensorrt\]' wh"):
        load(bundle, engine="tensorrt")
