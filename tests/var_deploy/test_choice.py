"""Which engine is taken and why, what a missing piece is told, and every option that an engine would not follow."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import var_deploy
from var_deploy.bundle import Bundle
from var_deploy.cpus import UsableCpus
from var_deploy.engines import EngineOptions, choice, engine_for, onnx_cuda
from var_deploy.engines import onnx as onnx_module
from var_deploy.engines.torch import engine as torch_module
from var_deploy.errors import EngineError
from var_deploy.precision import Precision
from var_deploy.prepared import PreparedCache, default_directory

Refused = Callable[..., str]
Taken = Callable[..., dict[str, Any]]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, verify_digests=False)


@pytest.fixture
def refused(bundle: Bundle) -> Refused:
    """`refused(engine, device, **options)`: the text of the error."""

    def refuse(engine: str = "auto", device: str = "auto", **options: Any) -> str:
        with pytest.raises(EngineError) as caught:
            engine_for(bundle, engine, device, EngineOptions(**options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def taken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Taken:
    """`taken(engine, device, **options)`: the engine that would start, with its arguments; nothing does."""
    started: list[dict[str, Any]] = []

    def start(name: str) -> Callable[..., None]:
        return lambda bundle, *device, **options: started.append({"engine": name, "device": device, **options})

    monkeypatch.setattr(onnx_module, "OnnxEngine", start("onnx"))
    monkeypatch.setattr(torch_module, "TorchEngine", start("torch"))

    def take(engine: str = "auto", device: str = "auto", **options: Any) -> dict[str, Any]:
        started.clear()
        engine_for(bundle, engine, device, EngineOptions(**options))
        (one,) = started
        return one

    return take


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(choice, "_driver_present", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one Hopper GPU."""
    monkeypatch.setattr(choice, "_driver_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def _without(monkeypatch: pytest.MonkeyPatch, library: str, *ours: str) -> None:
    """Makes importing a library fail, and imports the modules of ours that need it anew."""
    for name in list(sys.modules):
        if name == library or name.startswith((library + ".", *ours)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


# ---- what is unknown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "device", "options", "message"),
    [
        ("cuda", "auto", {}, "unknown engine 'cuda'; known: auto, onnx, torch, tensorrt"),
        ("", "auto", {}, "unknown engine ''; known: auto, onnx, torch, tensorrt"),
        ("Torch", "auto", {}, "unknown engine 'Torch'; known: auto, onnx, torch, tensorrt"),
        ("auto", "gpu", {}, "unknown device 'gpu'; known: auto, cpu, cuda, cuda:N"),
        ("torch", "cuda:", {}, "unknown device 'cuda:'; known: auto, cpu, cuda, cuda:N"),
        ("torch", "cuda:-1", {}, "unknown device 'cuda:-1'; known: auto, cpu, cuda, cuda:N"),
        ("torch", "cuda:0\n", {}, "unknown device 'cuda:0\\n'; known: auto, cpu, cuda, cuda:N"),
        ("torch", "cpu:0", {}, "unknown device 'cpu:0'; known: auto, cpu, cuda, cuda:N"),
        (
            "torch",
            "auto",
            {"precision": "fp4"},
            "unknown precision 'fp4'; known: auto, fp32, fp16, bf16, int8, fp8",
        ),
        (
            "auto",
            "auto",
            {"precision": "FP16"},
            "unknown precision 'FP16'; known: auto, fp32, fp16, bf16, int8, fp8",
        ),
        ("onnx", "auto", {"graphs": "both"}, "unknown graphs 'both'; known: symbolic, static"),
        ("onnx", "auto", {"threads": 0}, "threads: got 0, expected at least 1, or none for one per core"),
        ("onnx", "auto", {"threads": -2}, "threads: got -2, expected at least 1, or none for one per core"),
        (
            "torch",
            "auto",
            {"decode_slice": 0},
            "decode_slice: got 0, expected at least 1, or none for all images at once",
        ),
        (
            "onnx",
            "auto",
            {"memory_limit": 0},
            "memory_limit: got 0, expected at least 1, or none for what is free",
        ),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(refused, engine, device, options, message):
    assert refused(engine, device, **options) == message


# ---- options of the other engine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "device", "options", "message"),
    [
        ("onnx", "auto", {"decode_slice": 1}, "engine 'onnx' has no option decode_slice; leave it out"),
        ("auto", "cpu", {"compile_decoder": True}, "engine 'onnx' has no option compile_decoder; leave it out"),
        (
            "onnx",
            "cpu",
            {"decode_slice": 4, "compile_decoder": True},
            "engine 'onnx' has no option decode_slice, compile_decoder; leave it out",
        ),
        ("torch", "cpu", {"threads": 1}, "engine 'torch' has no option threads; leave it out"),
        ("torch", "cpu", {"memory_limit": 9}, "engine 'torch' has no option memory_limit; leave it out"),
        ("torch", "cpu", {"graphs": "static"}, "engine 'torch' has no option graphs; leave it out"),
        (
            "torch",
            "cpu",
            {"graphs": "static", "threads": 2},
            "engine 'torch' has no option threads, graphs; leave it out",
        ),
        ("auto", "cuda", {"threads": 2}, "engine 'torch' has no option threads; leave it out"),
        *(
            (
                engine,
                "cpu",
                {"precision": p},
                f"engine 'onnx': the bundle is fp32, got precision '{p}'; {export}use engine 'torch'",
            )
            for engine in ("onnx", "auto")
            for p, export in (
                *((p, f"export with --precision {p}, or ") for p in ("fp16", "bf16", "int8")),
                ("fp8", ""),
            )
        ),
    ],
)
def test_an_option_that_would_not_be_followed_is_refused(refused, engine, device, options, message):
    assert refused(engine, device, **options) == message


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("onnx", {"precision": "fp32", "graphs": "static", "threads": 1}),
        ("torch", {"precision": "fp32", "graphs": "symbolic", "decode_slice": 2, "compile_decoder": True}),
        ("auto", {"precision": "fp32", "threads": 1}),
    ],
)
def test_options_of_the_engine_itself_are_followed(taken, engine, options):
    started = taken(engine, "cpu", **options)
    expected = {"onnx": ("graphs", "threads"), "torch": ("precision", "decode_slice", "compile_decoder")}
    for name in expected[started["engine"]]:
        assert started[name] == options.get(name, EngineOptions.__dataclass_fields__[name].default)


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "asked", "threads", "said"),
    [
        (UsableCpus(cpus=8, cores=4, quota=None), None, 4, "threads 4 (4 cores of 8 CPUs: a core's second thread"),
        (UsableCpus(cpus=8, cores=4, quota=None), 8, 8, "threads 8 (asked for)"),
        (UsableCpus(cpus=8, cores=4, quota=2.5), None, 2, "threads 2 (the control group allows 2.5 of 8 CPUs)"),
        (UsableCpus(cpus=8, cores=4, quota=2.5), 1, 1, "threads 1 (asked for)"),
    ],
)
def test_threads_are_those_that_can_run_or_fewer(taken, monkeypatch, caplog, found, asked, threads, said):
    monkeypatch.setattr(choice, "usable_cpus", lambda: found)
    with caplog.at_level("INFO", logger="var_deploy"):
        assert taken("onnx", "cpu", threads=asked)["threads"] == threads
    assert said in caplog.text


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        (
            UsableCpus(cpus=8, cores=4, quota=None),
            9,
            "threads: got 9, this process may use 8 (8 CPUs by affinity); more would wait for each other, so give at "
            "most 8, or none for 4",
        ),
        (
            UsableCpus(cpus=8, cores=8, quota=0.5),
            2,
            "threads: got 2, this process may use 1 (the control group allows 0.5 of 8 CPUs); more would wait for each "
            "other, so give at most 1, or none for 1",
        ),
    ],
)
def test_more_threads_than_can_run_are_refused(refused, monkeypatch, found, asked, message):
    monkeypatch.setattr(choice, "usable_cpus", lambda: found)
    assert refused("onnx", "cpu", threads=asked) == message


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_an_error(refused, engine, device):
    expected = f"device '{device}': PyTorch {torch.__version__} sees no GPU; use device 'cpu'"
    assert refused(engine, device) == expected


@pytest.mark.parametrize("index", ["1", "99", "127"])
@pytest.mark.usefixtures("one_gpu")
def test_gpus_are_counted_from_0(refused, index):
    assert refused("torch", f"cuda:{index}") == (f"device 'cuda:{index}': this machine has 1 GPUs, counted from 0")


@pytest.mark.parametrize("index", ["01", "128", "255", "256", "300", "99999999999", "٣"])
@pytest.mark.usefixtures("one_gpu")
def test_a_number_that_is_no_gpus_is_an_error_of_ours(refused, index):
    """PyTorch refuses some of these with errors of its own, and keeps 8 bits of others: 256 would be GPU 0."""
    assert f"device 'cuda:{index}'" in refused("torch", f"cuda:{index}")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_runs_bf16_with_the_kernels(taken, device):
    pytest.importorskip("triton")
    started = taken("torch", device)
    assert started["engine"] == "torch"
    assert started["device"] == (torch.device("cuda", 0),)
    assert started["precision"] is Precision.BF16
    assert started["ops"].name == "triton"


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_runs_fp32_with_the_references(taken, device):
    started = taken("torch", device)
    assert started["device"] == (torch.device("cpu"),)
    assert started["precision"] is Precision.FP32
    assert started["ops"].name == "reference"


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_runs_every_precision(taken, precision):
    assert taken("torch", "cpu", precision=precision)["precision"] is precision


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
@pytest.mark.usefixtures("one_gpu")
def test_float8_needs_a_hopper_gpu(taken, refused, monkeypatch, capability, runs):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if runs:
        assert taken("torch", "cuda", precision="fp8")["precision"] is Precision.FP8
    else:
        expected = "precision 'fp8' needs a Hopper GPU or later (compute capability 9.0); use bf16 or int8"
        assert refused("torch", "cuda", precision="fp8") == expected
    assert taken("torch", "cuda", precision="int8")["precision"] is Precision.INT8


# ---- what "auto" takes -----------------------------------------------------------------------------------------------


def _logged(caplog: pytest.LogCaptureFixture, taken: Taken, *arguments: str, **options: Any) -> tuple[str, str]:
    """(engine, its line in the log) of a choice."""
    caplog.clear()
    with caplog.at_level("INFO", logger="var_deploy"):
        engine = taken(*arguments, **options)["engine"]
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("engine "))
    return engine, line


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_onnx_where_there_is_no_driver(taken, caplog):
    assert _logged(caplog, taken) == ("onnx", "engine onnx on cpu (no NVIDIA driver found), symbolic graphs")


@pytest.mark.parametrize("absent", [["torch"], ["triton"], ["torch", "triton"]], ids="-".join)
@pytest.mark.usefixtures("one_gpu")
def test_auto_says_what_the_gpu_would_need(taken, caplog, monkeypatch, absent):
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name in absent else object())
    engine, line = _logged(caplog, taken)
    assert engine == "onnx"
    reason = f"a GPU is there, but {' and '.join(absent)} is not installed: pip install 'var-deploy[gpu]'"
    assert line == f"engine onnx on cpu ({reason}), symbolic graphs"


@pytest.mark.usefixtures("one_gpu")
def test_auto_takes_onnx_where_pytorch_has_no_cuda(taken, caplog, monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "a GPU is there, but the installed PyTorch has no CUDA"
    assert _logged(caplog, taken) == ("onnx", f"engine onnx on cpu ({reason}), symbolic graphs")


@pytest.mark.usefixtures("one_gpu")
def test_auto_takes_torch_where_all_is_there(taken, caplog):
    pytest.importorskip("triton")
    device, precision = "cuda:0 (a GPU is there)", "precision bf16 (the default on a GPU)"
    expected = f"engine torch (a GPU is there) on {device}, {precision}, triton kernels"
    assert _logged(caplog, taken) == ("torch", expected)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.usefixtures("one_gpu")
def test_auto_takes_torch_for_a_gpu(taken, caplog, device):
    pytest.importorskip("triton")
    expected = "engine torch (the engine for GPUs) on cuda:0 (asked for), precision fp16 (asked for), triton kernels"
    assert _logged(caplog, taken, "auto", device, precision="fp16") == ("torch", expected)


@pytest.mark.usefixtures("one_gpu")
def test_auto_takes_onnx_for_a_cpu_even_beside_a_gpu(taken, caplog):
    expected = "engine onnx on cpu (the fastest engine on a CPU), static graphs"
    assert _logged(caplog, taken, "auto", "cpu", graphs="static") == ("onnx", expected)


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_is_too_old_is_left_alone(taken, refused, caplog, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "the GPU has compute capability 7.5, the kernels need 8.0 or later"
    assert _logged(caplog, taken) == ("onnx", f"engine onnx on cpu ({reason}), symbolic graphs")
    line = f"engine torch (asked for) on cpu ({reason}), precision fp32 (the default on a CPU), reference kernels"
    assert _logged(caplog, taken, "torch") == ("torch", line)
    assert refused("torch", "cuda") == f"device 'cuda': {reason}; use device 'cpu'"


@pytest.mark.usefixtures("no_gpu")
def test_what_was_asked_for_is_logged_as_such(taken, caplog):
    onnx = "engine onnx on cpu (asked for), symbolic graphs"
    torch_ = "engine torch (asked for) on cpu (asked for), precision int8 (asked for), reference kernels"
    assert _logged(caplog, taken, "onnx") == ("onnx", onnx)
    assert _logged(caplog, taken, "torch", "cpu", precision="int8") == ("torch", torch_)


@pytest.mark.usefixtures("no_gpu")
def test_what_auto_takes_of_device_and_precision_is_logged_with_its_reason(taken, caplog):
    where = f"cpu (PyTorch {torch.__version__} sees no GPU)"
    expected = f"engine torch (asked for) on {where}, precision fp32 (the default on a CPU), reference kernels"
    assert _logged(caplog, taken, "torch") == ("torch", expected)


@pytest.mark.parametrize(("platform", "library"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
@pytest.mark.parametrize("there", [True, False])
def test_the_driver_is_there_if_its_library_loads(monkeypatch, platform, library, there):
    asked = []

    def load(name: str) -> object:
        asked.append(name)
        if not there:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", platform)
    found = choice._driver_present()
    monkeypatch.undo()
    assert (found, asked) == (there, [library])


# ---- missing libraries -----------------------------------------------------------------------------------------------


def test_missing_onnxruntime_names_the_extra_to_install(refused, monkeypatch):
    _without(monkeypatch, "onnxruntime", "var_deploy.engines.onnx")
    for engine, device in (("onnx", "auto"), ("auto", "cpu")):
        message = refused(engine, device)
        assert message.startswith("engine 'onnx' needs onnxruntime (")
        assert message.endswith("); pip install 'var-deploy[cpu]'")


def test_missing_torch_names_the_extra_to_install():
    """In a process of its own: PyTorch cannot be imported twice."""
    program = """
import sys
from types import SimpleNamespace
sys.modules["torch"] = None
from var_deploy.engines import EngineOptions, engine_for
from var_deploy.errors import EngineError
from var_deploy.precision import Precision
bundle = SimpleNamespace(manifest=SimpleNamespace(precision=Precision.FP32))
for engine, device in (("torch", "cpu"), ("auto", "cuda")):
    try:
        engine_for(bundle, engine, device, EngineOptions())
    except EngineError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("engine 'torch' needs torch (")
        assert line.endswith("); pip install 'var-deploy[gpu]'")


@pytest.mark.usefixtures("one_gpu")
def test_missing_triton_names_the_extra_to_install(refused, taken, monkeypatch):
    _without(monkeypatch, "triton", *(f"var_kernels.{name}" for name in torch_module.reference_ops().__slots__))
    message = refused("torch", "cuda")
    assert message.startswith("engine 'torch' on a GPU needs triton (")
    assert message.endswith("); pip install 'var-deploy[gpu]'")
    assert taken("torch", "cpu")["ops"].name == "reference"  # which needs none


# ---- through the front door ------------------------------------------------------------------------------------------


def test_load_passes_every_option_on(tiny_bundle, taken, monkeypatch):
    """`taken` counts what starts; here through `load`."""
    seen: list[EngineOptions] = []
    original = choice.engine_for

    def record(bundle: Bundle, engine: str, device: str, options: EngineOptions) -> Any:
        seen.append(options)
        return original(bundle, engine, device, options)

    monkeypatch.setattr(var_deploy.pipeline, "engine_for", record)
    onnx = {"precision": "fp32", "graphs": "static", "decoder": "graph", "threads": 1}
    var_deploy.load(tiny_bundle, engine="onnx", device="cpu", **onnx, verify_digests=False)
    torch_ = {"precision": "fp16", "decode_slice": 3, "compile_decoder": True}
    var_deploy.load(tiny_bundle, engine="torch", device="cpu", **torch_, cache=False)
    kept = PreparedCache(directory=default_directory(), verify_digests=False)
    assert seen == [EngineOptions(**onnx, prepared=kept), EngineOptions(**torch_)]


# ---- precisions ------------------------------------------------------------------------------------------------------


def test_fp8_refuses_a_width_that_its_product_cannot_take(bundle):
    manifest = bundle.manifest
    odd = replace(bundle, manifest=replace(manifest, var=replace(manifest.var, ffn_dim=250)))
    with pytest.raises(EngineError) as caught:
        engine_for(odd, "torch", "cpu", EngineOptions(precision="fp8"))
    expected = "precision 'fp8' needs an ffn_dim that is a multiple of 16, got 250; use bf16 or int8"
    assert str(caught.value) == expected


@pytest.mark.parametrize(("precision", "warned"), [("fp32", True), ("bf16", False)])
def test_rounding_float32_products_are_warned_of(taken, caplog, precision, warned):
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        taken("torch", "cpu", precision=precision)
    finally:
        products.fp32_precision = before
    assert ("float32 products may round: this process has PyTorch compute them as 'bf16'" in caplog.text) is warned


def test_fp8_without_a_product_in_the_library_is_refused_before_weights_are_loaded(bundle, monkeypatch):
    def unsupported(*_, **__):
        raise RuntimeError("row-wise scaling is not supported\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", unsupported)
    monkeypatch.setattr(type(bundle), "weight", lambda *_: pytest.fail("a weight was loaded"))
    with pytest.raises(EngineError) as caught:
        engine_for(bundle, "torch", "cpu", EngineOptions(precision="fp8"))
    why = f"PyTorch {torch.__version__} has no float8 product on cpu (row-wise scaling is not supported)"
    assert str(caught.value) == f"precision 'fp8': {why}; use bf16 or int8"


# ---- bundles in lower precision --------------------------------------------------------------------------------------


@pytest.fixture
def lower(bundle: Bundle) -> Callable[[str], Bundle]:
    """`lower(precision)`: a bundle that says that it is of this precision."""
    return lambda precision: replace(bundle, manifest=replace(bundle.manifest, precision=Precision(precision)))


@pytest.mark.parametrize(
    ("precision", "engine", "device", "options", "message"),
    [
        (
            "int8",
            "onnx",
            "cpu",
            {"precision": "fp32"},
            "engine 'onnx': the bundle is int8, got precision 'fp32'; export with --precision fp32",
        ),
        (
            "int8",
            "auto",
            "auto",
            {"precision": "fp8"},
            "engine 'onnx': the bundle is int8, got precision 'fp8'; export fp32 for engine 'torch'",
        ),
        *(
            (
                p,
                "torch",
                device,
                options,
                f"engine 'torch' reads fp32 bundles, the bundle is {p}; use engine 'onnx'{where}, or export fp32",
            )
            for p, where in (("fp16", ""), ("int8", " on a CPU"))
            for device, options in (("cpu", {}), ("cuda", {"precision": p}))
        ),
        (
            "bf16",
            "torch",
            "cuda",
            {},
            "engine 'torch' reads fp32 bundles, the bundle is bf16; use engine 'onnx' on a GPU, or export fp32",
        ),
        *(
            (
                "bf16",
                engine,
                "cpu",
                options,
                "engine 'onnx': the bundle is bf16, which ONNX Runtime has no CPU kernels for; export int8 or fp32, "
                "or use device 'cuda'",
            )
            for engine, options in (("onnx", {}), ("auto", {"precision": "bf16"}))
        ),
        (
            "fp16",
            "onnx",
            "cpu",
            {"decoder": "winograd"},
            "decoder 'winograd' reads float32 weights, the bundle is fp16; use 'graph'",
        ),
    ],
)
def test_what_does_not_run_a_bundle_of_lower_precision_says_so(lower, precision, engine, device, options, message):
    with pytest.raises(EngineError) as caught:
        engine_for(lower(precision), engine, device, EngineOptions(**options))
    assert str(caught.value) == message


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("device", "chosen"), [("auto", 0), ("cuda:1", 1)])
def test_auto_takes_onnx_on_the_gpu_for_a_bundle_of_halves(lower, monkeypatch, precision, device, chosen):
    """Where its build for GPUs is installed."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(choice, "_installed", lambda name: name == "onnxruntime-gpu")
    monkeypatch.setattr(onnx_cuda, "onnx_cuda_engine", lambda _, index, **o: started.append({"index": index, **o}))
    engine_for(lower(precision), "auto", device, EngineOptions())
    assert started[0]["index"] == chosen
    assert f"the engine for {precision} bundles" in started[0]["reason"]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_auto_takes_onnx_for_an_int8_bundle_even_beside_a_gpu(lower, taken, caplog, asked):
    with caplog.at_level("INFO", logger="var_deploy"):
        engine_for(lower("int8"), "auto", "auto", EngineOptions(precision=asked))
    record = caplog.records[0]
    assert record.getMessage().startswith("engine onnx on cpu (the engine for int8 bundles), symbolic graphs")


def test_halves_on_a_cpu_are_warned_of(lower, taken, caplog):
    engine_for(lower("fp16"), "onnx", "cpu", EngineOptions())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "the bundle is fp16: on a CPU it is computed in float32, slower than a bundle of int8 or fp32"
