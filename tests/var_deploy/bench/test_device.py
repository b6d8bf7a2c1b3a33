"""What a GPU tells a benchmark: of an engine that says it is on CUDA and runs on the CPU, and of a real one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import var_deploy
from var_deploy.bench import bench, bench_record
from var_deploy.bench import device as bench_device
from var_deploy.bench import run as timing
from var_deploy.bench.device import (
    BenchRequest,
    cuda_clock,
    free,
    joules_per_image,
    product_rate,
    stage_seconds,
    whole_seconds,
)
from var_deploy.bench.gpu import GpuReading, GpuRecord
from var_deploy.engines.torch import TorchEngine
from var_deploy.errors import EngineError
from var_deploy.precision import Precision
from var_deploy.schedules import settings

READING = GpuReading(
    sm_clock_mhz=1755, memory_clock_mhz=2619, power_watts=600.0, temperature_celsius=50, energy_joules=1.0
)
RECORD = GpuRecord(
    name="Fake",
    driver="1",
    cuda_driver="13.0",
    cuda_runtime="13.0",
    memory_bytes=1,
    sm_clock_limit_mhz=1980,
    power_limit_watts=700.0,
    torch="2",
    triton="3",
)


class Meter:
    """Three joules, whatever happens."""

    def __init__(self, index: int) -> None:
        self.index, self.joules = index, None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.joules = 3.0


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What was done to the device, in order."""
    done: list[str] = []
    monkeypatch.setattr(bench_device, "EnergyMeter", Meter)
    monkeypatch.setattr(bench_device, "gpu_reading", lambda index: READING)
    monkeypatch.setattr("var_deploy.bench.rows.gpu_record", lambda index: RECORD)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append(f"reset {device}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2000)
    return done


@pytest.fixture
def pipe(tiny_bundle: Path, calls, monkeypatch) -> var_deploy.Pipeline:
    """A pipeline whose engine claims to be on CUDA."""
    made = var_deploy.load(tiny_bundle, engine="torch", device="cpu")
    engine = made.engine
    assert isinstance(engine, TorchEngine)
    timed, release = engine.device_seconds, engine.release

    def device_seconds(labels_B, seeds, settings, *, staged=False, decode=True, head_start=True):
        name = "staged" if staged else "whole" if decode else "without decoder"
        calls.append(name if head_start else f"{name}, at once")
        engine.device = torch.device("cpu")  # while it runs
        try:
            return timed(labels_B, seeds, settings, staged=staged, decode=decode)
        finally:
            engine.device = torch.device("cuda:0")

    def released():
        calls.append("release")
        release()

    monkeypatch.setattr(engine, "device_seconds", device_seconds)
    monkeypatch.setattr(engine, "release", released)
    monkeypatch.setattr(bench_device, "SECONDS", 0.0)
    for function in (whole_seconds, stage_seconds, joules_per_image):
        monkeypatch.setitem(function.__kwdefaults__, "limit_seconds", 0.0)
    engine.device = torch.device("cuda:0")
    return made


def request_of(pipe: var_deploy.Pipeline, batch: int) -> BenchRequest:
    manifest = pipe.bundle.manifest
    return BenchRequest(labels_B=np.zeros(batch, int), seeds=[0] * batch, settings=settings(manifest))


def test_only_an_engine_on_cuda_is_a_clock(tiny_bundle, pipe):
    assert cuda_clock(pipe.engine) is pipe.engine
    assert cuda_clock(var_deploy.load(tiny_bundle, engine="torch", device="cpu").engine) is None
    assert cuda_clock(var_deploy.load(tiny_bundle, engine="onnx").engine) is None


def test_a_row_on_a_gpu_holds_what_only_it_can_tell(pipe, calls):
    (row,) = bench(pipe, batches=[2], repeats=3, reference=False)
    assert calls[:2] == ["release", "reset cuda:0"]  # before the warm-up, whose peak is read
    # The first of each captures; the energy takes as many as fit its time, at least one.
    assert calls[2:] == ["whole"] * 4 + ["whole, at once"] + ["without decoder"] * 4 + ["staged"] * 2
    assert (row.device, row.engine) == ("cuda:0", "torch")
    assert (row.device_peak_bytes, row.device_reserved_bytes) == (1000, 2000)
    assert row.device_seconds.count == row.without_decoder.count == 3
    assert row.without_decoder.median < row.device_seconds.median
    assert row.joules_per_image == 1.5
    assert row.gpu == asdict(READING)
    assert list(row.stages)[:3] == ["upload", "condition", "scale_00"]
    assert list(row.stages)[-2:] == ["decode", "download"]
    assert "replay" not in row.stages
    record = bench_record(pipe, [row])
    assert record["gpu"] == asdict(RECORD)


def test_shares_are_of_the_time_on_the_device(pipe):
    class Rates:
        bytes_per_second = 1e10
        flops_per_second = {"float32": 1e11}  # noqa: RUF012

    (row,) = bench(pipe, batches=[1], repeats=1, reference=False, stages=False, ceilings=Rates())
    assert row.share_of_floor == pytest.approx(row.floor_seconds / row.device_seconds.median)
    assert row.flops_share == pytest.approx(row.flops / row.device_seconds.median / 1e11)


def test_every_batch_size_is_timed_with_its_own_buffers_alone(pipe, calls):
    bench(pipe, batches=[1, 2], repeats=1, reference=False, stages=False)
    assert calls.count("release") == 4  # before the memory of each, before the time of each
    assert [call for call in calls if not call.startswith("whole")][:4] == ["release", "reset cuda:0"] * 2


def test_compiled_references_too_run_beside_one_batch_size_at_a_time(pipe, calls, monkeypatch):
    class Fake:
        how = "fake"

        def run(self, batch: int) -> None:
            calls.append(f"reference {batch}")

        def compile(self) -> None:
            calls.append("compile")

    monkeypatch.setattr(timing, "Reference", lambda manifest, device, *_, **__: calls.append(device) or Fake())
    bench(pipe, batches=[1, 2], repeats=1, compiled=True, stages=False)
    assert "cuda:0" in calls
    after = calls[calls.index("compile") :]
    assert after == ["compile", *(["release"] + ["reference 1"] * 2), *(["release"] + ["reference 2"] * 2)]


def test_many_short_replays_show_the_tail_and_few_long_ones_suffice(pipe):
    clock, request = cuda_clock(pipe.engine), request_of(pipe, 1)
    assert clock is not None
    assert len(whole_seconds(clock, request, repeats=2, limit_seconds=0.0)) == 2
    assert len(whole_seconds(clock, request, repeats=50, limit_seconds=0.0)) == 10
    ticks = iter(range(10_000))
    quick = type("Quick", (), {"device_seconds": lambda *_, **__: {"replay": float(next(ticks))}})()
    seconds = whole_seconds(quick, request, repeats=2, limit_seconds=60.0)
    assert seconds == [float(i) for i in range(1, 201)]  # the first captures


def test_free_gives_back_what_is_on_a_gpu_and_leaves_others_alone(pipe, calls):
    free(pipe.engine)
    assert calls == ["release"]
    free(object())


@pytest.mark.parametrize(
    ("precision", "rate"),
    [
        (Precision.FP32, None),
        (Precision.FP16, 2.0),
        (Precision.BF16, 3.0),
        (Precision.INT8, 3.0),
        (Precision.FP8, None),
    ],
)
def test_each_precision_has_its_own_rate_or_none(precision, rate):
    class Rates:
        bytes_per_second = 1.0
        flops_per_second = {"float16": 2.0, "bfloat16": 3.0, "float8_e4m3fn": None}  # noqa: RUF012

    assert product_rate(Rates(), precision) == rate


def test_a_floor_without_its_rate_is_an_error(pipe):
    class Rates:
        bytes_per_second = 1e10
        flops_per_second = {"bfloat16": 1e11}  # noqa: RUF012

    with pytest.raises(EngineError, match="no ceiling of fp32 products was measured; leave the floor out"):
        bench(pipe, batches=[1], repeats=1, reference=False, stages=False, ceilings=Rates())


@pytest.mark.gpu
def test_a_row_measured_on_a_gpu(tiny_bundle):
    pipe = var_deploy.load(tiny_bundle, engine="torch", device="cuda")
    ceilings = bench_device.measured_ceilings("cuda")
    for row in bench(pipe, batches=[1, 4], repeats=5, compiled=True, ceilings=ceilings):
        assert row.failed == {}
        assert 0 < row.without_decoder.median < row.device_seconds.median
        assert row.device_seconds.minimum < row.seconds.maximum
        assert row.speedup > 1
        assert row.compiled_speedup > 0
        assert 0 < row.share_of_floor < 1
        assert row.reference_how == "autocast to bf16, other float32 products as TF32"
        assert row.device_reserved_bytes >= row.device_peak_bytes > 0
        assert {"upload", "condition", "scale_00", "scale_03", "draw", "finish", "decode", "download"} == set(
            row.stages
        )
