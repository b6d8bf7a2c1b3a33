"""The builder against TensorRT's real signatures: which calls, with what, in which order. No plan is built."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.export.recorded_tensorrt import Recorder, real_bindings
from tests.var_deploy.host_cuda import HostCuda, host_compiled
from var_deploy.bundle import Bundle, sha256_of
from var_deploy.cli import app
from var_deploy.engines import tensorrt_library
from var_deploy.engines.cuda import kernels as cuda_kernels
from var_deploy.errors import BundleError, EngineError, RequestError
from var_deploy.gpu import Gpu
from var_deploy.locks import exclusive
from var_deploy.plans import Batch, Layout, find_plans
from var_export import tensorrt as builder
from var_export.bundle import write_bundle
from var_export.plugin_graphs import plugin_graphs
from var_export.tensorrt import build_plans
from var_export.tensorrt_plans import plans_of
from var_kernels import ahead_of_time
from var_train.checkpoint import load_pair

BATCH = Batch(least=1, tuned=1, most=4)
GPU = Gpu(name="NVIDIA H200", capability=(9, 0), free_memory=140 * 10**9)


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    return real_bindings(tmp_path_factory.mktemp("bindings"))


@pytest.fixture
def recorder(bindings, monkeypatch) -> Recorder:
    recorder = Recorder(bindings)
    built = iter(range(1000))

    def add_profile(profile: object) -> int:
        """Counts those of the newest configuration."""
        methods = [call.method for call in reversed(recorder.calls)]
        return methods[: methods.index("create_builder_config")].count("add_optimization_profile") - 1

    recorder.answers = {
        ("IBuilderConfig", "add_optimization_profile"): add_profile,
        ("Builder", "build_serialized_network"): lambda **_: f"plan {next(built)}".encode(),
        ("ITimingCache", "serialize"): lambda **_: b"timings",
        ("INetworkDefinition", "num_layers"): lambda: 0,
    }
    monkeypatch.setitem(sys.modules, "tensorrt", recorder)
    monkeypatch.setattr(ahead_of_time, "compiled", host_compiled)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return recorder


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def built(bundle: Path, **options: object) -> Path:
    return build_plans(bundle, **{"batch": BATCH, "gpu": GPU, **options})


def test_every_plan_is_built_and_sealed(recorder, bundle):
    directory = built(bundle)
    assert directory == bundle / "plans" / "nvidia-h200-sm90-11.4.0.106" / "per-scale-1-1-4"
    plans = plans_of(Bundle.open(bundle), BATCH, Layout.PER_SCALE)
    assert sorted(path.name for path in directory.glob("*.plan")) == sorted(f"{plan.name}.plan" for plan in plans)
    assert [call["model"] for call in recorder.of("parse_from_file")] == [str(bundle / plan.graph) for plan in plans]
    record = json.loads((directory / "plans.json").read_text())
    assert {key: record[key] for key in ("precision", "batch", "layout")} == {
        "precision": "fp32",
        "batch": "1:1:4",
        "layout": "per-scale",
    }
    assert record["plans"].keys() == {plan.name for plan in plans}
    assert not any(entry["attention_not_fused"] for entry in record["plans"].values())
    assert (directory.parent / "timing.cache").read_bytes() == b"timings"
    assert record["kernels"] == sha256_of(directory / "kernels" / "kernels.json")
    Bundle.open(bundle)  # still whole


def test_order_and_flags_of_one_build(recorder, bundle):
    built(bundle, workspace=123, optimization_level=5)
    trt, methods = recorder.trt, [(call.cls, call.method) for call in recorder.calls]
    first = methods[: methods.index(("Builder", "create_network"), 2)]
    order = [
        ("Builder", "__init__"),
        ("Builder", "create_network"),
        ("OnnxParser", "__init__"),
        ("OnnxParser", "parse_from_file"),
        ("Builder", "create_builder_config"),
        ("IBuilderConfig", "add_optimization_profile"),
        ("IBuilderConfig", "set_timing_cache"),
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "get_timing_cache"),
    ]
    places = [first.index(step) for step in order]
    assert places == sorted(places)
    flags = [call["flag"] for call in recorder.of("set_flag")]
    assert set(flags) == {trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL}
    assert {call["flag"] for call in recorder.of("clear_flag")} == {trt.BuilderFlag.TF32}
    assert {call["value"] for call in recorder.of("builder_optimization_level")} == {5}
    assert recorder.of("set_memory_pool_limit")[0] == {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 123}


def test_what_is_float32_in_a_bundle_of_halves_is_not_rounded_either(recorder, tiny_pair, tmp_path):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "fp16", precision="fp16")
    record = json.loads((built(path) / "plans.json").read_text())
    assert record["precision"] == "fp16"
    assert {call["flag"] for call in recorder.of("clear_flag")} == {recorder.trt.BuilderFlag.TF32}
    assert recorder.of("set_memory_pool_limit") == []


def test_profiles_are_pinned(recorder, bundle):
    built(bundle, layout=Layout.PROFILES)
    scales = Bundle.open(bundle).manifest.var.num_scales
    pinned = recorder.of("set_shape_input")
    assert [call["min"] for call in pinned] == [[k] for k in range(scales)]
    assert all(call["input"] == "scale" and call["min"] == call["opt"] == call["max"] for call in pinned)
    assert len(recorder.of("extra_memory_target")) == scales - 1
    shapes = [call for call in recorder.of("set_shape") if call["input"] == "cache_v.1"]
    assert len(shapes) == scales
    assert [call["max"][0] for call in shapes] == [8] * scales
    assert "scale" not in {call["input"] for call in recorder.of("set_shape")}


def test_an_interrupted_build_goes_on(recorder, bundle):
    whole = recorder.answers["Builder", "build_serialized_network"]
    done = iter(range(3))

    def interrupted(**arguments):
        if next(done, None) is None:
            raise KeyboardInterrupt
        return whole(**arguments)

    recorder.answers["Builder", "build_serialized_network"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        built(bundle)
    recorder.answers["Builder", "build_serialized_network"] = whole
    recorder.calls.clear()
    directory = built(bundle)
    plans = plans_of(Bundle.open(bundle), BATCH, Layout.PER_SCALE)
    assert len(recorder.of("parse_from_file")) == len(plans) - 3
    assert recorder.of("create_timing_cache")[0] == {"serialized_timing_cache": b"timings"}
    recorder.calls.clear()
    built(bundle)
    assert recorder.of("parse_from_file") == []
    # What was damaged, or is of another batch, is built again.
    (directory / "finish.plan").write_bytes(b"plan x")
    built(bundle)
    assert [Path(call["model"]).name for call in recorder.of("parse_from_file")] == ["finish.onnx"]
    recorder.calls.clear()
    other = built(bundle, batch=Batch(least=1, tuned=1, most=5))
    assert len(recorder.of("parse_from_file")) == len(plans)
    assert other != directory
    recorder.calls.clear()
    built(bundle)  # those of the first batch are still there
    assert recorder.of("parse_from_file") == []
    built(bundle, optimization_level=4)
    assert len(recorder.of("parse_from_file")) == len(plans)


@pytest.mark.parametrize("where", ["step", "log"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_a_callback_raises_ends_the_build(recorder, bundle, where, error):
    """The bindings let nothing out of a callback: they cancel the build, or go on as if nothing had been."""

    def stop(*_: object) -> None:
        raise error

    def build(network: object, config: object) -> bytes | None:
        monitor, logger = recorder.of("progress_monitor")[-1]["value"], recorder.calls[0].arguments["logger"]
        monitor.phase_start("Building", None, 2)
        if where == "log":
            logger.log(recorder.trt.ILogger.Severity.INFO, "working")
        return b"plan" if monitor.step_complete("Building", 0) else None

    recorder.answers["Builder", "build_serialized_network"] = build
    with pytest.MonkeyPatch.context() as patch:
        if where == "log":
            patch.setattr(tensorrt_library.log, "log", stop)
        with pytest.raises(error):
            built(bundle, progress=stop if where == "step" else lambda *_: None)
    assert len(recorder.of("parse_from_file")) == 1  # no second try
    assert list((bundle / "plans").rglob("*.plan")) == []


@pytest.mark.parametrize("answer", ["no cache", "refused"])
def test_a_timing_cache_of_no_use_is_made_anew(recorder, bundle, caplog, answer):
    directory = built(bundle)
    (directory / "finish.plan").unlink()
    empty = recorder.make("ITimingCache")
    if answer == "no cache":
        recorder.answers["IBuilderConfig", "create_timing_cache"] = lambda serialized_timing_cache: (
            None if serialized_timing_cache else empty
        )
    else:
        answers = iter([False, True])
        recorder.answers["IBuilderConfig", "set_timing_cache"] = lambda **_: next(answers)
    built(bundle)
    assert (directory / "finish.plan").is_file()
    assert "timing.cache: of no use here; timing everything anew" in caplog.text
    assert recorder.of("create_timing_cache")[-1] == {"serialized_timing_cache": b""}


def test_a_profile_that_is_refused(recorder, bundle):
    recorder.answers["IBuilderConfig", "add_optimization_profile"] = lambda **_: -1
    with pytest.raises(EngineError, match=r"tensorrt: condition.onnx: profile 0 was refused; report the"):
        built(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_a_damaged_record_is_no_plan(recorder, bundle, content):
    directory = built(bundle)
    if content is None:
        content = json.dumps(json.loads((directory / "plans.json").read_text()) | {"plans": 3})
    (directory / "plans.json").write_text(content)
    recorder.calls.clear()
    built(bundle)
    assert len(recorder.of("parse_from_file")) == len(plans_of(Bundle.open(bundle), BATCH, Layout.PER_SCALE))


def test_attention_is_decomposed_where_nothing_fused_fits(recorder, bundle, caplog):
    attention, kinds = recorder.make("IAttention"), recorder.trt.LayerType
    recorder.answers |= {
        ("INetworkDefinition", "num_layers"): lambda: 2,
        ("ILayer", "type"): iter([kinds.SHUFFLE, kinds.ATTENTION_INPUT] * 99).__next__,
        ("IAttentionInputLayer", "attention"): lambda: attention,
    }
    whole, tries = recorder.answers["Builder", "build_serialized_network"], iter([True, False])

    def build(**arguments: object) -> bytes | None:
        if not next(tries, False):
            return whole(**arguments)
        logger = recorder.calls[0].arguments["logger"]
        return logger.log(recorder.trt.ILogger.Severity.ERROR, "no kernel fits")

    recorder.answers["Builder", "build_serialized_network"] = build
    directory = built(bundle)
    assert recorder.of("decomposable") == [{"value": True}]
    assert "condition: no plan with fused attention (no kernel fits); trying with several kernels" in caplog.text
    plans = json.loads((directory / "plans.json").read_text())["plans"]
    reasons = {name: entry["attention_not_fused"] for name, entry in plans.items() if entry["attention_not_fused"]}
    assert reasons == {"condition": "no kernel fits"}


def test_a_graph_that_cannot_be_built_leaves_what_was_before(recorder, bundle, caplog):
    recorder.answers["Builder", "build_serialized_network"] = lambda **_: None
    with pytest.raises(EngineError, match=r"tensorrt: condition.onnx could not be built: TensorRT gave no reason"):
        built(bundle)
    assert list((bundle / "plans").rglob("*.plan")) == []
    assert "several kernels" not in caplog.text  # it has no attention
    assert len(recorder.of("build_serialized_network")) == 1


def test_errors_of_the_parser_name_the_node(recorder, bundle):
    recorder.answers |= {
        ("OnnxParser", "parse_from_file"): lambda **_: False,
        ("OnnxParser", "num_errors"): lambda: 2,
        ("OnnxParser", "get_error"): lambda **_: recorder.make("ParserError"),
        ("ParserError", "node_name"): lambda: "Attention_9",
        ("ParserError", "node_operator"): lambda: "Attention",
        ("ParserError", "desc"): lambda: "no fused kernel",
    }
    line = (
        r"condition.onnx was not read: Attention_9 \(Attention\): no fused kernel; Attention_9 \(Attention\): no fused"
    )
    with pytest.raises(EngineError, match=line):
        built(bundle)


def test_messages_and_progress_of_tensorrt_are_passed_on(recorder, bundle, caplog):
    told: list[tuple[str, str, int, int]] = []

    def build(network: object, config: object) -> bytes:
        monitor = recorder.of("progress_monitor")[-1]["value"]
        monitor.phase_start("Building", None, 3)
        assert monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
        logger = recorder.calls[0].arguments["logger"]
        logger.log(recorder.trt.ILogger.Severity.WARNING, "slow")
        logger.log(recorder.trt.ILogger.Severity.VERBOSE, "chatter")
        return b"plan"

    recorder.answers["Builder", "build_serialized_network"] = build
    with caplog.at_level(logging.INFO, logger="var_deploy"):
        built(bundle, progress=lambda *step: told.append(step))
    assert told[0] == ("condition", "Building", 2, 3)
    assert "TensorRT: slow" in caplog.text
    assert "chatter" not in caplog.text


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout.PER_SCALE, "layout per-scale needs .* GB for 4 copies of the weights and the caches, NVIDIA H200 has "
                           "0.0 GB free; use layout profiles, or make the batch smaller"),
        (Layout.PROFILES, "layout profiles needs .* GB for 1 copies of the weights and the caches, NVIDIA H200 has "
                          "0.0 GB free; make the batch smaller"),
    ],
)  # fmt: skip
def test_too_little_memory_is_told_before_anything_is_built(recorder, bundle, layout, words):
    with pytest.raises(EngineError, match=words):
        built(bundle, layout=layout, gpu=replace(GPU, free_memory=1000))
    assert recorder.calls == []


def test_without_tensorrt(bundle, monkeypatch):
    for name in ("tensorrt", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EngineError, match=r"^tensorrt: cannot be used \(.*\): pip install 'var-deploy\[tensorrt\]' where"
    ):
        built(bundle)
    with pytest.raises(EngineError, match=r"^cuda-python cannot be used \(.*\): pip install cuda-python"):
        Gpu.at(None)


def test_another_version(recorder, bundle):
    recorder.__dict__["__version__"] = "10.9.0"
    with pytest.raises(EngineError, match=r"tensorrt: got version 10\.9\.0, expected 11\.4 or later, before 12"):
        built(bundle)


def test_a_machine_without_a_gpu(bindings, bundle, monkeypatch):
    """By the real bindings, whose libraries make no builder here."""
    monkeypatch.setitem(sys.modules, "tensorrt", bindings)
    with pytest.raises(EngineError, match="no builder could be made; is there an NVIDIA GPU with a driver for CUDA 13"):
        built(bundle)


def test_a_machine_whose_driver_is_too_old(recorder, bundle, monkeypatch):
    cuda = HostCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(cuda.runtime, "cudaGetDevice", lambda: (cuda.runtime.cudaError_t.cudaErrorInvalidValue, None))
    with pytest.raises(EngineError, match="no GPU can be used: CUDA says cudaErrorInvalidValue; check the driver with"):
        build_plans(bundle, batch=BATCH)


@pytest.mark.parametrize("why", ["no triton", "interpreter"])
def test_without_triton_plans_have_no_kernels(recorder, bundle, monkeypatch, caplog, why):
    if why == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
    directory = built(bundle)
    assert "without them an engine draws on the host, and only if asked to" in caplog.text
    assert json.loads((directory / "plans.json").read_text())["kernels"] is None
    assert not (directory / "kernels").exists()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", recorder)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ahead_of_time, "compiled", host_compiled)
    recorder.calls.clear()
    built(bundle)
    assert recorder.of("parse_from_file") == []  # the plans stay
    assert (directory / "kernels" / "draw.cubin").is_file()


def test_scales_with_plugins_lie_beside_the_plain_ones(recorder, bundle, monkeypatch):
    registered: list[tuple[int, int]] = []
    directory = built(bundle, plugins=registered.append)
    assert registered == [(9, 0)]
    assert directory.name == "per-scale-plugins-1-1-4"
    graphs = plugin_graphs(Bundle.open(bundle))
    assert [(call["model"], call["path"]) for call in recorder.of("parse")] == [
        (graph, str(bundle / f"{name}.onnx")) for name, graph in graphs.items()
    ]
    others = [Path(call["model"]).stem for call in recorder.of("parse_from_file")]
    assert others == ["condition", "finish", "decoder", "encoder"]
    record = json.loads((directory / "plans.json").read_text())
    assert record["compiled"]
    recorder.calls.clear()
    built(bundle, plugins=registered.append)
    assert recorder.of("parse") == []
    monkeypatch.setattr(builder, "version", lambda _: "0.0")  # other kernels would be compiled in
    built(bundle, plugins=registered.append)
    assert len(recorder.of("parse")) == len(graphs)
    plain = built(bundle)
    assert find_plans(Bundle.open(bundle), GPU, "11.4.0.106").directory == plain
    assert find_plans(Bundle.open(bundle), GPU, "11.4.0.106", directory.name).plugins
    with pytest.raises(
        RequestError, match="plugins: layout profiles has none, as their kernels are for one scale; use"
    ):
        built(bundle, plugins=registered.append, layout=Layout.PROFILES)


@pytest.mark.parametrize("what", ["cubin", "record", "source"])
def test_kernels_that_are_damaged_or_outdated_are_compiled_again(recorder, bundle, monkeypatch, what):
    directory = built(bundle) / "kernels"
    before = (directory / "draw.cubin").read_bytes()
    if what == "source":
        monkeypatch.setattr(cuda_kernels, "kernel_source", lambda: "of a newer version")
    else:
        (directory / {"cubin": "draw.cubin", "record": "kernels.json"}[what]).write_bytes(b"{}")
    recorder.calls.clear()
    built(bundle)
    assert recorder.of("parse_from_file") == []
    assert (directory / "draw.cubin").read_bytes() == before
    assert cuda_kernels.kernels_are_whole(directory)


def test_one_build_at_a_time(recorder, bundle):
    directory = built(bundle)
    with (
        exclusive(directory.parent / ".lock", "plans"),
        pytest.raises(BundleError, match=r"\.lock: another process makes plans here; wait until it has ended"),
    ):
        built(bundle, batch=Batch(least=1, tuned=1, most=2))
    built(bundle, batch=Batch(least=1, tuned=1, most=2))


def test_a_directory_that_cannot_be_written(recorder, bundle):
    (bundle / "plans").write_text("a file")
    with pytest.raises(BundleError, match="plans cannot be written"):
        built(bundle)


def test_a_full_disk(recorder, bundle, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match=r"plans cannot be written \(.*No space left on device"):
        built(bundle)


def test_the_recorder_refuses_what_the_api_does_not_have(recorder):
    """The control: were it to take anything, no test above could fail."""
    made = recorder.make("Builder")
    for wrong in (
        lambda: recorder.Bilder,
        lambda: made.build_engine,
        lambda: recorder.BuilderFlag.FP16,
        lambda: setattr(recorder.make("IBuilderConfig"), "max_workspace_size", 1),
    ):
        with pytest.raises(AttributeError):
            wrong()
    for wrong in (
        lambda: recorder.Builder(),
        lambda: recorder.Builder("logger"),
        lambda: made.create_network(0, 1),
        lambda: made.create_network(flag=0),
        lambda: recorder.make("IBuilderConfig").set_flag(3),
        lambda: recorder.make("IOptimizationProfile").set_shape("x", (1,), (1,)),
        lambda: recorder.make("IBuilderConfig").add_optimization_profile(made),
        lambda: setattr(recorder.make("ILayer"), "__class__", recorder.IBuilderConfig),
    ):
        with pytest.raises(TypeError):
            wrong()


# the command ----------------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["build", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_builds(recorder, bundle, monkeypatch):
    HostCuda().install(monkeypatch)
    result = run(bundle, "--batch", "1:2:4", "--layout", "profiles", "--workspace", "2GB", "--precision", "fp32")
    assert result.exit_code == 0, result.exception
    assert result.output == f"{bundle / 'plans' / 'nvidia-h200-sm90-11.4.0.106' / 'profiles-1-2-4'}\n"
    assert recorder.of("set_memory_pool_limit")[0]["pool_size"] == 2 * 10**9
    assert not list(bundle.rglob("*plugins*"))
    assert len(recorder.of("set_shape_input")) == Bundle.open(bundle).manifest.var.num_scales


def test_the_command_prints_lines_without_tensorrt(bundle):
    lines = run(bundle, "--trtexec").output.splitlines()
    assert lines[0] == "mkdir -p trtexec"
    assert len(lines) == Bundle.open(bundle).manifest.var.num_scales + 5
    assert all(line.startswith("trtexec --onnx=") for line in lines[1:])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--batch", "4:2:1"], "batch: got '4:2:1', expected MIN:OPT:MAX of images with 1 ≤ MIN ≤ OPT ≤ MAX"),
        (["--layout", "one"], "layout: got 'one', expected per-scale or profiles"),
        (["--precision", "fp16"], "precision: the bundle has fp32, got 'fp16'; export --precision fp16 first"),
        (["--workspace", "much"], "memory limit: got 'much', expected megabytes or a size with its unit"),
    ],
)  # fmt: skip
def test_wrong_options(bundle, options, line):
    result = run(bundle, *options)
    assert result.exit_code == 1
    assert str(result.exception).startswith(line)
    assert not (bundle / "plans").exists()
