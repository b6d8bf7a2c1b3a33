"""The GPU suite without a GPU: order and targets as data, budget, rows that fail, runs cut short, the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.var_deploy.host_cuda import HostCuda, host_compiled
from var_deploy.bench import suite as bench_gpu
from var_deploy.bench.suite import COMPILE_SECONDS, SUITE, Entry, Measurement, OnRow, SuiteRun, write_page
from var_deploy.bench.table import NOT_MEASURED, TARGETS, Goal, Target, outcome, page
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines import onnx_cuda
from var_deploy.errors import RequestError, VarDeployError, run_command
from var_export import random_bundle
from var_kernels import ahead_of_time
from var_kernels.result_file import slug
from var_train import presets
from var_train.presets import PRESETS

ROOT = Path(__file__).parents[3]
ENTRIES = [Entry(model=name, batch=1) for name in ("a", "b", "c", "d")]


def spread(seconds: float) -> dict[str, float]:
    return dict.fromkeys(("median", "minimum", "maximum", "p10", "p90", "p99"), seconds) | {"count": 5}


def measured(entry: Entry, seconds: float = 0.003, **more: Any) -> dict[str, Any]:
    """A row as `bench` makes it."""
    row = {"batch": entry.batch, "precision": entry.precision, "seconds": spread(seconds), "failed": {}, "stages": {}}
    return row | {"images_per_second": entry.batch / seconds, "device_seconds": spread(0.8 * seconds)} | more


class FakeClock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def suite_run(out: Path, clock: FakeClock, budget: float = 1000.0) -> SuiteRun:
    return SuiteRun({"gpu": {"name": "Fake"}}, out, budget=budget, clock=clock)


def stored(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8"))


# ---- the suite as data -----------------------------------------------------------------------------------------------


def test_the_most_telling_rows_come_first_and_every_target_has_its_row():
    names = [entry.key for entry in SUITE if not entry.compiled]
    assert names[:3] == [("d16", "torch", "bf16", 1), ("d16", "torch", "bf16", 64), ("d30", "torch", "bf16", 1)]
    assert {entry.engine for entry in SUITE} == {"torch", "onnx", "tensorrt"}
    assert len(set(names)) == len(names)
    assert {entry.model for entry in SUITE} == set(PRESETS) - {"d12"}  # of which there is no published model
    assert {entry.precision for entry in SUITE if entry.model == "d16"} == {"bf16", "fp16", "int8", "fp8"}
    for target in TARGETS:
        entry = next(e for e in SUITE if (e.model, e.precision, e.batch) == (target.model, "bf16", target.batch))
        assert entry.reference or target.goal is not Goal.EAGER
    first = SUITE[0]
    assert first.reference
    assert first.stages


def test_nothing_is_compiled_before_the_rows_of_the_targets():
    (compiled,) = [i for i, entry in enumerate(SUITE) if entry.compiled]
    rows = {(target.model, target.batch) for target in TARGETS}
    assert rows <= {(entry.model, entry.batch) for entry in SUITE[:compiled] if entry.precision == "bf16"}
    assert SUITE[compiled].name == "d16 bf16 batch 1, compiled reference"


# ---- running it ------------------------------------------------------------------------------------------------------


def test_the_file_is_whole_after_every_row_and_as_soon_as_a_row_has_its_first_numbers(tmp_path):
    out, clock, seen = tmp_path / "new" / "gpu.json", FakeClock(), []

    def measure(entry, on_row):
        if out.is_file():
            seen.append([row["model"] for row in stored(out)["rows"]])
        on_row(measured(entry))
        seen.append([row["model"] for row in stored(out)["rows"]])

    suite_run(out, clock).run(ENTRIES[:2], measure)
    assert seen == [["a"], ["a"], ["a", "b"]]
    record = stored(out)
    assert record["gpu"] == {"name": "Fake"}
    assert len(record["targets"]) == len(TARGETS)
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]


COMPILING = Entry(model="a", batch=1, compiled=True)


def test_the_compiled_reference_joins_the_row_that_came_before(tmp_path):
    out, seen = tmp_path / "gpu.json", []

    def measure(entry, on_row):
        on_row(measured(entry, 0.009 if entry.compiled else 0.003, reference_how=None if entry.compiled else "eager"))
        seen.append(stored(out)["rows"][0].get("compiled"))
        if entry.compiled:
            on_row(measured(entry, 0.009, compiled=spread(0.004), compiled_speedup=1.3, reference_how="bf16"))

    suite_run(out, FakeClock()).run([*ENTRIES[:2], COMPILING], measure)
    assert seen == [None, None, None]
    first, second = stored(out)["rows"]
    assert (first["seconds"]["median"], first["compiled"]["median"], first["compiled_speedup"]) == (0.003, 0.004, 1.3)
    assert (first["reference_how"], first["failed"]) == ("bf16", {})
    assert "compiled" not in second
    assert page(stored(out), []).count("| a | torch | bf16 | 1 |") == 1


def test_a_reference_that_does_not_compile_leaves_the_row_as_it_was(tmp_path):
    out = tmp_path / "gpu.json"

    def measure(entry, on_row):
        if entry.compiled and entry.batch == 2:
            raise RuntimeError("gone")
        on_row(measured(entry, failed={"compiled": "InductorError: no"} if entry.compiled else {}))

    entries = [Entry(model="a", batch=2), COMPILING, Entry(model="a", batch=2, compiled=True), ENTRIES[1]]
    suite_run(out, FakeClock()).run([ENTRIES[0], *entries], measure)
    rows = stored(out)["rows"]
    assert [(row["model"], row["batch"], row["failed"].get("compiled")) for row in rows] == [
        ("a", 1, "InductorError: no"),
        ("a", 2, "RuntimeError: gone"),
        ("b", 1, None),
    ]
    assert all(row["seconds"]["median"] == 0.003 and "error" not in row for row in rows)
    assert "- a bf16 batch 2, compiled: RuntimeError: gone" in page(stored(out), [])


def test_rows_that_would_not_fit_the_budget_are_listed(tmp_path):
    out, clock, done = tmp_path / "gpu.json", FakeClock(), []

    def measure(entry, on_row):
        done.append(entry.name)
        clock.now += 10
        on_row(measured(entry))

    suite_run(out, clock, budget=35).run([ENTRIES[0], COMPILING, *ENTRIES[1:]], measure)
    # After a 25 s are left: too little to compile, enough for b and again for c.
    assert done == ["a bf16 batch 1", "b bf16 batch 1", "c bf16 batch 1"]
    assert stored(out)["left_out"] == [
        f"a bf16 batch 1, compiled reference: takes about {10 + COMPILE_SECONDS:.0f} s, 25 s of the budget are left",
        "d bf16 batch 1: takes about 10 s, 5 s of the budget are left",
    ]
    assert stored(out)["spent_seconds"] == 30


def test_nothing_starts_once_the_budget_is_spent(tmp_path):
    out, clock = tmp_path / "gpu.json", FakeClock()

    def measure(entry, on_row):
        clock.now += 50
        on_row(measured(entry))

    suite_run(out, clock, budget=40).run(ENTRIES[:3], measure)
    assert [row["model"] for row in stored(out)["rows"]] == ["a"]
    assert len(stored(out)["left_out"]) == 2


def test_a_row_that_fails_holds_its_error_and_the_next_one_runs(tmp_path):
    out = tmp_path / "gpu.json"

    def measure(entry, on_row):
        if entry.model == "a":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        on_row(measured(entry))
        if entry.model == "b":
            raise RuntimeError("later")

    suite_run(out, FakeClock()).run(ENTRIES[:3], measure)
    a, b, c = stored(out)["rows"]
    assert a == {
        "model": "a",
        "engine": "torch",
        "precision": "bf16",
        "batch": 1,
        "error": "OutOfMemoryError: CUDA out of memory.",
    }
    assert (b["seconds"]["median"], b["error"]) == (0.003, "RuntimeError: later")
    assert "error" not in c
    text = page(stored(out), [])
    assert "- a bf16 batch 1: OutOfMemoryError: CUDA out of memory." in text
    assert "| a | torch | bf16 | 1 | failed |" in text
    assert "| b | torch | bf16 | 1 | 3.00 (3.00–3.00) |" in text


def test_a_device_that_failed_is_not_asked_again(tmp_path):
    out, done = tmp_path / "gpu.json", []

    def measure(entry, on_row):
        done.append(entry.model)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    suite_run(out, FakeClock()).run(ENTRIES, measure)
    assert done == ["a"]
    assert stored(out)["left_out"][0] == "b bf16 batch 1: the device failed before"
    assert len(stored(out)["left_out"]) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_run_and_leaves_the_rows_so_far(tmp_path, error):
    out = tmp_path / "gpu.json"

    def measure(entry, on_row):
        if entry.model == "b":
            raise error
        on_row(measured(entry))

    with pytest.raises(error):
        suite_run(out, FakeClock()).run(ENTRIES, measure)
    assert [row["model"] for row in stored(out)["rows"]] == ["a"]


def test_a_kill_in_the_second_row_leaves_the_first(tmp_path):
    out = tmp_path / "gpu.json"
    script = f"""
import os, signal
from pathlib import Path
from var_deploy.bench.suite import Entry, SuiteRun

def measure(entry, on_row):
    if entry.batch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    on_row({{"batch": entry.batch, "precision": entry.precision}})

SuiteRun({{}}, Path({str(out)!r}), budget=60).run([Entry(model="a", batch=b) for b in (1, 2, 3)], measure)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [row["batch"] for row in stored(out)["rows"]] == [1]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch) -> list[str]:
    """A GPU by name, whose rows are made up; says what was measured."""
    done: list[str] = []

    class Fake:
        def __init__(self, device, ceilings, progress) -> None:
            assert (device, ceilings.bytes_per_second) == ("cuda", 4e12)

        def __call__(self, entry, on_row) -> None:
            done.append(entry.name)
            if entry.model == "d30":
                os.kill(os.getpid(), signal.SIGTERM)
            on_row(measured(entry, floor_seconds=0.0018, flops_share=0.6))

    rates = SimpleNamespace(bytes_per_second=4e12, flops_per_second={"bfloat16": 8e14})
    monkeypatch.setattr(bench_gpu, "_gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_gpu, "measured_ceilings", lambda device: rates)
    monkeypatch.setattr(bench_gpu, "Measurement", Fake)
    before = signal.getsignal(signal.SIGTERM)
    yield done
    signal.signal(signal.SIGTERM, before)


def test_a_run_that_is_terminated_writes_page_and_plot_of_what_it_has(fake_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: bench_gpu.main(out=tmp_path, budget=450, device="cuda", table=None, record=None))
    assert ended.value.code == 143
    assert fake_gpu == ["d16 bf16 batch 1", "d16 bf16 batch 64", "d30 bf16 batch 1"]
    files = {"gpu-nvidia-h200.json", "gpu.md"}
    pytest.importorskip("matplotlib")
    assert {path.name for path in tmp_path.iterdir()} == files | {"gpu-nvidia-h200.png"}
    assert [row["batch"] for row in stored(tmp_path / "gpu-nvidia-h200.json")["rows"]] == [1, 64]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "NVIDIA H200" in text
    assert "| d16, batch 1: time over floor | ≤ 1.8 × floor = 3.24 ms | 1.67 × floor = 3.00 ms | yes |" in text
    assert "| d30, batch 1: time over floor | ≤ 1.4 × floor | not measured | not measured |" in text


def test_without_a_gpu_nothing_is_measured_and_one_line_says_so(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, "-m", "var_deploy.bench.suite", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    line = "error: no CUDA device: nothing was measured; run this on a machine with an NVIDIA GPU\n"
    assert done.stderr == line
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": "x.json"}, "--record: got it without --table, which says where its page goes; add --table FILE"),
        ({"table": "."}, ".: got a directory, expected a file name; add one"),
        (
            {"table": "t.md", "record": "broken.json"},
            "broken.json: not JSON (Expecting value: line 1 column 1",
        ),
        ({"table": "t.md", "record": "other.json"}, "other.json: got no rows, expected what a run of this suite wrote"),
        ({"device": "cpu"}, "device: got 'cpu', expected cuda or cuda:N; the suite measures a GPU"),
    ],
    ids=["record alone", "directory", "not JSON", "other JSON", "device"],
)
def test_a_wrong_option_is_refused(tmp_path, monkeypatch, options, message):
    (tmp_path / "broken.json").write_text("rows")
    (tmp_path / "other.json").write_text('{"a": 1}')
    monkeypatch.chdir(tmp_path)
    paths: dict[str, Any] = {name: Path(options[name]) if name in options else None for name in ("table", "record")}
    with pytest.raises(VarDeployError) as refusal:
        bench_gpu.main(out=tmp_path, budget=1, device=options.get("device", "cuda"), **paths)
    assert str(refusal.value).startswith(message)
    assert not (tmp_path / "t.md").exists()


def test_results_that_could_not_be_written_are_refused_first(fake_gpu, tmp_path):
    (tmp_path / "gpu-nvidia-h200.png").mkdir()
    with pytest.raises(RequestError, match=r"gpu-nvidia-h200\.png: got a directory"):
        bench_gpu.main(out=tmp_path, budget=1, device="cuda", table=None, record=None)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-nvidia-h200.png"]


def test_memory_that_ran_out_in_the_librarys_words_is_no_lost_device(tmp_path):
    def measure(entry: Entry, on_row: OnRow) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    run = suite_run(tmp_path / "x.json", FakeClock())
    run.run(SUITE[:2], measure)
    assert [row["error"] for row in run.record["rows"]] == ["AcceleratorError: CUDA error: out of memory"] * 2
    assert run.record["left_out"] == []


def test_the_page_can_be_written_from_a_record_or_from_nothing(tmp_path):
    empty, record, full = tmp_path / "gpu.md", tmp_path / "gpu.json", tmp_path / "full.md"
    bench_gpu.main(out=tmp_path, budget=1, device="cuda", table=empty, record=None)
    text = empty.read_text(encoding="utf-8")
    assert "Nothing is measured yet: `make bench-gpu` on a machine with an NVIDIA GPU fills this page" in text
    for entry in SUITE:
        assert f"| {' | '.join(map(str, entry.key))} | {NOT_MEASURED} |" in text
    assert text.count(f"| {NOT_MEASURED} | {NOT_MEASURED} |") == len(TARGETS)
    suite_run(record, FakeClock()).run(SUITE[:1], lambda entry, on_row: on_row(measured(entry, stages={"draw": 0.001})))
    bench_gpu.main(out=tmp_path, budget=1, device="cuda", table=full, record=record)
    text = full.read_text(encoding="utf-8")
    assert "| d16 | torch | bf16 | 1 | 3.00 (3.00–3.00) | 3.00 | 333.3 | 2.40 |" in text
    assert "- d16 bf16 batch 1: draw 1.00" in text
    assert f"| d16 | torch | bf16 | 64 | {NOT_MEASURED} |" in text


def test_the_page_in_the_repository_is_of_nothing_or_of_a_record_beside_it(tmp_path):
    kept = ROOT / "docs" / "results" / "gpu.md"
    files = [path for path in kept.parent.glob("gpu-*.json") if not path.stem.endswith("-kernels")]
    pages = [write_page(record, tmp_path / "gpu.md") for record in (None, *map(stored, files))]
    assert kept.read_text(encoding="utf-8") in pages, "run: make pages"


def test_names_of_gpus_become_names_of_files():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Tesla V100-SXM2-16GB (x)") == "tesla-v100-sxm2-16gb-x"


# ---- targets ---------------------------------------------------------------------------------------------------------


def row_of(target: Target, **more: Any) -> dict[str, Any]:
    return {"model": target.model, **measured(Entry(model=target.model, batch=target.batch), **more)}


@pytest.mark.parametrize(
    ("target", "more", "limit", "result", "met"),
    [
        # 3 ms over a floor of 2 ms is 1.5 times it: by the wall clock, not by the device's.
        (TARGETS[0], {"floor_seconds": 0.002}, "≤ 1.8 × floor = 3.60 ms", "1.50 × floor = 3.00 ms", True),
        (TARGETS[1], {"floor_seconds": 0.002}, "≤ 1.4 × floor = 2.80 ms", "1.50 × floor = 3.00 ms", False),
        (TARGETS[1], {}, "≤ 1.4 × floor", NOT_MEASURED, None),
        # The device needs 0.8 of the time of the whole.
        (TARGETS[2], {"floor_seconds": 0.002, "flops_share": 0.625}, "≥ 50%", "50%", True),
        (TARGETS[2], {"floor_seconds": 0.002, "flops_share": 0.6}, "≥ 50%", "48%", False),
        (TARGETS[3], {"speedup": 8.0}, "≥ 8×", "8×", True),
        (TARGETS[3], {"speedup": 7.96}, "≥ 8×", "7.96×", False),
        (TARGETS[5], {"speedup": None}, "≥ 2×", NOT_MEASURED, None),
    ],
)
def test_targets_are_held_against_the_floor_of_the_run(target, more, limit, result, met):
    found = outcome(target, [row_of(target, **more)])
    assert (found.limit, found.result, found.met) == (limit, result, met)


def test_a_target_looks_at_its_own_row_alone():
    target = TARGETS[0]
    right = row_of(target, floor_seconds=0.002)
    for wrong in ({"precision": "fp8"}, {"batch": 2}, {"model": "d20"}, {"seconds": None}):
        assert outcome(target, [{**right, **wrong}]).met is None
        assert outcome(target, [{**right, **wrong}, right]).met is True


# ---- measuring for real ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch) -> str:
    """A preset that fits a test."""
    both = {"patch_nums": (1, 2, 3), "vocab_size": 61}
    var = VARConfig(**both, num_classes=5, depth=2, embed_dim=128, ffn_dim=512)
    monkeypatch.setitem(PRESETS, "small", (2, both["patch_nums"], False))
    monkeypatch.setattr(random_bundle, "preset_configs", lambda name: (var, VQVAEConfig(**both, ch=32, ch_mult=(1,))))
    monkeypatch.setattr(bench_gpu, "REPEATS", 3)
    return "small"


def test_other_engines_run_exported_bundles_and_what_is_missing_is_their_row(small, tmp_path, monkeypatch):
    """On the host's CUDA, with ONNX Runtime's CPU provider; there is no TensorRT here."""
    HostCuda().install(monkeypatch)
    monkeypatch.setattr(presets, "preset_configs", random_bundle.preset_configs)
    monkeypatch.setattr(ahead_of_time, "compiled", host_compiled)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx_cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(onnx_cuda, "_require", lambda _: None)
    monkeypatch.setattr(onnx_cuda, "_providers", lambda *_, **__: [("CPUExecutionProvider", {})])
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    made = []
    monkeypatch.setattr(presets, "write_random_checkpoints", counted(presets.write_random_checkpoints, made))
    entries = [
        Entry(model=small, engine="onnx", precision="fp16", batch=2, stages=True),
        Entry(model=small, engine="onnx", precision="fp16", batch=1),
        Entry(model=small, engine="tensorrt", precision="fp16", batch=1),
    ]
    out = tmp_path / "gpu.json"
    suite_run(out, FakeClock()).run(entries, Measurement("cuda", None))
    first, second, third = stored(out)["rows"]
    assert (first["engine"], first["precision"], first["device"]) == ("onnx", "fp16", "cuda:0")
    assert "scale_02" in first["stages"]
    assert second["device_seconds"]["median"] > 0
    assert third["error"].startswith("EngineError: tensorrt: cannot be used")
    assert len(made) == 1  # one bundle serves all


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    return lambda *arguments: calls.append(arguments) or function(*arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_suite_measures_random_models_one_after_the_other(small, tmp_path, monkeypatch, device):
    made = []
    make = random_bundle.random_pipeline
    monkeypatch.setattr(
        random_bundle,
        "random_pipeline",
        lambda *args, **options: made.append(options["precision"]) or make(*args, **options),
    )
    entries = [
        Entry(model=small, precision="fp32", batch=1, reference=True, stages=True),
        Entry(model=small, precision="fp32", batch=2),
        Entry(model=small, precision="bf16", batch=1),
        Entry(model="d99", batch=1),
    ]
    out = tmp_path / "gpu.json"
    suite_run(out, FakeClock()).run(entries, Measurement(device, None))
    first, second, third, fourth = stored(out)["rows"]
    assert made == ["fp32", "bf16", "bf16"]  # one model serves two rows; the last is unknown
    assert [first["batch"], second["batch"], third["precision"]] == [1, 2, "bf16"]
    assert first["speedup"] > 0
    assert first["reference_how"] == "float32"
    assert "scale_02" in first["stages"]
    assert second["reference"] is None
    assert fourth["error"].startswith("RequestError: unknown preset 'd99'")
